package mosipdb

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// alias is a row of key_alias: one generation of a key.
type alias struct {
	id, app, ref       string
	generated, expires time.Time
	thumbprint         string // of the certificate, upper-case hexadecimal; may be empty
	unique             string // uni_ident; may be empty
	line               int
}

// stored is a row of key_store: the certificate of a generation and its private half, encrypted under a module key.
type stored struct {
	id, master  string
	wrapped     []byte // nil for a certificate of somebody else
	certificate []byte // DER
	line        int
}

// Policy is a row of key_policy_def.
type Policy struct {
	Application   string
	Days          int // a key is valid
	PreExpireDays int // before the expiry, a new one is made
	Active        bool
	Access        string // user names, or NA for everybody: kmsd has a policy of its own in place of that
}

// Certificate is a row of ca_cert_store or partner_cert_store.
type Certificate struct {
	Domain   string
	Partner  bool
	Name     string // of the partner's organization
	DER      []byte
	SelfMade bool // its issuer is its subject

	expires time.Time
	file    string
	line    int
}

func (c *Certificate) table() Table {
	if c.Partner {
		return PartnerCerts
	}
	return CACerts
}

// RandomKey is a row of data_encrypt_keystore: a random key of the zero-knowledge encryption, encrypted under the key KERNEL/IDENTITY_CACHE.
type RandomKey struct {
	Index   uint32
	Wrapped [32]byte
	Active  bool
}

const (
	maxName     = 256       // bytes of an id, application or reference
	maxWrapped  = 9 << 10   // bytes of a wrapped private key
	maxEncoded  = 16 << 10  // bytes of a certificate
	notOwn      = "NA"      // in private_key: the certificate is somebody else's
	maxValidity = 100 * 365 // days
)

func parseAlias(r *Row) (*alias, error) {
	a := &alias{
		id: r.Cell("id"), app: r.Cell("app_id"), ref: r.Cell("ref_id"), line: r.Line,
		thumbprint: strings.ToUpper(r.Cell("cert_thumbprint")), unique: strings.ToUpper(r.Cell("uni_ident")),
	}
	switch {
	case a.id == "" || len(a.id) > maxName:
		return nil, errors.New("id is empty or too long")
	case a.app == "" || len(a.app) > maxName || len(a.ref) > maxName:
		return nil, errors.New("app_id is empty, or app_id or ref_id too long")
	case a.thumbprint != "" && !hexadecimal(a.thumbprint, 2*sha256.Size):
		return nil, errors.New("cert_thumbprint is no SHA-256 in hexadecimal")
	case a.unique != "" && !hexadecimal(a.unique, 40):
		return nil, errors.New("uni_ident is no SHA-1 in hexadecimal")
	}
	var err error
	if a.generated, err = parseTime(r.Cell("key_gen_dtimes")); err != nil {
		return nil, fmt.Errorf("key_gen_dtimes: %w", err)
	}
	if a.expires, err = parseTime(r.Cell("key_expire_dtimes")); err != nil {
		return nil, fmt.Errorf("key_expire_dtimes: %w", err)
	}
	return a, nil
}

func hexadecimal(s string, n int) bool {
	return len(s) == n && strings.Trim(s, "0123456789ABCDEF") == ""
}

func parseStored(r *Row) (*stored, error) {
	s := &stored{id: r.Cell("id"), master: r.Cell("master_key"), line: r.Line}
	if s.id == "" || len(s.id) > maxName || len(s.master) > maxName {
		return nil, errors.New("id is empty, or id or master_key too long")
	}
	switch private := r.Cell("private_key"); private {
	case notOwn:
	case "":
		return nil, errors.New("private_key is empty")
	default:
		b, err := decodeBase64(private, maxWrapped)
		if err != nil {
			return nil, fmt.Errorf("private_key: %w", err)
		}
		s.wrapped = b
	}
	var err error
	if s.certificate, err = parseCertificate(r.Cell("certificate_data")); err != nil {
		return nil, fmt.Errorf("certificate_data: %w", err)
	}
	return s, nil
}

// decodeBase64 reads base64url, as MOSIP writes it, and standard base64, which it reads as well; both with or without padding.
func decodeBase64(s string, most int) ([]byte, error) {
	if len(s) > most*2 {
		return nil, fmt.Errorf("longer than %d bytes", most)
	}
	s = strings.TrimRight(s, "=")
	s = strings.NewReplacer("+", "-", "/", "_").Replace(s)
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		return nil, errors.New("is no base64")
	}
	if len(b) == 0 || len(b) > most {
		return nil, fmt.Errorf("%d bytes; 1 to %d", len(b), most)
	}
	return b, nil
}

// parseCertificate reads the PEM of a certificate and makes sure that it is one.
func parseCertificate(text string) ([]byte, error) {
	if text == "" {
		return nil, errors.New("is empty")
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("is no certificate in PEM")
	}
	if len(block.Bytes) > maxEncoded {
		return nil, fmt.Errorf("longer than %d bytes", maxEncoded)
	}
	if _, err := pkix.ParseCertificate(block.Bytes); err != nil {
		return nil, errors.New("is no certificate that can be read")
	}
	return block.Bytes, nil
}

func parsePolicy(r *Row) (*Policy, error) {
	p := &Policy{Application: r.Cell("app_id"), Access: r.Cell("access_allowed"), Active: true}
	if p.Application == "" || len(p.Application) > maxName {
		return nil, errors.New("app_id is empty or too long")
	}
	if len(p.Access) > 4<<10 {
		return nil, errors.New("access_allowed is too long")
	}
	var err error
	if p.Days, err = strconv.Atoi(r.Cell("key_validity_duration")); err != nil || p.Days < 1 || p.Days > maxValidity {
		return nil, errors.New("key_validity_duration is no number of days")
	}
	if s := r.Cell("pre_expire_days"); s != "" {
		if p.PreExpireDays, err = strconv.Atoi(s); err != nil || p.PreExpireDays < 0 || p.PreExpireDays > maxValidity {
			return nil, errors.New("pre_expire_days is no number of days")
		}
	}
	if s := r.Cell("is_active"); s != "" {
		if p.Active, err = parseBool(s); err != nil {
			return nil, fmt.Errorf("is_active: %w", err)
		}
	}
	return p, nil
}

func parseBool(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "t", "true":
		return true, nil
	case "f", "false", "":
		return false, nil
	}
	return false, errors.New("is neither true nor false")
}

func parseTrust(r *Row) (*Certificate, error) {
	c := &Certificate{Domain: strings.ToUpper(r.Cell("partner_domain")), Partner: r.Table == PartnerCerts, Name: r.Cell("organization_name")}
	if c.Domain == "" || len(c.Domain) > maxName || len(c.Name) > 1<<10 {
		return nil, errors.New("partner_domain is empty or too long")
	}
	var err error
	if c.DER, err = parseCertificate(r.Cell("cert_data")); err != nil {
		return nil, fmt.Errorf("cert_data: %w", err)
	}
	parsed, err := pkix.ParseCertificate(c.DER)
	if err != nil {
		return nil, fmt.Errorf("cert_data: %w", err)
	}
	c.SelfMade, c.expires = selfMade(parsed), parsed.NotAfter
	return c, nil
}

func selfMade(c *x509.Certificate) bool {
	return string(c.RawIssuer) == string(c.RawSubject)
}

func parseRandomKey(r *Row) (*RandomKey, error) {
	index, err := strconv.ParseUint(r.Cell("id"), 10, 32)
	if err != nil {
		return nil, errors.New("id is no number of 32 bits")
	}
	b, err := decodeBase64(r.Cell("key"), 64)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("key of %d bytes; 32", len(b))
	}
	return &RandomKey{Index: uint32(index), Wrapped: [32]byte(b), Active: strings.EqualFold(r.Cell("key_status"), "Active")}, nil
}

// timeLayouts are the ways in which PostgreSQL writes a time, with and without a zone; MOSIP's columns have none and are in UTC.
var timeLayouts = []string{
	"2006-01-02 15:04:05.999999999", "2006-01-02 15:04:05.999999999Z07", "2006-01-02 15:04:05.999999999Z07:00",
	"2006-01-02T15:04:05.999999999", time.RFC3339Nano,
}

func parseTime(s string) (time.Time, error) {
	if len(s) > 64 {
		return time.Time{}, errors.New("is no time")
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, s); err == nil {
			if t.Year() < 1970 || t.Year() > 9999 {
				return time.Time{}, fmt.Errorf("%d is no year for a key", t.Year())
			}
			return t.UTC(), nil
		}
	}
	return time.Time{}, errors.New("is no time")
}

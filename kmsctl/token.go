package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/cose"
	"github.com/kmsd-project/kmsd/client/jose"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// What the commands for JSON and CBOR signatures have in common.

// tokenAlgorithms are those that kmsd signs tokens with.
var tokenAlgorithms = []string{
	string(jose.RS256), string(jose.PS256), string(jose.ES256), string(jose.ES256K), string(jose.EdDSA), string(jose.RS384), string(jose.RS512),
	string(jose.PS384), string(jose.PS512), string(jose.ES384), string(jose.ES512),
}

// signTokenFlags are common to everything that signs a token.
type signTokenFlags struct {
	key, alg        string
	noX5C, chain    bool
	x5t             bool
	x5u             string
	kid, kidPrefix  string
	noKid, detached bool
}

func (f *signTokenFlags) register(a *app, c *cobra.Command, payload bool) {
	flags := c.Flags()
	a.keyFlag(c, &f.key, "the key, NAME or NAME@N")
	flags.StringVar(&f.alg, "alg", "", "such as RS256, PS256, ES256, ES256K, EdDSA (default: RS256 for module keys of MOSIP and APP/SIGN, PS256 for other RSA keys, else by the key)")
	c.RegisterFlagCompletionFunc("alg", cobra.FixedCompletions(tokenAlgorithms, cobra.ShellCompDirectiveNoFileComp))
	flags.BoolVar(&f.noX5C, "no-x5c", false, "leave the certificate out")
	flags.BoolVar(&f.chain, "chain", false, "with the certificates of the issuers up to the root")
	c.MarkFlagsMutuallyExclusive("no-x5c", "chain")
	flags.BoolVar(&f.x5t, "x5t", false, "with the SHA-256 of the certificate")
	flags.StringVar(&f.x5u, "x5u", "", "with an URL of the certificate")
	flags.StringVar(&f.kid, "kid", "", "key id (default: MOSIP's, if the key is of its hierarchy)")
	flags.StringVar(&f.kidPrefix, "kid-prefix", "", "text before the key id")
	flags.BoolVar(&f.noKid, "no-kid", false, "leave the key id out")
	c.MarkFlagsMutuallyExclusive("kid", "no-kid")
	if payload {
		flags.BoolVar(&f.detached, "detached", false, "leave the payload out")
	}
}

func (f *signTokenFlags) options() (client.SignToken, error) {
	if f.alg != "" && jose.Algorithm(f.alg).Hash() == 0 && jose.Algorithm(f.alg) != jose.EdDSA {
		return client.SignToken{}, withHint(usagef("--alg %q is not known", f.alg), "one of: %s", strings.Join(tokenAlgorithms, " "))
	}
	return client.SignToken{
		Algorithm: jose.Algorithm(f.alg), NoCertificate: f.noX5C, Chain: f.chain, Thumbprint: f.x5t, URL: f.x5u, KeyID: f.kid, KeyIDPrefix: f.kidPrefix,
		NoKeyID: f.noKid, Detached: f.detached,
	}, nil
}

// signOps are the operations that signing a token takes.
var signOps = []string{proto.OpSign, proto.OpCertGet, proto.OpCertList}

// signToken writes the text of a token.
func (a *app) signToken(ctx context.Context, key string, o outFlags, sign func(context.Context, *client.Client) ([]byte, error)) error {
	var token []byte
	err := a.with(ctx, func(ctx context.Context, c *client.Client) (err error) {
		token, err = sign(ctx, c)
		return err
	})
	if err != nil {
		return noCertificateHint(err)
	}
	return a.writeResult(o, "token", map[string]any{"key": key}, token, false, modePublic)
}

func noCertificateHint(err error) error {
	if errors.Is(err, client.ErrNoCertificate) {
		return withHint(err, "leave it out with --no-x5c, or get one: kmsctl cert get, cert self-sign, cert issue or cert attach")
	}
	return err
}

// maxToken is the longest text of a token in bytes.
const maxToken = 2 * jose.MaxPayload

// readToken reads a token in text, without the spaces around it.
func (a *app) readToken(path string) (string, error) {
	b, err := a.readFile(path, maxToken)
	return strings.TrimSpace(string(b)), err
}

// verifyFlags are common to everything that verifies a token.
type verifyFlags struct {
	key, cert, domain string
	anySigner         bool
	at                string
}

func (f *verifyFlags) registerSigner(a *app, c *cobra.Command) {
	c.Flags().StringVar(&f.key, "key", "", "key of this keystore that has signed, NAME or NAME@N")
	a.completeFlag(c, "key")
	c.Flags().StringVar(&f.cert, "cert", "", "certificate of the signer, PEM or DER")
	c.MarkFlagsMutuallyExclusive("key", "cert")
}

func (f *verifyFlags) register(a *app, c *cobra.Command) {
	f.registerSigner(a, c)
	c.Flags().StringVar(&f.domain, "domain", "", "trust domain to whose anchors the signer's certificate has to lead, such as AUTH")
	c.Flags().BoolVar(&f.anySigner, "any-signer", false, "take every certificate that is in the token: the verdict is then about the signature alone")
	c.MarkFlagsMutuallyExclusive("domain", "any-signer")
	c.Flags().StringVar(&f.at, "at", "", "time at which the certificate has to be valid (default now)")
}

// errToken is what a token that is not valid ends with.
var errToken = errors.New("not valid")

// verifyToken prints the verdict on a token and writes its payload, if out is not nil.
func (a *app) verifyToken(ctx context.Context, f *verifyFlags, out *outFlags, verify func(context.Context, *client.Client, client.VerifyToken) (*client.Verdict, error)) error {
	o := client.VerifyToken{Key: f.key, Domain: f.domain, AnySigner: f.anySigner}
	if f.cert != "" {
		certificate, err := a.readCertificate(f.cert)
		if err != nil {
			return err
		}
		o.Certificate = certificate
	}
	var err error
	if o.Time, err = parseMoment(f.at); err != nil {
		return err
	}
	var v *client.Verdict
	if f.domain == "" && (f.cert != "" || f.anySigner && f.key == "") {
		v, err = verify(ctx, nil, o) // nothing that the daemon knows is asked for
	} else {
		err = a.with(ctx, func(ctx context.Context, c *client.Client) (err error) {
			v, err = verify(ctx, c, o)
			return err
		})
	}
	if err != nil {
		return err
	}
	if v.Valid && out != nil && out.path != "" {
		if err := a.writePayload(out, v); err != nil {
			return err
		}
	}
	switch {
	case out != nil && out.path == "-" && v.Valid: // there is the payload now
		a.say("valid: %s", printable(v.Reason))
	default:
		if err := a.print(viewVerdict(v), func(w io.Writer) {
			if v.Valid {
				fmt.Fprintf(w, "valid: %s\n", printable(v.Reason))
			}
		}); err != nil {
			return err
		}
	}
	if !v.Valid {
		err := fmt.Errorf("%w: %s", errToken, v.Reason)
		if v.Certificate != nil && strings.HasPrefix(v.Reason, "nobody vouches") {
			return withHint(err, "--domain D asks the trust store, --cert F or --key NAME says who it has to be, --any-signer takes anybody")
		}
		return err
	}
	return nil
}

// payloadFlag registers --out for what a valid token says.
func payloadFlag(c *cobra.Command, out *outFlags, what string) {
	c.Flags().StringVar(&out.path, "out", "", what+` of a valid token, "-" is standard output (default: the verdict alone)`)
	c.Flags().BoolVar(&out.force, "force", false, "replace an existing file, or write bytes to a terminal")
}

// writePayload writes the payload of a valid token, or its claims as JSON.
func (a *app) writePayload(out *outFlags, v *client.Verdict) error {
	w, err := a.create(*out, v.Claims == nil, modeSecret)
	if err != nil {
		return err
	}
	defer w.abort()
	if v.Claims != nil {
		err = writeJSON(w, viewClaims(v.Claims))
	} else {
		_, err = w.Write(v.Payload)
	}
	if err != nil {
		return err
	}
	return w.commit()
}

type verdictView struct {
	Valid       bool           `json:"valid"`
	Reason      string         `json:"reason"`
	Algorithm   string         `json:"alg,omitempty"`
	Key         string         `json:"key,omitempty"` // NAME@VERSION in this keystore
	Certificate *certView      `json:"certificate,omitempty"`
	Header      map[string]any `json:"header"`
	Payload     string         `json:"payload,omitempty"` // base64
	Claims      map[string]any `json:"claims,omitempty"`
}

func viewVerdict(v *client.Verdict) verdictView {
	view := verdictView{Valid: v.Valid, Reason: v.Reason, Algorithm: string(v.Algorithm), Key: v.Key, Header: make(map[string]any)}
	if v.Certificate != nil {
		if c, err := viewCert(v.Certificate.Raw); err == nil {
			view.Certificate = &c
		}
	}
	if v.Payload != nil {
		view.Payload = base64Of(v.Payload)
	}
	switch {
	case v.JWS != nil:
		for name, value := range v.JWS.Extra {
			view.Header[name] = value
		}
		for name, value := range map[string]string{"kid": v.JWS.KeyID, "typ": v.JWS.Type, "cty": v.JWS.Content, "x5u": v.JWS.URL} {
			if value != "" {
				view.Header[name] = value
			}
		}
		if v.JWS.Unencoded {
			view.Header["b64"] = false
		}
	case v.CMS != nil:
		view.Header["hash"] = v.CMS.Hash.String()
		if !v.CMS.Time.IsZero() {
			view.Header["signing-time"] = v.CMS.Time.Format(time.RFC3339)
		}
	case v.COSE != nil:
		view.Header["protected"] = viewCOSEHeader(v.COSE.Protected)
		view.Header["unprotected"] = viewCOSEHeader(v.COSE.Unprotected)
	}
	if v.Claims != nil {
		view.Claims = viewClaims(v.Claims)
	}
	return view
}

func viewCOSEHeader(h *cose.Header) map[string]any {
	view := make(map[string]any)
	if len(h.KeyID) > 0 {
		view["kid"] = textOr64(h.KeyID)
	}
	if h.ContentType != nil {
		view["content-type"] = h.ContentType
	}
	if h.URL != "" {
		view["x5u"] = h.URL
	}
	for label, value := range h.Extra {
		view[fmt.Sprint(label)] = plain(value)
	}
	return view
}

func viewClaims(c *cose.Claims) map[string]any {
	view := make(map[string]any)
	for label, value := range c.Extra {
		view[fmt.Sprint(label)] = plain(value)
	}
	for name, value := range map[string]string{"iss": c.Issuer, "sub": c.Subject, "cti": textOr64(c.ID), "169": base64Of(c.Identity)} {
		if value != "" {
			view[name] = value
		}
	}
	if len(c.Audience) > 0 {
		view["aud"] = c.Audience
	}
	for name, t := range map[string]int64{"exp": unixOf(c.Expires), "nbf": unixOf(c.NotBefore), "iat": unixOf(c.IssuedAt)} {
		if t != 0 {
			view[name] = t
		}
	}
	return view
}

// plain turns what CBOR has and JSON has not into something that JSON has.
func plain(v any) any {
	switch v := v.(type) {
	case []byte:
		return base64Of(v)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Sprint(v)
		}
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = plain(v[i])
		}
		return list
	case map[any]any:
		m := make(map[string]any, len(v))
		for key, value := range v {
			m[fmt.Sprint(key)] = plain(value)
		}
		return m
	}
	return v
}

// headerFlag adds members to a header: NAME=VALUE, where VALUE is JSON or else a text.
func headerFlag(list []string) (map[string]any, error) {
	if len(list) == 0 {
		return nil, nil
	}
	extra := make(map[string]any)
	for _, text := range list {
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			return nil, usagef("--header is NAME=VALUE, not %q", text)
		}
		if _, twice := extra[name]; twice {
			return nil, usagef("--header %s twice", name)
		}
		var v any
		if json.Unmarshal([]byte(value), &v) != nil {
			v = value
		}
		extra[name] = v
	}
	return extra, nil
}

// parseMoment reads a time for a flag; none is the zero time.
func parseMoment(s string) (time.Time, error) {
	seconds, err := parseTime(s, time.Now())
	if err != nil || seconds == 0 {
		return time.Time{}, err
	}
	if seconds < 0 {
		return time.Time{}, usagef("%q is no time", s)
	}
	return time.Unix(seconds, 0), nil
}

func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// textOr64 returns bytes that are printable text as that, others in base64.
func textOr64(b []byte) string {
	for _, c := range b {
		if c < 0x20 || c > 0x7e {
			return base64Of(b)
		}
	}
	return string(b)
}

// Package pkcs12 reads PKCS#12 files (RFC 7292) with many entries, as Java's keystores write them: private keys with their certificates,
// and secret keys.
//
// The packages there are for PKCS#12 in Go are for files with one private key: golang.org/x/crypto/pkcs12 knows no PBES2, which current
// Java writes; software.sslmate.com/src/go-pkcs12 wants exactly one key, and neither knows the bags of secret keys. A keystore of a key
// manager has a dozen keys of both kinds. So this is a reader of its own: of DER, and of the BER that BouncyCastle writes.
//
// It reads what is encrypted under a password by PBES2 (RFC 8018) with AES or triple DES, and by the older schemes of RFC 7292 appendix C
// with triple DES and RC2. Nothing in it may be trusted before its MAC was checked, and a file without one is refused.
package pkcs12

import (
	"bytes"
	"crypto/hmac"
	"encoding/asn1"
	"errors"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Limits of a file.
const (
	MaxSize    = 16 << 20 // bytes
	MaxEntries = 10_000
	// MaxWork is how many iterations of key derivation all parts of a file together may ask for. Java asks for 10,000 for each key, older
	// releases for up to 100,000.
	MaxWork = 100_000_000

	maxPassword = 1 << 10
)

// The errors of Decode.
var (
	ErrFormat      = errors.New("this is no PKCS#12 file that can be read")
	ErrUnsupported = errors.New("the PKCS#12 file uses what is not supported")
	ErrPassword    = errors.New("wrong password of the PKCS#12 file, or it was changed")
)

// Entry is what a file has under one alias: a private key, a secret key, or a certificate alone.
type Entry struct {
	Alias       string
	PrivateKey  []byte // PKCS#8, DER
	Secret      []byte // the bytes of a secret key
	Certificate []byte // DER, of the private key
}

// Wipe overwrites the keys.
func (e *Entry) Wipe() {
	clear(e.PrivateKey)
	clear(e.Secret)
}

var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidEncryptedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 6}

	oidKeyBag      = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 1}
	oidShroudedBag = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 2}
	oidCertBag     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 3}
	oidSecretBag   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 5}
	oidSafeBag     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 12, 10, 1, 6}
	oidX509        = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 22, 1}

	oidFriendlyName = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 20}
	oidLocalKeyID   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 21}
)

var tag0 = casn1.Tag(0).ContextSpecific().Constructed()

// Decode reads a file. The caller wipes the entries.
func Decode(file []byte, password string) ([]Entry, error) {
	return decode(file, password, MaxWork)
}

func decode(file []byte, password string, work int) (_ []Entry, err error) {
	if len(file) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrFormat, len(file), MaxSize)
	}
	if len(password) > maxPassword || !utf8.ValidString(password) {
		return nil, fmt.Errorf("%w: a password is text of at most %d bytes", ErrPassword, maxPassword)
	}
	der, err := toDER(file)
	if err != nil {
		return nil, err
	}
	r := &reader{password: password, work: work}
	defer func() {
		if err != nil {
			r.wipe()
		}
	}()
	safes, err := r.authenticate(der)
	if err != nil {
		return nil, err
	}
	for !safes.Empty() {
		if err := r.contentInfo(&safes); err != nil {
			return nil, err
		}
	}
	return r.entries()
}

// reader is one file that is being read.
type reader struct {
	password string
	work     int // iterations that are left
	bags     []bag
}

// bag is a part of a file with its attributes.
type bag struct {
	kind  bagKind
	name  string
	id    []byte
	value []byte
}

type bagKind uint8

const (
	private bagKind = iota
	secret
	certificate
)

func (r *reader) wipe() {
	for _, b := range r.bags {
		if b.kind != certificate {
			clear(b.value)
		}
	}
}

func malformed(what string) error { return fmt.Errorf("%w: %s", ErrFormat, what) }

// authenticate checks the MAC of a file and returns its AuthenticatedSafe.
func (r *reader) authenticate(der []byte) (safes cryptobyte.String, err error) {
	input := cryptobyte.String(der)
	var pfx, info, content, mac cryptobyte.String
	var version int
	var kind asn1.ObjectIdentifier
	if !input.ReadASN1(&pfx, casn1.SEQUENCE) || !input.Empty() || !pfx.ReadASN1Integer(&version) || version != 3 ||
		!pfx.ReadASN1(&info, casn1.SEQUENCE) || !info.ReadASN1ObjectIdentifier(&kind) {
		return nil, malformed("no PFX")
	}
	if !kind.Equal(oidData) {
		return nil, fmt.Errorf("%w: integrity by signature", ErrUnsupported)
	}
	if !info.ReadASN1(&content, tag0) || !content.ReadASN1(&content, casn1.OCTET_STRING) {
		return nil, malformed("no content")
	}
	if pfx.Empty() {
		return nil, fmt.Errorf("%w: it has no MAC", ErrUnsupported)
	}
	if !pfx.ReadASN1(&mac, casn1.SEQUENCE) || !pfx.Empty() {
		return nil, malformed("MAC")
	}
	if err := r.checkMAC(mac, content); err != nil {
		return nil, err
	}
	if der, err = toDER(content); err != nil {
		return nil, err
	}
	content = der
	if !content.ReadASN1(&safes, casn1.SEQUENCE) || !content.Empty() {
		return nil, malformed("no AuthenticatedSafe")
	}
	return safes, nil
}

func (r *reader) checkMAC(mac, content cryptobyte.String) error {
	var digestInfo, algorithm, digest, salt cryptobyte.String
	var oid asn1.ObjectIdentifier
	iterations := 1
	if !mac.ReadASN1(&digestInfo, casn1.SEQUENCE) || !digestInfo.ReadASN1(&algorithm, casn1.SEQUENCE) || !algorithm.ReadASN1ObjectIdentifier(&oid) ||
		!digestInfo.ReadASN1(&digest, casn1.OCTET_STRING) || !mac.ReadASN1(&salt, casn1.OCTET_STRING) ||
		!mac.Empty() && !mac.ReadASN1Integer(&iterations) || !mac.Empty() {
		return malformed("MAC")
	}
	h := hashOf(oid)
	if h == nil {
		return fmt.Errorf("%w: MAC by %s", ErrUnsupported, oid)
	}
	if err := r.spend(iterations); err != nil {
		return err
	}
	for _, password := range bmpPasswords(r.password) {
		key := derive(h, idMAC, password, salt, iterations, h().Size())
		m := hmac.New(h, key)
		m.Write(content)
		if hmac.Equal(m.Sum(nil), digest) {
			return nil
		}
	}
	return ErrPassword
}

// spend takes iterations from what a file may ask for.
func (r *reader) spend(iterations int) error {
	if iterations < 1 || iterations > r.work {
		return fmt.Errorf("%w: %d iterations of key derivation", ErrUnsupported, iterations)
	}
	r.work -= iterations
	return nil
}

// contentInfo reads one part of the AuthenticatedSafe.
func (r *reader) contentInfo(safes *cryptobyte.String) error {
	var info, content cryptobyte.String
	var kind asn1.ObjectIdentifier
	if !safes.ReadASN1(&info, casn1.SEQUENCE) || !info.ReadASN1ObjectIdentifier(&kind) || !info.ReadASN1(&content, tag0) {
		return malformed("ContentInfo")
	}
	switch {
	case kind.Equal(oidData):
		if !content.ReadASN1(&content, casn1.OCTET_STRING) {
			return malformed("data")
		}
		return r.contents(content)
	case kind.Equal(oidEncryptedData):
		plain, err := r.encryptedData(content)
		if err != nil {
			return err
		}
		defer clear(plain)
		return r.contents(plain)
	}
	return fmt.Errorf("%w: content of type %s", ErrUnsupported, kind)
}

// encryptedData decrypts an EncryptedData (RFC 5652 section 8).
func (r *reader) encryptedData(content cryptobyte.String) ([]byte, error) {
	var data, info, algorithm, sealed cryptobyte.String
	var version int
	var kind asn1.ObjectIdentifier
	if !content.ReadASN1(&data, casn1.SEQUENCE) || !data.ReadASN1Integer(&version) || !data.ReadASN1(&info, casn1.SEQUENCE) ||
		!info.ReadASN1ObjectIdentifier(&kind) || !info.ReadASN1(&algorithm, casn1.SEQUENCE) {
		return nil, malformed("EncryptedData")
	}
	if implicit := casn1.Tag(0).ContextSpecific(); info.PeekASN1Tag(implicit) {
		info.ReadASN1(&sealed, implicit)
		return r.decrypt(algorithm, sealed)
	}
	var pieces, piece cryptobyte.String // in BER
	if !info.ReadASN1(&pieces, tag0) {
		return nil, malformed("EncryptedData")
	}
	for !pieces.Empty() {
		if !pieces.ReadASN1(&piece, casn1.OCTET_STRING) {
			return nil, malformed("EncryptedData")
		}
		sealed = append(sealed, piece...)
	}
	return r.decrypt(algorithm, sealed)
}

// contents reads a SafeContents, which is in BER where the file is. Nothing that is kept aliases b.
func (r *reader) contents(b []byte) error {
	der, err := toDER(b)
	if err != nil {
		return err
	}
	defer clear(der)
	return r.safeContents(der, 0)
}

const maxDepth = 4 // of SafeContents in one another

func (r *reader) safeContents(der []byte, depth int) error {
	input := cryptobyte.String(der)
	var list cryptobyte.String
	if depth > maxDepth || !input.ReadASN1(&list, casn1.SEQUENCE) || !input.Empty() {
		return malformed("SafeContents")
	}
	for !list.Empty() {
		if len(r.bags) >= 2*MaxEntries {
			return fmt.Errorf("%w: over %d entries", ErrUnsupported, MaxEntries)
		}
		var b, value cryptobyte.String
		var kind asn1.ObjectIdentifier
		if !list.ReadASN1(&b, casn1.SEQUENCE) || !b.ReadASN1ObjectIdentifier(&kind) || !b.ReadASN1(&value, tag0) {
			return malformed("SafeBag")
		}
		if kind.Equal(oidSafeBag) {
			if err := r.safeContents(value, depth+1); err != nil {
				return err
			}
			continue
		}
		next, ok, err := r.bag(kind, value)
		if err != nil {
			return err
		}
		if err := next.attributes(b); err != nil {
			return err
		}
		if ok {
			r.bags = append(r.bags, next)
		}
	}
	return nil
}

// bag reads the value of a bag. CRLs, and whatever else is of no use here, are passed over.
func (r *reader) bag(kind asn1.ObjectIdentifier, value cryptobyte.String) (b bag, ok bool, err error) {
	switch {
	case kind.Equal(oidKeyBag):
		return bag{kind: private, value: bytes.Clone(value)}, true, nil
	case kind.Equal(oidShroudedBag):
		b.kind = private
		b.value, err = r.encryptedKey(value)
		return b, true, err
	case kind.Equal(oidSecretBag):
		b.kind = secret
		b.value, err = r.secretBag(value)
		return b, b.value != nil, err
	case kind.Equal(oidCertBag):
		var content cryptobyte.String
		var form asn1.ObjectIdentifier
		if !value.ReadASN1(&content, casn1.SEQUENCE) || !content.ReadASN1ObjectIdentifier(&form) || !content.ReadASN1(&content, tag0) {
			return b, false, malformed("CertBag")
		}
		if !form.Equal(oidX509) {
			return b, false, nil
		}
		if !content.ReadASN1(&content, casn1.OCTET_STRING) {
			return b, false, malformed("CertBag")
		}
		return bag{kind: certificate, value: bytes.Clone(content)}, true, nil
	}
	return b, false, nil
}

// encryptedKey decrypts an EncryptedPrivateKeyInfo (RFC 5958 section 3).
func (r *reader) encryptedKey(der cryptobyte.String) ([]byte, error) {
	var info, algorithm, sealed cryptobyte.String
	if !der.ReadASN1(&info, casn1.SEQUENCE) || !info.ReadASN1(&algorithm, casn1.SEQUENCE) || !info.ReadASN1(&sealed, casn1.OCTET_STRING) {
		return nil, malformed("EncryptedPrivateKeyInfo")
	}
	return r.decrypt(algorithm, sealed)
}

// secretBag reads a secret key as Java writes it: encrypted like a private key, in a PrivateKeyInfo whose key is the bytes themselves.
func (r *reader) secretBag(value cryptobyte.String) ([]byte, error) {
	var content, sealed cryptobyte.String
	var kind asn1.ObjectIdentifier
	if !value.ReadASN1(&content, casn1.SEQUENCE) || !content.ReadASN1ObjectIdentifier(&kind) || !content.ReadASN1(&content, tag0) {
		return nil, malformed("SecretBag")
	}
	if !kind.Equal(oidShroudedBag) {
		return nil, nil
	}
	if !content.ReadASN1(&sealed, casn1.OCTET_STRING) {
		sealed = content // without the octets around it, as the standard could be read too
	}
	plain, err := r.encryptedKey(sealed)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	input := cryptobyte.String(plain)
	var info, key cryptobyte.String
	var version int
	if !input.ReadASN1(&info, casn1.SEQUENCE) || !info.ReadASN1Integer(&version) || !info.SkipASN1(casn1.SEQUENCE) || !info.ReadASN1(&key, casn1.OCTET_STRING) {
		return nil, malformed("a secret key")
	}
	return bytes.Clone(key), nil
}

// attributes reads the name and the id of a bag.
func (b *bag) attributes(rest cryptobyte.String) error {
	if rest.Empty() {
		return nil
	}
	var set cryptobyte.String
	if !rest.ReadASN1(&set, casn1.SET) {
		return malformed("attributes")
	}
	for !set.Empty() {
		var attribute, values, value cryptobyte.String
		var kind asn1.ObjectIdentifier
		if !set.ReadASN1(&attribute, casn1.SEQUENCE) || !attribute.ReadASN1ObjectIdentifier(&kind) || !attribute.ReadASN1(&values, casn1.SET) {
			return malformed("attribute")
		}
		switch {
		case kind.Equal(oidFriendlyName):
			if !values.ReadASN1(&value, casn1.Tag(30)) || len(value)%2 != 0 || len(value) > 1024 {
				return malformed("friendlyName")
			}
			units := make([]uint16, len(value)/2)
			for i := range units {
				units[i] = uint16(value[2*i])<<8 | uint16(value[2*i+1])
			}
			b.name = string(utf16.Decode(units))
		case kind.Equal(oidLocalKeyID):
			if !values.ReadASN1(&value, casn1.OCTET_STRING) || len(value) > 256 {
				return malformed("localKeyId")
			}
			b.id = bytes.Clone(value)
		}
	}
	return nil
}

// entries brings keys and certificates together, by the id that both have, and by the alias where several have that id: Java makes it of the
// time in milliseconds, in which it writes more than one key.
func (r *reader) entries() ([]Entry, error) {
	type named struct{ id, name string }
	certificates := make(map[string][]byte)
	exact := make(map[named][]byte)
	used := make(map[string]bool)
	for _, b := range r.bags {
		if b.kind != certificate || len(b.id) == 0 {
			continue
		}
		if certificates[string(b.id)] == nil {
			certificates[string(b.id)] = b.value
		}
		if n := (named{string(b.id), b.name}); exact[n] == nil {
			exact[n] = b.value
		}
	}
	var list []Entry
	for _, b := range r.bags {
		switch b.kind {
		case private:
			found := exact[named{string(b.id), b.name}]
			if found == nil {
				found = certificates[string(b.id)]
			}
			list = append(list, Entry{Alias: b.name, PrivateKey: b.value, Certificate: found})
			used[string(b.id)] = true
		case secret:
			list = append(list, Entry{Alias: b.name, Secret: b.value})
		}
	}
	for _, b := range r.bags {
		if b.kind == certificate && (len(b.id) == 0 || !used[string(b.id)]) {
			list = append(list, Entry{Alias: b.name, Certificate: b.value})
		}
	}
	return list, nil
}

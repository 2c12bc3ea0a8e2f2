package pkix

import (
	"bytes"
	"crypto/x509"
	"errors"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// errCertificates says that what follows a certificate is none.
var errCertificates = errors.New("pkix: not certificates in DER, one after the other")

// ParseCertificate parses one certificate in DER: x509.ParseCertificate for keys of secp256k1 and negative serial numbers too. Of a
// certificate with such a key PublicKey is an *ecdsa.PublicKey and PublicKeyAlgorithm is ECDSA.
func ParseCertificate(der []byte) (*x509.Certificate, error) {
	at, ok := locate(der)
	if !ok || !at.odd(der) {
		return x509.ParseCertificate(der)
	}
	certificate, err := x509.ParseCertificate(at.standIn(der))
	if err != nil {
		return nil, err
	}
	original := bytes.Clone(der)
	certificate.Raw = original
	certificate.RawTBSCertificate = at.tbs.of(original)
	certificate.RawSubjectPublicKeyInfo = at.spki.of(original)
	if serial := at.serial.of(original); negative(serial) {
		certificate.SerialNumber = twosComplement(serial)
	}
	if at.onSecp256k1(original) {
		key, err := ParsePublicKey(certificate.RawSubjectPublicKeyInfo)
		if err != nil {
			return nil, err
		}
		certificate.PublicKey, certificate.PublicKeyAlgorithm = key, x509.ECDSA
	}
	return certificate, nil
}

// ParseCertificates parses certificates in DER that follow each other with nothing between them: x509.ParseCertificates for those of
// ParseCertificate.
func ParseCertificates(der []byte) ([]*x509.Certificate, error) {
	var certificates []*x509.Certificate
	for rest := cryptobyte.String(der); !rest.Empty(); {
		var one cryptobyte.String
		if !rest.ReadASN1Element(&one, asn1.SEQUENCE) {
			return nil, errCertificates
		}
		certificate, err := ParseCertificate(one)
		if err != nil {
			return nil, err
		}
		certificates = append(certificates, certificate)
	}
	return certificates, nil
}

// ParseRequest parses a PKCS#10 request in DER (RFC 2986): x509.ParseCertificateRequest for keys of secp256k1 too. The signature is not
// checked.
func ParseRequest(der []byte) (*x509.CertificateRequest, error) {
	at, ok := locateRequest(der)
	if !ok || !at.odd(der) {
		return x509.ParseCertificateRequest(der)
	}
	request, err := x509.ParseCertificateRequest(at.standIn(der))
	if err != nil {
		return nil, err
	}
	original := bytes.Clone(der)
	request.Raw = original
	request.RawTBSCertificateRequest = at.tbs.of(original)
	request.RawSubjectPublicKeyInfo = at.spki.of(original)
	key, err := ParsePublicKey(request.RawSubjectPublicKeyInfo)
	if err != nil {
		return nil, err
	}
	request.PublicKey, request.PublicKeyAlgorithm = key, x509.ECDSA
	return request, nil
}

// span is a part of an encoding.
type span struct{ start, end int }

func (s span) of(b []byte) []byte { return b[s.start:s.end:s.end] }

// places are where the parts of a certificate or request are that may need a stand-in.
type places struct {
	tbs    span // the element that is signed
	serial span // the content of the serial number; empty in a request
	spki   span // the element
}

// standInOID is where the last byte of the OID id-ecPublicKey is in secp256k1Prefix, which a stand-in changes.
const standInOID = 12

func (p places) onSecp256k1(der []byte) bool { return bytes.HasPrefix(p.spki.of(der), secp256k1Prefix) }

// odd reports whether crypto/x509 refuses what der has in these places.
func (p places) odd(der []byte) bool { return negative(p.serial.of(der)) || p.onSecp256k1(der) }

// standIn returns der as crypto/x509 takes it: with a positive serial number, and a key of an algorithm that it does not know and
// therefore does not look at. Nothing changes its length.
func (p places) standIn(der []byte) []byte {
	der = bytes.Clone(der)
	if serial := p.serial.of(der); negative(serial) {
		serial[0] = 0x01 // in DER the first byte is not 0 unless the next one begins with a 1
	}
	if p.onSecp256k1(der) {
		p.spki.of(der)[standInOID] = 0x7f // 1.2.840.10045.2.127 is nothing
	}
	return der
}

// locate finds the places of a certificate (RFC 5280 section 4.1).
func locate(der []byte) (at places, ok bool) {
	c := cursor{der, len(der)}
	if !c.enter() || !c.element(&at.tbs) {
		return at, false
	}
	c = cursor{at.tbs.of(der), at.tbs.end}
	var unread span
	ok = c.enter() && c.rest.SkipOptionalASN1(asn1.Tag(0).Constructed().ContextSpecific()) && c.integer(&at.serial) &&
		c.element(&unread) && // signature algorithm
		c.element(&unread) && // issuer
		c.element(&unread) && // validity
		c.element(&unread) && // subject
		c.element(&at.spki)
	return at, ok
}

// locateRequest finds the places of a request (RFC 2986 section 4.1).
func locateRequest(der []byte) (at places, ok bool) {
	c := cursor{der, len(der)}
	if !c.enter() || !c.element(&at.tbs) {
		return at, false
	}
	c = cursor{at.tbs.of(der), at.tbs.end}
	var version, subject span
	ok = c.enter() && c.integer(&version) && c.element(&subject) && c.element(&at.spki)
	return at, ok
}

// cursor reads DER and knows where it is.
type cursor struct {
	rest cryptobyte.String
	end  int // of rest, in the whole
}

// enter goes into the SEQUENCE that is next.
func (c *cursor) enter() bool {
	var content cryptobyte.String
	ok := c.rest.ReadASN1(&content, asn1.SEQUENCE)
	c.end -= len(c.rest)
	c.rest = content
	return ok
}

// element reads the SEQUENCE that is next.
func (c *cursor) element(s *span) bool {
	var element cryptobyte.String
	ok := c.rest.ReadASN1Element(&element, asn1.SEQUENCE)
	*s = span{c.end - len(c.rest) - len(element), c.end - len(c.rest)}
	return ok
}

// integer reads the content of the INTEGER that is next.
func (c *cursor) integer(s *span) bool {
	var content cryptobyte.String
	ok := c.rest.ReadASN1(&content, asn1.INTEGER)
	*s = span{c.end - len(c.rest) - len(content), c.end - len(c.rest)}
	return ok
}

// negative reports whether the content of an INTEGER is negative, in its shortest form: no other gets a stand-in.
func negative(integer []byte) bool {
	if len(integer) > 1 && integer[0] == 0xff && integer[1]&0x80 != 0 {
		return false
	}
	return len(integer) > 0 && integer[0]&0x80 != 0
}

// twosComplement returns the value of a negative number.
func twosComplement(b []byte) *big.Int {
	n := new(big.Int).SetBytes(b)
	return n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(8*len(b))))
}

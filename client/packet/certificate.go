package packet

import (
	"bytes"
	"crypto/x509"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// ParseCertificate is x509.ParseCertificate for MOSIP's certificates too, of which half have a negative serial number:
// MOSIP takes a signed random number for it. RFC 5280 section 4.1.2.2 asks readers to handle them gracefully, crypto/x509
// refuses them unless GODEBUG says x509negativeserial=1. This function does not depend on GODEBUG.
//
// Signatures, chains and pools work with what it returns. crypto/tls parses the certificates of the other side by
// itself: a program whose peers have such certificates needs a line //go:debug x509negativeserial=1 in its main package.
func ParseCertificate(der []byte) (*x509.Certificate, error) {
	at, serial := findSerial(der)
	if len(serial) == 0 || serial[0]&0x80 == 0 {
		return x509.ParseCertificate(der)
	}
	// The parser sees a positive number of the same length in its place. Everything the signature covers is put back
	// after it, from the original bytes.
	positive := bytes.Clone(der)
	positive[at] = 0x01 // in DER the first byte is not 0 unless the next one begins with 1
	certificate, err := x509.ParseCertificate(positive)
	if err != nil {
		return nil, err
	}
	original := bytes.Clone(der)
	tbs := bytes.Index(positive, certificate.RawTBSCertificate)
	certificate.Raw = original
	certificate.RawTBSCertificate = original[tbs : tbs+len(certificate.RawTBSCertificate)]
	certificate.SerialNumber = negative(serial)
	return certificate, nil
}

// findSerial returns the content of the serial number in der and where it begins. It is empty if there is none.
func findSerial(der []byte) (at int, serial []byte) {
	input := cryptobyte.String(der)
	var certificate, tbs, content cryptobyte.String
	if !input.ReadASN1(&certificate, asn1.SEQUENCE) || !input.Empty() ||
		!certificate.ReadASN1(&tbs, asn1.SEQUENCE) ||
		!tbs.SkipOptionalASN1(asn1.Tag(0).Constructed().ContextSpecific()) ||
		!tbs.ReadASN1(&content, asn1.INTEGER) {
		return 0, nil
	}
	// What has not been read lies behind it: the rest of the TBS, and the rest of the certificate.
	return len(der) - len(certificate) - len(tbs) - len(content), content
}

// negative returns the value of a two's complement number whose first bit is set.
func negative(b []byte) *big.Int {
	n := new(big.Int).SetBytes(b)
	return n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(8*len(b))))
}

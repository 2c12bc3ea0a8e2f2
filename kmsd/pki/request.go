package pki

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"fmt"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// Request makes a PKCS#10 request for the signer's key, in DER. Errors wrap ErrKey, ErrName or ErrSubject.
func Request(signer crypto.Signer, s Subject) ([]byte, error) {
	if err := checkKey(signer.Public()); err != nil {
		return nil, err
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	template := &x509.CertificateRequest{RawSubject: s.RawName, DNSNames: s.DNS, EmailAddresses: s.Email, URIs: s.URI}
	for _, addr := range s.IP {
		template.IPAddresses = append(template.IPAddresses, addr.AsSlice())
	}
	var der []byte
	var err error
	if pkix.IsSecp256k1(signer.Public()) {
		der, err = requestSecp256k1(template, signer)
	} else {
		der, err = x509.CreateCertificateRequest(rand.Reader, template, signer)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	return der, nil
}

// ParseRequest parses a PKCS#10 request, DER or one PEM block, and verifies its signature: whoever made it holds the private
// key. Errors wrap ErrRequest, ErrKey, ErrName or ErrSubject.
func ParseRequest(data []byte) (*x509.CertificateRequest, error) {
	if len(data) > MaxRequest {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrRequest, MaxRequest)
	}
	der := data
	if isPEM(data) {
		blocks, err := decodePEM(data, "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST")
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrRequest, err)
		}
		if len(blocks) != 1 {
			return nil, fmt.Errorf("%w: not exactly one PEM block", ErrRequest)
		}
		der = blocks[0]
	}
	r, err := pkix.ParseRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	if err := checkKey(r.PublicKey); err != nil {
		return nil, err
	}
	if _, err := RequestSubject(r); err != nil {
		return nil, err
	}
	if weakSignature(r.SignatureAlgorithm) || r.CheckSignature() != nil {
		return nil, fmt.Errorf("%w: its signature is not right", ErrRequest)
	}
	return r, nil
}

// isPEM tells PEM from DER, which begins with a SEQUENCE.
func isPEM(data []byte) bool { return len(data) > 0 && data[0] != asn1.TagSequence|0x20 }

// decodePEM returns the contents of the PEM blocks in data, which must all be of the given types. Text between blocks is
// allowed, as openssl writes it; a damaged block is an error and not text.
func decodePEM(data []byte, types ...string) ([][]byte, error) {
	var blocks [][]byte
	begun := countLines(data, "-----BEGIN ")
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		known := false
		for _, t := range types {
			known = known || block.Type == t
		}
		if !known {
			return nil, fmt.Errorf("a PEM block is a %q", block.Type)
		}
		blocks = append(blocks, block.Bytes)
		data = rest
	}
	if len(blocks) == 0 {
		return nil, fmt.Errorf("neither DER nor PEM")
	}
	if len(blocks) != begun {
		return nil, fmt.Errorf("a PEM block is damaged")
	}
	return blocks, nil
}

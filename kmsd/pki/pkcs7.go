package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
)

// ErrPKCS7 is wrapped by the errors about PKCS#7 files.
var ErrPKCS7 = errors.New("invalid PKCS#7")

// MaxBundle bounds the certificates of a file in which a store of CAs is carried; in bytes it is MaxChainBytes.
const MaxBundle = 32

var (
	oidSignedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidData       = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
)

// MarshalPKCS7 puts certificates into a SignedData without content and signers (RFC 5652 section 5.1, "certs-only", .p7b), in
// DER but for one thing: the certificates stay in the order given, leaf first for a chain, where DER would sort the SET. Every
// other maker leaves them in their order too, and readers look at it. Errors wrap ErrPKCS7.
func MarshalPKCS7(certificates [][]byte) ([]byte, error) {
	if len(certificates) == 0 || len(certificates) > MaxBundle {
		return nil, fmt.Errorf("%w: 1 to %d certificates", ErrPKCS7, MaxBundle)
	}
	type contentInfo struct {
		Type asn1.ObjectIdentifier
	}
	signed := struct {
		Version          int
		DigestAlgorithms []asn1.ObjectIdentifier `asn1:"set"`
		Content          contentInfo
		Certificates     asn1.RawValue
		SignerInfos      []asn1.ObjectIdentifier `asn1:"set"`
	}{
		Version: 1, Content: contentInfo{oidData},
		Certificates: asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: bytes.Join(certificates, nil)},
	}
	inner, err := asn1.Marshal(signed)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPKCS7, err)
	}
	der, err := asn1.Marshal(struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue
	}{oidSignedData, asn1.RawValue{Class: asn1.ClassContextSpecific, IsCompound: true, Bytes: inner}})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPKCS7, err)
	}
	return der, nil
}

// ParsePKCS7 returns the certificates of a certs-only SignedData, DER or BER (Java's and BouncyCastle's writers use indefinite
// lengths), in the order in which they are there, 1 to MaxBundle. A message with signers is refused: nothing here would check
// them. Errors wrap ErrPKCS7 or ErrCertificate.
func ParsePKCS7(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxChainBytes {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrPKCS7, MaxChainBytes)
	}
	info, err := berChildren(data, tagSequence)
	if err != nil || len(info) != 2 || !bytes.Equal(info[0].full, marshaled(oidSignedData)) || info[1].tag != tagContext0 {
		return nil, fmt.Errorf("%w: it is no SignedData", ErrPKCS7)
	}
	signed, err := berChildren(info[1].content, tagSequence)
	if err != nil || len(signed) < 4 || signed[0].tag != asn1.TagInteger || signed[1].tag != tagSet || signed[2].tag != tagSequence {
		return nil, fmt.Errorf("%w: its SignedData is damaged", ErrPKCS7)
	}
	var bag []ber
	for _, e := range signed[3 : len(signed)-1] {
		switch e.tag {
		case tagContext0:
			if bag != nil {
				return nil, fmt.Errorf("%w: it has certificates twice", ErrPKCS7)
			}
			if bag, err = berList(e.content); err != nil {
				return nil, err
			}
		case tagContext1: // revocation lists
		default:
			return nil, fmt.Errorf("%w: its SignedData is damaged", ErrPKCS7)
		}
	}
	if last := signed[len(signed)-1]; last.tag != tagSet {
		return nil, fmt.Errorf("%w: its SignedData is damaged", ErrPKCS7)
	} else if len(last.content) > 0 {
		return nil, fmt.Errorf("%w: it is a signed message, not a file of certificates", ErrPKCS7)
	}
	if len(bag) == 0 || len(bag) > MaxBundle {
		return nil, fmt.Errorf("%w: 1 to %d certificates", ErrPKCS7, MaxBundle)
	}
	certificates := make([]*x509.Certificate, len(bag))
	for i, e := range bag {
		if certificates[i], err = ParseCertificate(e.full); err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i, err)
		}
	}
	return certificates, nil
}

func marshaled(oid asn1.ObjectIdentifier) []byte {
	der, _ := asn1.Marshal(oid) // of constants
	return der
}

// ParseBundle parses a file with 1 to MaxBundle certificates in any order: PEM, DER one after the other, PKCS#7 as ParsePKCS7
// takes it in PEM or DER, and any DER of these as base64 or base64url text, as MOSIP's interfaces carry it. Certificates that
// are there twice are given once. Errors wrap ErrCertificate or ErrPKCS7.
func ParseBundle(data []byte) ([]*x509.Certificate, error) {
	if len(data) > MaxChainBytes {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrCertificate, MaxChainBytes)
	}
	if isPEM(data) && !bytes.Contains(data, []byte("-----BEGIN ")) {
		if der := fromBase64(data); der != nil {
			data = der
		}
	}
	blocks := [][]byte{data}
	if isPEM(data) {
		var err error
		if blocks, err = decodePEM(data, "CERTIFICATE", "PKCS7", "CMS"); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrCertificate, err)
		}
	}
	var all []*x509.Certificate
	for _, block := range blocks {
		for len(block) > 0 {
			e, rest, err := readBER(block, berDepth)
			if err != nil || e.tag != tagSequence {
				return nil, fmt.Errorf("%w: neither DER nor PEM", ErrCertificate)
			}
			block = rest
			some, err := parseElement(e)
			if err != nil {
				return nil, err
			}
			for _, c := range some {
				if !slices.ContainsFunc(all, c.Equal) {
					all = append(all, c)
				}
			}
			if len(all) > MaxBundle {
				return nil, fmt.Errorf("%w: more than %d", ErrCertificate, MaxBundle)
			}
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: there is none", ErrCertificate)
	}
	return all, nil
}

// parseElement parses a certificate, or a PKCS#7 file, which begins with an object identifier.
func parseElement(e ber) ([]*x509.Certificate, error) {
	if bytes.HasPrefix(e.content, []byte{asn1.TagOID}) {
		return ParsePKCS7(e.full)
	}
	c, err := ParseCertificate(e.full)
	return []*x509.Certificate{c}, err
}

// fromBase64 decodes text that begins as a DER sequence would, or returns nil.
func fromBase64(text []byte) []byte {
	text = bytes.TrimRight(bytes.Join(bytes.Fields(text), nil), "=")
	for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		der, err := encoding.AppendDecode(nil, text)
		if err == nil && len(der) > 0 && !isPEM(der) {
			return der
		}
	}
	return nil
}

// Arrange returns the chain, leaf first, that the certificates of a file make in whatever order they are: each of the next
// is the issuer of the one before. Errors wrap ErrChain when that leaves one over, or makes no single chain.
func Arrange(bundle []*x509.Certificate) ([]*x509.Certificate, error) {
	if err := checkSizes(bundle); err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for _, c := range bundle {
		issues := slices.ContainsFunc(bundle, func(o *x509.Certificate) bool { return o != c && len(link(0, o, c)) == 0 })
		if issues {
			continue
		}
		if chain != nil {
			return nil, fmt.Errorf("%w: it has more than one end", ErrChain)
		}
		chain = []*x509.Certificate{c}
	}
	if chain == nil {
		return nil, fmt.Errorf("%w: it has no end", ErrChain)
	}
	for len(chain) < len(bundle) {
		last := chain[len(chain)-1]
		next := slices.IndexFunc(bundle, func(c *x509.Certificate) bool {
			return !slices.Contains(chain, c) && len(link(0, last, c)) == 0
		})
		if next < 0 {
			return nil, fmt.Errorf("%w: %d certificates do not belong to it", ErrChain, len(bundle)-len(chain))
		}
		chain = append(chain, bundle[next])
	}
	return chain, nil
}

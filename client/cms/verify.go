package cms

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"time"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// minRSA and maxRSA bound the keys that signatures are verified with, in bits; maxTries is how many signatures of certificates are.
const (
	minRSA   = 2048
	maxRSA   = 8192
	maxTries = 2 * MaxCertificates
)

// Signature is a detached signature that was parsed and, unless it comes from [Verify], not verified.
type Signature struct {
	// Chain is the signer's certificate and those of its issuers that the signature has, leaf first, each signed by the next. It may end
	// before a root. Nothing says that any of it can be trusted.
	Chain []*x509.Certificate

	// Certificates are all that the signature has, in its order.
	Certificates []*x509.Certificate

	// Time is when the signer says that it signed; zero if it does not say.
	Time time.Time

	// Hash is the hash that the content and the attributes are signed with.
	Hash crypto.Hash

	hash       *hashAlgorithm
	algorithm  algorithmIdentifier
	attributes []byte // the SET that is signed
	digest     []byte // of the content, as it is signed
	signature  []byte
}

// Verify reads a signature, DER or BER, and checks it against everything that content gives. Whether to believe the
// signer is for the caller to find out: Chain. The error wraps ErrVerification if the signature is not right; of others it wraps ErrFormat,
// ErrTooLarge or ErrUnsupported, or is that of content.
func Verify(signature []byte, content io.Reader) (*Signature, error) {
	s, err := Parse(signature)
	if err != nil {
		return nil, err
	}
	return s, s.Verify(content)
}

// Verify checks the signature against everything that content gives.
func (s *Signature) Verify(content io.Reader) error {
	digest := s.Hash.New()
	if _, err := io.Copy(digest, content); err != nil {
		return err
	}
	if err := s.verifyAttributes(); err != nil {
		return err
	}
	if !bytes.Equal(digest.Sum(nil), s.digest) {
		return ErrVerification
	}
	return nil
}

// verifyAttributes checks the signature over the signed attributes with the key of the signer's certificate.
func (s *Signature) verifyAttributes() error {
	if s.algorithm.id == oidEd25519 {
		key, ok := s.Chain[0].PublicKey.(ed25519.PublicKey)
		if !ok || s.Hash != crypto.SHA512 || s.algorithm.parameters != nil || !ed25519.Verify(key, s.attributes, s.signature) {
			return ErrVerification
		}
		return nil
	}
	h := s.Hash.New()
	h.Write(s.attributes)
	digest := h.Sum(nil)
	ok := false
	switch key := s.Chain[0].PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("%w: an RSA key of %d bits", ErrUnsupported, bits)
		}
		if s.algorithm.id == oidPSS {
			salt, err := s.pssSalt()
			if err != nil {
				return err
			}
			ok = rsa.VerifyPSS(key, s.Hash, digest, s.signature, &rsa.PSSOptions{SaltLength: salt}) == nil
			break
		}
		ok = (s.algorithm.id == oidRSA || s.algorithm.id == s.hash.withRSA) && s.plain() && rsa.VerifyPKCS1v15(key, s.Hash, digest, s.signature) == nil
	case *ecdsa.PublicKey:
		ok = s.algorithm.id == s.hash.withECDSA && s.plain() && ecdsa.VerifyASN1(key, digest, s.signature)
	}
	if !ok {
		return ErrVerification
	}
	return nil
}

// plain reports whether the signature algorithm has no parameters, or NULL.
func (s *Signature) plain() bool {
	return s.algorithm.parameters == nil || bytes.Equal(s.algorithm.parameters, null)
}

// pssSalt returns the length of the salt that the parameters of RSASSA-PSS name (RFC 4055 section 3.1). One hash has to serve everywhere.
func (s *Signature) pssSalt() (int, error) {
	unsupported := fmt.Errorf("%w: RSASSA-PSS with these parameters", ErrUnsupported)
	input := cryptobyte.String(s.algorithm.parameters)
	var list, field cryptobyte.String
	var salt int
	if !input.ReadASN1(&list, asn1.SEQUENCE) || !input.Empty() || !list.ReadASN1(&field, context(0)) {
		return 0, unsupported // the defaults are SHA-1
	}
	hash, ok := readAlgorithm(&field)
	if !ok || !field.Empty() || !s.isHash(hash) || !list.ReadASN1(&field, context(1)) {
		return 0, unsupported
	}
	mgf, ok := readAlgorithm(&field)
	if !ok || !field.Empty() || mgf.id != oidMGF1 {
		return 0, unsupported
	}
	inner := cryptobyte.String(mgf.parameters)
	if hash, ok = readAlgorithm(&inner); !ok || !inner.Empty() || !s.isHash(hash) {
		return 0, unsupported
	}
	if !list.ReadASN1(&field, context(2)) || !field.ReadASN1Integer(&salt) || !field.Empty() || salt < 1 || salt > maxRSA/8 {
		return 0, unsupported
	}
	if list.PeekASN1Tag(context(3)) {
		var trailer int
		if !list.ReadASN1(&field, context(3)) || !field.ReadASN1Integer(&trailer) || !field.Empty() || trailer != 1 {
			return 0, unsupported
		}
	}
	if !list.Empty() {
		return 0, unsupported
	}
	return salt, nil
}

// isHash reports whether an identifier is that of the hash of the signature.
func (s *Signature) isHash(a algorithmIdentifier) bool {
	return a.id == s.hash.id && (a.parameters == nil || bytes.Equal(a.parameters, null))
}

// readAlgorithm reads an AlgorithmIdentifier.
func readAlgorithm(s *cryptobyte.String) (algorithmIdentifier, bool) {
	var full, content, id cryptobyte.String
	if !s.ReadASN1Element(&full, asn1.SEQUENCE) {
		return algorithmIdentifier{}, false
	}
	inner := full
	if !inner.ReadASN1(&content, asn1.SEQUENCE) || !content.ReadASN1Element(&id, asn1.OBJECT_IDENTIFIER) {
		return algorithmIdentifier{}, false
	}
	a := algorithmIdentifier{id: oid(id), full: full}
	if !content.Empty() {
		var parameters cryptobyte.String
		var tag asn1.Tag
		if !content.ReadAnyASN1Element(&parameters, &tag) || !content.Empty() {
			return algorithmIdentifier{}, false
		}
		a.parameters = parameters
	}
	return a, true
}

// Parse reads a signature by one signer, DER or BER, followed by zeros at most. Nothing in the result may be believed before its
// Verify.
func Parse(signature []byte) (*Signature, error) {
	if len(signature) > MaxSignature {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(signature), MaxSignature)
	}
	der, err := toDER(signature)
	if err != nil {
		return nil, err
	}
	input := cryptobyte.String(der)
	var info, explicit, signed cryptobyte.String
	if !input.ReadASN1(&info, asn1.SEQUENCE) || !readOID(&info, oidSignedData) ||
		!info.ReadASN1(&explicit, context(0)) || !info.Empty() || !explicit.ReadASN1(&signed, asn1.SEQUENCE) || !explicit.Empty() {
		return nil, fmt.Errorf("%w: it is no SignedData", ErrFormat)
	}
	damaged := fmt.Errorf("%w: its SignedData is damaged", ErrFormat)
	var version int
	var digests, content, bag, lists, signers, signer cryptobyte.String
	var hasBag, hasLists bool
	if !signed.ReadASN1Integer(&version) || !signed.ReadASN1(&digests, asn1.SET) || !signed.ReadASN1(&content, asn1.SEQUENCE) {
		return nil, damaged
	}
	if !readOID(&content, oidData) {
		return nil, fmt.Errorf("%w: what is signed is not data", ErrUnsupported)
	}
	if !content.Empty() {
		return nil, fmt.Errorf("%w: it has its content inside", ErrUnsupported)
	}
	if !signed.ReadOptionalASN1(&bag, &hasBag, context(0)) || !signed.ReadOptionalASN1(&lists, &hasLists, context(1)) ||
		!signed.ReadASN1(&signers, asn1.SET) || !signed.Empty() {
		return nil, damaged
	}
	if !signers.ReadASN1(&signer, asn1.SEQUENCE) {
		return nil, fmt.Errorf("%w: nobody has signed it", ErrFormat)
	}
	if !signers.Empty() {
		return nil, fmt.Errorf("%w: it has more than one signer", ErrUnsupported)
	}
	s := new(Signature)
	if s.Certificates, err = readCertificates(bag); err != nil {
		return nil, err
	}
	return s, s.readSigner(signer)
}

func readOID(s *cryptobyte.String, want oid) bool {
	var id cryptobyte.String
	return s.ReadASN1Element(&id, asn1.OBJECT_IDENTIFIER) && oid(id) == want
}

// readCertificates reads the certificates of a SignedData. Those that are none of X.509, attribute certificates for example, are left out.
func readCertificates(bag cryptobyte.String) ([]*x509.Certificate, error) {
	var certificates []*x509.Certificate
	for !bag.Empty() {
		var element cryptobyte.String
		var tag asn1.Tag
		if !bag.ReadAnyASN1Element(&element, &tag) {
			return nil, fmt.Errorf("%w: its certificates are damaged", ErrFormat)
		}
		if tag != asn1.SEQUENCE {
			continue
		}
		if len(certificates) == MaxCertificates {
			return nil, fmt.Errorf("%w: more than %d certificates", ErrTooLarge, MaxCertificates)
		}
		c, err := pkix.ParseCertificate(element)
		if err != nil {
			return nil, fmt.Errorf("%w: a certificate: %w", ErrFormat, err)
		}
		certificates = append(certificates, c)
	}
	return certificates, nil
}

// readSigner reads the SignerInfo (RFC 5652 section 5.3).
func (s *Signature) readSigner(signer cryptobyte.String) error {
	damaged := fmt.Errorf("%w: its signer is damaged", ErrFormat)
	var version int
	var id, attributes, unsigned cryptobyte.String
	var tag asn1.Tag
	var hasUnsigned bool
	if !signer.ReadASN1Integer(&version) || !signer.ReadAnyASN1Element(&id, &tag) {
		return damaged
	}
	digest, ok := readAlgorithm(&signer)
	if !ok {
		return damaged
	}
	if !signer.PeekASN1Tag(context(0)) {
		return fmt.Errorf("%w: it has no signed attributes", ErrUnsupported)
	}
	if !signer.ReadASN1Element(&attributes, context(0)) {
		return damaged
	}
	if s.algorithm, ok = readAlgorithm(&signer); !ok || !signer.ReadASN1Bytes(&s.signature, asn1.OCTET_STRING) ||
		!signer.ReadOptionalASN1(&unsigned, &hasUnsigned, context(1)) || !signer.Empty() {
		return damaged
	}
	if s.hash = byID(digest.id); s.hash == nil || !s.isHash(digest) {
		return fmt.Errorf("%w: a digest that is not SHA-256, SHA-384 or SHA-512", ErrUnsupported)
	}
	s.Hash = s.hash.hash
	leaf, err := s.findSigner(id, tag)
	if err != nil {
		return err
	}
	s.Chain = s.chainOf(leaf)
	s.attributes = bytes.Clone(attributes)
	s.attributes[0] = byte(asn1.SET)
	return s.readAttributes(digest)
}

// findSigner returns the certificate that a SignerIdentifier names.
func (s *Signature) findSigner(id cryptobyte.String, tag asn1.Tag) (*x509.Certificate, error) {
	matches := func(*x509.Certificate) bool { return false }
	switch tag {
	case asn1.SEQUENCE: // IssuerAndSerialNumber
		var content, issuer cryptobyte.String
		serial := new(big.Int)
		if !id.ReadASN1(&content, asn1.SEQUENCE) || !content.ReadASN1Element(&issuer, asn1.SEQUENCE) || !content.ReadASN1Integer(serial) || !content.Empty() {
			return nil, fmt.Errorf("%w: its signer is damaged", ErrFormat)
		}
		matches = func(c *x509.Certificate) bool {
			return bytes.Equal(c.RawIssuer, issuer) && c.SerialNumber.Cmp(serial) == 0
		}
	case asn1.Tag(0).ContextSpecific(): // SubjectKeyIdentifier
		var keyID cryptobyte.String
		if !id.ReadASN1(&keyID, tag) || len(keyID) == 0 {
			return nil, fmt.Errorf("%w: its signer is damaged", ErrFormat)
		}
		matches = func(c *x509.Certificate) bool { return bytes.Equal(c.SubjectKeyId, keyID) }
	}
	for _, c := range s.Certificates {
		if matches(c) {
			return c, nil
		}
	}
	return nil, fmt.Errorf("%w: it does not have the signer's certificate", ErrUnsupported)
}

// chainOf returns c and its issuers among the certificates. Somebody could have made them so that many signatures have to be tried, or slow
// ones: maxTries are.
func (s *Signature) chainOf(c *x509.Certificate) []*x509.Certificate {
	chain := []*x509.Certificate{c}
	tries := 0
	for len(chain) <= len(s.Certificates) && !bytes.Equal(c.RawIssuer, c.RawSubject) {
		var next *x509.Certificate
		for _, issuer := range s.Certificates {
			if key, ok := issuer.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > maxRSA || !bytes.Equal(issuer.RawSubject, c.RawIssuer) || tries == maxTries {
				continue
			}
			if tries++; c.CheckSignatureFrom(issuer) == nil {
				next = issuer
				break
			}
		}
		if next == nil {
			break
		}
		chain = append(chain, next)
		c = next
	}
	return chain
}

// readAttributes reads the signed attributes (RFC 5652 section 11). Each may be there once, with one value.
func (s *Signature) readAttributes(digest algorithmIdentifier) error {
	damaged := fmt.Errorf("%w: its signed attributes are damaged", ErrFormat)
	input := cryptobyte.String(s.attributes)
	var list cryptobyte.String
	if !input.ReadASN1(&list, asn1.SET) {
		return damaged
	}
	seen := make(map[oid]bool)
	for !list.Empty() {
		var attribute, id, values cryptobyte.String
		if !list.ReadASN1(&attribute, asn1.SEQUENCE) || !attribute.ReadASN1Element(&id, asn1.OBJECT_IDENTIFIER) ||
			!attribute.ReadASN1(&values, asn1.SET) || !attribute.Empty() || seen[oid(id)] {
			return damaged
		}
		if seen[oid(id)] = true; len(seen) > maxAttributes || len(values) > maxAttribute {
			return fmt.Errorf("%w: its signed attributes", ErrTooLarge)
		}
		if err := s.readAttribute(oid(id), values, digest); err != nil {
			return err
		}
	}
	if !seen[oidContentType] || !seen[oidMessageDigest] {
		return fmt.Errorf("%w: what is signed has no type or no digest", ErrFormat)
	}
	return nil
}

func (s *Signature) readAttribute(id oid, values cryptobyte.String, digest algorithmIdentifier) error {
	ok := true
	switch id {
	case oidContentType:
		ok = readOID(&values, oidData) && values.Empty()
	case oidMessageDigest:
		ok = values.ReadASN1Bytes(&s.digest, asn1.OCTET_STRING) && values.Empty() && len(s.digest) == s.Hash.Size()
	case oidSigningTime:
		if values.PeekASN1Tag(asn1.GeneralizedTime) {
			ok = values.ReadASN1GeneralizedTime(&s.Time)
		} else {
			ok = values.ReadASN1UTCTime(&s.Time)
		}
		ok = ok && values.Empty()
		s.Time = s.Time.UTC()
	case oidAlgorithms:
		var list, signature cryptobyte.String
		ok = values.ReadASN1(&list, asn1.SEQUENCE) && values.Empty()
		protected, is := readAlgorithm(&list)
		if !ok || !is || !bytes.Equal(protected.full, digest.full) || !list.ReadASN1(&signature, context(1)) || !list.Empty() {
			return ErrVerification
		}
		var inner cryptobyte.String // the tag is implicit
		full := cryptobyte.String(s.algorithm.full)
		if !full.ReadASN1(&inner, asn1.SEQUENCE) || !bytes.Equal(inner, signature) {
			return ErrVerification
		}
	case oidSigningCertV2:
		return s.checkSigner(values, crypto.SHA256)
	case oidSigningCert:
		return s.checkSigner(values, crypto.SHA1)
	}
	if !ok {
		return fmt.Errorf("%w: its signed attributes are damaged", ErrFormat)
	}
	return nil
}

// checkSigner compares the signer's certificate with the first that signing-certificate-v2 names (RFC 5035 section 5.4.1), or the older attribute
// of SHA-1 alone (RFC 2634 section 5.4). hash is the default.
func (s *Signature) checkSigner(values cryptobyte.String, hash crypto.Hash) error {
	damaged := fmt.Errorf("%w: its signed attributes are damaged", ErrFormat)
	var attribute, list, certificate, digest cryptobyte.String
	if !values.ReadASN1(&attribute, asn1.SEQUENCE) || !values.Empty() || !attribute.ReadASN1(&list, asn1.SEQUENCE) || !list.ReadASN1(&certificate, asn1.SEQUENCE) {
		return damaged
	}
	if certificate.PeekASN1Tag(asn1.SEQUENCE) {
		a, ok := readAlgorithm(&certificate)
		if !ok {
			return damaged
		}
		h := byID(a.id)
		if h == nil {
			return fmt.Errorf("%w: the signer's certificate is named by a digest that is not SHA-2", ErrUnsupported)
		}
		hash = h.hash
	}
	if !certificate.ReadASN1(&digest, asn1.OCTET_STRING) {
		return damaged
	}
	sum := hash.New()
	sum.Write(s.Chain[0].Raw)
	if !bytes.Equal(sum.Sum(nil), digest) {
		return ErrVerification
	}
	return nil
}

package cose

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/kmsd-project/kmsd/client/jose"
)

// tagSign1 is the tag of a COSE_Sign1 message (RFC 9052 section 2).
const tagSign1 = 18

// SignOptions says what a message looks like.
type SignOptions struct {
	Algorithm   jose.Algorithm // always in the protected header
	Protected   Header
	Unprotected Header // what may be changed by anybody; no label of it may be in Protected, too
	RFC9360     bool   // write x5t and x5u as RFC 9360 has them, not as MOSIP does; both are read
	Detached    bool   // leave the payload out of the message
}

// sign1 is the array of a message.
type sign1 struct {
	_           struct{} `cbor:",toarray"`
	Protected   cbor.RawMessage
	Unprotected cbor.RawMessage
	Payload     cbor.RawMessage
	Signature   cbor.RawMessage
}

// sign1Items is the first byte of that array in its shortest encoding.
const sign1Items = majorArray<<5 | 4

// null is the payload of a message that has none.
var null = []byte{7<<5 | 22}

// Sign returns a COSE_Sign1 message with its tag.
func Sign(ctx context.Context, s jose.Signer, payload []byte, o SignOptions) ([]byte, error) {
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("%w: payload of %d bytes, at most %d", ErrTooLarge, len(payload), MaxPayload)
	}
	algorithm, err := number(o.Algorithm)
	if err != nil {
		return nil, err
	}
	protected := map[any]any{labelAlgorithm: algorithm}
	if err := o.Protected.fill(protected, o.RFC9360); err != nil {
		return nil, err
	}
	unprotected := make(map[any]any)
	if err := o.Unprotected.fill(unprotected, o.RFC9360); err != nil {
		return nil, err
	}
	if err := disjoint(protected, unprotected); err != nil {
		return nil, err
	}
	header, err := encodeHeader(protected)
	if err != nil {
		return nil, err
	}
	var m sign1
	if m.Unprotected, err = encodeHeader(unprotected); err != nil {
		return nil, err
	}
	input, err := signingInput(header, payload)
	if err != nil {
		return nil, err
	}
	signature, err := s.SignJWS(ctx, o.Algorithm, input)
	if err != nil {
		return nil, err
	}
	if len(signature) == 0 || len(signature) > maxSignature {
		return nil, fmt.Errorf("%w: a signature of %d bytes", ErrFormat, len(signature))
	}
	m.Payload = null
	for _, f := range []struct {
		to   *cbor.RawMessage
		b    []byte
		have bool
	}{{&m.Protected, header, true}, {&m.Payload, payload, !o.Detached}, {&m.Signature, signature, true}} {
		if !f.have {
			continue
		}
		if *f.to, err = encoder.Marshal(notNil(f.b)); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrFormat, err)
		}
	}
	message, err := encoder.Marshal(cbor.Tag{Number: tagSign1, Content: m})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return message, nil
}

// signingInput is what is signed: the Sig_structure of RFC 9052 section 4.4, without external data.
func signingInput(protected, payload []byte) ([]byte, error) {
	input, err := encoder.Marshal([]any{"Signature1", notNil(protected), []byte{}, notNil(payload)})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return input, nil
}

// notNil makes sure that no bytes are encoded as a byte string and not as null.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// disjoint refuses labels that are in both headers (RFC 9052 section 3).
func disjoint[V any](protected, unprotected map[any]V) error {
	for label := range unprotected {
		if _, ok := protected[label]; ok {
			return fmt.Errorf("%w: label %s is in both headers", ErrFormat, printed(label))
		}
	}
	return nil
}

// Signed is a message that was parsed and not verified.
type Signed struct {
	Algorithm   jose.Algorithm
	Protected   *Header
	Unprotected *Header // not signed: anybody can have changed it
	Detached    bool    // the message has no payload: it has to be given to Verify
	protected   []byte
	payload     []byte
	signature   []byte
}

// Parse parses a COSE_Sign1 message, with or without its tag. Nothing in the result may be believed before Verify.
func Parse(message []byte) (*Signed, error) {
	if len(message) > maxMessage {
		return nil, fmt.Errorf("%w: %d bytes", ErrTooLarge, len(message))
	}
	b, _ := withoutTag(message, tagSign1)
	if len(b) == 0 || b[0] != sign1Items {
		return nil, fmt.Errorf("%w: no array of four items", ErrFormat)
	}
	var m sign1
	if err := splitter.Unmarshal(b, &m); err != nil {
		return nil, malformed("message", err)
	}
	s := &Signed{Detached: bytes.Equal(m.Payload, null)}
	for _, f := range []struct {
		to   *[]byte
		raw  []byte
		what string
		most int
	}{{&s.protected, m.Protected, "protected header", maxHeader}, {&s.payload, m.Payload, "payload", MaxPayload}, {&s.signature, m.Signature, "signature", maxSignature}} {
		if f.to == &s.payload && s.Detached {
			continue
		}
		var err error
		if *f.to, err = decodeBytes(f.raw, f.what); err != nil {
			return nil, err
		}
		if len(*f.to) > f.most {
			return nil, fmt.Errorf("%w: %s of %d bytes, at most %d", ErrTooLarge, f.what, len(*f.to), f.most)
		}
	}
	if len(s.signature) == 0 {
		return nil, fmt.Errorf("%w: the message is not signed", ErrFormat)
	}
	return s, s.parseHeaders(m.Unprotected)
}

func (s *Signed) parseHeaders(raw []byte) error {
	protected, err := splitHeader(s.protected)
	if err != nil {
		return err
	}
	unprotected, err := splitHeader(raw)
	if err != nil {
		return err
	}
	if err := disjoint(protected, unprotected); err != nil {
		return err
	}
	if _, ok := unprotected[labelCritical]; ok {
		return fmt.Errorf("%w: critical labels have to be protected (RFC 9052 section 3.1)", ErrFormat)
	}
	if _, ok := unprotected[labelAlgorithm]; ok {
		return fmt.Errorf("%w: the algorithm is not protected", ErrFormat)
	}
	if err := checkCritical(protected); err != nil {
		return err
	}
	number, ok := protected[labelAlgorithm]
	if !ok {
		return fmt.Errorf("%w: the protected header names no algorithm", ErrFormat)
	}
	var algorithm any
	if err := decode(number, &algorithm, "algorithm"); err != nil {
		return err
	}
	switch n := algorithm.(type) {
	case int64:
		if s.Algorithm, ok = algorithms[n]; !ok {
			return fmt.Errorf("%w: algorithm %d", ErrUnsupported, n)
		}
	case string:
		return fmt.Errorf("%w: algorithm %s", ErrUnsupported, printed(n))
	default:
		return fmt.Errorf("%w: the algorithm is neither integer nor text", ErrFormat)
	}
	delete(protected, labelAlgorithm)
	if s.Protected, err = decodeHeader(protected); err != nil {
		return err
	}
	s.Unprotected, err = decodeHeader(unprotected)
	return err
}

// checkCritical refuses critical labels that are not understood or not there (RFC 9052 section 3.1).
func checkCritical(protected map[any]cbor.RawMessage) error {
	raw, ok := protected[labelCritical]
	if !ok {
		return nil
	}
	delete(protected, labelCritical)
	var labels []any
	if !isMajor(raw, majorArray) {
		return fmt.Errorf("%w: the critical labels are no array", ErrFormat)
	}
	if err := decode(raw, &labels, "critical labels"); err != nil {
		return err
	}
	if len(labels) == 0 {
		return fmt.Errorf("%w: no critical labels", ErrFormat)
	}
	for _, label := range labels {
		switch label {
		case labelAlgorithm, labelContentType, labelKeyID, labelChain, labelThumbprint, labelURL:
		default:
			return fmt.Errorf("%w: critical label %s", ErrUnsupported, printed(label))
		}
		if _, ok := protected[label]; !ok {
			return fmt.Errorf("%w: critical label %s is not there", ErrFormat, printed(label))
		}
	}
	return nil
}

// Verify checks the signature with a key that the caller believes and returns the payload. detached is the payload of a message
// that has none, nil otherwise. ErrVerification says nothing about why.
func (s *Signed) Verify(public crypto.PublicKey, detached []byte) ([]byte, error) {
	payload := s.payload
	switch {
	case s.Detached && detached == nil:
		return nil, fmt.Errorf("%w: the message has no payload of its own", ErrFormat)
	case s.Detached && len(detached) > MaxPayload:
		return nil, fmt.Errorf("%w: payload of %d bytes, at most %d", ErrTooLarge, len(detached), MaxPayload)
	case s.Detached:
		payload = detached
	case detached != nil:
		return nil, fmt.Errorf("%w: the message has a payload of its own", ErrFormat)
	}
	input, err := signingInput(s.protected, payload)
	if err != nil {
		return nil, err
	}
	if s.Algorithm.Verify(public, input, s.signature) != nil {
		return nil, ErrVerification
	}
	return payload, nil
}

// Leaf returns the first certificate of x5chain, from the protected header if it has one, checked against the x5t of either
// header, and nil if there is none. Whether to believe it is for the caller to find out.
func (s *Signed) Leaf(parse func(der []byte) (*x509.Certificate, error)) (*x509.Certificate, error) {
	chain := s.Protected.Chain
	if len(chain) == 0 {
		chain = s.Unprotected.Chain
	}
	if len(chain) == 0 {
		return nil, nil
	}
	sum := sha256.Sum256(chain[0])
	for _, thumbprint := range [][]byte{s.Protected.Thumbprint, s.Unprotected.Thumbprint} {
		if len(thumbprint) > 0 && !bytes.Equal(thumbprint, sum[:]) {
			return nil, fmt.Errorf("%w: x5chain and x5t do not belong together", ErrFormat)
		}
	}
	c, err := parse(chain[0])
	if err != nil {
		return nil, fmt.Errorf("%w: x5chain: %w", ErrFormat, err)
	}
	return c, nil
}

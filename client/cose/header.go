package cose

import (
	"crypto/sha256"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// Labels of headers (RFC 9052 section 3.1, RFC 9360 section 2).
const (
	labelAlgorithm   = int64(1)
	labelCritical    = int64(2)
	labelContentType = int64(3)
	labelKeyID       = int64(4)
	labelChain       = int64(33) // x5chain
	labelThumbprint  = int64(34) // x5t
	labelURL         = int64(35) // x5u
)

// headerLabels are those that Header.Extra must not contain.
var headerLabels = []int64{labelAlgorithm, labelCritical, labelContentType, labelKeyID, labelChain, labelThumbprint, labelURL}

const (
	tagURI          = 32  // RFC 8949 section 3.4.5.3
	algorithmSHA256 = -16 // RFC 9054 section 3.1
)

// Header is the protected or the unprotected header, without the algorithm.
type Header struct {
	ContentType any      // content type: a string, or an int64 for a CoAP content format; none when nil
	KeyID       []byte   // kid; MOSIP puts in the characters of a key's kid
	Chain       [][]byte // x5chain: certificates in DER, leaf first
	Thumbprint  []byte   // x5t: the SHA-256 of the leaf
	URL         string   // x5u
	Extra       map[any]any
	// Extra has what is not listed, under an int64 or a string. Values that were read are int64, float64, bool, nil, string,
	// []byte, []any or map[any]any.
}

// fill puts the header into a map that is going to be encoded. MOSIP writes the thumbprint as a bare byte string and the URL as
// bare text; RFC 9360 wants the thumbprint together with its algorithm and the URL with a tag.
func (h *Header) fill(m map[any]any, rfc9360 bool) error {
	switch c := h.ContentType.(type) {
	case nil:
	case string, int64:
		if n, ok := c.(int64); ok && (n < 0 || n > 0xffff) {
			return fmt.Errorf("%w: content format %d", ErrFormat, n)
		}
		m[labelContentType] = c
	default:
		return fmt.Errorf("%w: a content type of type %T; string or int64", ErrFormat, c)
	}
	if len(h.KeyID) > 0 {
		m[labelKeyID] = h.KeyID
	}
	switch {
	case len(h.Chain) > maxChain:
		return fmt.Errorf("%w: %d certificates, at most %d", ErrTooLarge, len(h.Chain), maxChain)
	case len(h.Chain) == 1:
		m[labelChain] = h.Chain[0]
	case len(h.Chain) > 1:
		m[labelChain] = h.Chain
	}
	switch {
	case len(h.Thumbprint) == 0:
	case len(h.Thumbprint) != sha256.Size:
		return fmt.Errorf("%w: a thumbprint of %d bytes is no SHA-256", ErrFormat, len(h.Thumbprint))
	case rfc9360:
		m[labelThumbprint] = []any{algorithmSHA256, h.Thumbprint}
	default:
		m[labelThumbprint] = h.Thumbprint
	}
	switch {
	case h.URL == "":
	case rfc9360:
		m[labelURL] = cbor.Tag{Number: tagURI, Content: h.URL}
	default:
		m[labelURL] = h.URL
	}
	return addRest(m, h.Extra, headerLabels, "header label")
}

// encodeHeader encodes a header and makes sure that it can be read again.
func encodeHeader(m map[any]any) ([]byte, error) {
	b, err := encoder.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%w: header: %w", ErrFormat, err)
	}
	labels, err := splitHeader(b)
	if err != nil {
		return nil, err
	}
	delete(labels, labelAlgorithm)
	if _, err := decodeHeader(labels); err != nil {
		return nil, err
	}
	return b, nil
}

// splitHeader splits a header into its labels.
func splitHeader(b []byte) (map[any]cbor.RawMessage, error) {
	if len(b) > maxHeader {
		return nil, fmt.Errorf("%w: header of %d bytes, at most %d", ErrTooLarge, len(b), maxHeader)
	}
	return decodeMap(b, "header")
}

// decodeHeader parses the labels of a header but the algorithm and the critical ones. It empties labels.
func decodeHeader(labels map[any]cbor.RawMessage) (*Header, error) {
	h := &Header{}
	for _, f := range []struct {
		label int64
		parse func(raw []byte) error
	}{
		{labelContentType, h.parseContentType},
		{labelKeyID, func(raw []byte) (err error) { h.KeyID, err = decodeBytes(raw, "kid"); return err }},
		{labelChain, h.parseChain},
		{labelThumbprint, h.parseThumbprint},
		{labelURL, func(raw []byte) (err error) {
			text, _ := withoutTag(raw, tagURI)
			h.URL, err = decodeText(text, "x5u")
			return err
		}},
	} {
		raw, ok := labels[f.label]
		if !ok {
			continue
		}
		delete(labels, f.label)
		if err := f.parse(raw); err != nil {
			return nil, err
		}
	}
	var err error
	h.Extra, err = decodeRest(labels, "header label")
	return h, err
}

func (h *Header) parseContentType(raw []byte) error {
	if err := decode(raw, &h.ContentType, "content type"); err != nil {
		return err
	}
	switch c := h.ContentType.(type) {
	case string:
		return nil
	case int64:
		if c >= 0 && c <= 0xffff {
			return nil
		}
	}
	return fmt.Errorf("%w: the content type is neither text nor a content format", ErrFormat)
}

// parseChain reads one certificate or an array of them.
func (h *Header) parseChain(raw []byte) error {
	list := []cbor.RawMessage{raw}
	if isMajor(raw, majorArray) {
		list = nil
		if err := decode(raw, &list, "x5chain"); err != nil {
			return err
		}
	}
	if len(list) == 0 || len(list) > maxChain {
		return fmt.Errorf("%w: %d certificates; 1 to %d", ErrFormat, len(list), maxChain)
	}
	for _, item := range list {
		der, err := decodeBytes(item, "x5chain")
		if err != nil {
			return err
		}
		h.Chain = append(h.Chain, der)
	}
	return nil
}

// parseThumbprint reads MOSIP's bare hash and the pair of RFC 9360.
func (h *Header) parseThumbprint(raw []byte) error {
	if isMajor(raw, majorArray) {
		var pair []cbor.RawMessage
		if err := decode(raw, &pair, "x5t"); err != nil {
			return err
		}
		if len(pair) != 2 {
			return fmt.Errorf("%w: x5t is no pair of algorithm and hash", ErrFormat)
		}
		var algorithm any
		if err := decode(pair[0], &algorithm, "x5t"); err != nil {
			return err
		}
		if algorithm != int64(algorithmSHA256) {
			return fmt.Errorf("%w: x5t that is no SHA-256", ErrUnsupported)
		}
		raw = pair[1]
	}
	sum, err := decodeBytes(raw, "x5t")
	if err != nil {
		return err
	}
	if len(sum) != sha256.Size {
		return fmt.Errorf("%w: x5t of %d bytes is no SHA-256", ErrFormat, len(sum))
	}
	h.Thumbprint = sum
	return nil
}

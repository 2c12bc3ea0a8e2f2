package cms

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"regexp"
)

// ErrPDF says that a PDF document has not been prepared for a signature, or that the space left in it is too small.
var ErrPDF = fmt.Errorf("%w: the PDF document is not prepared for a signature", ErrFormat)

// In a prepared document: the space for the signature, hexadecimal zeros, and the numbers of the byte range, of which the first is 0 already.
var (
	pdfContents  = regexp.MustCompile(`/Contents[ \r\n]*<(0{512,})>`)
	pdfByteRange = regexp.MustCompile(`/ByteRange[ \r\n]*\[[ \r\n]*0[ \r\n]+[^\]<>()]{1,200}\]`)
)

// SignPDF signs a PDF document that has been prepared for it (ISO 32000-2 section 12.8.1), as libraries for PDF do it for signatures that are made
// elsewhere ("external signing"): it has one signature dictionary whose /Contents is a hexadecimal string of zeros, at least 512 of them, and whose
// /ByteRange is an array that begins with 0 and goes on with anything as long as three numbers of ten digits. SubFilter is adbe.pkcs7.detached
// or ETSI.CAdES.detached; o.Time stays zero for the latter. The signature of a chain of three RSA certificates takes some 10,000 zeros.
//
// SignPDF returns the document with both filled in; it has the same length. Errors wrap ErrPDF, or are those of Sign.
func SignPDF(signer crypto.Signer, chain []*x509.Certificate, pdf []byte, o Options) ([]byte, error) {
	spaces := pdfContents.FindAllSubmatchIndex(pdf, 2)
	if len(spaces) != 1 {
		return nil, fmt.Errorf("%w: /Contents has no zeros, or more than one has", ErrPDF)
	}
	zeros := span{spaces[0][2], spaces[0][3]}
	numbers, err := findByteRange(pdf, zeros)
	if err != nil {
		return nil, err
	}
	// The signature covers all but the string itself, its brackets included.
	before, after := zeros.start-1, zeros.end+1
	signed := bytes.Clone(pdf)
	text := fmt.Appendf(nil, "/ByteRange [0 %d %d %d", before, after, len(pdf)-after)
	place := numbers.of(signed)
	if len(text)+1 > len(place) {
		return nil, fmt.Errorf("%w: /ByteRange is too short", ErrPDF)
	}
	for i := copy(place, text); i < len(place)-1; i++ {
		place[i] = ' '
	}
	place[len(place)-1] = ']'
	der, err := Sign(signer, chain, io.MultiReader(bytes.NewReader(signed[:before]), bytes.NewReader(signed[after:])), o)
	if err != nil {
		return nil, err
	}
	if hex.EncodedLen(len(der)) > zeros.end-zeros.start {
		return nil, fmt.Errorf("%w: the signature has %d bytes, and /Contents space for %d", ErrPDF, len(der), (zeros.end-zeros.start)/2)
	}
	hex.Encode(zeros.of(signed), der) // the zeros after it stay
	return signed, nil
}

// span is a part of a document.
type span struct{ start, end int }

func (s span) of(b []byte) []byte { return b[s.start:s.end] }

// findByteRange returns the byte range in the dictionary of the space for the signature: the one in the same object.
func findByteRange(pdf []byte, zeros span) (span, error) {
	start := max(bytes.LastIndex(pdf[:zeros.start], []byte(" obj")), 0)
	end := bytes.Index(pdf[zeros.end:], []byte("endobj"))
	if end < 0 {
		return span{}, fmt.Errorf("%w: the object with /Contents has no end", ErrPDF)
	}
	object := pdf[start : zeros.end+end]
	found := pdfByteRange.FindAllIndex(object, 2)
	if len(found) != 1 {
		return span{}, fmt.Errorf("%w: the object with /Contents has no /ByteRange [0 ...], or more than one", ErrPDF)
	}
	return span{start + found[0][0], start + found[0][1]}, nil
}

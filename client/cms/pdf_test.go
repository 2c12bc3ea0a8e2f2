package cms_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/client/cms"
)

// prepared is a document of one empty page with a signature field and space for a signature.
func prepared(byteRange string, zeros int) []byte {
	var b bytes.Buffer
	b.WriteString("%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
	objects := []string{
		"<< /Type /Catalog /Pages 2 0 R /AcroForm << /SigFlags 3 /Fields [4 0 R] >> >>",
		"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
		"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 300] /Annots [4 0 R] >>",
		"<< /Type /Annot /Subtype /Widget /FT /Sig /T (Signature) /Rect [0 0 0 0] /P 3 0 R /F 132 /V 5 0 R >>",
		"<< /Type /Sig /Filter /Adobe.PPKLite /SubFilter /adbe.pkcs7.detached /M (D:20261123043000Z) /ByteRange " + byteRange + " /Contents <" + strings.Repeat("0", zeros) + "> >>",
	}
	offsets := make([]int, len(objects))
	for i, o := range objects {
		offsets[i] = b.Len()
		fmt.Fprintf(&b, "%d 0 obj\n%s\nendobj\n", i+1, o)
	}
	table := b.Len()
	fmt.Fprintf(&b, "xref\n0 %d\n0000000000 65535 f \n", len(objects)+1)
	for _, at := range offsets {
		fmt.Fprintf(&b, "%010d 00000 n \n", at)
	}
	fmt.Fprintf(&b, "trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n", len(objects)+1, table)
	return b.Bytes()
}

const placeholder = "[0 ********** ********** **********]"

// verifyPDF reads the byte range as a reader of PDF does, and verifies what it names.
func verifyPDF(t *testing.T, pdf []byte) error {
	t.Helper()
	match := regexp.MustCompile(`/ByteRange \[0 (\d+) (\d+) (\d+) *\]`).FindSubmatch(pdf)
	if match == nil {
		t.Fatal("no byte range")
	}
	var n [3]int
	for i := range n {
		fmt.Sscan(string(match[i+1]), &n[i])
	}
	if n[1]+n[2] != len(pdf) || pdf[n[0]] != '<' || pdf[n[1]-1] != '>' {
		t.Fatalf("the byte range %v does not leave out the signature alone", n)
	}
	signature, err := hex.DecodeString(string(pdf[n[0]+1 : n[1]-1]))
	if err != nil {
		t.Fatal(err)
	}
	_, err = cms.Verify(signature, io.MultiReader(bytes.NewReader(pdf[:n[0]]), bytes.NewReader(pdf[n[1]:])))
	return err
}

func TestSignPDF(t *testing.T) {
	for name, s := range signers() {
		pdf := prepared(placeholder, 12000)
		signed, err := cms.SignPDF(s.key, s.chain, pdf, cms.Options{})
		if err != nil || len(signed) != len(pdf) {
			t.Fatalf("%s: %v, %d bytes of %d", name, err, len(signed), len(pdf))
		}
		if err := verifyPDF(t, signed); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		signed[bytes.Index(signed, []byte("300 300"))] = '4'
		if err := verifyPDF(t, signed); !errors.Is(err, cms.ErrVerification) {
			t.Errorf("%s: a changed document: %v", name, err)
		}
	}
	s := signers()["p256"]
	good := prepared(placeholder, 12000)
	for name, pdf := range map[string][]byte{
		"nothing":         nil,
		"no zeros":        prepared(placeholder, 100),
		"little space":    prepared(placeholder, 600),
		"no byte range":   prepared("[1 2 3 4]", 12000),
		"short range":     prepared("[0 0 0 0]", 12000),
		"signed":          must(cms.SignPDF(s.key, s.chain, good, cms.Options{})),
		"two spaces":      append(bytes.Clone(good), good...),
		"without its end": good[:bytes.LastIndex(good, []byte("endobj"))],
	} {
		if _, err := cms.SignPDF(s.key, s.chain, pdf, cms.Options{}); !errors.Is(err, cms.ErrPDF) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func FuzzSignPDF(f *testing.F) {
	f.Add(prepared(placeholder, 12000))
	s := signers()["ed25519"]
	f.Fuzz(func(t *testing.T, pdf []byte) {
		if signed, err := cms.SignPDF(s.key, s.chain, pdf, cms.Options{}); err == nil && len(signed) != len(pdf) {
			t.Error("another length")
		}
	})
}

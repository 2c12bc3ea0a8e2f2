package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func decodeAllBase64(text string) ([]byte, error) {
	b, err := io.ReadAll((&rawFlags{}).reader(strings.NewReader(text)))
	return b, base64Error(err)
}

// TestBase64 reads what MOSIP reads, and refuses the rest.
func TestBase64(t *testing.T) {
	want := []byte{0xfb, 0xff, 0xfe, 1, 2}
	for _, text := range []string{
		base64.RawURLEncoding.EncodeToString(want), base64.URLEncoding.EncodeToString(want), base64.StdEncoding.EncodeToString(want),
		base64.RawStdEncoding.EncodeToString(want), "-__-\r\n AQI=\n", "\n-__-AQI \n",
	} {
		if got, err := decodeAllBase64(text); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q: %x, %v", text, got, err)
		}
		slow := (&rawFlags{}).reader(iotest.OneByteReader(strings.NewReader(text)))
		if got, err := io.ReadAll(slow); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%q, byte by byte: %x, %v", text, got, err)
		}
	}
	for _, text := range []string{"-__/", "+_", "A", "AQI=AQI=", "AQ=I", "AQI===", "AQJ", "a b!", "é"} {
		if got, err := decodeAllBase64(text); !errors.Is(err, errBase64) {
			t.Errorf("%q: %x, %v", text, got, err)
		}
	}
	if got, err := decodeAllBase64(""); err != nil || len(got) > 0 {
		t.Errorf("nothing: %x, %v", got, err)
	}
	wrong := errors.New("wrong")
	if _, err := io.ReadAll((&rawFlags{}).reader(iotest.ErrReader(wrong))); !errors.Is(base64Error(err), wrong) {
		t.Errorf("what cannot be read: %v", err)
	}
	var out bytes.Buffer
	w := (&rawFlags{}).writer(&out)
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil || out.String() != "-__-AQI\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

func TestZKTable(t *testing.T) {
	row := "7,AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=,Active\n"
	for _, text := range []string{row, "id,key,key_status\n" + row, "ID,key\n" + row} {
		keys, err := parseZKTable([]byte(text))
		if err != nil || len(keys) != 1 || keys[0].Index != 7 || keys[0].Wrapped[31] != 31 || keys[0].Inactive {
			t.Errorf("%q: %v, %v", text, keys, err)
		}
	}
	for _, text := range []string{"", "id,key,key_status\n", "x" + row, "7,AA==,Active\n", "7\n", row + "\"", "-1" + row, row + "id,key\n"} {
		if keys, err := parseZKTable([]byte(text)); err == nil {
			t.Errorf("%q: %v", text, keys)
		}
	}
}

func FuzzBase64(f *testing.F) {
	f.Add("-__-AQI=")
	f.Add("+//+ AQI\n")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := decodeAllBase64(text)
		if err != nil {
			return
		}
		letters := strings.NewReplacer(" ", "", "\t", "", "\r", "", "\n", "", "=", "", "+", "-", "/", "_").Replace(text)
		if again := base64.RawURLEncoding.EncodeToString(got); again != letters {
			t.Errorf("%q is read as %q", text, again)
		}
	})
}

func FuzzZKTable(f *testing.F) {
	f.Add([]byte("id,key,key_status\n7,AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=,Active\n"))
	f.Fuzz(func(t *testing.T, table []byte) {
		keys, err := parseZKTable(table)
		for _, k := range keys {
			if len(k.Wrapped) != 32 || err != nil {
				t.Errorf("%v, %v", k, err)
			}
		}
	})
}

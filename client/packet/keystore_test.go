package packet

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"testing"
)

func TestCheckPrivateKey(t *testing.T) {
	module, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	larger, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := WrapPrivateKey(&module.PublicKey, make([]byte, 1218))
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckPrivateKey(&module.PublicKey, blob); err != nil {
		t.Error(err)
	}
	for what, bad := range map[string][]byte{"cut": blob[:256+len(splitter)+tagSize+longIVSize], "a payload": append(make([]byte, 32), blob...), "no splitter": blob[:256], "nothing": nil} {
		if what == "a payload" {
			bad[0] = 1
		}
		if err := CheckPrivateKey(&module.PublicKey, bad); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := CheckPrivateKey(&larger.PublicKey, blob); !errors.Is(err, ErrFormat) {
		t.Errorf("under another module key: %v", err)
	}
	if err := CheckPrivateKey(&module.PublicKey, make([]byte, maxPrivateKey+1025)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
}

package engine

import (
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// What an operation costs beyond its mechanism: policy, rules, cache, audit.
func BenchmarkRandom16(b *testing.B) {
	h := newHouse(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.Random(b.Context(), h.app, 16, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncrypt1K(b *testing.B) {
	h := newHouse(b)
	h.create("APP/e", keyspec.AES256GCM)
	r := keyspec.Ref{Name: "APP/e"}
	data := make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := h.Encrypt(b.Context(), h.app, r, data, nil, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignEd25519(b *testing.B) {
	h := newHouse(b)
	h.create("APP/s", keyspec.Ed25519)
	r := keyspec.Ref{Name: "APP/s"}
	in := mechanism.Input{Message: make([]byte, 32)}
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := h.Sign(b.Context(), h.app, r, "", "", in, nil); err != nil {
			b.Fatal(err)
		}
	}
}

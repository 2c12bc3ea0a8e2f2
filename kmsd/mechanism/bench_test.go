package mechanism

import (
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// BenchmarkLoad is what a cache miss costs beyond the store.
func BenchmarkLoad(b *testing.B) {
	for _, row := range Table() {
		material := unhex(b, row.known.material)
		b.Run(string(row.Algorithm), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := row.Load(material); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSign signs a 32-byte digest or message in the default scheme.
func BenchmarkSign(b *testing.B) {
	for _, row := range Table() {
		if len(row.Schemes) == 0 {
			continue
		}
		key, dst := fixed(b, row.Algorithm), make([]byte, 0, 512)
		in := Input{Message: make([]byte, 32)}
		b.Run(string(row.Algorithm), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := key.Sign(dst, "", "", in); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkNewKey makes keys, the pairwise test included.
func BenchmarkNewKey(b *testing.B) {
	for _, a := range []keyspec.Algorithm{keyspec.ECDSAP256, keyspec.Ed25519, keyspec.X25519, keyspec.AES256GCM} {
		row := lookup(b, a)
		b.Run(string(a), func(b *testing.B) {
			for b.Loop() {
				if _, _, err := row.NewKey(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkMAC authenticates 1 KiB.
func BenchmarkMAC(b *testing.B) {
	key, dst, data := fixed(b, keyspec.HMACSHA256), make([]byte, 0, 32), make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := key.MAC(dst, data); err != nil {
			b.Fatal(err)
		}
	}
}

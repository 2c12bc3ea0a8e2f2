package tpm

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// BenchmarkDriver compares what the driver does with the bare command on a loaded object, in turns and on the same TPM. It reports the
// median and the 99th percentile of the driver and the ratio of the medians. With swtpm only the ratio means something.
func BenchmarkDriver(b *testing.B) {
	s := startSimulator(b)
	d := s.open(Config{})
	slotBlob, _ := enrol(b, d, enclave.Auth{})
	sl, err := decodeSlot(slotBlob)
	if err != nil {
		b.Fatal(err)
	}
	keys := make(map[keyspec.Algorithm]enclave.Blob)
	input := make(map[keyspec.Algorithm][]byte)
	for _, sp := range []enclave.Spec{spec(keyspec.ECDSAP256, keyspec.Sign), spec(keyspec.ECDHP256, keyspec.Agree), spec(keyspec.RSA2048, keyspec.Decrypt)} {
		blob, spki, err := d.Generate(limited(b), sp)
		if err != nil {
			b.Fatal(err)
		}
		keys[sp.Algorithm] = blob
		public, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			b.Fatal(err)
		}
		switch k := public.(type) {
		case *rsa.PublicKey:
			if input[sp.Algorithm], err = rsa.EncryptOAEP(sha256.New(), rand.Reader, k, make([]byte, 32), nil); err != nil {
				b.Fatal(err)
			}
		default:
			peer, err := ecdh.P256().GenerateKey(rand.Reader)
			if err != nil {
				b.Fatal(err)
			}
			if input[sp.Algorithm], err = x509.MarshalPKIXPublicKey(peer.PublicKey()); err != nil {
				b.Fatal(err)
			}
		}
	}
	do := func(a keyspec.Algorithm, u keyspec.Usage) func() error {
		return func() error {
			_, err := d.Do(limited(b), keys[a], enclave.Op{Usage: u, Input: input[a], Bound: testAAD}, nil)
			return err
		}
	}
	for _, bench := range []struct {
		name   string
		driver func() error
		blob   enclave.Blob
		bare   func(d *device, o *object, auth tpm2.Session) error
	}{
		{"unwrap", func() error {
			return d.Unwrap(limited(b), slotBlob, testAAD, enclave.Auth{}, make([]byte, enclave.SecretSize))
		}, nil, func(d *device, o *object, auth tpm2.Session) error {
			_, err := tpm2.Unseal{ItemHandle: o.with(auth)}.Execute(d)
			return err
		}},
		{"sign-ecdsa-p256", do(keyspec.ECDSAP256, keyspec.Sign), keys[keyspec.ECDSAP256], func(d *device, o *object, auth tpm2.Session) error {
			_, err := tpm2.Sign{KeyHandle: o.with(auth), Digest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
				InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA, Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
				Validation: tpm2.TPMTTKHashCheck{Tag: tpm2.TPMSTHashCheck}}.Execute(d)
			return err
		}},
		{"agree-p256", do(keyspec.ECDHP256, keyspec.Agree), keys[keyspec.ECDHP256], func(d *device, o *object, auth tpm2.Session) error {
			point, err := pointBytes(o.public)
			if err != nil {
				return err
			}
			_, err = tpm2.ECDHZGen{KeyHandle: o.with(auth), InPoint: tpm2.New2B(*pointOf(point))}.Execute(d)
			return err
		}},
		{"decrypt-rsa-2048", do(keyspec.RSA2048, keyspec.Decrypt), keys[keyspec.RSA2048], func(d *device, o *object, auth tpm2.Session) error {
			_, err := tpm2.RSADecrypt{KeyHandle: o.with(auth), CipherText: tpm2.TPM2BPublicKeyRSA{Buffer: input[keyspec.RSA2048]},
				InScheme: tpm2.TPMTRSADecrypt{Scheme: tpm2.TPMAlgOAEP, Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgOAEP, &tpm2.TPMSEncSchemeOAEP{HashAlg: tpm2.TPMAlgSHA256})}}.Execute(d)
			return err
		}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var driver, bare []time.Duration
			for b.Loop() {
				start := time.Now()
				if err := bench.driver(); err != nil {
					b.Fatal(err)
				}
				driver = append(driver, time.Since(start))
				took, err := call(limited(b), d, func(d *device) (time.Duration, error) {
					root, err := d.storageKey()
					if err != nil {
						return 0, err
					}
					public, private, auth := sl.public, sl.private, authValue(sl.salt, labelSlot, nil)
					if bench.blob != nil {
						k, err := decodeKey(bench.blob)
						if err != nil {
							return 0, err
						}
						public, private, auth = k.public, k.private, authValue(k.salt, labelKey, testAAD)
					}
					o, err := d.load(root, public, private)
					if err != nil {
						return 0, err
					}
					defer d.flush(o)
					start := time.Now()
					err = bench.bare(d, o, tpm2.PasswordAuth(auth))
					return time.Since(start), err
				})
				if err != nil {
					b.Fatal(err)
				}
				bare = append(bare, took)
			}
			slices.Sort(driver)
			slices.Sort(bare)
			b.ReportMetric(float64(driver[len(driver)/2].Microseconds()), "p50-us")
			b.ReportMetric(float64(driver[len(driver)*99/100].Microseconds()), "p99-us")
			b.ReportMetric(float64(driver[len(driver)/2])/float64(bare[len(bare)/2]), "ratio-to-bare")
		})
	}
}

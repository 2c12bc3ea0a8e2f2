package keyspec

import (
	"slices"
	"testing"
)

func TestSchemesNameTheirHash(t *testing.T) {
	for _, s := range Schemes() {
		if (s.Hash() == 0) != (s == PureEd25519) {
			t.Errorf("%s: hash %v", s, s.Hash())
		}
	}
	if Scheme("").Hash() != 0 {
		t.Error("no scheme has a hash")
	}
}

func TestAlgorithmsThatSignAreAsymmetric(t *testing.T) {
	for _, a := range Algorithms() {
		s := a.SignatureScheme()
		if s != "" && (!a.Asymmetric() || !slices.Contains(Schemes(), s)) {
			t.Errorf("%s signs by %q", a, s)
		}
		if a.IsRSA() != (len(a) == 8 && a[:4] == "rsa-") {
			t.Errorf("%s", a)
		}
	}
}

package pki

import (
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// names returns the common names on a path.
func names(path []*x509.Certificate) string {
	var list []string
	for _, c := range path {
		list = append(list, c.Subject.CommonName)
	}
	return strings.Join(list, " ")
}

// called makes a CA, or with ca false a leaf, of key, under a name, signed by signer.
func called(t *testing.T, signer string, issuer *x509.Certificate, key, name string, ca bool, change ...func(*x509.Certificate)) *x509.Certificate {
	return forge(t, signer, issuer, key, func(c *x509.Certificate) {
		c.RawSubject = subject(t, "CN="+name).RawName
		c.SubjectKeyId, _ = keyID(keys()[key].Public())
		c.SerialNumber = newSerial()
		c.KeyUsage |= x509.KeyUsageCRLSign
		if !ca {
			c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature
		}
		for _, f := range change {
			f(c)
		}
	})
}

func TestVerify(t *testing.T) {
	rootA := called(t, "p256", nil, "p256", "A", true)
	rootB := called(t, "p384", nil, "p384", "B", true)
	middle := called(t, "p256", rootA, "p256b", "M", true)
	leaf := called(t, "p256b", middle, "ed25519", "leaf", false)
	cross := called(t, "p384", rootB, "p256b", "M", true) // the same CA, certified by B as well
	expired := func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Minute) }
	old := called(t, "p256", rootA, "p256b", "M", true, expired)
	fake := called(t, "rsa", rootA, "p256b", "M", true)       // names A as its issuer, and A's key
	impostor := called(t, "rsa", nil, "rsa", "A", true)       // A's name, another key
	ring1 := called(t, "p521", nil, "p256", "ring 1", true)   // certified by ring 2
	ring2 := called(t, "p256", ring1, "p521", "ring 2", true) // and the other way round
	ring1 = called(t, "p521", ring2, "p256", "ring 1", true)
	ringed := called(t, "p256", ring1, "ed25519", "ringed", false)
	deep := []*x509.Certificate{called(t, "p256", nil, "p256", "D0", true)}
	for i := range MaxChain {
		deep = append(deep, called(t, "p256", deep[i], "p256", fmt.Sprintf("D%d", i+1), true))
	}
	slices.Reverse(deep)
	zero := called(t, "p256", rootA, "p256b", "zero", true, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true })
	underZero := called(t, "p256b", zero, "p384", "MZ", true)
	tooDeep := called(t, "p384", underZero, "ed25519", "deep", false)
	constrained := called(t, "p256", rootA, "p256b", "C", true, func(c *x509.Certificate) {
		c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, []string{"example.org"}
	})
	inside := called(t, "p256b", constrained, "ed25519", "in", false, func(c *x509.Certificate) { c.DNSNames = []string{"a.example.org"} })
	outside := called(t, "p256b", constrained, "ed25519", "out", false, func(c *x509.Certificate) { c.DNSNames = []string{"a.example.com"} })
	otherHint := called(t, "p256", &x509.Certificate{RawSubject: rootA.RawSubject, SubjectKeyId: []byte{1, 2, 3}}, "ed25519", "hint", false)

	type list = []*x509.Certificate
	var commands []string
	wants := map[string]string{}
	for _, c := range []struct {
		name  string
		chain list
		trust Trust
		want  string // the path
		codes string
	}{
		{"chain-given", list{leaf, middle, rootA}, Trust{Roots: list{rootA}}, "leaf M A", ""},
		{"any-order", list{leaf, rootA, rootB, middle}, Trust{Roots: list{rootA}}, "leaf M A", ""},
		{"from-the-store", list{leaf}, Trust{Roots: list{rootB, rootA}, Intermediates: list{middle}}, "leaf M A", ""},
		{"anchor-in-the-middle", list{leaf, middle}, Trust{Roots: list{middle}}, "leaf M", ""},
		{"root-alone", list{rootA}, Trust{Roots: list{rootA}}, "A", ""},
		{"cross-certified", list{leaf, middle, rootA}, Trust{Roots: list{rootB}, Intermediates: list{cross}}, "leaf M B", ""},
		{"expired-and-renewed", list{leaf}, Trust{Roots: list{rootA}, Intermediates: list{old, middle}}, "leaf M A", ""},
		{"forged-and-real", list{leaf, fake, impostor}, Trust{Roots: list{rootA}, Intermediates: list{middle}}, "leaf M A", ""},
		{"another-key-identifier", list{otherHint}, Trust{Roots: list{rootA}}, "hint A", ""},
		{"inside-constraints", list{inside, constrained}, Trust{Roots: list{rootA}}, "in C A", ""},

		{"no-roots", list{leaf, middle, rootA}, Trust{}, "leaf M A", "2 untrusted"},
		{"untrusted-root", list{leaf, middle, rootA}, Trust{Roots: list{rootB}}, "leaf M A", "2 untrusted"},
		{"stored-is-not-trusted", list{leaf}, Trust{Roots: list{rootB}, Intermediates: list{middle, rootA}}, "leaf M A", "2 untrusted"},
		{"issuer-unknown", list{leaf}, Trust{Roots: list{rootA}}, "leaf", "0 untrusted"},
		{"impostor", list{leaf, middle, impostor}, Trust{Roots: list{impostor}}, "leaf M", "1 untrusted"},
		{"forged", list{leaf, fake}, Trust{Roots: list{rootA}}, "leaf M", "1 bad-signature"},
		{"expired", list{leaf, old}, Trust{Roots: list{rootA}}, "leaf M A", "1 expired"},
		{"round-and-round", list{ringed, ring1, ring2}, Trust{Roots: list{rootA}}, "ringed ring 1 ring 2", "2 untrusted"},
		{"too-deep", deep[:MaxChain], Trust{Roots: list{rootA}, Intermediates: deep[MaxChain:]}, names(deep[:MaxChain]), "9 path-too-long"},
		{"path-length", list{tooDeep, underZero, zero}, Trust{Roots: list{rootA}}, "deep MZ zero A", "2 path-too-long"},
		{"outside-constraints", list{outside, constrained}, Trust{Roots: list{rootA}}, "out C A", "0 name-not-allowed"},
		{"removed-middle", list{leaf, middle}, Trust{Roots: list{rootA}, Removed: list{middle}}, "leaf M", "1 removed"},
		{"removed-root", list{leaf, middle, rootA}, Trust{Roots: list{rootB}, Removed: list{rootA}}, "leaf M A", "2 removed"},
		{"removed-and-not-sent", list{leaf}, Trust{Roots: list{rootB}, Intermediates: list{middle}, Removed: list{rootA}}, "leaf M A", "2 removed"},
		{"removed-leaf", list{leaf, middle}, Trust{Roots: list{rootA}, Removed: list{leaf}}, "leaf", "0 removed"},
		{"removed-key", list{leaf, cross}, Trust{Roots: list{rootB}, Removed: list{middle}}, "leaf M", "1 removed"},
		{"removed-and-replaced", list{leaf}, Trust{Roots: list{rootB}, Intermediates: list{cross}, Removed: list{middle}}, "leaf M B", ""},
		{"removed-root-cross-certified", list{leaf, middle, called(t, "p384", rootB, "p256", "A", true)}, Trust{Roots: list{rootB}, Removed: list{rootA}}, "leaf M A", "2 removed"},
		{"around-the-removed", list{leaf, old}, Trust{Roots: list{rootA}, Intermediates: list{middle}, Removed: list{old}}, "leaf M A", ""},
		{"empty", nil, Trust{Roots: list{rootA}}, "", "0 malformed"},
	} {
		v := c.trust.Verify(c.chain, now)
		if names(v.Path) != c.want || codes(v.Reasons) != c.codes || v.Trusted != (c.codes == "") {
			t.Errorf("%s: %v by %q: %q", c.name, v.Trusted, names(v.Path), v.Reasons)
		}
		if c.name == "another-key-identifier" || c.name == "too-deep" || len(c.chain) == 1 && c.chain[0] == rootA || len(c.trust.Roots) == 0 || len(c.trust.Removed) > 0 || len(c.chain) == 0 {
			continue // there the JDK has other rules, or none
		}
		others := slices.Concat(c.chain, c.trust.Intermediates)
		commands = append(commands, fmt.Sprintf("build %s %s %s %s %s", c.name, now.Format(time.RFC3339), writePEM(t, c.trust.Roots...), writePEM(t, c.chain[0]), writePEM(t, others...)))
		if wants[c.name] = "refused no path"; v.Trusted {
			wants[c.name] = fmt.Sprintf("ok %d", len(v.Path)-1)
		}
	}
	for name, answer := range java(t, commands...) {
		if answer != wants[name] {
			t.Errorf("java %s: %q, ours %q", name, answer, wants[name])
		}
	}
}

// TestVerifyIsBounded gives a heap of CAs that all certify one another under one name.
func TestVerifyIsBounded(t *testing.T) {
	var pool []*x509.Certificate
	kinds := []string{"rsa", "rsa2", "p256", "p256b", "p384", "p521", "ed25519", "ed25519b"}
	issuer := &x509.Certificate{RawSubject: subject(t, "CN=x").RawName}
	for _, signer := range kinds {
		for _, key := range kinds {
			pool = append(pool, called(t, signer, issuer, key, "x", true, func(c *x509.Certificate) { c.SubjectKeyId = nil }))
		}
	}
	began := time.Now()
	trust := Trust{Roots: []*x509.Certificate{called(t, "rsa", nil, "rsa", "A", true)}, Intermediates: pool}
	if v := trust.Verify(pool[1:2], now); v.Trusted || len(v.Reasons) == 0 || v.Reasons[0].Code != Untrusted || !strings.Contains(v.Reasons[0].Text, "too many") {
		t.Errorf("%v", v.Reasons)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("that took %s", took)
	}
}

func TestVerifyRevocation(t *testing.T) {
	rootA := called(t, "p256", nil, "p256", "A", true)
	middle := called(t, "p256", rootA, "p256b", "M", true)
	leaf := called(t, "p256b", middle, "ed25519", "leaf", false)
	rekeyed := called(t, "p256", rootA, "p384", "M", true) // M has got a new key
	impostor := called(t, "rsa", nil, "rsa", "M", true)
	list := func(key string, ca *x509.Certificate, next time.Duration, revoked ...*x509.Certificate) *CRL {
		l := RevocationList{Number: big.NewInt(1), ThisUpdate: now.Add(-time.Hour), NextUpdate: now.Add(next)}
		for _, c := range revoked {
			l.Revoked = append(l.Revoked, Revocation{c.SerialNumber, now.Add(-time.Minute), keyspec.Superseded})
		}
		der, err := SignCRL(keys()[key], ca, l)
		return mustCRL(t, der, err)
	}
	day := 24 * time.Hour
	for _, c := range []struct {
		name      string
		crls      []*CRL
		revoked   []Withdrawn
		at        time.Time
		codes     string
		unchecked string
	}{
		{"no lists", nil, nil, now, "", "[0 1]"},
		{"clean", []*CRL{list("p256b", middle, day), list("p256", rootA, day)}, nil, now, "", "[]"},
		{"one list", []*CRL{list("p256", rootA, day)}, nil, now, "", "[0]"},
		{"leaf", []*CRL{list("p256b", middle, day, leaf)}, nil, now, "0 revoked", "[1]"},
		{"leaf, before", []*CRL{list("p256b", middle, day, leaf)}, nil, now.Add(-30 * time.Minute), "", "[1]"},
		{"middle", []*CRL{list("p256", rootA, day, middle)}, nil, now, "1 revoked", "[0]"},
		{"both", []*CRL{list("p256b", middle, day, leaf), list("p256", rootA, day, middle)}, nil, now, "0 revoked, 1 revoked", "[]"},
		{"another's serial number", []*CRL{list("p256", rootA, day, leaf)}, nil, now, "", "[0]"},
		{"stale", []*CRL{list("p256b", middle, -time.Minute)}, nil, now, "0 stale-crl", "[1]"},
		{"stale and current", []*CRL{list("p256b", middle, -time.Minute), list("p256b", middle, day)}, nil, now, "", "[1]"},
		{"stale and says so", []*CRL{list("p256b", middle, -time.Minute, leaf), list("p256b", middle, day)}, nil, now, "0 revoked", "[1]"},
		{"by the new key of M", []*CRL{list("p384", rekeyed, day, leaf)}, nil, now, "0 revoked", "[1]"},
		{"by an impostor", []*CRL{list("rsa", impostor, day, leaf)}, nil, now, "", "[0 1]"},
		{"withdrawn", nil, []Withdrawn{{middle.RawSubject, Revocation{leaf.SerialNumber, now, keyspec.Superseded}}}, now, "0 revoked", "[1]"},
		{"withdrawn later", nil, []Withdrawn{{middle.RawSubject, Revocation{leaf.SerialNumber, now.Add(time.Hour), keyspec.Superseded}}}, now, "", "[1]"},
		{"withdrawn by another", nil, []Withdrawn{{rootA.RawSubject, Revocation{leaf.SerialNumber, now, keyspec.Superseded}}}, now, "", "[0 1]"},
	} {
		trust := Trust{Roots: []*x509.Certificate{rootA}, Intermediates: []*x509.Certificate{middle, rekeyed}, CRLs: c.crls, Revoked: c.revoked}
		v := trust.Verify([]*x509.Certificate{leaf}, c.at)
		if got := codes(v.Reasons); got != c.codes || v.Trusted != (got == "") || fmt.Sprint(v.Unchecked) != c.unchecked {
			t.Errorf("%s: %v %v, unchecked %v", c.name, v.Trusted, v.Reasons, v.Unchecked)
		}
	}
	// A path that is revoked does not stand in the way of one that is not.
	cross := called(t, "p384", nil, "p256b", "M", true)
	v := (&Trust{Roots: []*x509.Certificate{rootA, cross}, Intermediates: []*x509.Certificate{middle}, CRLs: []*CRL{list("p256", rootA, day, middle)}}).Verify([]*x509.Certificate{leaf, middle}, now)
	if !v.Trusted || !v.Path[1].Equal(cross) {
		t.Error(v.Reasons)
	}
	// What says most comes first.
	v = (&Trust{Roots: []*x509.Certificate{rootA}, Intermediates: []*x509.Certificate{middle}, CRLs: []*CRL{list("p256", rootA, day, middle)}}).Verify([]*x509.Certificate{leaf}, now.AddDate(2, 0, 0))
	if got := codes(v.Reasons); got != "1 revoked, 0 expired, 1 expired, 2 expired" {
		t.Error(got)
	}
}

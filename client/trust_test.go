package client

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func selfSigned(t *testing.T, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestVerifyTrust looks at what is asked and at what becomes of answers, one of them too long for its path.
func TestVerifyTrust(t *testing.T) {
	leaf, root := selfSigned(t, "leaf"), selfSigned(t, "root")
	at := time.Unix(1_800_000_000, 0)
	var asked proto.TrustVerify
	var reply proto.TrustVerdict
	f := newFake(t, func(c *fakeConn, r proto.Request) {
		asked = proto.TrustVerify{}
		if err := proto.Decode(r.Params, &asked); err != nil || r.Op != proto.OpTrustVerify {
			t.Errorf("%s: %v", r.Op, err)
		}
		c.reply(r, &reply)
	})
	c := f.dial()
	reply = proto.TrustVerdict{Trusted: true, Domain: "DEVICE", Partner: "Maker", Path: []proto.TrustStep{{Certificate: leaf.Raw, Unchecked: true}, {Certificate: root.Raw}}}
	v, err := c.VerifyTrust(t.Context(), "device", []*x509.Certificate{leaf, root}, at)
	if err != nil || !v.Trusted || v.Err() != nil || v.Partner != "Maker" || len(v.Path) != 2 || !v.Path[1].Equal(root) || len(v.Unchecked) != 1 || v.Unchecked[0] != 0 {
		t.Errorf("%+v %v", v, err)
	}
	if asked.Domain != "device" || len(asked.Chain) != 2 || string(asked.Chain[0]) != string(leaf.Raw) || asked.At != at.Unix() {
		t.Errorf("%+v", asked)
	}
	reply = proto.TrustVerdict{Domain: "DEVICE", Path: []proto.TrustStep{{Certificate: leaf.Raw}, {Unchecked: true}, {Certificate: root.Raw}},
		Reasons: []proto.TrustReason{{Index: 1, Code: "revoked", Text: "its issuer revoked it"}, {Index: 0, Code: "expired", Text: "x"}}}
	v, err = c.VerifyTrust(t.Context(), "DEVICE", []*x509.Certificate{leaf}, time.Time{})
	if err != nil || v.Trusted || asked.At != 0 || len(v.Path) != 1 {
		t.Fatalf("%+v %v", v, err)
	}
	if err := v.Err(); !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "DEVICE: certificate 1 of its path: its issuer revoked it (revoked)") {
		t.Error(err)
	}
	if err := (&TrustVerdict{}).Err(); !errors.Is(err, ErrUntrusted) {
		t.Error("no verdict is no trust: ", err)
	}
	reply = proto.TrustVerdict{Trusted: true, Path: []proto.TrustStep{{Certificate: []byte("rubbish")}}}
	if _, err := c.VerifyTrust(t.Context(), "DEVICE", []*x509.Certificate{leaf}, time.Time{}); err == nil {
		t.Error("took rubbish for a path")
	}
}

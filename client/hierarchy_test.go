//go:build linux

package client_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestHierarchy sets up an application as a program would, and verifies what it gets with crypto/x509.
func TestHierarchy(t *testing.T) {
	c, ctx := dial(t, client.WithAdmin()), t.Context()
	if _, err := c.CurrentCertificate(ctx, "HIERARCHY/one", client.Holder{}); !errors.Is(err, client.ErrNotAvailable) {
		t.Errorf("a key of no application: %v", err)
	}
	app := &client.Application{Name: "HIERARCHY", BaseDays: 10, BasePreExpireDays: 3, Subject: client.DN{Organization: "Tests", Country: "XX"}}
	set, err := c.SetApplication(ctx, app)
	if err != nil || set.BaseDays != 10 || set.Days != 1095 || set.BuiltIn {
		t.Fatalf("%+v, %v", set, err)
	}
	if kept, err := c.Application(ctx, "HIERARCHY", true); err != nil || kept.Days != 0 || kept.BaseDays != 10 {
		t.Errorf("as it was set: %+v, %v", kept, err)
	}
	var names []string
	for a, err := range c.Applications(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, a.Name)
	}
	if !slices.IsSorted(names) || !slices.Contains(names, "HIERARCHY") || !slices.Contains(names, "REGISTRATION") {
		t.Errorf("applications %v", names)
	}

	var answered *client.Error
	if _, err := c.GenerateMaster(ctx, "HIERARCHY", client.MasterKey{}); !errors.As(err, &answered) || answered.Remedy != "kmsctl master generate ROOT" {
		t.Errorf("without a root: %v", err)
	}
	root, err := c.GenerateMaster(ctx, "ROOT", client.MasterKey{})
	if err != nil || !root.Made || len(root.Chain) != 1 {
		t.Fatalf("%+v, %v", root, err)
	}
	if _, err := c.GenerateMaster(ctx, "HIERARCHY", client.MasterKey{Holder: client.Holder{Name: client.DN{CommonName: "module"}, AltNames: []string{"dns:module.example.org"}}}); err != nil {
		t.Fatal(err)
	}
	if k, err := c.GenerateMaster(ctx, "HIERARCHY/CACHE", client.MasterKey{Symmetric: true}); err != nil || len(k.Chain) > 0 || k.Expires.IsZero() {
		t.Errorf("an AES key: %+v, %v", k, err)
	}

	// Many ask at once, most of them over one connection: one key is made.
	const many = 64
	answers := make([]*client.CertifiedKey, many)
	var group sync.WaitGroup
	for i := range many {
		group.Go(func() {
			var err error
			if answers[i], err = c.CurrentCertificate(ctx, "HIERARCHY/one", client.Holder{}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if t.Failed() {
		t.FailNow()
	}
	made := 0
	for _, k := range answers {
		if k.Ref != "HIERARCHY/one@1" || !k.Chain[0].Equal(answers[0].Chain[0]) {
			t.Errorf("%s besides %s", k.Ref, answers[0].Ref)
		}
		if k.Made {
			made++
		}
	}
	if made != 1 {
		t.Errorf("%d of the answers made the key", made)
	}

	leaf := answers[0].Chain[0]
	roots, middle := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root.Chain[0])
	middle.AddCert(answers[0].Chain[1])
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: middle, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		t.Error(err)
	}
	if module := answers[0].Chain[1]; module.Subject.CommonName != "module" || !slices.Equal(module.DNSNames, []string{"module.example.org"}) || module.Subject.Organization[0] != "Tests" {
		t.Errorf("the module key is %s for %v", module.Subject, module.DNSNames)
	}
	if days := leaf.NotAfter.Sub(leaf.NotBefore); days != 10*24*time.Hour {
		t.Errorf("valid for %v", days)
	}
	if want := packet.KeyID(packet.UniqueIdentifier("HIERARCHY", "one", leaf.NotBefore)); answers[0].KeyID != want {
		t.Errorf("kid %s, want %s", answers[0].KeyID, want)
	}

	// A request of a key that only decrypts.
	if k, err := c.CurrentRequest(ctx, "HIERARCHY/one", client.Holder{}); err != nil {
		t.Error(err)
	} else if request, err := x509.ParseCertificateRequest(k.Request); err != nil || request.CheckSignature() != nil || request.Subject.String() != leaf.Subject.String() {
		t.Errorf("%+v, %v", request, err)
	}

	// What was encrypted to the first version is opened after the second was made, and both certificates are listed.
	sealed, err := packet.EncryptPayload(leaf, []byte("data"), packet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Rotate(ctx, "HIERARCHY/one"); err != nil {
		t.Fatal(err)
	}
	second, err := c.CurrentCertificate(ctx, "HIERARCHY/one", client.Holder{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := c.Key(ctx, "HIERARCHY/one")
	if err != nil {
		t.Fatal(err)
	}
	if opened, err := packet.DecryptPayload(ctx, key, sealed, packet.Options{}); err != nil || string(opened) != "data" {
		t.Errorf("%q, %v", opened, err)
	}
	var versions []*client.CertificateVersion
	for v, err := range c.CertificateVersions(ctx, "HIERARCHY/one") {
		if err != nil {
			t.Fatal(err)
		}
		versions = append(versions, v)
	}
	if len(versions) != 2 || !versions[0].Certificate.Equal(second.Chain[0]) || !versions[1].Certificate.Equal(leaf) || versions[1].State != keyspec.Deactivated ||
		versions[1].KeyID != answers[0].KeyID || versions[1].Thumbprint() != packet.Thumbprint(leaf) {
		t.Errorf("%+v", versions)
	}

	before := time.Now().Add(-time.Minute)
	if clock, err := c.AcceptClock(ctx); err != nil || clock.Now.Before(before) || clock.Seen.Before(before) {
		t.Errorf("%+v, %v", clock, err)
	}
}

// TestApplicationsAreForAdministrators tries the socket of applications.
func TestApplicationsAreForAdministrators(t *testing.T) {
	c, ctx := dial(t), context.Background()
	if _, err := c.SetApplication(ctx, &client.Application{Name: "OTHER"}); !errors.Is(err, client.ErrUnknownOp) {
		t.Errorf("app_set: %v", err)
	}
	if _, err := c.GenerateMaster(ctx, "ROOT", client.MasterKey{}); !errors.Is(err, client.ErrUnknownOp) {
		t.Errorf("master_generate: %v", err)
	}
	if _, err := c.AcceptClock(ctx); !errors.Is(err, client.ErrUnknownOp) {
		t.Errorf("clock_accept: %v", err)
	}
}

// TestPages reads lists that do not fit one answer.
func TestPages(t *testing.T) {
	c, ctx := dial(t, client.WithAdmin()), t.Context()
	const applications, versions = 8, 34
	for i := range applications {
		app := &client.Application{Name: fmt.Sprintf("PAGES.%02d", i)}
		if i%3 != 2 { // most of them large
			for r := range 100 {
				app.References = append(app.References, proto.AppReference{Reference: fmt.Sprintf("reference-%d-%s", r, strings.Repeat("x", 90))})
			}
		}
		if _, err := c.SetApplication(ctx, app); err != nil {
			t.Fatal(err)
		}
	}
	var found []string
	for a, err := range c.Applications(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(a.Name, "PAGES.") {
			found = append(found, a.Name)
		}
	}
	if len(found) != applications || !slices.IsSorted(found) {
		t.Errorf("%d of %d applications: %v", len(found), applications, found)
	}

	key := create(t, c, keyspec.Ed25519)
	for i := range versions {
		if i > 0 {
			if _, err := c.Rotate(ctx, key.Name()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.SelfSign(ctx, key.Name(), client.Subject{DN: fmt.Sprintf("CN=%d", i+1)}, client.CertProfile{}); err != nil {
			t.Fatal(err)
		}
	}
	want := uint32(versions)
	for v, err := range c.CertificateVersions(ctx, key.Name()) {
		if err != nil {
			t.Fatal(err)
		}
		if v.Version != want || v.Certificate.Subject.CommonName != fmt.Sprint(want) {
			t.Fatalf("version %d is of %s, want %d", v.Version, v.Certificate.Subject, want)
		}
		want--
	}
	if want != 0 {
		t.Errorf("the list ends at version %d", want+1)
	}
}

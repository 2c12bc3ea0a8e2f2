//go:build linux

package client_test

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func TestFindKey(t *testing.T) {
	c := dial(t)
	key := create(t, c, keyspec.ECDSAP256)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	public, err := ssh.NewPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for kind, sum := range map[string][32]byte{"spki-sha256": sha256.Sum256(spki), "ssh-sha256": sha256.Sum256(public.Marshal())} {
		info, number, err := c.FindKey(t.Context(), kind, sum[:])
		if err != nil || info.Name != key.Name() || number != 1 {
			t.Errorf("by %s: %+v, version %d, %v", kind, info, number, err)
		}
	}
	if _, _, err := c.FindKey(t.Context(), "spki-sha256", make([]byte, 32)); !errors.Is(err, client.ErrNotAvailable) {
		t.Errorf("a key that is not there: %v", err)
	}
}

func TestSetUses(t *testing.T) {
	app, admin := dial(t), dial(t, client.WithAdmin())
	name := fmt.Sprintf("test/%d", names.Add(1))
	key, err := app.Create(t.Context(), client.KeySpec{Name: name, Algorithm: string(keyspec.HMACSHA256), Uses: 2})
	if err != nil {
		t.Fatal(err)
	}
	mac := func() error {
		_, err := key.MAC(t.Context(), []byte("m"))
		return err
	}
	if err := errors.Join(mac(), mac()); err != nil {
		t.Fatal(err)
	}
	if err := mac(); !errors.Is(err, client.ErrExhausted) {
		t.Errorf("a third use: %v", err)
	}
	if _, err := app.SetUses(t.Context(), name, 1); !errors.Is(err, client.ErrUnsupported) {
		t.Errorf("an application allows itself one more: %v", err)
	}
	if info, err := admin.SetUses(t.Context(), name, 1); err != nil || !info.Limited || info.UsesLeft != 1 {
		t.Errorf("%+v %v", info, err)
	}
	if err := mac(); err != nil {
		t.Error(err)
	}
	if info, err := admin.SetUses(t.Context(), name, client.NoLimit); err != nil || info.Limited {
		t.Errorf("%+v %v", info, err)
	}
	if err := mac(); err != nil {
		t.Error(err)
	}
}

package engine

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// plantForeign puts the public half of somebody else's key into the store, with every usage that its algorithm knows.
func (h *house) plantForeign(name string, row *mechanism.Row, spki []byte) {
	h.t.Helper()
	now := h.clock.Now()
	key := &keystore.Key{
		Name: keyspec.Name(name), Algorithm: row.Algorithm, Usages: row.Usages, Origin: keyspec.Foreign, Protection: keyspec.Software,
		Owner: owner, Created: now, Current: 1, MinVersion: 1, Exportable: true,
		Versions: []keystore.Version{{Number: 1, State: keyspec.Active, Created: now, NotBefore: now, Expires: now.AddDate(1, 0, 0)}},
	}
	ch := keystore.Change{Key: key, Public: map[keyspec.Version]keystore.Public{1: {SPKI: spki}}, Aliases: Aliases(1, spki)}
	if err := h.store.Load().Apply(h.t.Context(), keystore.Commit{Changes: []keystore.Change{ch}}); err != nil {
		h.t.Fatal(err)
	}
}

// TestForeignKeysEncryptAndVerifyOnly tries every operation on keys of which only the public half is there.
func TestForeignKeysEncryptAndVerifyOnly(t *testing.T) {
	h := newHouse(t)
	if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "KEK", Algorithm: keyspec.AES256GCM, Usages: []keyspec.Usage{keyspec.Wrap}}, nil); err != nil {
		t.Fatal(err)
	}
	worked := 0
	for i, row := range mechanism.Table() {
		if !row.Algorithm.Asymmetric() || row.Algorithm.IsRSA() && row.Algorithm != keyspec.RSA2048 {
			continue
		}
		name := keyspec.Name(fmt.Sprint("APP/", i))
		r := keyspec.Ref{Name: name}
		_, spki, m := fresh1(t, row)
		h.plantForeign(string(name), row, spki)
		for _, op := range operations() {
			where := fmt.Sprintf("%s with %s", op.name, row.Algorithm)
			err := op.run(h, r, m)
			switch {
			case op.name == "verify" && m.sig != nil, op.name == "encrypt" && m.oaep != nil:
				want(t, where, err, nil)
				worked++
			case op.usage == keyspec.Verify, op.usage == keyspec.Encrypt:
				if err == nil {
					t.Errorf("%s: worked", where)
				}
			default:
				want(t, where, err, ErrUsage)
			}
			// Nor when it is asked behind the rules' back.
			u := use{Engine: h.Engine, ctx: t.Context(), caller: h.app, act: &act{}, store: h.store.Load(), now: h.clock.Now()}
			if u.key, err = u.store.Get(name); err != nil {
				t.Fatal(err)
			}
			u.version = &u.key.Versions[0]
			_, err = u.secret()
			want(t, where, err, ErrUsage)
		}
		s, err := pki.ParseSubject("CN=test", nil, nil, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = h.CertRequest(t.Context(), h.app, r, &s)
		want(t, "cert_request", err, ErrUsage)
		_, _, err = h.Wrap(t.Context(), h.app, keyspec.Ref{Name: "KEK"}, r)
		want(t, "wrap as target", err, ErrUsage)
		_, err = h.Rotate(t.Context(), h.app, name, time.Time{}, time.Time{}, false)
		want(t, "key_rotate", err, ErrUnsupported)

		_, number, p, err := h.Public(t.Context(), h.app, r)
		if err != nil || number != 1 || !bytes.Equal(p.SPKI, spki) {
			t.Fatalf("public: %v", err)
		}
		sum := sha256.Sum256(spki)
		found, _, err := h.Find(t.Context(), h.app, keystore.AliasSPKI, sum[:])
		if err != nil || found.Name != name || found.Origin != keyspec.Foreign {
			t.Fatalf("key_find: %v", err)
		}
		_, err = h.DestroyNow(t.Context(), h.app, r)
		want(t, "key_destroy", err, nil)
		_, err = h.Verify(t.Context(), h.app, r, "", "", message, m.sig)
		if !errors.Is(err, ErrState) && !errors.Is(err, ErrUsage) {
			t.Fatalf("verify with a destroyed one: %v", err)
		}
	}
	if worked < 5 {
		t.Fatalf("only %d operations worked", worked)
	}
}

package engine

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// The matrix tries every operation on a key of every algorithm, with every set of usages, in every state, and compares
// with what design and documents say, written down here a second time and in another way. A new row of the mechanism
// table is in it by itself.

// condition is a state as the matrix brings it about.
type condition string

const (
	active      condition = "active"
	preActive   condition = "pre-active"
	expired     condition = "expired"
	suspended   condition = "suspended"
	rotatedOut  condition = "deactivated"
	compromised condition = "compromised"
	scheduled   condition = "scheduled"
	destroyed   condition = "destroyed"
)

// allowed lists the usages that go on in a condition, and the error that meets the others.
var allowed = map[condition]struct {
	usages []keyspec.Usage
	other  error
}{
	active:      {keyspec.Usages(), nil},
	preActive:   {nil, ErrExpired},
	expired:     {[]keyspec.Usage{keyspec.Verify, keyspec.Decrypt, keyspec.Unwrap}, ErrExpired},
	suspended:   {nil, ErrState},
	rotatedOut:  {[]keyspec.Usage{keyspec.Verify, keyspec.Decrypt, keyspec.Unwrap}, ErrState},
	compromised: {[]keyspec.Usage{keyspec.Verify}, ErrState},
	scheduled:   {nil, ErrState},
	destroyed:   {nil, ErrState},
}

// operation is one way to use a key. kinds are the families it works with; on others it is unsupported, or the input is no
// such ciphertext.
type operation struct {
	name  string
	usage keyspec.Usage
	kinds []mechanism.Kind
	run   func(h *house, ref keyspec.Ref, m *made) error
}

// made is what an active key with all usages has made, for the others to verify and decrypt.
type made struct {
	sig, mac, sealed, oaep, head, wrapped, peer []byte
	n                                           int
}

var message = mechanism.Input{Message: []byte("message")}

func operations() []operation {
	signing := []mechanism.Kind{mechanism.KindRSA, mechanism.KindECDSA, mechanism.KindEd25519}
	aead := []mechanism.Kind{mechanism.KindAEAD}
	macs := []mechanism.Kind{mechanism.KindHMAC}
	fresh := func(m *made) *NewKey {
		m.n++
		return &NewKey{Name: keyspec.Name(fmt.Sprintf("NEW/%p/%d", m, m.n)), Algorithm: keyspec.AES256GCM}
	}
	return []operation{
		{"sign", keyspec.Sign, signing, func(h *house, r keyspec.Ref, m *made) error {
			_, _, err := h.Sign(h.t.Context(), h.app, r, "", "", message, nil)
			return err
		}},
		{"verify", keyspec.Verify, signing, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.Verify(h.t.Context(), h.app, r, "", "", message, m.sig)
			return err
		}},
		{"mac", keyspec.MAC, macs, func(h *house, r keyspec.Ref, m *made) error {
			_, _, err := h.MAC(h.t.Context(), h.app, r, []byte("message"), nil)
			return err
		}},
		{"mac_verify", keyspec.Verify, macs, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.MACVerify(h.t.Context(), h.app, r, []byte("message"), m.mac)
			return err
		}},
		{"encrypt", keyspec.Encrypt, []mechanism.Kind{mechanism.KindAEAD, mechanism.KindRSA}, func(h *house, r keyspec.Ref, m *made) error {
			_, _, err := h.Encrypt(h.t.Context(), h.app, r, []byte("data"), nil, nil)
			return err
		}},
		{"decrypt", keyspec.Decrypt, []mechanism.Kind{mechanism.KindAEAD, mechanism.KindRSA}, func(h *house, r keyspec.Ref, m *made) error {
			sealed := m.sealed
			if m.oaep != nil {
				sealed = m.oaep
			}
			_, _, err := h.Decrypt(h.t.Context(), h.app, r, sealed, nil, nil, nil)
			return err
		}},
		{"data_key", keyspec.Encrypt, aead, func(h *house, r keyspec.Ref, m *made) error {
			_, _, _, err := h.DataKey(h.t.Context(), h.app, r, 32, nil, false)
			return err
		}},
		{"stream encrypt", keyspec.Encrypt, aead, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.BeginStream(h.t.Context(), h.app, "encrypt", r, nil, nil, nil)
			return err
		}},
		{"stream decrypt", keyspec.Decrypt, aead, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.BeginStream(h.t.Context(), h.app, "decrypt", r, nil, nil, m.head)
			return err
		}},
		{"stream mac", keyspec.MAC, macs, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.BeginStream(h.t.Context(), h.app, "mac", r, nil, nil, nil)
			return err
		}},
		{"wrap", keyspec.Wrap, aead, func(h *house, r keyspec.Ref, m *made) error {
			_, _, err := h.Wrap(h.t.Context(), h.app, r, keyspec.Ref{Name: "TARGET"})
			return err
		}},
		{"unwrap", keyspec.Unwrap, aead, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.Unwrap(h.t.Context(), h.app, r, m.wrapped, fresh(m), nil)
			return err
		}},
		{"agree", keyspec.Agree, []mechanism.Kind{mechanism.KindECDH}, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.Agree(h.t.Context(), h.app, r, m.peer, nil, nil, fresh(m), nil)
			return err
		}},
		{"derive", keyspec.Derive, []mechanism.Kind{mechanism.KindHKDF}, func(h *house, r keyspec.Ref, m *made) error {
			_, err := h.Derive(h.t.Context(), h.app, r, nil, nil, fresh(m), nil)
			return err
		}},
		{"cert_self_sign CA", keyspec.Certify, signing, func(h *house, r keyspec.Ref, m *made) error {
			s, err := pki.ParseSubject("CN=test", nil, nil, nil, nil)
			if err != nil {
				h.t.Fatal(err)
			}
			_, err = h.CertSelfSign(h.t.Context(), h.app, r, &s, &pki.Profile{CA: true, PathLen: -1})
			return err
		}},
	}
}

// usageSets returns the sets of usages that the matrix tries: each alone, the default, and all that go together.
func usageSets(row *mechanism.Row) [][]keyspec.Usage {
	sets := [][]keyspec.Usage{row.Default}
	add := func(set []keyspec.Usage) {
		if mechanism.ValidateUsages(row.Algorithm, set, "") == nil &&
			!slices.ContainsFunc(sets, func(s []keyspec.Usage) bool { return slices.Equal(s, set) }) {
			sets = append(sets, set)
		}
	}
	for _, u := range row.Usages {
		add([]keyspec.Usage{u})
	}
	for _, u := range row.Usages {
		for _, v := range row.Usages {
			add([]keyspec.Usage{u, v})
		}
	}
	return sets
}

// plant puts a key of material in a condition into the store, around the engine. Version 1 is the one to be tried.
func (h *house) plant(name string, row *mechanism.Row, material, spki []byte, usages []keyspec.Usage, c condition) {
	h.t.Helper()
	now := h.clock.Now()
	v := keystore.Version{Number: 1, State: keyspec.Active, Created: now, NotBefore: now.Add(-2 * time.Hour), Expires: now.Add(time.Hour)}
	ch := keystore.Change{Material: map[keyspec.Version][]byte{1: material}, Public: map[keyspec.Version]keystore.Public{}}
	if spki != nil {
		ch.Public[1] = keystore.Public{SPKI: spki}
	}
	switch c {
	case preActive:
		v.State, v.NotBefore = keyspec.PreActive, now.Add(time.Minute)
	case expired:
		v.Expires = now.Add(-time.Hour)
	case suspended:
		v.State = keyspec.Suspended
	case rotatedOut:
		v.State = keyspec.Deactivated
	case compromised:
		v.State = keyspec.Compromised
	case scheduled:
		v.DestroyAt = now.Add(time.Minute)
	}
	ch.Key = &keystore.Key{
		Name: keyspec.Name(name), Algorithm: row.Algorithm, Usages: usages, Origin: keyspec.Generated, Protection: keyspec.Software,
		Owner: owner, Created: now, Current: 1, MinVersion: 1, Versions: []keystore.Version{v},
	}
	if err := h.store.Load().Apply(h.t.Context(), keystore.Commit{Changes: []keystore.Change{ch}}); err != nil {
		h.t.Fatal(err)
	}
	if c == destroyed {
		key, err := h.store.Load().Get(keyspec.Name(name))
		if err != nil {
			h.t.Fatal(err)
		}
		key.Versions[0].State = keyspec.Destroyed
		erase := keystore.Change{Key: key, Erase: []keyspec.Version{1}}
		if err := h.store.Load().Apply(h.t.Context(), keystore.Commit{Changes: []keystore.Change{erase}}); err != nil {
			h.t.Fatal(err)
		}
	}
}

// fresh1 makes the material of a key, and what an active one with it has made.
func fresh1(t *testing.T, row *mechanism.Row) (material, spki []byte, m *made) {
	t.Helper()
	k, material, err := row.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if k.Public() != nil {
		if spki, err = k.SPKI(); err != nil {
			t.Fatal(err)
		}
	}
	return material, spki, make1(t, row, k)
}

// make1 has loaded key material make what the operations need.
func make1(t *testing.T, row *mechanism.Row, k *mechanism.Key) *made {
	t.Helper()
	m := &made{}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	switch row.Kind {
	case mechanism.KindRSA:
		m.oaep, err = mechanism.Encrypt(nil, k.Public(), keyspec.RSAOAEPSHA256, []byte("data"), nil)
		check(err)
		fallthrough
	case mechanism.KindECDSA, mechanism.KindEd25519:
		m.sig, err = k.Sign(nil, "", "", message)
		check(err)
	case mechanism.KindHMAC:
		m.mac, err = k.MAC(nil, []byte("message"))
		check(err)
	case mechanism.KindECDH:
		m.peer, err = k.SPKI() // agreeing with oneself is as good as with another
		check(err)
	case mechanism.KindAEAD:
		m.sealed, err = ciphertext.AppendMessage(nil, row.Algorithm, 1, k.AEAD(), []byte("data"), nil)
		check(err)
		m.head, _, err = ciphertext.AppendHead(nil, ciphertext.Header{Format: ciphertext.Stream, Algorithm: row.Algorithm, Version: 1}, k.AEAD(), nil)
		check(err)
		m.wrapped, err = k.Wrap(nil, make([]byte, 32))
		if !errors.Is(err, mechanism.ErrUnsupported) { // ChaCha20 wraps nothing
			check(err)
		}
	}
	return m
}

func TestMatrix(t *testing.T) {
	conditions := []condition{active, preActive, expired, suspended, rotatedOut, compromised, scheduled, destroyed}
	tried := 0
	for _, row := range mechanism.Table() {
		t.Run(string(row.Algorithm), func(t *testing.T) {
			if row.Cost == mechanism.CostRSA && row.Algorithm != keyspec.RSA2048 && (testing.Short() || raceDetector) {
				return // larger RSA keys take long to make, and the size changes nothing here
			}
			h := newHouse(t)
			if _, err := h.Create(t.Context(), h.app, &NewKey{Name: "TARGET", Algorithm: keyspec.AES256GCM, Exportable: true}, nil); err != nil {
				t.Fatal(err)
			}
			material, spki, m := fresh1(t, row)
			for i, usages := range usageSets(row) {
				for _, c := range conditions {
					name := fmt.Sprintf("APP/%d/%s", i, c)
					h.plant(name, row, material, spki, usages, c)
					for _, op := range operations() {
						tried++
						got := op.run(h, keyspec.Ref{Name: keyspec.Name(name)}, m)
						h.judge(op, row, usages, c, m, got)
					}
				}
			}
		})
	}
	t.Logf("%d combinations", tried)
}

// judge says what should have come of an operation.
func (h *house) judge(op operation, row *mechanism.Row, usages []keyspec.Usage, c condition, m *made, got error) {
	h.t.Helper()
	where := fmt.Sprintf("%s with %s %v, %s", op.name, row.Algorithm, usages, c)
	if !slices.Contains(usages, op.usage) {
		want(h.t, where, got, ErrUsage)
		return
	}
	rule := allowed[c]
	if !slices.Contains(rule.usages, op.usage) {
		want(h.t, where, got, rule.other)
		return
	}
	if slices.Contains(op.kinds, row.Kind) {
		want(h.t, where, got, nil)
		return
	}
	// The usage is one this algorithm may have, but not for this operation: RSA does not wrap with AES-KWP or make MACs of
	// streams, HMAC keys verify no signatures.
	if got == nil {
		h.t.Errorf("%s: worked", where)
	}
	for _, e := range []error{ErrUnsupported, mechanism.ErrUnsupported, ErrDecryption, mechanism.ErrInput} {
		if errors.Is(got, e) {
			return
		}
	}
	h.t.Errorf("%s: got %v", where, got)
}

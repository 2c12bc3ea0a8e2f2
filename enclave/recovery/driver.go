package recovery

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/kmsd-project/kmsd/enclave"
)

// Kind is the kind of slots and blobs of this driver.
const Kind = "recovery"

// The body of a blob of version 1:
//
//	id of the key (4) | threshold (1) | number of shares (1) | check value (8) | sealed secret
//
// Threshold and number are zero for a key that is not shared. The check value is derived from the key, so that a wrong key and a
// damaged blob are told apart; it tells nothing about a key of 160 random bits.
const (
	blobVersion = 1
	checkSize   = 8
	bodySize    = 4 + 1 + 1 + checkSize + enclave.SealedSize
	sealLabel   = "kmsd recovery v1"
)

// Driver is the enclave that a recovery key makes. It implements enclave.Enclave.
//
// Invariant: the key is only held by a driver made for enrolment, and Close wipes it. Unwrap takes the key from its Auth alone.
type Driver struct {
	key       *Key // nil unless made for enrolment
	threshold int
	shares    int
	closed    atomic.Bool
}

// New returns a driver that can Unwrap.
func New() *Driver { return &Driver{} }

// ForKey returns a driver that can also Wrap, under a key that is kept whole. The driver takes the key over.
func ForKey(k *Key) *Driver { return &Driver{key: k} }

// ForShares returns a driver that can also Wrap, under a key that was split; threshold and n only go into the description. The driver
// takes the key over.
func ForShares(k *Key, threshold, n int) *Driver {
	return &Driver{key: k, threshold: threshold, shares: n}
}

// Info describes the slot; before enrolment and after unlock it cannot name the key.
func (d *Driver) Info() enclave.Info {
	info := enclave.Info{
		Kind:     Kind,
		Level:    "recovery: opens the store without any device; as safe as the place where the key is kept",
		NeedsYou: true,
	}
	if d.shares > 0 {
		info.Level = fmt.Sprintf("recovery: opens the store without any device; %d of %d people must bring their share", d.threshold, d.shares)
	}
	if d.key != nil {
		info.Binding = d.key.ID()
	}
	return info
}

// Wrap seals the secret under the key the driver was made with.
func (d *Driver) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	if err := d.usable(ctx); err != nil {
		return nil, err
	}
	if d.key == nil {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: "no recovery key was made for this slot"}
	}
	sealed, err := enclave.Seal(d.key.secret[:], sealLabel, secret, aad)
	if err != nil {
		return nil, err
	}
	check, err := checkValue(d.key)
	if err != nil {
		return nil, err
	}
	body := make([]byte, 0, bodySize)
	body = append(body, d.key.id[:]...)
	body = append(body, byte(d.threshold), byte(d.shares))
	body = append(body, check...)
	body = append(body, sealed...)
	return enclave.EncodeBlob(Kind, blobVersion, body)
}

// Unwrap opens the blob with the recovery key or the shares in a.
func (d *Driver) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, a enclave.Auth, dst []byte) error {
	if err := d.usable(ctx); err != nil {
		return err
	}
	body, err := decodeBody(b)
	if err != nil {
		return err
	}
	id, check, sealed := body[:4], body[6:6+checkSize], body[6+checkSize:]
	key, err := keyOf(a)
	if err != nil {
		return err
	}
	defer key.Wipe()
	if [4]byte(id) != key.id {
		return &enclave.Error{
			Kind:   enclave.ErrAuth,
			Detail: fmt.Sprintf("the key is %s, the slot belongs to %x", key.ID(), id),
			Remedy: "look for the recovery key with the number of the slot",
		}
	}
	have, err := checkValue(key)
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(have, check) != 1 {
		return &enclave.Error{Kind: enclave.ErrAuth, Detail: "the key has the right number but is another one"}
	}
	return enclave.Open(key.secret[:], sealLabel, sealed, aad, dst)
}

// Health is always ready: there is no device that could be missing.
func (d *Driver) Health(ctx context.Context) enclave.Health {
	if err := d.usable(ctx); err != nil {
		return enclave.Health{State: enclave.Absent, Detail: err.Error()}
	}
	return enclave.Health{State: enclave.Ready, Detail: "opens with the recovery key"}
}

// Close wipes the key of a driver made for enrolment.
func (d *Driver) Close() error {
	if d.closed.CompareAndSwap(false, true) && d.key != nil {
		d.key.Wipe()
	}
	return nil
}

func (d *Driver) usable(ctx context.Context) error {
	if d.closed.Load() {
		return &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	return ctx.Err()
}

// Owner returns the ID of the key that opens a blob of this driver, and the threshold of its shares, 0 when the key is kept whole.
func Owner(b enclave.Blob) (id string, threshold int, err error) {
	body, err := decodeBody(b)
	if err != nil {
		return "", 0, err
	}
	return fmt.Sprintf("%x", body[:4]), int(body[4]), nil
}

func decodeBody(b enclave.Blob) ([]byte, error) {
	version, body, err := enclave.DecodeBlob(Kind, b)
	if err != nil {
		return nil, err
	}
	if version != blobVersion {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("recovery slot of version %d", version),
			Remedy: "use the release of kmsd that made it, or a later one"}
	}
	if len(body) != bodySize {
		return nil, &enclave.Error{Kind: enclave.ErrCorrupt, Detail: fmt.Sprintf("recovery slot of %d bytes", len(body))}
	}
	return body, nil
}

// keyOf takes the key out of an Auth.
func keyOf(a enclave.Auth) (*Key, error) {
	if len(a.Shares) == 0 && len(a.Secret) == 0 {
		return nil, &enclave.Error{Kind: enclave.ErrLocked, Remedy: "give the recovery key or the shares"}
	}
	key, err := parseAuth(a)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrAuth, Cause: err, Remedy: remedy(err)}
	}
	return key, nil
}

func parseAuth(a enclave.Auth) (*Key, error) {
	if len(a.Shares) == 0 {
		return ParseKey(a.Secret)
	}
	if len(a.Secret) != 0 {
		return nil, fmt.Errorf("%w: give either the key or shares of it", ErrShares)
	}
	shares := make([]*Share, 0, min(len(a.Shares), MaxShares))
	defer func() {
		for _, s := range shares {
			s.Wipe()
		}
	}()
	if len(a.Shares) > MaxShares {
		return nil, fmt.Errorf("%d shares: %w", len(a.Shares), ErrGeometry)
	}
	for i, text := range a.Shares {
		s, err := ParseShare(text)
		if err != nil {
			return nil, fmt.Errorf("share %d as given: %w", i+1, err)
		}
		shares = append(shares, s)
	}
	return Combine(shares)
}

func remedy(err error) string {
	switch {
	case errors.Is(err, ErrTooFew):
		return "bring more shares of the same set"
	case errors.Is(err, ErrShares):
		return "give shares of one set, each once"
	default:
		return "compare what you typed with the printed key, group by group"
	}
}

func checkValue(k *Key) ([]byte, error) {
	return hkdf.Key(sha256.New, k.secret[:], k.id[:], "kmsd recovery check v1", checkSize)
}

package pkcs11

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Sizes in bytes.
const (
	IDSize    = 16 // CKA_ID of our keys, random
	CheckSize = 8
	NonceSize = 12 // of AES-GCM (SP 800-38D section 5.2.1.1)
	PointSize = 65 // uncompressed P-256

	wrappedSize = enclave.SecretSize + 16
	boundSize   = 16
	maxSPKI     = 600 // RSA-4096 is 550
	slotFormat  = 1
	keyFormat   = 1
	takenFormat = 2
	keyKind     = Kind + "-key"
)

// Slot is the content of the blob of a slot:
//
//	guard (1) | serial of the token (1+n) | CKA_ID (16) | then
//	wrapped: check value (8) | nonce (12) | ciphertext and tag (48)
//	agreed:  point of the token's key (65) | point of the other half (65) | sealed secret
type Slot struct {
	Guard  Guard
	Serial string
	ID     []byte
	Check  []byte // tells the key from another under its CKA_ID, and that from a damaged slot
	Nonce  []byte
	Public []byte // of the token's key
	Point  []byte // of the key that software threw away
	Sealed []byte
}

var guards = []Guard{1: Wrapped, 2: Agreed}

// Encode returns the blob.
func (s *Slot) Encode() (enclave.Blob, error) {
	b := cryptobyte.NewBuilder(nil)
	for i, g := range guards {
		if i > 0 && g == s.Guard {
			b.AddUint8(uint8(i))
		}
	}
	addBytes8(b, []byte(s.Serial))
	b.AddBytes(s.ID)
	if s.Guard == Wrapped {
		b.AddBytes(s.Check)
		b.AddBytes(s.Nonce)
	} else {
		b.AddBytes(s.Public)
		b.AddBytes(s.Point)
	}
	b.AddBytes(s.Sealed)
	body, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob(Kind, slotFormat, body)
}

// DecodeSlot takes the blob of a slot apart. The parts alias b.
func DecodeSlot(b enclave.Blob) (*Slot, error) {
	body, err := decodeBody(Kind, slotFormat, b)
	if err != nil {
		return nil, err
	}
	var guard uint8
	var serial cryptobyte.String
	s := new(Slot)
	if !body.ReadUint8(&guard) || !body.ReadUint8LengthPrefixed(&serial) || len(serial) > maxSerial || !body.ReadBytes(&s.ID, IDSize) {
		return nil, corrupt("length of the parts of the PKCS#11 slot")
	}
	if guard == 0 || int(guard) >= len(guards) {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("PKCS#11 slot of kind %d", guard), Remedy: remedyRelease}
	}
	s.Guard, s.Serial = guards[guard], string(serial)
	var ok bool
	if s.Guard == Wrapped {
		ok = body.ReadBytes(&s.Check, CheckSize) && body.ReadBytes(&s.Nonce, NonceSize) && body.ReadBytes(&s.Sealed, wrappedSize)
	} else {
		ok = body.ReadBytes(&s.Public, PointSize) && body.ReadBytes(&s.Point, PointSize) && body.ReadBytes(&s.Sealed, enclave.SealedSize)
	}
	if !ok || !body.Empty() {
		return nil, corrupt("length of the parts of the PKCS#11 slot")
	}
	return s, nil
}

// Key is the content of the blob of a resident key:
//
//	algorithm (1+n) | serial of the token (1+n) | CKA_ID (16) | bound (16) | public key (2+n)
//
// The public key is SubjectPublicKeyInfo in DER, empty for a symmetric key. A token cannot bind data to a key, so bound, the beginning of a
// hash over Spec.AAD, only notices a blob that was put into another record by mistake.
//
// A key that another program has made has a blob of format 2, with the names that it has there; one of both may be empty:
//
//	algorithm (1+n) | serial of the token (1+n) | CKA_ID (1+n) | CKA_LABEL (1+n) | bound (16) | public key (2+n)
type Key struct {
	Algorithm keyspec.Algorithm
	Serial    string
	ID        []byte
	Bound     []byte
	SPKI      []byte
	Taken     bool   // over from another program
	Label     string // of such a key
}

// Encode returns the blob.
func (k *Key) Encode() (enclave.Blob, error) {
	b := cryptobyte.NewBuilder(nil)
	addBytes8(b, []byte(k.Algorithm))
	addBytes8(b, []byte(k.Serial))
	format := uint8(keyFormat)
	if k.Taken {
		format = takenFormat
		addBytes8(b, k.ID)
		addBytes8(b, []byte(k.Label))
	} else {
		b.AddBytes(k.ID)
	}
	b.AddBytes(k.Bound)
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(k.SPKI) })
	body, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob(keyKind, format, body)
}

// DecodeKey takes the blob of a resident key apart. The parts alias b.
func DecodeKey(b enclave.Blob) (*Key, error) {
	body, format, err := decodeEither(keyKind, b, keyFormat, takenFormat)
	if err != nil {
		return nil, err
	}
	var algorithm, serial, id, label, spki cryptobyte.String
	k := &Key{Taken: format == takenFormat}
	ok := body.ReadUint8LengthPrefixed(&algorithm) && body.ReadUint8LengthPrefixed(&serial)
	if k.Taken {
		ok = ok && body.ReadUint8LengthPrefixed(&id) && body.ReadUint8LengthPrefixed(&label) && len(id)+len(label) > 0
		k.ID, k.Label = id, string(label)
	} else {
		ok = ok && body.ReadBytes(&k.ID, IDSize)
	}
	if !ok || len(serial) > maxSerial || !body.ReadBytes(&k.Bound, boundSize) || !body.ReadUint16LengthPrefixed(&spki) || len(spki) > maxSPKI || !body.Empty() {
		return nil, corrupt("length of the parts of the PKCS#11 key")
	}
	if k.Algorithm, err = keyspec.ParseAlgorithm(string(algorithm)); err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("PKCS#11 key of algorithm %.32q", string(algorithm)), Remedy: remedyRelease}
	}
	k.Serial, k.SPKI = string(serial), spki
	return k, nil
}

// BindTo makes the key belong to the record that aad names.
func (k *Key) BindTo(aad []byte) { k.Bound = bound(aad) }

// BelongsTo reports whether the key was bound to the record that aad names.
func (k *Key) BelongsTo(aad []byte) bool {
	return subtle.ConstantTimeCompare(k.Bound, bound(aad)) == 1
}

func bound(aad []byte) []byte {
	sum := sha256.Sum256(append([]byte("kmsd pkcs11 key bound v1\x00"), aad...))
	return sum[:boundSize]
}

const remedyRelease = "use the release of kmsd that made it, or a later one"

func decodeBody(kind string, format uint8, b enclave.Blob) (cryptobyte.String, error) {
	body, _, err := decodeEither(kind, b, format)
	return body, err
}

// decodeEither opens a blob of one of these formats.
func decodeEither(kind string, b enclave.Blob, formats ...uint8) (cryptobyte.String, uint8, error) {
	version, body, err := enclave.DecodeBlob(kind, b)
	if err != nil {
		return nil, 0, err
	}
	if !slices.Contains(formats, version) {
		return nil, 0, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("%s blob of version %d", kind, version), Remedy: remedyRelease}
	}
	return cryptobyte.String(body), version, nil
}

func addBytes8(b *cryptobyte.Builder, p []byte) {
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(p) })
}

func corrupt(detail string) error { return &enclave.Error{Kind: enclave.ErrCorrupt, Detail: detail} }

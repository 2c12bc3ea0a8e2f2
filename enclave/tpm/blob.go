package tpm

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"

	"golang.org/x/crypto/cryptobyte"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Sizes in bytes.
const (
	nameSize   = 2 + sha256.Size // of an object: algorithm and hash of the public area
	saltSize   = 32
	checkSize  = 8
	authSize   = 32 // the longest auth value of an object whose name algorithm is SHA-256
	maxArea    = 1 << 10
	maxSigner  = 600 // SPKI of RSA-3072 is 422
	maxPIN     = 256
	pointSize  = 65 // uncompressed P-256
	slotFormat = 1
	keyFormat  = 1
	keyKind    = Kind + "-key"
)

// slot is the content of the blob of a slot:
//
//	guard (1) | flags (1) | name of the storage key (34) | salt (32) | PCRs (3) | signer (2+n) | public area (2+n) | private area (2+n) |
//	point (1+n) | sealed secret
//
// All numbers are big endian. Public and private area are the contents of TPM2B_PUBLIC and TPM2B_PRIVATE.
type slot struct {
	guard   Guard
	pin     bool
	root    []byte
	salt    []byte
	pcrs    pcrs   // fixed, 0 for none
	signer  []byte // SPKI of who approves PCRs, empty for none
	public  []byte
	private []byte
	point   []byte // the other half of the agreement, of a slot that is agreed
	sealed  []byte
}

const flagPIN = 1

var guards = []Guard{1: Sealed, 2: Agreed}

func (s *slot) encode() (enclave.Blob, error) {
	b := cryptobyte.NewBuilder(nil)
	for i, g := range guards {
		if i > 0 && g == s.guard {
			b.AddUint8(uint8(i))
		}
	}
	var flags uint8
	if s.pin {
		flags |= flagPIN
	}
	b.AddUint8(flags)
	b.AddBytes(s.root)
	b.AddBytes(s.salt)
	b.AddUint24(uint32(s.pcrs))
	addBytes16(b, s.signer)
	addBytes16(b, s.public)
	addBytes16(b, s.private)
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(s.point) })
	b.AddBytes(s.sealed)
	body, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob(Kind, slotFormat, body)
}

// decodeSlot takes a blob apart. The parts alias b.
func decodeSlot(b enclave.Blob) (*slot, error) {
	body, err := decodeBody(Kind, slotFormat, b)
	if err != nil {
		return nil, err
	}
	var guard, flags uint8
	var selected uint32
	var signer, public, private, point cryptobyte.String
	s := new(slot)
	if !body.ReadUint8(&guard) || !body.ReadUint8(&flags) ||
		!body.ReadBytes(&s.root, nameSize) || !body.ReadBytes(&s.salt, saltSize) || !body.ReadUint24(&selected) ||
		!body.ReadUint16LengthPrefixed(&signer) || !body.ReadUint16LengthPrefixed(&public) || !body.ReadUint16LengthPrefixed(&private) ||
		!body.ReadUint8LengthPrefixed(&point) || !body.ReadBytes(&s.sealed, enclave.SealedSize) || !body.Empty() {
		return nil, corrupt("length of the parts of the TPM slot", nil)
	}
	if guard == 0 || int(guard) >= len(guards) || flags&^flagPIN != 0 {
		return nil, unsupported("TPM slot of kind %d with flags %#x", guard, flags)
	}
	s.guard, s.pin, s.pcrs = guards[guard], flags&flagPIN != 0, pcrs(selected)
	s.signer, s.public, s.private, s.point = signer, public, private, point
	if len(s.signer) > maxSigner || badArea(s.public) || badArea(s.private) || len(s.signer) > 0 && s.pcrs != 0 ||
		(s.guard == Agreed) != (len(s.point) == pointSize) || s.guard != Agreed && len(s.point) != 0 {
		return nil, corrupt("parts of the TPM slot", nil)
	}
	return s, nil
}

// key is the content of the blob of a resident key:
//
//	length of algorithm (1) | algorithm | name of the storage key (34) | salt (32) | check value (8) | public area (2+n) |
//	private area (2+n)
//
// The check value is derived from what the key is bound to, so that a blob in a wrong record is noticed before the TPM counts it as a
// wrong password, as it does for imported keys.
type key struct {
	algorithm keyspec.Algorithm
	root      []byte
	salt      []byte
	check     []byte
	public    []byte
	private   []byte
}

func (k *key) encode() (enclave.Blob, error) {
	b := cryptobyte.NewBuilder(nil)
	b.AddUint8LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes([]byte(k.algorithm)) })
	b.AddBytes(k.root)
	b.AddBytes(k.salt)
	b.AddBytes(k.check)
	addBytes16(b, k.public)
	addBytes16(b, k.private)
	body, err := b.Bytes()
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob(keyKind, keyFormat, body)
}

// decodeKey takes a blob apart. The parts alias b.
func decodeKey(b enclave.Blob) (*key, error) {
	body, err := decodeBody(keyKind, keyFormat, b)
	if err != nil {
		return nil, err
	}
	var algorithm, public, private cryptobyte.String
	k := new(key)
	if !body.ReadUint8LengthPrefixed(&algorithm) || !body.ReadBytes(&k.root, nameSize) || !body.ReadBytes(&k.salt, saltSize) ||
		!body.ReadBytes(&k.check, checkSize) || !body.ReadUint16LengthPrefixed(&public) || !body.ReadUint16LengthPrefixed(&private) || !body.Empty() ||
		badArea(public) || badArea(private) {
		return nil, corrupt("length of the parts of the TPM key", nil)
	}
	if k.algorithm, err = keyspec.ParseAlgorithm(string(algorithm)); err != nil {
		return nil, unsupported("TPM key of algorithm %.32q", string(algorithm))
	}
	k.public, k.private = public, private
	return k, nil
}

func decodeBody(kind string, format uint8, b enclave.Blob) (cryptobyte.String, error) {
	version, body, err := enclave.DecodeBlob(kind, b)
	if err != nil {
		return nil, err
	}
	if version != format {
		return nil, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("%s blob of version %d", kind, version),
			Remedy: "use the release of kmsd that made it, or a later one"}
	}
	return cryptobyte.String(body), nil
}

func badArea(area []byte) bool { return len(area) == 0 || len(area) > maxArea }

func addBytes16(b *cryptobyte.Builder, p []byte) {
	b.AddUint16LengthPrefixed(func(b *cryptobyte.Builder) { b.AddBytes(p) })
}

// Description is what the blob of a slot says about the slot.
type Description struct {
	Guard   Guard
	Binding string // name of the storage key, hex
	PIN     bool
	PCRs    []int
	Signer  []byte // SubjectPublicKeyInfo of who approves PCRs, DER; nil for none
}

// Describe reads the blob of a slot without a device.
func Describe(b enclave.Blob) (Description, error) {
	s, err := decodeSlot(b)
	if err != nil {
		return Description{}, err
	}
	return Description{s.guard, fmt.Sprintf("%x", s.root), s.pin, s.pcrs.list(), append([]byte(nil), s.signer...)}, nil
}

func newSalt() []byte {
	salt := make([]byte, saltSize)
	rand.Read(salt)
	return salt
}

// authValue makes the auth value of an object from the salt in its blob and from what else it is bound to: 192 bits, as 32 characters.
//
// It is text because the auth value must not have a zero byte: a TPM removes zeros at the end, and go-tpm (v0.9.8, hmacKeyFromAuthValue)
// everything from the first zero on, so that every eighth random value of 32 bytes would be refused. Text can also be given to other tools.
func authValue(salt []byte, label string, bound []byte) []byte {
	sum := bind(salt, label, bound)
	defer clear(sum)
	return base64.RawURLEncoding.AppendEncode(nil, sum[:24])
}

// bind derives 32 bytes from a salt and what is bound to it. Labels have no zero byte.
func bind(salt []byte, label string, bound []byte) []byte {
	mac := hmac.New(sha256.New, salt)
	mac.Write([]byte(label))
	mac.Write([]byte{0})
	mac.Write(bound)
	return mac.Sum(nil)
}

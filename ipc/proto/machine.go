package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Messages of the identity of a registration machine.

// Bounds of these messages, in bytes.
const (
	maxMachineName = 256 // by which the server knows a machine; a label is not longer
	maxKeyIndex    = 95  // 32 bytes in hexadecimal, with a colon between them
	maxMachineKey  = 1 << 10
)

// MachineAdopt makes the identity of a registration machine one of kmsd's: from a TPM, or with Wrapped from a file.
type MachineAdopt struct {
	Name     string // the keys are NAME/SIGN and NAME/ENCRYPT
	Machine  string // by which the server knows the machine; may be empty
	Expect   string // key index that one of the two keys must have; empty: any
	Location string // of the TPM, as for slot_add; empty: the one that new keys are made in
	Wrapped  []byte // PKCS#8 DER, HPKE-sealed to the key of key_import_begin (enc || ciphertext)
	Token    []byte // from key_import_begin, with Wrapped
}

// MachineRef names an identity.
type MachineRef struct{ Name string }

// Machine is an adopted identity.
type Machine struct {
	Name    string
	Machine string
	Sign    MachineKey
	Encrypt MachineKey
	Adopted bool // by this very request
}

// MachineKey is one of the two keys of a machine.
type MachineKey struct {
	Key        string // name of the key
	Version    uint32
	State      string
	Protection string
	Location   string // of the device; empty for a key from a file
	SPKI       []byte // SubjectPublicKeyInfo, DER
	Public     []byte // as the server has it: TPMT_PUBLIC for a key in a TPM, else SPKI
	KeyIndex   string // SHA-256 of Public in lower-case hexadecimal with colons
}

func (m *MachineAdopt) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxRef)
	f.text("machine", &m.Machine, maxMachineName)
	f.str("expect", &m.Expect, maxKeyIndex)
	f.text("location", &m.Location, MaxSpec)
	f.bin("wrapped", &m.Wrapped, maxMaterial)
	f.bin("token", &m.Token, maxWord)
}

func (m *MachineRef) fields(f *fields) { f.str("name", &m.Name, keyspec.MaxRef) }

func (m *Machine) fields(f *fields) {
	f.str("name", &m.Name, keyspec.MaxRef)
	f.text("machine", &m.Machine, maxMachineName)
	f.msg("sign", &m.Sign)
	f.msg("encrypt", &m.Encrypt)
	f.bool("adopted", &m.Adopted)
}

func (m *MachineKey) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.u32("version", &m.Version)
	f.str("state", &m.State, maxWord)
	f.str("protection", &m.Protection, maxWord)
	f.text("location", &m.Location, MaxSpec)
	f.bin("spki", &m.SPKI, maxSPKI)
	f.bin("public", &m.Public, maxMachineKey)
	f.str("key_index", &m.KeyIndex, maxKeyIndex)
}

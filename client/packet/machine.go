package packet

import (
	"crypto/rsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
)

// MachineUse says what one of the two keys of a registration machine is for.
type MachineUse string

// The uses of a machine's keys.
const (
	MachineSigning    MachineUse = "sign"
	MachineEncryption MachineUse = "encrypt"
)

// What the two templates of MOSIP's client are made of (TPM 2.0 part 2, section 12.2.4). The same template gives the same key
// on the same TPM, so every byte of it is the identity of a machine.
const (
	tpmRSA       = 0x0001
	tpmNull      = 0x0010
	tpmSHA1      = 0x0004
	tpmSHA256    = 0x000b
	tpmRSASSA    = 0x0014
	tpmOAEP      = 0x0017
	tpmBits      = 2048
	tpmExponent  = 65537
	signingFlags = 0x00040072 // fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, sign
	openingFlags = 0x00020072 // the same with decrypt
	tpmMost      = 1024       // bytes of a public part
)

// encryptionPolicy is the policy digest of the endorsement key template of the TCG, which MOSIP's encryption key has as well.
const encryptionPolicy = "837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa"

// MarshalMachineKey returns the TPMT_PUBLIC by which the server knows a machine's key: 280 bytes for signing, 312 for encryption.
func MarshalMachineKey(public *rsa.PublicKey, use MachineUse) ([]byte, error) {
	if public.N.BitLen() != tpmBits || public.E != tpmExponent {
		return nil, fmt.Errorf("%w: a machine's key is RSA-2048 with the exponent 65537", ErrFormat)
	}
	before, err := machineTemplate(use)
	if err != nil {
		return nil, err
	}
	return append(before, public.N.FillBytes(make([]byte, tpmBits/8))...), nil
}

// machineTemplate is the public part up to the modulus, with the length of that.
func machineTemplate(use MachineUse) ([]byte, error) {
	be := binary.BigEndian
	b := be.AppendUint16(nil, tpmRSA)
	scheme := uint16(tpmRSASSA)
	switch use {
	case MachineSigning:
		b = be.AppendUint16(b, tpmSHA1)
		b = be.AppendUint32(b, signingFlags)
		b = be.AppendUint16(b, 0)
	case MachineEncryption:
		scheme = tpmOAEP
		b = be.AppendUint16(b, tpmSHA256)
		b = be.AppendUint32(b, openingFlags)
		b = be.AppendUint16(b, sha256.Size)
		policy, err := hex.DecodeString(encryptionPolicy)
		if err != nil {
			return nil, err
		}
		b = append(b, policy...)
	default:
		return nil, fmt.Errorf("%w: use %q of a machine's key", ErrFormat, use)
	}
	b = be.AppendUint16(b, tpmNull) // no symmetric cipher
	b = be.AppendUint16(b, scheme)
	b = be.AppendUint16(b, tpmSHA256)
	b = be.AppendUint16(b, tpmBits)
	b = be.AppendUint32(b, tpmExponent)
	return be.AppendUint16(b, tpmBits/8), nil
}

// ParseMachineKey reads the TPMT_PUBLIC of a machine's key. It takes nothing but the two templates; what differs in one bit is
// another key, and another machine.
func ParseMachineKey(b []byte) (*rsa.PublicKey, MachineUse, error) {
	if len(b) > tpmMost {
		return nil, "", fmt.Errorf("%w: public part of %d bytes", ErrTooLarge, len(b))
	}
	for _, use := range []MachineUse{MachineSigning, MachineEncryption} {
		before, err := machineTemplate(use)
		if err != nil {
			return nil, "", err
		}
		if len(b) != len(before)+tpmBits/8 || string(b[:len(before)]) != string(before) {
			continue
		}
		n := new(big.Int).SetBytes(b[len(before):])
		if n.BitLen() != tpmBits || n.Bit(0) == 0 {
			return nil, "", fmt.Errorf("%w: the modulus is none of 2048 bits", ErrFormat)
		}
		return &rsa.PublicKey{N: n, E: tpmExponent}, use, nil
	}
	return nil, "", fmt.Errorf("%w: the public part is not of a machine's key", ErrFormat)
}

package client

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// MachineInfo is the public side of the identity of a registration machine.
type MachineInfo = proto.Machine

// MachineKeyInfo is the public side of one of its two keys.
type MachineKeyInfo = proto.MachineKey

// MaxMachineData bounds what is encrypted for a machine, or by one for itself, in bytes. Receipts, sync data and pre-registrations are
// small; they are in memory whole, since nothing of them may be used before all of it was verified.
const MaxMachineData = 64 << 20

// Adoption says whose identity is adopted.
type Adoption struct {
	Name     string // of the keys NAME/SIGN and NAME/ENCRYPT
	Machine  string // by which the server knows the machine; may be empty
	KeyIndex string // that one of the two keys must have, else nothing is adopted; may be empty
	TPM      string // its place, such as tpm:/dev/tpmrm0; empty: the TPM that new keys are made in
}

// Machine is the identity of a registration machine of MOSIP: a key that signs and one that decrypts. It is safe for concurrent use.
type Machine struct {
	client     *Client
	info       MachineInfo
	signing    *rsa.PublicKey
	encryption *rsa.PublicKey
}

var _ packet.ClientKey = (*Machine)(nil)

// AdoptMachine makes the identity that MOSIP's client has in the TPM of this machine one of kmsd's, on the admin socket. Adopting the same one
// again changes nothing. A TPM that is not there is [ErrAbsent] or [ErrUnsupported]; keys in a file never take its place.
func (c *Client) AdoptMachine(ctx context.Context, a Adoption) (*Machine, error) {
	var info MachineInfo
	p := &proto.MachineAdopt{Name: a.Name, Machine: a.Machine, Expect: a.KeyIndex, Location: a.TPM}
	if err := c.Call(ctx, proto.OpMachineAdopt, p, &info, nil); err != nil {
		return nil, err
	}
	return c.newMachine(info)
}

// AdoptMachineKey does that with the key that MOSIP's client has in a file, reg.key: PKCS #8 DER of an RSA-2048 key. It is sealed to a one-time
// key of kmsd before it leaves this process. Remove the file afterwards.
func (c *Client) AdoptMachineKey(ctx context.Context, a Adoption, pkcs8 []byte) (*Machine, error) {
	if a.TPM != "" {
		return nil, fmt.Errorf("%w: both a TPM and a file", ErrInvalid)
	}
	i, err := c.beginImport(ctx, pkcs8)
	if err != nil {
		return nil, err
	}
	var info MachineInfo
	p := &proto.MachineAdopt{Name: a.Name, Machine: a.Machine, Expect: a.KeyIndex, Wrapped: i.wrapped, Token: i.token}
	if err := i.conn.call(ctx, proto.OpMachineAdopt, p, &info, nil); err != nil {
		return nil, notSentIsUnreachable(err)
	}
	return c.newMachine(info)
}

// Machine looks an adopted identity up.
func (c *Client) Machine(ctx context.Context, name string) (*Machine, error) {
	var info MachineInfo
	if err := c.Call(ctx, proto.OpMachineShow, &proto.MachineRef{Name: name}, &info, nil); err != nil {
		return nil, err
	}
	return c.newMachine(info)
}

// ReleaseMachine gives an identity up, on the admin socket: both keys are destroyed. The TPM, where it was in one, makes it again when it is
// adopted again; a key from a file is gone.
func (c *Client) ReleaseMachine(ctx context.Context, name string) error {
	return c.Call(ctx, proto.OpMachineRelease, &proto.MachineRef{Name: name}, nil, nil)
}

func (c *Client) newMachine(info MachineInfo) (*Machine, error) {
	m := &Machine{client: c, info: info}
	for _, k := range []struct {
		spki []byte
		into **rsa.PublicKey
	}{{info.Sign.SPKI, &m.signing}, {info.Encrypt.SPKI, &m.encryption}} {
		public, err := x509.ParsePKIXPublicKey(k.spki)
		if err != nil {
			return nil, fmt.Errorf("%w: public key: %w", ErrProtocol, err)
		}
		key, ok := public.(*rsa.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%w: the key of a machine is not RSA", ErrProtocol)
		}
		*k.into = key
	}
	return m, nil
}

// Info returns what kmsd said about the machine when it was looked up or adopted.
func (m *Machine) Info() MachineInfo { return m.info }

// Onboarding is what a server has to be told of a new machine.
type Onboarding struct {
	MachineName   string `json:"machineName"`
	PublicKey     string `json:"publicKey"`     // of the encryption key, base64url
	SignPublicKey string `json:"signPublicKey"` // of the signing key, base64url
}

// Onboarding returns what a server has to be told to register the machine.
func (m *Machine) Onboarding() Onboarding {
	text := base64.RawURLEncoding.EncodeToString
	return Onboarding{m.info.Machine, text(m.info.Encrypt.Public), text(m.info.Sign.Public)}
}

// Padding returns how data for this machine are encrypted: by where its key is.
func (m *Machine) Padding() packet.Padding {
	if m.info.Encrypt.Protection == string(keyspec.TPM) {
		return packet.PaddingTPM
	}
	return packet.PaddingFile
}

// Sign signs everything r gives as MOSIP's csSign does: RSASSA-PKCS1-v1_5 with SHA-256, 256 bytes. The data are hashed in this process.
func (m *Machine) Sign(ctx context.Context, r io.Reader) ([]byte, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return nil, err
	}
	var reply proto.SignReply
	p := &proto.Sign{Key: pinned(&m.info.Sign), Scheme: string(keyspec.RSAPKCS1SHA256), Digest: h.Sum(nil)}
	if err := m.client.Call(ctx, proto.OpSign, p, &reply, nil); err != nil {
		return nil, err
	}
	return reply.Signature, nil
}

func pinned(k *MachineKeyInfo) string {
	return keyspec.Ref{Name: keyspec.Name(k.Key), Version: keyspec.Version(k.Version)}.String()
}

// Verify verifies a signature of this machine over everything r gives, in this process. The error is [ErrVerification] if it is wrong.
func (m *Machine) Verify(r io.Reader, signature []byte) error {
	return verifyMachine(m.signing, r, signature)
}

// VerifyMachine verifies a signature of the machine with this public part, as its server has it: a TPMT_PUBLIC of MOSIP's template for
// signing, else a SubjectPublicKeyInfo of an RSA-2048 key in DER.
func VerifyMachine(public []byte, r io.Reader, signature []byte) error {
	key, use, err := ParseMachinePublic(public)
	if err != nil {
		return err
	}
	if use == packet.MachineEncryption {
		return fmt.Errorf("%w: this is the public part of the encryption key", ErrInvalid)
	}
	return verifyMachine(key, r, signature)
}

// ParseMachinePublic reads the public part of a machine's key as a server has it: TPMT_PUBLIC first, else SubjectPublicKeyInfo, whose key is
// for both uses, so that use is empty.
func ParseMachinePublic(public []byte) (key *rsa.PublicKey, use packet.MachineUse, err error) {
	if key, use, err = packet.ParseMachineKey(public); err == nil {
		return key, use, nil
	}
	if len(public) > maxMachineSPKI {
		return nil, "", fmt.Errorf("%w: public part of %d bytes", ErrInvalid, len(public))
	}
	parsed, err := x509.ParsePKIXPublicKey(public)
	if err != nil {
		return nil, "", fmt.Errorf("%w: neither TPMT_PUBLIC nor SubjectPublicKeyInfo", ErrInvalid)
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok || key.N.BitLen() != machineBits {
		return nil, "", fmt.Errorf("%w: the key of a machine is RSA-%d", ErrInvalid, machineBits)
	}
	return key, "", nil
}

const (
	machineBits    = 2048
	maxMachineSPKI = 1024 // bytes
)

func verifyMachine(key *rsa.PublicKey, r io.Reader, signature []byte) error {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return err
	}
	if rsa.VerifyPKCS1v15(key, crypto.SHA256, h.Sum(nil), signature) != nil {
		return ErrVerification
	}
	return nil
}

// Encrypt encrypts at most [MaxMachineData] bytes to this machine, as its server does (packet.EncryptForClient), in this process.
func (m *Machine) Encrypt(plaintext []byte) ([]byte, error) {
	return EncryptForMachine(m.encryption, m.Padding(), plaintext)
}

// EncryptForMachine is packet.EncryptForClient for at most [MaxMachineData] bytes.
func EncryptForMachine(public *rsa.PublicKey, p packet.Padding, plaintext []byte) ([]byte, error) {
	if len(plaintext) > MaxMachineData {
		return nil, fmt.Errorf("%w: %d bytes for a machine, at most %d", ErrTooLarge, len(plaintext), MaxMachineData)
	}
	return packet.EncryptForClient(public, p, plaintext)
}

// Decrypt decrypts what was encrypted to this machine, in today's layout or that of MOSIP 1.1.4.4. The error is the one [ErrDecryption],
// whatever is wrong with what has the form of it.
func (m *Machine) Decrypt(ctx context.Context, sealed []byte) ([]byte, error) {
	return m.DecryptAs(ctx, m.Padding(), sealed)
}

// DecryptAs is Decrypt for data that were padded for another kind of client, such as [packet.PaddingAndroid] of a key from a file. A TPM has
// no other padding than its own.
func (m *Machine) DecryptAs(ctx context.Context, p packet.Padding, sealed []byte) ([]byte, error) {
	if len(sealed) > MaxMachineData+maxMachineOverhead {
		return nil, fmt.Errorf("%w: %d bytes for a machine, at most %d", ErrTooLarge, len(sealed), MaxMachineData)
	}
	plaintext, err := packet.DecryptForClient(ctx, m, p, sealed)
	if errors.Is(err, ErrDecryption) || errors.Is(err, packet.ErrDecryption) {
		return nil, ErrDecryption
	}
	return plaintext, err
}

const maxMachineOverhead = 512 // bytes in front of, and behind, the ciphertext

// EncryptBlock encrypts at most 190 bytes in one RSA block, without a data key: the content of db.conf.
func (m *Machine) EncryptBlock(plaintext []byte) ([]byte, error) {
	return packet.EncryptClientBlock(m.encryption, m.Padding(), plaintext)
}

// DecryptBlock decrypts one RSA block; a Machine is a [packet.ClientKey] by it.
func (m *Machine) DecryptBlock(ctx context.Context, p packet.Padding, block []byte) ([]byte, error) {
	options, err := p.Options()
	if err != nil {
		return nil, err
	}
	request := &proto.Decrypt{Key: pinned(&m.info.Encrypt), Ciphertext: block, Label: options.Label, Scheme: string(keyspec.RSAOAEPSHA256)}
	if options.MGFHash == crypto.SHA1 {
		request.Scheme = string(keyspec.RSAOAEPSHA256MGF1SHA1)
	}
	var reply proto.DecryptReply
	if err := m.client.Call(ctx, proto.OpDecrypt, request, &reply, nil); err != nil {
		return nil, err
	}
	return reply.Data, nil
}

// LoginToken returns the token by which a machine asks its server for a login or refresh: header.payload.signature in base64url, where the
// header names the signing key by its index. The signature is over the payload's bytes alone, as MOSIP has it, so nothing protects the header.
func (m *Machine) LoginToken(ctx context.Context, payload []byte) (string, error) {
	signature, err := m.Sign(ctx, bytes.NewReader(payload))
	if err != nil {
		return "", err
	}
	header, err := json.Marshal(map[string]string{"kid": m.info.Sign.KeyIndex})
	if err != nil {
		return "", err
	}
	text := base64.RawURLEncoding.EncodeToString
	return text(header) + "." + text(payload) + "." + text(signature), nil
}

// RequestSignatureHeader is the name of the HTTP header that a machine signs its requests in.
const RequestSignatureHeader = "request-signature"

// RequestSignature returns the value of the header [RequestSignatureHeader] for a request with this JSON body.
func (m *Machine) RequestSignature(ctx context.Context, body []byte) (string, error) {
	signature, err := m.Sign(ctx, bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	return "Authorization:" + base64.RawURLEncoding.EncodeToString(signature), nil
}

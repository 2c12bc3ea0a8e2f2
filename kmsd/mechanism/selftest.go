package mechanism

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// knownAnswer is what a row's self-test expects. All fields are hexadecimal, white space is ignored.
type knownAnswer struct {
	material string
	input    string // message, plaintext or the peer's SubjectPublicKeyInfo
	output   string // signature (r || s for ECDSA), shared secret, ciphertext and tag, MAC or derived bytes
	sealed   string // RSA: an OAEP ciphertext of input
	nonce    string // AEAD: nonce; HKDF: salt
	context  string // AEAD: additional data; HKDF: info
}

// SelfTest checks the row against a known answer, through the code that serves callers: the private operation gives the
// answer, the public one accepts it, and neither accepts one that is changed. Errors wrap ErrSelfTest. It takes as long
// as two private operations of the row.
func (r *Row) SelfTest() error {
	if err := r.selfTest(r.known); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrSelfTest, r.Algorithm, err)
	}
	return nil
}

func (r *Row) selfTest(known knownAnswer) error {
	var material, input, output, sealed, nonce, context []byte
	for _, field := range []struct {
		text string
		into *[]byte
	}{{known.material, &material}, {known.input, &input}, {known.output, &output}, {known.sealed, &sealed}, {known.nonce, &nonce}, {known.context, &context}} {
		decoded, err := hex.DecodeString(strings.Join(strings.Fields(field.text), ""))
		if err != nil {
			return err
		}
		*field.into = decoded
	}
	key, err := r.Load(material)
	if err != nil {
		return err
	}
	switch r.Kind {
	case KindRSA:
		return key.testRSA(input, output, sealed)
	case KindECDSA:
		return key.testECDSA(input, output)
	case KindEd25519:
		got, err := key.Sign(nil, keyspec.PureEd25519, DER, Input{Message: input})
		if err != nil {
			return err
		}
		return key.testSignature(keyspec.PureEd25519, DER, input, got, output)
	case KindECDH:
		got, err := key.Agree(input)
		return answer(got, output, err)
	case KindAEAD:
		return key.testAEAD(nonce, input, context, output)
	case KindHMAC:
		got, err := key.MAC(nil, input)
		if err := answer(got, output, err); err != nil {
			return err
		}
		return refused(key.VerifyMAC(input, changed(output)))
	case KindHKDF:
		got, err := key.Derive(nonce, context, len(output))
		return answer(got, output, err)
	}
	return ErrUnsupported
}

func (k *Key) testRSA(input, output, sealed []byte) error {
	got, err := k.Sign(nil, keyspec.RSAPKCS1SHA256, DER, Input{Message: input})
	if err != nil {
		return err
	}
	if err := k.testSignature(keyspec.RSAPKCS1SHA256, DER, input, got, output); err != nil {
		return err
	}
	got, err = k.Decrypt(nil, keyspec.RSAOAEPSHA256, sealed, nil)
	return answer(got, input, err)
}

// testECDSA asks for the deterministic signature of RFC 6979 section 3.2, which has a known answer; the hedged signatures
// that callers get are checked by verifying one.
func (k *Key) testECDSA(input, output []byte) error {
	scheme := k.row.Schemes[0]
	var space [64]byte
	digest := sum(Digest(scheme), input, &space)
	var got []byte
	if k.koblitz != nil {
		got = k.koblitz.sign(digest, nil)
	} else {
		der, err := k.ecdsa.Sign(nil, digest, Digest(scheme))
		if err != nil {
			return err
		}
		if got, err = AppendP1363(nil, der, k.row.size); err != nil {
			return err
		}
	}
	if err := k.testSignature(scheme, P1363, input, got, output); err != nil {
		return err
	}
	hedged, err := k.Sign(nil, scheme, DER, Input{Message: input})
	if err != nil {
		return err
	}
	return Verify(k.Public(), scheme, DER, Input{Message: input}, hedged)
}

func (k *Key) testSignature(s keyspec.Scheme, e Encoding, message, got, want []byte) error {
	if err := answer(got, want, nil); err != nil {
		return err
	}
	if err := Verify(k.Public(), s, e, Input{Message: message}, want); err != nil {
		return err
	}
	return refused(Verify(k.Public(), s, e, Input{Message: changed(message)}, want))
}

func (k *Key) testAEAD(nonce, plaintext, additional, want []byte) error {
	if len(nonce) != k.aead.NonceSize() {
		return ErrInput
	}
	if err := answer(k.aead.Seal(nil, nonce, plaintext, additional), want, nil); err != nil {
		return err
	}
	got, err := k.aead.Open(nil, nonce, want, additional)
	if err := answer(got, plaintext, err); err != nil {
		return err
	}
	_, err = k.aead.Open(nil, nonce, changed(want), additional)
	return refused(err)
}

// answer compares what came out with what is known.
func answer(got, want []byte, err error) error {
	if err != nil {
		return err
	}
	if len(want) == 0 || !bytes.Equal(got, want) {
		return errors.New("wrong answer")
	}
	return nil
}

// refused turns the acceptance of something wrong into an error.
func refused(err error) error {
	if err == nil {
		return errors.New("a changed input was accepted")
	}
	return nil
}

// changed returns b with its last bit flipped.
func changed(b []byte) []byte {
	c := bytes.Clone(b)
	if len(c) > 0 {
		c[len(c)-1] ^= 1
	}
	return c
}

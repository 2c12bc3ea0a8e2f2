package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// Bounds of a file of approvals.
const (
	maxApprovalFile = 64 << 10
	maxApprovals    = 64
)

// Approval is the word of a signer that slots may open while PCRs are in one state. A new state needs a new approval, not a new slot.
//
// An approval does not expire: a machine that is taken back to an approved state, with its old software, opens again.
type Approval struct {
	PCRs      []int
	Policy    []byte // what TPM2_PolicyPCR gives for the PCRs and their values
	Key       []byte // fingerprint of the signer: SHA-256 of the RSAPublicKey (RFC 8017), or of the uncompressed point
	Signature []byte // over Policy, by RSASSA-PKCS1-v1_5 with SHA-256 or by ECDSA with SHA-256 in DER

	selected pcrs
}

// fingerprint is how systemd-measure names a key.
func fingerprint(signer crypto.PublicKey) ([]byte, error) {
	var encoded []byte
	switch k := signer.(type) {
	case *rsa.PublicKey:
		encoded = x509.MarshalPKCS1PublicKey(k)
	case *ecdsa.PublicKey:
		var err error
		if encoded, err = k.Bytes(); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("a key of type %T cannot sign for a TPM", signer)
	}
	sum := sha256.Sum256(encoded)
	return sum[:], nil
}

// wireApproval is an approval in the file, which is the one that systemd-measure(1) writes and systemd-stub(7) puts into
// /run/systemd/tpm2-pcr-signature.json: an object with an array of these for each bank.
type wireApproval struct {
	PCRs []int  `json:"pcrs"`
	Key  string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  []byte `json:"sig"`
}

const bank = "sha256"

// ParseApprovals reads a file of approvals of at most 64 KiB. It returns those for the SHA-256 bank; it does not check signatures.
func ParseApprovals(file []byte) ([]Approval, error) {
	if len(file) > maxApprovalFile {
		return nil, errors.New("file of approvals is too large")
	}
	banks := make(map[string]json.RawMessage)
	if err := json.Unmarshal(file, &banks); err != nil {
		return nil, errors.New("file of approvals is not JSON")
	}
	var wire []wireApproval
	if raw, ok := banks[bank]; ok {
		if err := json.Unmarshal(raw, &wire); err != nil {
			return nil, errors.New("file of approvals is not as systemd-measure writes it")
		}
	}
	if len(wire) > maxApprovals {
		return nil, fmt.Errorf("%d approvals in a file", len(wire))
	}
	list := make([]Approval, 0, len(wire))
	for i, w := range wire {
		a := Approval{PCRs: w.PCRs, Signature: w.Sig}
		var err error
		if a.selected, err = newPCRs(w.PCRs); err != nil || a.selected == 0 {
			return nil, fmt.Errorf("PCRs of approval %d", i)
		}
		if a.Policy, err = hex.DecodeString(w.Pol); err != nil || len(a.Policy) != sha256.Size {
			return nil, fmt.Errorf("policy of approval %d", i)
		}
		if a.Key, err = hex.DecodeString(w.Key); err != nil || len(a.Key) != sha256.Size {
			return nil, fmt.Errorf("key of approval %d", i)
		}
		if len(a.Signature) == 0 || len(a.Signature) > maxArea {
			return nil, fmt.Errorf("signature of approval %d", i)
		}
		a.PCRs = a.selected.list()
		list = append(list, a)
	}
	return list, nil
}

// readApprovals reads the file anew at each unlock, so that an approval counts as soon as it is there. Approvals of other signers are left
// out.
func readApprovals(path string, signer []byte) ([]Approval, error) {
	if path == "" {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the slot wants approved PCRs and no file of approvals is configured"}
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &enclave.Error{Kind: enclave.ErrPolicy, Detail: "no approvals of the PCRs", Cause: err,
			Remedy: "have the signer approve the present state, or unlock with another slot"}
	}
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
	}
	defer f.Close()
	file, err := io.ReadAll(io.LimitReader(f, maxApprovalFile+1))
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Cause: err}
	}
	all, err := ParseApprovals(file)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: path, Cause: err}
	}
	k, err := parsePublic(signer)
	if err != nil {
		return nil, corrupt("signer of the slot", err)
	}
	id, err := fingerprint(k)
	if err != nil {
		return nil, corrupt("signer of the slot", err)
	}
	var ours []Approval
	for _, a := range all {
		if bytes.Equal(a.Key, id) {
			ours = append(ours, a)
		}
	}
	return ours, nil
}

// signature is the approval's signature in the TPM's form.
func (a Approval) signature(keyType tpm2.TPMAlgID) (*tpm2.TPMTSignature, error) {
	if keyType == tpm2.TPMAlgRSA {
		return &tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: a.Signature}})}, nil
	}
	var r, s []byte
	der, inner := cryptobyte.String(a.Signature), cryptobyte.String(nil)
	if !der.ReadASN1(&inner, asn1.SEQUENCE) || !der.Empty() || !inner.ReadASN1Integer(&r) || !inner.ReadASN1Integer(&s) || !inner.Empty() ||
		len(r) > 32 || len(s) > 32 {
		return nil, &enclave.Error{Kind: enclave.ErrPolicy, Detail: "the signature of the approval is not ECDSA with P-256"}
	}
	return &tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA,
		&tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: leftPad(r, 32)}, SignatureS: tpm2.TPM2BECCParameter{Buffer: leftPad(s, 32)}})}, nil
}

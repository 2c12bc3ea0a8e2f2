package tpm

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
)

// What the signer of approvals does, away from the machine; outside of these tests that is systemd-measure.

// SignApproval approves of the PCRs having these values. It is what the one who makes the updates runs, away from the machine.
func SignApproval(signer crypto.Signer, list []int, values [][]byte) (Approval, error) {
	if _, err := signerPublic(signer.Public()); err != nil {
		return Approval{}, fmt.Errorf("signer of PCRs: %w", err)
	}
	policy, err := PCRPolicy(list, values)
	if err != nil {
		return Approval{}, err
	}
	id, err := fingerprint(signer.Public())
	if err != nil {
		return Approval{}, err
	}
	digest := sha256.Sum256(policy)
	signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return Approval{}, err
	}
	selected, err := newPCRs(list)
	if err != nil {
		return Approval{}, err
	}
	return Approval{PCRs: selected.list(), Policy: policy, Key: id, Signature: signature, selected: selected}, nil
}

// MarshalApprovals writes a file of approvals.
func MarshalApprovals(list []Approval) ([]byte, error) {
	wire := make([]wireApproval, 0, len(list))
	for _, a := range list {
		wire = append(wire, wireApproval{a.PCRs, hex.EncodeToString(a.Key), hex.EncodeToString(a.Policy), a.Signature})
	}
	b, err := json.Marshal(map[string][]wireApproval{bank: wire})
	if err == nil && (len(b) > maxApprovalFile || len(list) > maxApprovals) {
		err = errors.New("too many approvals for one file")
	}
	return b, err
}

// PCRPolicy is the policy digest that an approval signs: that PCRs of the SHA-256 bank have these values, of 32 bytes each in ascending
// order of the PCRs (TPM2_PolicyPCR from an empty policy, TPM 2.0 part 3 section 23.7).
func PCRPolicy(list []int, values [][]byte) ([]byte, error) {
	p, err := newPCRs(list)
	if err != nil {
		return nil, err
	}
	if p == 0 || len(values) != len(list) {
		return nil, errors.New("give one value for each PCR, and at least one PCR")
	}
	for _, v := range values {
		if len(v) != sha256.Size {
			return nil, fmt.Errorf("PCR value of %d bytes", len(v))
		}
	}
	return p.policy(values)
}

// PCRs reads the PCRs of the SHA-256 bank, in ascending order.
func (t *TPM) PCRs(ctx context.Context, list []int) ([][]byte, error) {
	p, err := newPCRs(list)
	if err != nil {
		return nil, unsupported("%v", err)
	}
	return call(ctx, t, func(d *device) ([][]byte, error) { return d.readPCRs(p) })
}

// Verify reports whether the approval was signed by the key.
func (a Approval) Verify(signer crypto.PublicKey) bool {
	digest := sha256.Sum256(a.Policy)
	switch k := signer.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, digest[:], a.Signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], a.Signature) == nil
	}
	return false
}

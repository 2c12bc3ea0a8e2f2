package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/kmsd-project/kmsd/enclave"
)

// pcrs is a set of PCRs of the SHA-256 bank, bit n for PCR n.
type pcrs uint32

// maxPCR is the last PCR of a PC client.
const maxPCR = 23

func newPCRs(list []int) (pcrs, error) {
	var p pcrs
	for _, n := range list {
		if n < 0 || n > maxPCR {
			return 0, fmt.Errorf("there is no PCR %d", n)
		}
		if p&(1<<n) != 0 {
			return 0, fmt.Errorf("PCR %d is named twice", n)
		}
		p |= 1 << n
	}
	return p, nil
}

func (p pcrs) list() []int {
	var list []int
	for n := range maxPCR + 1 {
		if p&(1<<n) != 0 {
			list = append(list, n)
		}
	}
	return list
}

func (p pcrs) selection() tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{byte(p), byte(p >> 8), byte(p >> 16)},
	}}}
}

// policy says what a TPM demands besides the auth value: the PCRs in a fixed state, PCRs in a state that the signer approves, or nothing.
type policy struct {
	pcrs   pcrs
	signer []byte // SPKI
}

func (p policy) empty() bool { return p.pcrs == 0 && len(p.signer) == 0 }

// digest is the authPolicy of an object under p, whose fixed PCRs have values now (TPM 2.0 part 3 sections 23.7, 23.16 and 23.17). The
// auth value is part of each policy, so that the session that carries it also proves it.
func (p policy) digest(values [][]byte) ([]byte, error) {
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if p.pcrs != 0 {
		err = (tpm2.PolicyPCR{Pcrs: p.pcrs.selection(), PcrDigest: tpm2.TPM2BDigest{Buffer: pcrDigest(values)}}).Update(calculator)
	} else {
		var key *tpm2.TPMTPublic
		var name *tpm2.TPM2BName
		if key, err = parseSigner(p.signer); err != nil {
			return nil, err
		}
		if name, err = tpm2.ObjectName(key); err != nil {
			return nil, err
		}
		err = (tpm2.PolicyAuthorize{KeySign: *name}).Update(calculator)
	}
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyAuthValue{}).Update(calculator); err != nil {
		return nil, err
	}
	return calculator.Hash().Digest, nil
}

func pcrDigest(values [][]byte) []byte {
	h := sha256.New()
	for _, v := range values {
		h.Write(v)
	}
	return h.Sum(nil)
}

func (p pcrs) policy(values [][]byte) ([]byte, error) {
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := (tpm2.PolicyPCR{Pcrs: p.selection(), PcrDigest: tpm2.TPM2BDigest{Buffer: pcrDigest(values)}}).Update(calculator); err != nil {
		return nil, err
	}
	return calculator.Hash().Digest, nil
}

// readPCRs reads the selected PCRs. A TPM answers with at most eight at a time, and tells which.
func (d *device) readPCRs(p pcrs) ([][]byte, error) {
	var values [][]byte
	for p != 0 {
		answer, err := tpm2.PCRRead{PCRSelectionIn: p.selection()}.Execute(d)
		if err != nil {
			return nil, err
		}
		var got pcrs
		for _, s := range answer.PCRSelectionOut.PCRSelections {
			if s.Hash == tpm2.TPMAlgSHA256 {
				for i, b := range s.PCRSelect {
					if i < 3 {
						got |= pcrs(b) << (8 * i)
					}
				}
			}
		}
		if got == 0 || got&^p != 0 || len(got.list()) != len(answer.PCRValues.Digests) {
			return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the TPM does not have these PCRs of the SHA-256 bank",
				Remedy: "enable the SHA-256 bank in the firmware"}
		}
		for _, v := range answer.PCRValues.Digests {
			values = append(values, v.Buffer)
		}
		p &^= got
	}
	return values, nil
}

// authorise opens the session with which the object may be used. The caller closes it, always.
//
// This is not go-tpm's Policy with a callback: that leaks its session each time the callback fails, and a TPM has three (v0.9.8).
func (d *device) authorise(root *object, auth []byte, p policy, approvals []Approval, more ...tpm2.AuthOption) (tpm2.Session, func() error, error) {
	if p.empty() {
		return tpm2.HMACSession(d, tpm2.TPMAlgSHA256, nonceSize, salted(root, auth, more...)...)
	}
	s, end, err := tpm2.PolicySession(d, tpm2.TPMAlgSHA256, nonceSize, salted(root, auth, more...)...)
	if err != nil {
		return nil, nil, err
	}
	if err := d.satisfy(s, p, approvals); err != nil {
		end()
		return nil, nil, err
	}
	return s, end, nil
}

// satisfy runs the policy in the session.
func (d *device) satisfy(s tpm2.Session, p policy, approvals []Approval) error {
	if p.pcrs != 0 {
		if err := d.policyPCR(s, p.pcrs); err != nil {
			return err
		}
	} else if err := d.policySigned(s, p.signer, approvals); err != nil {
		return err
	}
	_, err := tpm2.PolicyAuthValue{PolicySession: s.Handle()}.Execute(d)
	return err
}

// policyPCR puts the present state of the PCRs into the policy. Whether it is the right one shows when the object is used.
func (d *device) policyPCR(s tpm2.Session, p pcrs) error {
	_, err := tpm2.PolicyPCR{PolicySession: s.Handle(), Pcrs: p.selection()}.Execute(d)
	return err
}

// policySigned looks for an approval of the present state and has the TPM check that, and its signature.
func (d *device) policySigned(s tpm2.Session, signer []byte, approvals []Approval) error {
	for _, a := range approvals {
		values, err := d.readPCRs(a.selected)
		if err != nil {
			return err
		}
		now, err := a.selected.policy(values)
		if err != nil {
			return err
		}
		if bytes.Equal(now, a.Policy) {
			return d.policyAuthorize(s, signer, a)
		}
	}
	return &enclave.Error{Kind: enclave.ErrPolicy, Detail: fmt.Sprintf("none of %d approvals is for the present state of the PCRs", len(approvals)),
		Remedy: "have the signer approve the state after the update, or unlock with another slot"}
}

func (d *device) policyAuthorize(s tpm2.Session, signer []byte, a Approval) error {
	if err := d.policyPCR(s, a.selected); err != nil {
		return err
	}
	public, err := parseSigner(signer)
	if err != nil {
		return err
	}
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*public), Hierarchy: tpm2.TPMRHOwner}.Execute(d)
	if err != nil {
		return err
	}
	o := &object{handle: loaded.ObjectHandle, name: loaded.Name}
	defer d.flush(o)
	signature, err := a.signature(public.Type)
	if err != nil {
		return err
	}
	signed := sha256.Sum256(a.Policy) // and an empty policyRef (TPM 2.0 part 3 section 23.16)
	ticket, err := tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: o.handle, Name: o.name},
		Digest:    tpm2.TPM2BDigest{Buffer: signed[:]},
		Signature: *signature,
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCSignature, tpm2.TPMRCSize, tpm2.TPMRCValue) {
		return &enclave.Error{Kind: enclave.ErrPolicy, Detail: "the approval is not signed by the signer of the slot", Cause: err}
	}
	if err != nil {
		return err
	}
	_, err = tpm2.PolicyAuthorize{
		PolicySession:  s.Handle(),
		ApprovedPolicy: tpm2.TPM2BDigest{Buffer: a.Policy},
		KeySign:        o.name,
		CheckTicket:    ticket.Validation,
	}.Execute(d)
	if isOneOf(err, tpm2.TPMRCValue, tpm2.TPMRCPolicyFail) {
		// The PCRs changed between two commands.
		return &enclave.Error{Kind: enclave.ErrPolicy, Detail: "the approval is for another state of the PCRs", Cause: err}
	}
	return err
}

// signerPublic is the public area under which the TPM knows the signer. Its name is in the policy of slots, so it never changes.
func signerPublic(signer crypto.PublicKey) (*tpm2.TPMTPublic, error) {
	p := &tpm2.TPMTPublic{NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: tpm2.TPMAObject{SignEncrypt: true, UserWithAuth: true}}
	switch k := signer.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() {
			return nil, errors.New("an ECDSA key is on P-256")
		}
		point, err := k.Bytes()
		if err != nil {
			return nil, err
		}
		p.Type = tpm2.TPMAlgECC
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, pointOf(point))
	case *rsa.PublicKey:
		if bits := k.N.BitLen(); bits != 2048 && bits != 3072 || k.E != 65537 {
			return nil, errors.New("an RSA key has 2048 or 3072 bits and the exponent 65537")
		}
		p.Type = tpm2.TPMAlgRSA
		p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: tpm2.TPMIRSAKeyBits(k.N.BitLen())})
		p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: k.N.Bytes()})
	default:
		return nil, fmt.Errorf("a key of type %T cannot sign for a TPM", signer)
	}
	return p, nil
}

func parseSigner(spki []byte) (*tpm2.TPMTPublic, error) {
	k, err := parsePublic(spki)
	if err != nil {
		return nil, corrupt("signer of the slot", err)
	}
	p, err := signerPublic(k)
	if err != nil {
		return nil, corrupt("signer of the slot", err)
	}
	return p, nil
}

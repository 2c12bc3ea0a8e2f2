package client

import (
	"crypto/rsa"
	"io"

	"golang.org/x/crypto/ssh"
)

// SSHSigner returns the key as a signer for golang.org/x/crypto/ssh. With an RSA key it signs and offers rsa-sha2-256 and
// rsa-sha2-512 (RFC 8332) only, never the SHA-1 of ssh-rsa.
func (k *Key) SSHSigner() (ssh.AlgorithmSigner, error) {
	if k.public == nil {
		return nil, k.unsupported("ssh")
	}
	signer, err := ssh.NewSignerFromSigner(k)
	if err != nil {
		return nil, k.unsupported("ssh")
	}
	algorithmSigner, ok := signer.(ssh.AlgorithmSigner)
	if !ok {
		return nil, k.unsupported("ssh")
	}
	if _, ok := k.public.(*rsa.PublicKey); !ok {
		return algorithmSigner, nil
	}
	sha2, err := ssh.NewSignerWithAlgorithms(algorithmSigner, []string{ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSASHA512})
	if err != nil {
		return nil, err
	}
	return rsaSHA2{sha2}, nil
}

// rsaSHA2 replaces the two defaults of x/crypto/ssh that mean SHA-1.
type rsaSHA2 struct{ ssh.MultiAlgorithmSigner }

func (s rsaSHA2) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return s.SignWithAlgorithm(rand, data, ssh.KeyAlgoRSASHA256)
}

func (s rsaSHA2) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	if algorithm == "" {
		algorithm = ssh.KeyAlgoRSASHA256
	}
	return s.MultiAlgorithmSigner.SignWithAlgorithm(rand, data, algorithm)
}

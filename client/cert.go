package client

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Subject says whom a certificate is for.
type Subject = proto.Subject

// CertProfile says what a certificate allows.
type CertProfile = proto.CertProfile

// CertificateRequest returns a PKCS #10 request for a key, in DER.
func (c *Client) CertificateRequest(ctx context.Context, ref string, subject Subject) ([]byte, error) {
	chain, err := c.chain(ctx, proto.OpCertRequest, &proto.CertRequest{Key: ref, Subject: subject})
	if err != nil {
		return nil, err
	}
	return chain[0], nil
}

// SelfSign makes a self-signed certificate and attaches it to the key.
func (c *Client) SelfSign(ctx context.Context, ref string, subject Subject, profile CertProfile) ([]*x509.Certificate, error) {
	return c.certificates(ctx, proto.OpCertSelfSign, &proto.CertSelfSign{Key: ref, Subject: subject, Profile: profile})
}

// Issue makes a certificate signed by issuer for the key ref and attaches it, with its chain, to that key.
func (c *Client) Issue(ctx context.Context, issuer, ref string, subject Subject, profile CertProfile) ([]*x509.Certificate, error) {
	return c.certificates(ctx, proto.OpCertIssue, &proto.CertIssue{Issuer: issuer, Key: ref, Subject: subject, Profile: profile})
}

// IssueRequest makes a certificate signed by issuer for a PKCS #10 request in DER.
func (c *Client) IssueRequest(ctx context.Context, issuer string, request []byte, profile CertProfile) ([]*x509.Certificate, error) {
	return c.certificates(ctx, proto.OpCertIssue, &proto.CertIssue{Issuer: issuer, Request: request, Profile: profile})
}

// Attach attaches a certificate chain, leaf first, to a key.
func (c *Client) Attach(ctx context.Context, ref string, chain []*x509.Certificate) error {
	p := &proto.CertAttach{Key: ref}
	for _, certificate := range chain {
		p.Chain = append(p.Chain, certificate.Raw)
	}
	return c.Call(ctx, proto.OpCertAttach, p, nil, nil)
}

// Chain returns the certificate chain of a key, leaf first. It is empty if none has been attached. Certificates with a
// negative serial number are read too.
func (c *Client) Chain(ctx context.Context, ref string) ([]*x509.Certificate, error) {
	var reply proto.CertChain
	if err := c.Call(ctx, proto.OpCertGet, &proto.KeyRef{Key: ref}, &reply, nil); err != nil {
		return nil, err
	}
	return parseChain(reply.Chain)
}

func (c *Client) chain(ctx context.Context, op string, params proto.Message) ([][]byte, error) {
	var reply proto.CertChain
	if err := c.Call(ctx, op, params, &reply, nil); err != nil {
		return nil, err
	}
	if len(reply.Chain) == 0 {
		return nil, fmt.Errorf("%w: %s gave nothing", ErrProtocol, op)
	}
	return reply.Chain, nil
}

func (c *Client) certificates(ctx context.Context, op string, params proto.Message) ([]*x509.Certificate, error) {
	chain, err := c.chain(ctx, op, params)
	if err != nil {
		return nil, err
	}
	return parseChain(chain)
}

func parseChain(der [][]byte) ([]*x509.Certificate, error) {
	var chain []*x509.Certificate
	for _, b := range der {
		certificate, err := pkix.ParseCertificate(b)
		if err != nil {
			return nil, err
		}
		chain = append(chain, certificate)
	}
	return chain, nil
}

// ErrNoCertificate says that a key has no certificate, which TLS needs.
var ErrNoCertificate = errors.New("the key has no certificate")

// Certificate returns the chain of the key, with the key as the private key of its leaf, for a tls.Config. Where a rotation shall take
// effect without a restart use [CertificateSource].
func (k *Key) Certificate(ctx context.Context) (tls.Certificate, error) {
	if pkix.IsSecp256k1(k.public) {
		return tls.Certificate{}, k.unsupported("TLS")
	}
	chain, err := k.client.Chain(ctx, k.pinned)
	if err != nil {
		return tls.Certificate{}, err
	}
	if len(chain) == 0 {
		return tls.Certificate{}, fmt.Errorf("%w: %s", ErrNoCertificate, k.pinned)
	}
	certificate := tls.Certificate{PrivateKey: signer{k}, Leaf: chain[0], SupportedSignatureAlgorithms: k.tlsAlgorithms()}
	for _, c := range chain {
		certificate.Certificate = append(certificate.Certificate, c.Raw)
	}
	return certificate, nil
}

// signer is a Key without Decrypt: crypto/tls takes a crypto.Decrypter for one that does the RSA key exchange of TLS 1.2,
// and fails if it does not.
type signer struct{ crypto.MessageSigner }

// tlsAlgorithms keeps crypto/tls from choosing what kmsd does not sign with, such as SHA-1.
func (k *Key) tlsAlgorithms() []tls.SignatureScheme {
	switch k.Algorithm() {
	case keyspec.ECDSAP256:
		return []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}
	case keyspec.ECDSAP384:
		return []tls.SignatureScheme{tls.ECDSAWithP384AndSHA384}
	case keyspec.ECDSAP521:
		return []tls.SignatureScheme{tls.ECDSAWithP521AndSHA512}
	case keyspec.Ed25519:
		return []tls.SignatureScheme{tls.Ed25519}
	}
	all := map[keyspec.Scheme]tls.SignatureScheme{
		keyspec.RSAPSSSHA256: tls.PSSWithSHA256, keyspec.RSAPSSSHA384: tls.PSSWithSHA384, keyspec.RSAPSSSHA512: tls.PSSWithSHA512,
		keyspec.RSAPKCS1SHA256: tls.PKCS1WithSHA256, keyspec.RSAPKCS1SHA384: tls.PKCS1WithSHA384, keyspec.RSAPKCS1SHA512: tls.PKCS1WithSHA512,
	}
	var algorithms []tls.SignatureScheme
	for _, scheme := range keyspec.Schemes() {
		algorithm, ok := all[scheme]
		if ok && strings.HasPrefix(string(scheme), "rsa-") && (len(k.info.Schemes) == 0 || slices.Contains(k.info.Schemes, string(scheme))) {
			algorithms = append(algorithms, algorithm)
		}
	}
	return algorithms
}

// CertificateSource gives the certificate of a key to crypto/tls and looks for a newer one from time to time, so that a
// rotated key or a renewed certificate is taken up without a restart:
//
//	source := c.CertificateSource("web/server", time.Minute)
//	config := &tls.Config{GetCertificate: source.GetCertificate}
//
// It is safe for concurrent use.
type CertificateSource struct {
	client  *Client
	name    string
	refresh time.Duration

	mu      sync.Mutex
	current *tls.Certificate
	looked  time.Time
	looking bool
}

// CertificateSource returns a source for the key name that asks kmsd again after the time refresh.
func (c *Client) CertificateSource(name string, refresh time.Duration) *CertificateSource {
	return &CertificateSource{client: c, name: name, refresh: refresh}
}

// GetCertificate is for the field of that name of a tls.Config of a server.
func (s *CertificateSource) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.get(hello.Context())
}

// GetClientCertificate is for the field of that name of a tls.Config of a client.
func (s *CertificateSource) GetClientCertificate(request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return s.get(request.Context())
}

// get returns the certificate, looked up again by one handshake at a time. When that fails the last one serves on.
func (s *CertificateSource) get(ctx context.Context) (*tls.Certificate, error) {
	if ctx == nil { // of a handshake that a test made up
		ctx = context.Background()
	}
	s.mu.Lock()
	current := s.current
	if current != nil && (s.looking || time.Since(s.looked) < s.refresh) {
		s.mu.Unlock()
		return current, nil
	}
	s.looking = true
	s.mu.Unlock()

	found, err := s.look(ctx)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.looking, s.looked = false, time.Now()
	if err != nil {
		if s.current != nil {
			return s.current, nil
		}
		return nil, err
	}
	s.current = found
	return found, nil
}

func (s *CertificateSource) look(ctx context.Context) (*tls.Certificate, error) {
	key, err := s.client.Key(ctx, s.name)
	if err != nil {
		return nil, err
	}
	certificate, err := key.Certificate(ctx)
	if err != nil {
		return nil, err
	}
	return &certificate, nil
}

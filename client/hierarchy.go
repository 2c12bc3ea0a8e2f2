package client

import (
	"context"
	"crypto/x509"
	"fmt"
	"iter"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Application says what keys an application has, how long they are valid and whom their certificates name.
type Application = proto.Application

// DN is the name of the holder of a certificate; empty parts are the defaults of its application.
type DN = proto.DN

// Applications lists the applications of the hierarchy by name, those that are built in and those that were set.
func (c *Client) Applications(ctx context.Context) iter.Seq2[*Application, error] {
	return func(yield func(*Application, error) bool) {
		p := proto.AppList{}
		for {
			var page proto.AppListReply
			if err := c.Call(ctx, proto.OpAppList, &p, &page, nil); err != nil {
				yield(nil, err)
				return
			}
			for i := range page.Applications {
				if !yield(&page.Applications[i], nil) {
					return
				}
			}
			if page.Next == "" {
				return
			}
			p.After = page.Next
		}
	}
}

// Application returns one application with what profile and ROOT give it, or with settings only what was set. The error is
// [ErrNotAvailable] if there is none of this name.
func (c *Client) Application(ctx context.Context, name string, settings bool) (*Application, error) {
	var reply Application
	if err := c.Call(ctx, proto.OpAppGet, &proto.AppRef{Name: name, Settings: settings}, &reply, nil); err != nil {
		return nil, err
	}
	return &reply, nil
}

// SetApplication adds an application, or replaces the settings of one. It takes the admin socket.
func (c *Client) SetApplication(ctx context.Context, a *Application) (*Application, error) {
	var reply Application
	if err := c.Call(ctx, proto.OpAppSet, a, &reply, nil); err != nil {
		return nil, err
	}
	return &reply, nil
}

// Holder is whom a certificate is for, as far as that shall not be the default of the application.
type Holder struct {
	Name     DN
	AltNames []string // kind:value with the kinds dns, ip, email and uri; nil: those of the application
}

// MasterKey says how the root key, a module key or a sign key is made.
type MasterKey struct {
	Holder
	Force      bool               // a new version although there is a current one
	Request    bool               // make a request to an outside authority instead of a certificate
	Symmetric  bool               // an AES key APP/REF, where the application does not say so
	Protection keyspec.Protection // empty: that of the application
	Escrow     keyspec.Escrow
}

// CertifiedKey is a version of a key with its certificate.
type CertifiedKey struct {
	Ref       string              // NAME@VERSION
	Chain     []*x509.Certificate // leaf first, up to the root; empty where only a request was made
	Request   []byte              // PKCS #10 in DER, where one was asked for
	KeyID     string              // MOSIP's kid
	NotBefore time.Time
	Expires   time.Time
	Made      bool // by this call
}

// GenerateMaster makes the root key (ROOT), a module key (APP) or a sign key (APP/SIGN, APP/EC_SECP256K1_SIGN, APP/EC_SECP256R1_SIGN,
// APP/ED25519_SIGN) with its certificate, or an AES key of an application. Without Force a key that is current is returned as it is.
func (c *Client) GenerateMaster(ctx context.Context, name string, m MasterKey) (*CertifiedKey, error) {
	return c.certified(ctx, proto.OpMasterGenerate, &proto.MasterGenerate{
		Key: name, Force: m.Force, CSR: m.Request, Symmetric: m.Symmetric, Protection: string(m.Protection), Escrow: string(m.Escrow), Subject: m.Name, Names: m.AltNames,
	})
}

// CurrentCertificate returns the certificate of the current version of a key, as MOSIP's getCertificate does: where none is current, or the
// current one expires soon, kmsd makes a new version if the policy of the application lets it. Any number of callers get the same one.
func (c *Client) CurrentCertificate(ctx context.Context, name string, h Holder) (*CertifiedKey, error) {
	return c.certified(ctx, proto.OpCertCurrent, &proto.CertCurrent{Key: name, Subject: h.Name, Names: h.AltNames})
}

// CurrentRequest is CurrentCertificate with a PKCS #10 request for the key instead of its certificate.
func (c *Client) CurrentRequest(ctx context.Context, name string, h Holder) (*CertifiedKey, error) {
	return c.certified(ctx, proto.OpCertCSR, &proto.CertCurrent{Key: name, Subject: h.Name, Names: h.AltNames})
}

func (c *Client) certified(ctx context.Context, op string, params proto.Message) (*CertifiedKey, error) {
	var reply proto.Certified
	if err := c.Call(ctx, op, params, &reply, nil); err != nil {
		return nil, err
	}
	k := &CertifiedKey{
		Ref: reply.Key, Request: reply.Request, KeyID: reply.KeyID, NotBefore: wireTime(reply.NotBefore), Expires: wireTime(reply.Expires), Made: reply.Made,
	}
	var err error
	k.Chain, err = parseChain(reply.Chain)
	return k, err
}

// wireTime is a time of the wire; none, and the default, are the zero time.
func wireTime(seconds int64) time.Time {
	if seconds <= 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}

// CertificateVersion is the certificate of one version of a key.
type CertificateVersion struct {
	Version     uint32
	State       keyspec.State
	KeyID       string // MOSIP's kid
	Certificate *x509.Certificate
	Created     time.Time
	NotBefore   time.Time // of the version; the certificate has dates of its own
	Expires     time.Time
	Revoked     time.Time // zero: it is not
	Reason      keyspec.Reason
}

// Thumbprint is the SHA-256 of the certificate.
func (v *CertificateVersion) Thumbprint() [32]byte { return packet.Thumbprint(v.Certificate) }

// CertificateVersions lists every version of a key that has a certificate, the newest first, as MOSIP's getAllCertificates does.
func (c *Client) CertificateVersions(ctx context.Context, name string) iter.Seq2[*CertificateVersion, error] {
	return func(yield func(*CertificateVersion, error) bool) {
		p := proto.CertList{Key: name}
		for {
			var page proto.CertListReply
			if err := c.Call(ctx, proto.OpCertList, &p, &page, nil); err != nil {
				yield(nil, err)
				return
			}
			for _, v := range page.Certificates {
				certificate, err := pkix.ParseCertificate(v.Certificate)
				if err != nil {
					yield(nil, fmt.Errorf("%w: certificate of %s@%d: %w", ErrProtocol, name, v.Version, err))
					return
				}
				one := &CertificateVersion{
					Version: v.Version, State: keyspec.State(v.State), KeyID: v.KeyID, Certificate: certificate,
					Created: wireTime(v.Created), NotBefore: wireTime(v.NotBefore), Expires: wireTime(v.Expires),
					Revoked: wireTime(v.Revoked), Reason: keyspec.Reason(v.Reason),
				}
				if !yield(one, nil) {
					return
				}
			}
			if page.Next == 0 {
				return
			}
			p.After = page.Next
		}
	}
}

// Clock is what kmsd goes by when it issues certificates and rotates keys.
type Clock struct {
	Now  time.Time // the clock of the machine
	Seen time.Time // the latest time that the keystore had seen
}

// AcceptClock makes the clock of the machine count, although the keystore has seen a later time. It takes the admin socket.
func (c *Client) AcceptClock(ctx context.Context) (Clock, error) {
	var reply proto.Clock
	err := c.Call(ctx, proto.OpClockAccept, nil, &reply, nil)
	return Clock{Now: wireTime(reply.Now), Seen: wireTime(reply.Seen)}, err
}

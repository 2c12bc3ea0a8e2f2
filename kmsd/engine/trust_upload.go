package engine

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// CertUpload attaches a certificate that was issued outside to the version of one of our keys that it is for: without a version in
// ref, whichever has its public key, and has not expired. The version expires with the certificate from then on, but only an
// administrator makes it live longer by that, and the key of a machine does not expire. The certificate that was there before goes on being an alias of the version.
//
// The file holds the certificate and as much of its chain as there is, in any order. The chain must be sound: linked, CAs only above
// the leaf, all of it within its dates. With a domain it must lead to a root of that, and what lacks in the file is taken from there.
// The certificate must be valid now, allow what the key is for, and be that of a CA if the key certifies.
func (e *Engine) CertUpload(ctx context.Context, c *Caller, ref keyspec.Ref, bundle []*x509.Certificate, domain string) (out *Certified, err error) {
	err = e.do(ctx, c, &act{op: "cert_upload", ref: ref, sync: true, info: domain}, func(u *use) error {
		chain, err := u.uploaded(bundle, domain)
		if err != nil {
			return err
		}
		done, err := u.makers.take(u.ctx, string(ref.Name))
		if err != nil {
			return err
		}
		defer done()
		if u.now, err = u.turn(); err != nil {
			return err
		}
		key, v, err := u.versionFor(ref, chain[0])
		if err != nil {
			return err
		}
		if err := allows(chain[0], key.Usages); err != nil {
			return err
		}
		u.version = v
		u.detail = "certificate " + shortSum(chain[0])
		until := key.Profile != mechanism.ProfileMOSIPMachine && (u.administers() || v.Expires.IsZero() || chain[0].NotAfter.Before(v.Expires))
		after, err := u.replaceChain(keyspec.Ref{Name: key.Name, Version: v.Number}, raws(chain), until)
		if err != nil {
			return err
		}
		if v, err = version(after, v.Number, u.now); err != nil {
			return err
		}
		stored, err := u.store.Public(keyspec.Ref{Name: key.Name, Version: v.Number})
		out = &Certified{Ref: keyspec.Ref{Name: key.Name, Version: v.Number}, Chain: stored.Chain, KeyID: KeyID(after, v, stored), NotBefore: v.NotBefore, Expires: v.Expires}
		return err
	})
	if err != nil {
		return nil, err
	}
	signal(e.wakeScheduler)
	if name := out.Ref.Name; name == RootName || name.IsModule() {
		signal(e.wakeRenewer) // something may hang on it
	}
	return out, nil
}

func raws(chain []*x509.Certificate) [][]byte {
	out := make([][]byte, len(chain))
	for i, c := range chain {
		out[i] = c.Raw
	}
	return out
}

// uploaded returns the chain of a file, leaf first, sound and, where a domain is named, trusted in it.
func (u *use) uploaded(bundle []*x509.Certificate, domain string) ([]*x509.Certificate, error) {
	chain, err := pki.Arrange(bundle)
	if err != nil {
		return nil, err
	}
	if domain == "" {
		last := chain[len(chain)-1]
		if reasons := pki.Check(chain, []*x509.Certificate{last}, u.now); len(reasons) > 0 {
			return nil, fmt.Errorf("%w: %s", pki.ErrChain, reasons[0])
		}
		if pki.HasWeakSignature(last) && (len(chain) == 1 || !pki.IsSelfSigned(last)) {
			return nil, fmt.Errorf("%w: it is signed with %s", pki.ErrChain, last.SignatureAlgorithm)
		}
		return chain, nil
	}
	v, err := u.verdict(domain, chain, u.now)
	if err != nil {
		return nil, err
	}
	if !v.Trusted {
		return nil, fmt.Errorf("%w: not trusted in the domain %s: %s", pki.ErrChain, v.Domain, v.Reasons[0])
	}
	return v.Path, nil
}

// versionFor returns the version of a key that has the public key of a certificate.
func (u *use) versionFor(ref keyspec.Ref, c *x509.Certificate) (*keystore.Key, *keystore.Version, error) {
	key, err := u.metadata(u.store, ref.Name, u.now)
	if err != nil {
		return nil, nil, err
	}
	if key.Origin == keyspec.Foreign {
		return nil, nil, &Remedied{fmt.Errorf("%w: %s is another domain's key", ErrUnsupported, key.Name), "kmsctl cert upload --other-domain " + string(key.Name)}
	}
	key = cloneKey(key)
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	for i := range slices.Backward(key.Versions) {
		v := &key.Versions[i]
		if ref.Version != 0 && v.Number != ref.Version || v.SPKISHA256 != sum {
			continue
		}
		switch state := stateAt(key, v, u.now); {
		case !v.DestroyAt.IsZero():
			return nil, nil, fmt.Errorf("%w: no certificate for a key whose destruction is scheduled", ErrState)
		case !v.Revoked.IsZero(), state != keyspec.Active && state != keyspec.PreActive:
			return nil, nil, fmt.Errorf("%w: no certificate for version %d, which is %s", ErrState, v.Number, state)
		}
		return key, v, nil
	}
	return nil, nil, fmt.Errorf("%w: the certificate is of another key", ErrInput)
}

// allows checks that a certificate allows what a key with these usages is for.
func allows(c *x509.Certificate, usages []keyspec.Usage) error {
	if slices.Contains(usages, keyspec.Certify) {
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return fmt.Errorf("%w: the key certifies others, and the certificate is not that of a CA", pki.ErrCertificate)
		}
		return nil
	}
	if c.KeyUsage == 0 {
		return nil
	}
	for _, needed := range []struct {
		usage keyspec.Usage
		bits  x509.KeyUsage
		name  string
	}{
		{keyspec.Sign, x509.KeyUsageDigitalSignature | x509.KeyUsageContentCommitment, "digitalSignature"},
		{keyspec.Decrypt, encipherment, "keyEncipherment"},
		{keyspec.Encrypt, encipherment, "keyEncipherment"},
		{keyspec.Agree, x509.KeyUsageKeyAgreement, "keyAgreement"},
	} {
		if slices.Contains(usages, needed.usage) && c.KeyUsage&needed.bits == 0 {
			return fmt.Errorf("%w: its key usage lacks %s, which the key is for", pki.ErrCertificate, needed.name)
		}
	}
	return nil
}

const encipherment = x509.KeyUsageKeyEncipherment | x509.KeyUsageDataEncipherment

// rsaAlgorithms are the algorithms of keys of others, by the length of the modulus in bits.
var rsaAlgorithms = map[int]keyspec.Algorithm{2048: keyspec.RSA2048, 3072: keyspec.RSA3072, 4096: keyspec.RSA4096}

// CertUploadOther takes the certificate of somebody else's key under a name of ours, so that we can encrypt to it: MOSIP's
// uploadOtherDomainCertificate. The name is that of a base key: APP/REF, where no key is yet, or another one of somebody else's. A
// newer certificate becomes the current one; as long as it stands there kmsd makes no base key of its own under that name.
//
// The certificate is of RSA with 2048, 3072 or 4096 bits, valid now, not signed with SHA-1, and allows encipherment. With a domain it
// has to be trusted in it; without one nobody vouches for it but the caller.
func (e *Engine) CertUploadOther(ctx context.Context, c *Caller, name keyspec.Name, bundle []*x509.Certificate, domain string) (out *Certified, err error) {
	err = e.do(ctx, c, &act{op: "cert_upload", ref: keyspec.Ref{Name: name}, sync: true, info: "other domain " + domain}, func(u *use) error {
		p, err := u.placeOf(name, false)
		if err != nil {
			return err
		}
		if p.rank != rankBase {
			return fmt.Errorf("%w: a certificate of another domain goes under the name of a base key, and %s is a %s key", ErrUnsupported, name, p.rank)
		}
		chain, err := u.uploaded(bundle, domain)
		if err != nil {
			return err
		}
		public, ok := chain[0].PublicKey.(*rsa.PublicKey)
		if !ok || rsaAlgorithms[public.N.BitLen()] == "" {
			return fmt.Errorf("%w: one encrypts to RSA keys of 2048, 3072 or 4096 bits", pki.ErrKey)
		}
		if _, err := mechanism.ParseSPKI(chain[0].RawSubjectPublicKeyInfo); err != nil {
			return err
		}
		if err := allows(chain[0], []keyspec.Usage{keyspec.Encrypt}); err != nil {
			return err
		}
		done, err := u.makers.take(u.ctx, string(name))
		if err != nil {
			return err
		}
		defer done()
		if u.now, err = u.turn(); err != nil {
			return err
		}
		if err := u.notOurs(chain[0]); err != nil {
			return err
		}
		defer u.writers.lock(name)()
		key, number, err := u.foreign(p, chain[0], rsaAlgorithms[public.N.BitLen()])
		if err != nil {
			return err
		}
		stored := keystore.Public{SPKI: chain[0].RawSubjectPublicKeyInfo, Chain: raws(chain)}
		v := &key.Versions[len(key.Versions)-1]
		ch := keystore.Change{Key: key}
		u.setPublic(&ch, v, stored.SPKI)
		ch.Public[number] = stored
		u.version = v
		u.detail = "another domain's certificate " + shortSum(chain[0])
		if err := u.commit(keystore.Commit{Changes: []keystore.Change{ch}}); err != nil {
			return err
		}
		out = &Certified{Ref: keyspec.Ref{Name: name, Version: number}, Chain: stored.Chain, KeyID: KeyID(key, v, stored), NotBefore: v.NotBefore, Expires: v.Expires, Made: true}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// notOurs refuses the certificate of a key that is ours: it would be found under the other name from then on, by its thumbprint, and what
// was encrypted to it not be decrypted any more.
func (u *use) notOurs(c *x509.Certificate) error {
	sum := sha256.Sum256(c.RawSubjectPublicKeyInfo)
	refs, err := u.store.Sharing(keystore.AliasSPKI, sum[:])
	if err != nil && !errors.Is(err, keystore.ErrNotFound) {
		return err
	}
	for _, ref := range refs {
		key, err := u.metadata(u.store, ref.Name, u.now)
		if errors.Is(err, keystore.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if key.Origin != keyspec.Foreign {
			return fmt.Errorf("%w: the certificate is of a key in this keystore, under another name: encrypt to that", ErrState)
		}
	}
	return nil
}

// foreign returns the key of a place with a new version for the certificate of somebody else.
func (u *use) foreign(p *place, c *x509.Certificate, algorithm keyspec.Algorithm) (*keystore.Key, keyspec.Version, error) {
	v := keystore.Version{Number: 1, State: keyspec.Active, Created: u.now.Truncate(time.Second), NotBefore: c.NotBefore, Expires: c.NotAfter}
	key, err := u.store.Get(p.name)
	if errors.Is(err, keystore.ErrNotFound) {
		return &keystore.Key{
			Name: p.name, Algorithm: algorithm, Usages: []keyspec.Usage{keyspec.Encrypt}, Origin: keyspec.Foreign, Protection: keyspec.Software,
			Owner: u.caller.UID, Created: v.Created, Current: 1, MinVersion: 1, Versions: []keystore.Version{v},
		}, 1, nil
	}
	if err != nil {
		return nil, 0, err
	}
	switch {
	case key.Origin != keyspec.Foreign:
		return nil, 0, fmt.Errorf("%w: %s is a key of ours: a certificate of another domain goes under a name of its own", ErrState, p.name)
	case key.Algorithm != algorithm:
		return nil, 0, fmt.Errorf("%w: %s is %s and this certificate's key %s: it goes under another name", ErrUnsupported, p.name, key.Algorithm, algorithm)
	}
	last := key.Versions[len(key.Versions)-1]
	stored, err := u.store.Public(keyspec.Ref{Name: p.name, Version: last.Number})
	if err != nil {
		return nil, 0, err
	}
	if len(stored.Chain) > 0 && bytes.Equal(stored.Chain[0], c.Raw) {
		return nil, 0, fmt.Errorf("%w: %s has this certificate already", ErrState, p.name)
	}
	if err := u.advance(key, v, false); err != nil {
		return nil, 0, err
	}
	return key, newest(key), nil
}

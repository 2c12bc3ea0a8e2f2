package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// The zero-knowledge encryption of MOSIP: attributes of a person under a key that is derived from a random key and the person's id. An
// application has thousands of random keys, each wrapped by its AES key APP/IDENTITY_CACHE; they are kept in documents.
//
// Invariant: AES without a mode (ECB), which MOSIP wraps the random keys and derives keys by, is inside of this code and of client/packet. It
// wraps and unwraps random keys, which are secret and random themselves, and nothing else: there is no operation of it.
//
// Invariant: a key APP/IDENTITY_CACHE serves these operations alone. Under AES-GCM with the same key, somebody who can have it wrap a
// random key of his choice could read everything.

// Limits of zero-knowledge encryption, in numbers.
const (
	MaxZKAttributes = 64      // in one request
	MaxZKRecipients = 16      // of a random key
	MaxZKImport     = 1000    // random keys in one request
	MaxZKIndex      = 1 << 19 // random keys of one application
	maxZKID         = 1024    // bytes of an id
	MaxZKData       = 40_000  // bytes of all attributes of a request in plain, so that the answer fits a frame
	zkOverhead      = 64      // bytes that an attribute has more when it is encrypted
	zkPage          = 512     // random keys in a document
)

// identityCache is the reference of the AES keys that wrap random keys, as MOSIP names them.
const identityCache = "IDENTITY_CACHE"

// kindZK is the kind of the documents that hold random keys: a page under NAME#NUMBER, and under NAME what pages there are.
const kindZK = "zk"

const zkFormat = 1

// ZKKey is a random key, wrapped by a version of the key APP/IDENTITY_CACHE.
type ZKKey struct {
	Index    uint32
	Wrapped  [32]byte
	Inactive bool // it decrypts, and is not chosen any more
}

// ZKAttribute is an attribute of a person, in plain or encrypted.
type ZKAttribute struct {
	Identifier string
	Value      []byte
}

// zkDirectory is the document NAME.
type zkDirectory struct {
	Format int       `json:"format"`
	Pages  []zkCount `json:"pages"` // by number
}

type zkCount struct {
	Page   uint32 `json:"page"`   // has the keys from page*zkPage
	Keys   int    `json:"keys"`   // in it
	Active int    `json:"active"` // of these
}

// zkDocument is the document NAME#NUMBER.
type zkDocument struct {
	Format int       `json:"format"`
	Keys   []zkEntry `json:"keys"` // by index
}

type zkEntry struct {
	Index    uint32          `json:"index"`
	Version  keyspec.Version `json:"version"` // of the key that wraps it
	Wrapped  []byte          `json:"wrapped"`
	Inactive bool            `json:"inactive,omitempty"`
}

// forZK reports whether a key is one that wraps random keys.
func forZK(name keyspec.Name) bool {
	_, reference, ok := strings.Cut(string(name), "/")
	return ok && reference == identityCache
}

// checkZK refuses keys that cannot wrap random keys.
func checkZK(key *keystore.Key) error {
	switch {
	case !forZK(key.Name):
		return fmt.Errorf("%w: random keys are wrapped by a key APP/%s", ErrUsage, identityCache)
	case key.Algorithm != keyspec.AES256GCM:
		return fmt.Errorf("%w: random keys are wrapped by an AES-256 key, not by %s", ErrUnsupported, key.Algorithm)
	case key.Protection != keyspec.Software:
		return fmt.Errorf("%w: random keys are wrapped without a mode of AES, for which a key in a device is not used", ErrUnsupported)
	}
	return nil
}

// withMaster calls f with the AES key that wraps random keys, on a stack that is erased.
func (u *use) withMaster(ref keyspec.Ref, f func(master [32]byte) error) error {
	row, err := mechanism.Lookup(keyspec.AES256GCM)
	if err != nil {
		return err
	}
	u.touch()
	return u.withMaterial(ref, func(b []byte) error {
		plain, err := row.Export(b)
		if err != nil {
			return err
		}
		defer clear(plain)
		if len(plain) != 32 {
			return fmt.Errorf("%w: %s is no AES-256 key", keystore.ErrDamaged, ref)
		}
		return f([32]byte(plain))
	})
}

// readZK reads a document of random keys into to, which stays as it is if there is none yet, and returns its revision.
func (u *use) readZK(name string, to any) (revision uint64, err error) {
	d, err := u.store.Document(kindZK, name)
	if errors.Is(err, keystore.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return d.Revision, decodeDocument(&d, zkFormat, to)
}

func (u *use) zkDirectory(name keyspec.Name) (dir zkDirectory, revision uint64, err error) {
	dir.Format = zkFormat
	revision, err = u.readZK(string(name), &dir)
	return dir, revision, err
}

func zkPageName(name keyspec.Name, number uint32) string { return fmt.Sprintf("%s#%d", name, number) }

func (u *use) zkPage(name keyspec.Name, number uint32) (page zkDocument, revision uint64, err error) {
	page.Format = zkFormat
	revision, err = u.readZK(zkPageName(name, number), &page)
	for i := range page.Keys {
		if e := &page.Keys[i]; err == nil && (len(e.Wrapped) != 32 || e.Index/zkPage != number || i > 0 && e.Index <= page.Keys[i-1].Index) {
			err = fmt.Errorf("%w: page %d of random keys", keystore.ErrDamaged, number)
		}
	}
	return page, revision, err
}

func (p *zkDocument) find(index uint32) (at int, found bool) {
	return slices.BinarySearchFunc(p.Keys, index, func(e zkEntry, index uint32) int { return int(e.Index) - int(index) })
}

// random is a whole number from 0 below n, each as likely.
func random(n int) (int, error) {
	v, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil {
		return 0, err
	}
	return int(v.Int64()), nil
}

// choose returns one of the active random keys, each as likely as every other.
func (u *use) choose(name keyspec.Name) (*zkEntry, error) {
	dir, _, err := u.zkDirectory(name)
	if err != nil {
		return nil, err
	}
	total := 0
	for _, c := range dir.Pages {
		total += c.Active
	}
	if total == 0 {
		return nil, &Remedied{fmt.Errorf("%w: %s has no random keys", ErrState, name), "kmsctl zk generate " + string(name)}
	}
	n, err := random(total)
	if err != nil {
		return nil, err
	}
	for _, c := range dir.Pages {
		if n >= c.Active {
			n -= c.Active
			continue
		}
		page, _, err := u.zkPage(name, c.Page)
		if err != nil {
			return nil, err
		}
		for i := range page.Keys {
			if page.Keys[i].Inactive {
				continue
			}
			if n == 0 {
				return &page.Keys[i], nil
			}
			n--
		}
		break
	}
	return nil, fmt.Errorf("%w: documents of random keys of %s", keystore.ErrDamaged, name)
}

// unwrapped calls f with a random key of an entry.
func (u *use) unwrapped(name keyspec.Name, e *zkEntry, f func(random [32]byte) error) error {
	return u.withMaster(keyspec.Ref{Name: name, Version: e.Version}, func(master [32]byte) error {
		random, err := packet.UnwrapRandomKey(master, [32]byte(e.Wrapped))
		if err != nil {
			return err
		}
		return f(random)
	})
}

// checkAttributes refuses a request whose values have more than most bytes in all.
func checkAttributes(id string, attributes []ZKAttribute, most int) error {
	switch {
	case id == "" || len(id) > maxZKID:
		return fmt.Errorf("%w: an id of %d bytes; 1 to %d", ErrInput, len(id), maxZKID)
	case len(attributes) == 0 || len(attributes) > MaxZKAttributes:
		return fmt.Errorf("%w: %d attributes; 1 to %d", ErrInput, len(attributes), MaxZKAttributes)
	}
	total := 0
	for i := range attributes {
		total += len(attributes[i].Value)
	}
	if total > most {
		return fmt.Errorf("%w: attributes of %d bytes; at most %d", ErrInput, total, most)
	}
	return nil
}

// zkError turns an error of the codec into one of the engine.
func zkError(err error) error {
	switch {
	case errors.Is(err, packet.ErrDecryption):
		return ErrDecryption
	case errors.Is(err, packet.ErrFormat), errors.Is(err, packet.ErrTooLarge), errors.Is(err, packet.ErrCertificate):
		return fmt.Errorf("%w: %w", ErrInput, err)
	}
	return err
}

// maxChoices is how many random keys are tried before it is said that all are wrapped by versions that are out of use.
const maxChoices = 64

// chooseGood is choose among those that a version wraps which is fit for new data: not one that is revoked as compromised, suspended or about
// to be destroyed.
func (u *use) chooseGood(name keyspec.Name) (*zkEntry, error) {
	for range maxChoices {
		entry, err := u.choose(name)
		if err != nil {
			return nil, err
		}
		v, err := version(u.key, entry.Version, u.now)
		if err != nil {
			continue
		}
		if state := stateAt(u.key, v, u.now); v.DestroyAt.IsZero() && (state == keyspec.Active || state == keyspec.Deactivated) {
			return entry, nil
		}
	}
	return nil, &Remedied{fmt.Errorf("%w: the random keys of %s are wrapped by versions that are out of use", ErrState, name), "kmsctl zk generate with a higher --count"}
}

// ZKEncrypt encrypts attributes of the person id under a random key that is chosen by chance. It returns the index of that key, the
// attributes in their order, and the random key itself encrypted to the certificate of each of the keys to: thumbprint (32), RSA-OAEP block.
func (e *Engine) ZKEncrypt(ctx context.Context, c *Caller, name keyspec.Name, id string, attributes []ZKAttribute, to []keyspec.Name,
) (index uint32, sealed []ZKAttribute, keys [][]byte, err error) {
	a := &act{op: "zk_encrypt", ref: keyspec.Ref{Name: name}, usage: keyspec.Encrypt, also: to}
	err = e.do(ctx, c, a, func(u *use) error {
		if err := checkZK(u.key); err != nil {
			return err
		}
		if err := checkAttributes(id, attributes, MaxZKData); err != nil {
			return err
		}
		if len(to) > MaxZKRecipients {
			return fmt.Errorf("%w: %d recipients; at most %d", ErrInput, len(to), MaxZKRecipients)
		}
		entry, err := u.chooseGood(name)
		if err != nil {
			return err
		}
		index = entry.Index
		return u.unwrapped(name, entry, func(random [32]byte) error {
			for _, plain := range attributes {
				b, err := packet.EncryptAttribute(random, index, id, plain.Value)
				if err != nil {
					return zkError(err)
				}
				sealed = append(sealed, ZKAttribute{plain.Identifier, b})
			}
			for _, name := range to {
				b, err := u.sealRandomKey(name, random)
				if err != nil {
					return err
				}
				keys = append(keys, b)
			}
			return nil
		})
	})
	return index, sealed, keys, err
}

// sealRandomKey encrypts a random key to the certificate of a key.
func (u *use) sealRandomKey(name keyspec.Name, random [32]byte) ([]byte, error) {
	key, err := u.metadata(u.store, name, u.now)
	if err != nil {
		return nil, err
	}
	if err := reachable(key, u.caller); err != nil {
		return nil, err
	}
	v, err := version(key, 0, u.now)
	if err != nil {
		return nil, err
	}
	if state := stateAt(key, v, u.now); state != keyspec.Active {
		return nil, fmt.Errorf("%w: %s is %s", ErrState, name, state)
	}
	stored, err := u.store.Public(keyspec.Ref{Name: name, Version: v.Number})
	if err != nil {
		return nil, err
	}
	if len(stored.Chain) == 0 {
		return nil, fmt.Errorf("%w: %s has no certificate", ErrState, name)
	}
	certificate, err := pki.ParseCertificate(stored.Chain[0])
	if err != nil {
		return nil, fmt.Errorf("%w: certificate: %w", keystore.ErrDamaged, err)
	}
	b, err := packet.SealRandomKey(certificate, random)
	return b, zkError(err)
}

// ZKDecrypt decrypts attributes of the person id.
func (e *Engine) ZKDecrypt(ctx context.Context, c *Caller, name keyspec.Name, id string, attributes []ZKAttribute) (plain []ZKAttribute, err error) {
	err = e.do(ctx, c, &act{op: "zk_decrypt", ref: keyspec.Ref{Name: name}, usage: keyspec.Decrypt}, func(u *use) error {
		if err := checkZK(u.key); err != nil {
			return err
		}
		if err := checkAttributes(id, attributes, MaxZKData+len(attributes)*zkOverhead); err != nil {
			return err
		}
		var page zkDocument // the one of the attribute before, which has the same random key as a rule
		var have bool
		var number uint32
		for _, sealed := range attributes {
			index, err := packet.AttributeIndex(sealed.Value)
			if err != nil {
				return zkError(err)
			}
			if index >= MaxZKIndex {
				return errNoRandomKey(index)
			}
			if !have || number != index/zkPage {
				number, have = index/zkPage, true
				if page, _, err = u.zkPage(name, number); err != nil {
					return err
				}
			}
			at, found := page.find(index)
			if !found {
				return errNoRandomKey(index)
			}
			if err := u.mayDecrypt(page.Keys[at].Version); err != nil {
				return err
			}
			err = u.unwrapped(name, &page.Keys[at], func(random [32]byte) error {
				b, err := packet.DecryptAttribute(random, id, sealed.Value)
				if err == nil {
					plain = append(plain, ZKAttribute{sealed.Identifier, b})
				}
				return zkError(err)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return plain, nil
}

func errNoRandomKey(index uint32) error {
	return &Remedied{fmt.Errorf("%w: there is no random key %d", ErrState, index), "take it over: kmsctl zk import or zk rewrap --keep"}
}

// mayDecrypt asks the rules about the version of the key that a random key is wrapped by.
func (u *use) mayDecrypt(number keyspec.Version) error {
	v, err := version(u.key, number, u.now)
	if err != nil {
		return err
	}
	err = permit(u.key, v, keyspec.Decrypt, u.now)
	if errors.Is(err, errCompromised) {
		return u.compromised()
	}
	return err
}

// ZKRewrap decrypts a random key that another application has encrypted to the RSA key from, and returns it wrapped by the key name, as
// MOSIP's zkReEncryptRandomKey does. With keep it becomes the random key of that index here, too: an inactive one, which decrypts what the other
// application has encrypted. It is never chosen for encrypting, since whoever made it up knows it.
func (e *Engine) ZKRewrap(ctx context.Context, c *Caller, name keyspec.Name, from keyspec.Ref, block []byte, keep bool, index uint32,
) (wrapped [32]byte, number keyspec.Version, err error) {
	a := &act{op: "zk_rewrap", ref: from, usage: keyspec.Decrypt, also: []keyspec.Name{name}, info: "to " + string(name)}
	err = e.do(ctx, c, a, func(u *use) error {
		if row, err := mechanism.Lookup(u.key.Algorithm); err != nil || row.Kind != mechanism.KindRSA {
			return fmt.Errorf("%w: %s is no RSA key", ErrUnsupported, from.Name)
		}
		master, err := u.metadata(u.store, name, u.now)
		if err != nil {
			return err
		}
		if err := reachable(master, c); err != nil {
			return err
		}
		if err := checkZK(master); err != nil {
			return err
		}
		v, err := version(master, 0, u.now)
		if err != nil {
			return err
		}
		if err := permit(master, v, keyspec.Encrypt, u.now); err != nil {
			return err
		}
		var plain []byte
		_, err = u.tryVersions(func() error {
			k, err := u.secret()
			if err != nil {
				return err
			}
			plain, err = decryptKey(k, block, nil, nil)
			return err
		})
		if err != nil {
			return err
		}
		defer clear(plain)
		number = v.Number
		err = u.withMaster(keyspec.Ref{Name: name, Version: number}, func(m [32]byte) (err error) {
			wrapped, err = packet.WrapRandomKey(m, [32]byte(plain))
			return err
		})
		if err != nil || !keep {
			return err
		}
		_, err = u.addRandomKeys(name, number, []ZKKey{{Index: index, Wrapped: wrapped, Inactive: true}})
		return err
	})
	return wrapped, number, err
}

// ZKImport adds random keys that are wrapped by a version of the key of ref, the current one if it names none. One that is there already is
// no error, another one under its index is ErrState.
func (e *Engine) ZKImport(ctx context.Context, c *Caller, ref keyspec.Ref, keys []ZKKey) (added int, err error) {
	err = e.do(ctx, c, &act{op: "zk_import", ref: ref, usage: keyspec.Decrypt, sync: true}, func(u *use) (err error) {
		if err := checkZK(u.key); err != nil {
			return err
		}
		if len(keys) == 0 || len(keys) > MaxZKImport {
			return fmt.Errorf("%w: %d random keys; 1 to %d", ErrInput, len(keys), MaxZKImport)
		}
		added, err = u.addRandomKeys(ref.Name, u.version.Number, keys)
		return err
	})
	return added, err
}

// ZKGenerate makes random keys until there are those with the indices below count, and returns how many it has made. MOSIP has 10,000.
func (e *Engine) ZKGenerate(ctx context.Context, c *Caller, name keyspec.Name, count int) (made int, err error) {
	a := &act{op: "zk_generate", ref: keyspec.Ref{Name: name}, usage: keyspec.Encrypt, sync: true}
	err = e.do(ctx, c, a, func(u *use) error {
		if err := checkZK(u.key); err != nil {
			return err
		}
		if count < 1 || count > MaxZKIndex {
			return fmt.Errorf("%w: %d random keys; 1 to %d", ErrInput, count, MaxZKIndex)
		}
		// Page by page, so that what is made is kept if the next one fails, and nothing of it is held in memory for long.
		for number := uint32(0); int(number)*zkPage < count; number++ {
			page, _, err := u.zkPage(name, number)
			if err != nil {
				return err
			}
			var missing []ZKKey
			for index := number * zkPage; index < uint32(min(count, int(number+1)*zkPage)); index++ {
				if _, found := page.find(index); !found {
					missing = append(missing, ZKKey{Index: index})
				}
			}
			if len(missing) == 0 {
				continue
			}
			if err := u.ctx.Err(); err != nil {
				return err
			}
			err = u.withMaster(keyspec.Ref{Name: name, Version: u.version.Number}, func(master [32]byte) error {
				for i := range missing {
					var random [32]byte
					rand.Read(random[:])
					if missing[i].Wrapped, err = packet.WrapRandomKey(master, random); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
			added, err := u.addRandomKeys(name, u.version.Number, missing)
			made += added
			if err != nil {
				return err
			}
		}
		return nil
	})
	return made, err
}

// addRandomKeys commits random keys to the documents.
func (u *use) addRandomKeys(name keyspec.Name, number keyspec.Version, keys []ZKKey) (added int, err error) {
	defer u.writers.lock(name)()
	dir, dirRevision, err := u.zkDirectory(name)
	if err != nil {
		return 0, err
	}
	type changed struct {
		page     zkDocument
		revision uint64
	}
	pages := make(map[uint32]*changed)
	for _, k := range keys {
		if k.Index >= MaxZKIndex {
			return 0, fmt.Errorf("%w: random key %d; indices are below %d", ErrInput, k.Index, MaxZKIndex)
		}
		p := pages[k.Index/zkPage]
		if p == nil {
			p = new(changed)
			if p.page, p.revision, err = u.zkPage(name, k.Index/zkPage); err != nil {
				return 0, err
			}
			pages[k.Index/zkPage] = p
		}
		at, found := p.page.find(k.Index)
		if !found {
			p.page.Keys = slices.Insert(p.page.Keys, at, zkEntry{k.Index, number, bytes.Clone(k.Wrapped[:]), k.Inactive})
			added++
			continue
		}
		if old := &p.page.Keys[at]; old.Version != number || !bytes.Equal(old.Wrapped, k.Wrapped[:]) || old.Inactive != k.Inactive {
			return 0, fmt.Errorf("%w: another random key %d is there already", ErrState, k.Index)
		}
	}
	if added == 0 {
		return 0, nil
	}
	var commit keystore.Commit
	put := func(name string, revision uint64, content any) error {
		d, err := document(kindZK, name, revision, content, false)
		commit.Documents = append(commit.Documents, d)
		return err
	}
	for n, p := range pages {
		c := zkCount{Page: n, Keys: len(p.page.Keys)}
		for i := range p.page.Keys {
			if !p.page.Keys[i].Inactive {
				c.Active++
			}
		}
		at, found := slices.BinarySearchFunc(dir.Pages, n, func(c zkCount, n uint32) int { return int(c.Page) - int(n) })
		if found {
			dir.Pages[at] = c
		} else {
			dir.Pages = slices.Insert(dir.Pages, at, c)
		}
		if err := put(zkPageName(name, n), p.revision, &p.page); err != nil {
			return 0, err
		}
	}
	if err := put(string(name), dirRevision, &dir); err != nil {
		return 0, err
	}
	return added, u.commit(commit)
}

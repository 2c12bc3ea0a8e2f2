package engine

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// DueWhat says what it is that expires.
type DueWhat string

// What expires.
const (
	DueKey         DueWhat = "key"         // a version, with its certificate if it has one
	DueCertificate DueWhat = "certificate" // and the key would go on; or a certificate of others
	DueCRL         DueWhat = "crl"         // its next update is due
)

func (w DueWhat) text() string {
	if w == DueCRL {
		return "the revocation list"
	}
	return "the " + string(w)
}

// DueThen says what is done about that.
type DueThen string

// What is done.
const (
	ThenRotate     DueThen = "rotate"     // kmsd makes a new version
	ThenRecertify  DueThen = "recertify"  // kmsd issues a new certificate for the version
	ThenPublish    DueThen = "publish"    // kmsd signs a new list
	ThenDeactivate DueThen = "deactivate" // nothing: the key is out of use, but decrypts and verifies what there is
	ThenAlert      DueThen = "alert"      // a person has to do what Detail says
	ThenNothing    DueThen = "nothing"    // it is out of use already, or replaced on demand
)

// Due is one thing that expires.
type Due struct {
	Key    keyspec.Ref // zero for what is no key of the store: certificates and revocation lists of others
	What   DueWhat
	At     time.Time
	Then   DueThen
	ActAt  time.Time // when kmsd does what Then says, zero when it does nothing
	Detail string
}

// Expiry returns a page of what expires until a time, in no order that means anything: the current versions of keys, revocation lists,
// and the certificates and lists of others that are trusted. The zero time stands for everything that expires at all. A page has at most
// limit entries, of at least 4, and may be empty; next is empty after the last one.
func (e *Engine) Expiry(ctx context.Context, c *Caller, until time.Time, after []byte, limit int) (list []Due, next []byte, err error) {
	err = e.do(ctx, c, &act{op: "expiry", admin: true, quiet: true}, func(u *use) error {
		if u.store == nil {
			_, err := u.opened()
			return err
		}
		list, next, err = newSurvey(u).timeline(after, max(limit, dueOfKey))
		list = slices.DeleteFunc(list, func(d Due) bool {
			at := d.At
			if !d.ActAt.IsZero() && d.ActAt.Before(at) {
				at = d.ActAt
			}
			return !until.IsZero() && at.After(until)
		})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return list, next, nil
}

// dueOfKey is how many entries one key has at most: itself, and its newest lists.
const dueOfKey = 4

// The sections of the timeline, which are the first byte of the continuation.
const (
	sectionKeys = iota
	sectionOthers
)

// others are the kinds of documents of a domain that expire.
var others = []string{kindCAs, kindPartner, kindCRLs}

// timeline returns one page. What follows after the section is, of keys, the continuation of the store; of others, the index in others, the
// name of the domain, a zero byte and the continuation of the store.
func (y *survey) timeline(after []byte, limit int) (list []Due, next []byte, err error) {
	bad := fmt.Errorf("%w: continuation of the timeline", ErrInput)
	section := byte(sectionKeys)
	var cursor []byte
	if len(after) > 0 {
		if section = after[0]; len(after) > 1 {
			cursor = after[1:]
		}
	}
	switch section {
	case sectionKeys:
		keys, following, err := y.store.Page("", "", cursor, max(1, limit/dueOfKey))
		if err != nil {
			return nil, nil, err
		}
		for _, key := range keys {
			due, err := y.dueOf(key)
			switch {
			case y.over(err):
				return nil, nil, err
			case err != nil:
				due = []Due{{Key: keyspec.Ref{Name: key.Name}, What: DueKey, At: y.now, Then: ThenAlert, Detail: shortened("what becomes of it is not known: " + err.Error())}}
			}
			list = append(list, due...)
		}
		if following == nil {
			return list, []byte{sectionOthers, 0, 0}, nil
		}
		return list, append([]byte{sectionKeys}, following...), nil
	case sectionOthers:
		if len(cursor) < 2 || int(cursor[0]) >= len(others) {
			return nil, nil, bad
		}
		domain, rest, ok := strings.Cut(string(cursor[1:]), "\x00")
		if !ok {
			return nil, nil, bad
		}
		return y.dueOthers(int(cursor[0]), domain, []byte(rest), limit)
	}
	return nil, nil, bad
}

// dueOf returns what expires of a key.
func (y *survey) dueOf(key *keystore.Key) (list []Due, err error) {
	x, err := y.prospect(key.Name)
	if err != nil {
		return nil, err
	}
	if x != nil && !(x.version.State == keyspec.Destroyed) {
		d := Due{Key: keyspec.Ref{Name: key.Name, Version: x.version.Number}, What: x.what, At: x.until, Then: x.then, ActAt: x.at, Detail: shortened(x.detail)}
		if again, text := y.renewals.waiting(string(key.Name)); !again.IsZero() && !x.at.IsZero() && !y.now.Before(x.at) {
			d.Then, d.ActAt, d.Detail = ThenAlert, again, shortened("it is tried again: "+text)
		}
		list = append(list, d)
	}
	refs, err := y.publishing(key, nil)
	if err != nil {
		return nil, err
	}
	for _, ref := range refs[max(0, len(refs)-(dueOfKey-1)):] {
		last, _, err := y.lastList(ref)
		if err != nil {
			return nil, err
		}
		d := Due{Key: ref, What: DueCRL, At: last.NextUpdate, Then: ThenPublish, ActAt: last.ThisUpdate.Add(crlFresh)}
		if again, text := y.renewals.waiting("list of " + ref.String()); !again.IsZero() {
			d.Then, d.ActAt, d.Detail = ThenAlert, again, shortened("it is tried again: "+text)
		}
		list = append(list, d)
	}
	return list, nil
}

// dueOthers returns a page of what expires in the domains from one on.
func (y *survey) dueOthers(kind int, domain string, cursor []byte, limit int) (list []Due, next []byte, err error) {
	unknown := func(what string, err error) []Due {
		return []Due{{What: DueCertificate, At: y.now, Then: ThenAlert, Detail: shortened("what expires of " + what + " is not known: " + err.Error())}}
	}
	names, err := y.domainNames()
	if y.over(err) {
		return nil, nil, err
	}
	if err != nil {
		return unknown("others", err), nil, nil
	}
	at, same := slices.BinarySearch(names, domain)
	if !same {
		kind, cursor = 0, nil
	}
	if at == len(names) {
		return nil, nil, nil
	}
	if len(cursor) == 0 {
		cursor = nil
	}
	notices, following, err := y.expiring(names[at], others[kind], cursor, limit)
	switch {
	case errors.Is(err, keystore.ErrInvalid) || y.over(err):
		return nil, nil, err
	case err != nil:
		list, following = unknown("domain "+names[at], err), nil
	}
	for i := range notices {
		list = append(list, notices[i].Due)
	}
	name := names[at]
	if following == nil {
		if kind++; kind == len(others) {
			if kind, at = 0, at+1; at == len(names) {
				return list, nil, nil
			}
			name = names[at]
		}
	}
	next = append([]byte{sectionOthers, byte(kind)}, name...)
	return list, append(append(next, 0), following...), nil
}

// expiring returns a page of the certificates or lists of a domain.
func (u *use) expiring(domain, kind string, after []byte, limit int) (list []notice, next []byte, err error) {
	page, next, err := u.store.Documents(kind+domain, after, limit)
	if err != nil {
		return nil, nil, err
	}
	for i := range page {
		entry, err := u.entryOf(domain, &page[i], kind == kindCRLs)
		if err != nil {
			return nil, nil, err
		}
		if entry == nil || !entry.Removed.IsZero() {
			continue
		}
		n, err := entry.expires(domain)
		if err != nil {
			return nil, nil, err
		}
		if !n.At.IsZero() {
			list = append(list, *n)
		}
	}
	return list, next, nil
}

// expires says when an entry of a domain expires.
func (t *TrustEntry) expires(domain string) (*notice, error) {
	n := &notice{Due: Due{Then: ThenAlert}}
	if t.Role == RoleCRL {
		n.What, n.At, n.begin = DueCRL, t.NextUpdate, t.ThisUpdate
		n.Detail = shortened("domain " + domain + " (kmsctl trust add-crl): list of " + nameText(t.Issuer))
		return n, nil
	}
	c, err := pki.ParseCertificate(t.Certificate)
	if err != nil {
		return nil, err
	}
	what, remedy := "CA ", "kmsctl cert upload-ca"
	switch t.Role {
	case RoleRoot:
		what = "trust anchor "
	case RolePartner:
		what, remedy = "partner ", "kmsctl partner add"
	}
	n.What, n.At, n.begin = DueCertificate, c.NotAfter, c.NotBefore
	n.Detail = shortened("domain " + domain + " (" + remedy + "): " + what + nameText(c.RawSubject))
	return n, nil
}

// nameText is a name for people.
func nameText(raw []byte) string {
	text, err := pki.FormatName(raw)
	if err != nil {
		return "?"
	}
	return text
}

// outsiders calls f with what expires in all domains.
func (y *survey) outsiders(f func(n *notice)) error {
	names, err := y.domainNames()
	if err != nil {
		return err
	}
	for _, name := range names {
		for _, kind := range others {
			for after := []byte(nil); ; {
				list, following, err := y.expiring(name, kind, after, MaxPage)
				if err != nil {
					return err
				}
				for i := range list {
					f(&list[i])
				}
				if after = following; after == nil {
					break
				}
			}
		}
	}
	return nil
}

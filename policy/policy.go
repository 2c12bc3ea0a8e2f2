// Package policy decides who may use which key how.
//
// The decision is a pure function of a snapshot and a request: no clock, no file, no store. Nothing is allowed unless the
// snapshot says so. Today a snapshot is one of two small things, the owner of a user's own daemon or the administrators
// and the list of uids per application of a system daemon. Principals with more facts, and grants with operations and
// conditions, extend the snapshot and its file, not the shape of Decide.
package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Facts are what the kernel says about a caller.
type Facts struct {
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary groups
	Unit   string   // systemd unit, empty when there is none
	Admin  bool     // connected to the admin socket
}

// Request is one thing a caller wants to do.
type Request struct {
	Caller    Facts
	Operation string        // as on the wire, such as "sign"
	Name      keyspec.Name  // the key, or its namespace alone; empty: no key is concerned, or all of them are
	Usage     keyspec.Usage // what the key is put to, empty for acts on the key itself

	// Administration marks acts on the daemon or on the whole store.
	Administration bool
	// Compromised marks use of a compromised key beyond verification, which no ordinary grant covers.
	Compromised bool
}

// Decision is the answer to a Request.
type Decision struct {
	Allowed   bool
	Principal string // the name the policy gives to the caller, empty when it knows none
	Rule      string // what decided, for the audit; never sent to the caller
}

// Policy is an immutable snapshot.
//
// Invariant: a Policy is never changed after it was made, so any number of goroutines may decide with it while another
// snapshot replaces it.
type Policy struct {
	mode         mode
	owner        uint32
	adminGroup   uint32
	hasAdmins    bool
	applications map[subject]struct{}
	principals   map[uint32]string
	digest       [sha256.Size]byte
}

type mode uint8

const (
	denyAll mode = iota
	userMode
	systemMode
)

// subject is a uid in an application's list.
type subject struct {
	namespace string
	uid       uint32
}

// UserMode returns the policy of a user's own daemon: the owner may do everything, on both sockets, and nobody else
// anything, not even root.
func UserMode(owner uint32) *Policy {
	p := &Policy{mode: userMode, owner: owner}
	p.digest = sha256.Sum256(binary.BigEndian.AppendUint32([]byte("kmsd policy user v1"), owner))
	return p
}

// WithAdminGroup returns a copy of a system policy in which members of the group gid administrate as root does.
func (p *Policy) WithAdminGroup(gid uint32) *Policy {
	q := *p
	q.adminGroup, q.hasAdmins = gid, true
	q.digest = sha256.Sum256(binary.BigEndian.AppendUint32(p.digest[:], gid))
	return &q
}

// Digest identifies the content of p.
func (p *Policy) Digest() [sha256.Size]byte { return p.digest }

// Epoch is a number for the content of p: the first 63 bits of its digest. The same content has the same epoch in every
// run of the daemon, so that an audit entry can be matched with the file that decided it.
func (p *Policy) Epoch() uint64 { return binary.BigEndian.Uint64(p.digest[:8]) >> 1 }

// Decide answers r under the snapshot p. A nil or zero Policy allows nothing.
func Decide(p *Policy, r *Request) Decision {
	if p == nil {
		return Decision{Rule: "no policy"}
	}
	switch p.mode {
	case userMode:
		return p.decideUser(r)
	case systemMode:
		return p.decideSystem(r)
	}
	return Decision{Rule: "no policy"}
}

func (p *Policy) decideUser(r *Request) Decision {
	if r.Caller.UID != p.owner {
		return Decision{Rule: "not the owner"}
	}
	return byRole(r, "owner")
}

func (p *Policy) decideSystem(r *Request) Decision {
	if r.Caller.Admin {
		switch {
		case r.Caller.UID == 0:
			return byRole(r, "root")
		case p.hasAdmins && p.inAdminGroup(&r.Caller):
			return byRole(r, "kmsd-admin")
		}
		return Decision{Rule: "not an administrator"}
	}
	principal, known := p.principals[r.Caller.UID]
	switch {
	case !known:
		return Decision{Rule: "uid in no application"}
	case r.Administration:
		return Decision{Principal: principal, Rule: "administration on the application socket"}
	case r.Compromised:
		return Decision{Principal: principal, Rule: "compromised key"}
	case r.Name == "":
		if r.Operation == opList {
			return Decision{Principal: principal, Rule: "every namespace"}
		}
		return Decision{Allowed: true, Principal: principal, Rule: "known uid"}
	}
	if _, ok := p.applications[subject{r.Name.Namespace(), r.Caller.UID}]; !ok {
		return Decision{Principal: principal, Rule: "uid not in this application"}
	}
	return Decision{Allowed: true, Principal: principal, Rule: "application"}
}

// opList is the operation that without a name concerns every namespace instead of none.
const opList = "key_list"

// byRole answers for an owner or administrator, who may do everything, but administration and what needs an explicit
// grant only where that was meant: on the admin socket.
func byRole(r *Request, principal string) Decision {
	d := Decision{Allowed: true, Principal: principal, Rule: principal}
	if !r.Caller.Admin {
		switch {
		case r.Administration:
			d.Allowed, d.Rule = false, "administration on the application socket"
		case r.Compromised:
			d.Allowed, d.Rule = false, "compromised key"
		}
	}
	return d
}

func (p *Policy) inAdminGroup(f *Facts) bool {
	if f.GID == p.adminGroup {
		return true
	}
	for _, g := range f.Groups {
		if g == p.adminGroup {
			return true
		}
	}
	return false
}

func principalName(uid uint32) string { return "uid:" + strconv.FormatUint(uint64(uid), 10) }

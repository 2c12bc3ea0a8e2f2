package proto

import "github.com/kmsd-project/kmsd/keystore/keyspec"

// Messages about what time does to keys: what expires, what has happened, and lists of what was revoked.

// maxHappening bounds the detail of what expires and of events, in bytes.
const maxHappening = 256

// MaxCRLPart is how much of a revocation list one answer carries, in bytes.
const MaxCRLPart = 56 << 10

// How many things that expire, and how many events, one page carries. With the bounds of their fields they fit a control frame.
const (
	MaxDue    = 64
	MaxEvents = 64
)

// MaxWait is for how long an events request waits at most, in milliseconds.
const MaxWait = 30_000

// CRLGet asks for the certificate revocation list of an issuer, or for the rest of a long one.
type CRLGet struct {
	Issuer string
	Number uint64 // with Offset: the list that was begun; the error is conflict when there is a newer one
	Offset uint32 // bytes that were read already
}

// CRLReply is the latest list, or a part of it.
type CRLReply struct {
	CRL        []byte // of DER (RFC 5280 section 5)
	Size       uint32 // of the whole list in bytes
	Number     uint64
	ThisUpdate int64
	NextUpdate int64
	Entries    uint32
}

// Expiry asks for what expires.
type Expiry struct {
	Until int64 // 0: everything that expires at all
	After []byte
	Limit uint32 // 0, and at most: MaxDue
}

// ExpiryReply is one page, in no order that means anything.
type ExpiryReply struct {
	Due  []Due
	Next []byte // empty: that was the last page
}

// Due is one thing that expires, and what happens then.
type Due struct {
	Key    string // NAME@VERSION, or empty: a certificate or list of others, which Detail names
	What   string // key, certificate or crl
	At     int64
	ActAt  int64  // when kmsd acts by itself, 0: it does not
	Then   string // rotate, recertify, publish, deactivate, alert or nothing
	Detail string
}

// Events asks for what has happened since an event, and waits for more when there is nothing.
type Events struct {
	Source []byte // of the page before; empty: this is the first
	After  uint64 // Next of the page before
	Recent bool   // of the first page: begin with what kmsd remembers, else with what happens from now on
	WaitMS uint32 // at most MaxWait
}

// EventsReply is what has happened.
type EventsReply struct {
	Source []byte // the run of kmsd that the numbers belong to
	Events []Event
	Next   uint64 // for After
	Lost   bool   // some have been missed: kmsd was started anew, or they were too many
}

// Event is one thing that has happened.
type Event struct {
	Number uint64
	Time   int64
	Kind   string
	Key    string // NAME or NAME@VERSION, or empty
	Detail string
}

func (m *CRLGet) fields(f *fields) {
	f.str("issuer", &m.Issuer, keyspec.MaxRef)
	f.u64("number", &m.Number)
	f.u32("offset", &m.Offset)
}

func (m *CRLReply) fields(f *fields) {
	f.bin("crl", &m.CRL, MaxCRLPart)
	f.u32("size", &m.Size)
	f.u64("number", &m.Number)
	f.i64("this_update", &m.ThisUpdate)
	f.i64("next_update", &m.NextUpdate)
	f.u32("entries", &m.Entries)
}

func (m *Expiry) fields(f *fields) {
	f.i64("until", &m.Until)
	f.bin("after", &m.After, maxCursor)
	f.u32("limit", &m.Limit)
}

func (m *ExpiryReply) fields(f *fields) {
	list(f, "due", &m.Due, MaxDue)
	f.bin("next", &m.Next, maxCursor)
}

func (m *Due) fields(f *fields) {
	f.str("key", &m.Key, keyspec.MaxRef)
	f.str("what", &m.What, maxWord)
	f.i64("at", &m.At)
	f.i64("act_at", &m.ActAt)
	f.str("then", &m.Then, maxWord)
	f.text("detail", &m.Detail, maxHappening)
}

func (m *Events) fields(f *fields) {
	f.bin("source", &m.Source, NonceSize)
	f.u64("after", &m.After)
	f.bool("recent", &m.Recent)
	f.u32("wait_ms", &m.WaitMS)
}

func (m *EventsReply) fields(f *fields) {
	f.bin("source", &m.Source, NonceSize)
	list(f, "events", &m.Events, MaxEvents)
	f.u64("next", &m.Next)
	f.bool("lost", &m.Lost)
}

func (m *Event) fields(f *fields) {
	f.u64("number", &m.Number)
	f.i64("time", &m.Time)
	f.str("kind", &m.Kind, maxWord)
	f.str("key", &m.Key, keyspec.MaxRef)
	f.text("detail", &m.Detail, maxHappening)
}

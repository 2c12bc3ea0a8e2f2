package audit

import (
	"encoding/binary"
	"errors"
	"time"
	"unicode/utf8"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Entry is one use of a key or one act, allowed or refused.
type Entry struct {
	Number      uint64 // place in the log, from 0; set when the entry is read back
	Time        time.Time
	Op          string
	Key         string // as written: NAME or NAME@VERSION
	Version     keyspec.Version
	UID         uint32
	PID         int32
	Principal   string // the name policy gives to the caller
	Via         string // the bridge the caller came through, empty for none
	Client      string // what the caller's software calls itself: a claim
	Trace       string // what the caller wants to find the request by: a claim
	Allowed     bool
	Code        string // "ok" or the wire code of the error
	Detail      string // for people; may tell what the caller was not told
	DetailID    string // also given to the caller, so that the two can be matched
	PolicyEpoch uint64
}

// Sizes in bytes. Strings that are longer than their share are cut; Detail gets what is left.
const (
	block    = 256       // an entry is padded to a multiple of this, so that its length tells next to nothing
	maxEntry = 4 * block // the largest entry with its padding

	maxOp        = 32
	maxKey       = keyspec.MaxRef
	maxPrincipal = 64
	maxVia       = 64
	maxClient    = 64
	maxTrace     = 64
	maxCode      = 32
	maxDetailID  = 32
)

// errEntry says that the plaintext of an entry is not one. It cannot be the doing of the disk: the entry was
// authenticated before.
var errEntry = errors.New("entry is malformed")

// entryFormat is the first byte of an encoded entry.
const entryFormat = 1

// appendEntry appends the encoding of e, padded to a multiple of block. tag is 0, or that of the outbox entry that e comes
// from.
//
//	u8 format | u64 tag | i64 time in ms | u32 version | u32 uid | i32 pid | u8 allowed | u64 policy epoch
//	then op, key, principal, via, client, trace, code, detail id, detail: each u16 length and bytes
//	then 0x80 and zeros up to a multiple of block
func appendEntry(dst []byte, e *Entry, tag uint64) []byte {
	start := len(dst)
	dst = append(dst, entryFormat)
	dst = binary.BigEndian.AppendUint64(dst, tag)
	dst = binary.BigEndian.AppendUint64(dst, uint64(e.Time.UnixMilli()))
	dst = binary.BigEndian.AppendUint32(dst, uint32(e.Version))
	dst = binary.BigEndian.AppendUint32(dst, e.UID)
	dst = binary.BigEndian.AppendUint32(dst, uint32(e.PID))
	allowed := byte(0)
	if e.Allowed {
		allowed = 1
	}
	dst = append(dst, allowed)
	dst = binary.BigEndian.AppendUint64(dst, e.PolicyEpoch)
	dst = appendField(dst, e.Op, maxOp)
	dst = appendField(dst, e.Key, maxKey)
	dst = appendField(dst, e.Principal, maxPrincipal)
	dst = appendField(dst, e.Via, maxVia)
	dst = appendField(dst, e.Client, maxClient)
	dst = appendField(dst, e.Trace, maxTrace)
	dst = appendField(dst, e.Code, maxCode)
	dst = appendField(dst, e.DetailID, maxDetailID)
	dst = appendField(dst, e.Detail, maxEntry-(len(dst)-start)-len("\x00\x00\x80"))
	dst = append(dst, 0x80)
	for (len(dst)-start)%block != 0 {
		dst = append(dst, 0)
	}
	return dst
}

func appendField(dst []byte, s string, limit int) []byte {
	if len(s) > limit {
		for limit > 0 && !utf8.RuneStart(s[limit]) {
			limit--
		}
		s = s[:limit]
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(s)))
	return append(dst, s...)
}

// parseEntry is the inverse of appendEntry.
func parseEntry(b []byte) (e Entry, tag uint64, err error) {
	const fixed = 1 + 8 + 8 + 4 + 4 + 4 + 1 + 8
	if len(b) < fixed || b[0] != entryFormat || len(b)%block != 0 || len(b) > maxEntry || b[29] > 1 {
		return Entry{}, 0, errEntry
	}
	tag = binary.BigEndian.Uint64(b[1:])
	e.Time = time.UnixMilli(int64(binary.BigEndian.Uint64(b[9:])))
	e.Version = keyspec.Version(binary.BigEndian.Uint32(b[17:]))
	e.UID = binary.BigEndian.Uint32(b[21:])
	e.PID = int32(binary.BigEndian.Uint32(b[25:]))
	e.Allowed = b[29] == 1
	e.PolicyEpoch = binary.BigEndian.Uint64(b[30:])
	b = b[fixed:]
	for _, s := range [...]*string{&e.Op, &e.Key, &e.Principal, &e.Via, &e.Client, &e.Trace, &e.Code, &e.DetailID, &e.Detail} {
		if len(b) < 2 {
			return Entry{}, 0, errEntry
		}
		n := int(binary.BigEndian.Uint16(b))
		if b = b[2:]; len(b) < n {
			return Entry{}, 0, errEntry
		}
		*s = string(b[:n])
		b = b[n:]
	}
	if len(b) == 0 || b[0] != 0x80 {
		return Entry{}, 0, errEntry
	}
	for _, c := range b[1:] {
		if c != 0 {
			return Entry{}, 0, errEntry
		}
	}
	return e, tag, nil
}

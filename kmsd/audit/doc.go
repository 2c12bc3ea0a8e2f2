// Package audit keeps the record of every use of a key: an append-only log whose entries only the auditor can read and
// whose integrity anybody can check.
//
// Entries are padded and encrypted to the auditor's HPKE key, so the files show how many there are and when they were
// written, nothing else. Writing needs the public key alone, which lies beside the log: what happens before the keystore
// is unlocked is recorded too. The leaves of an RFC 6962 tree are the ciphertexts, so [Verify] works offline without a
// key; given an earlier [Head] it also finds entries that were cut off or rewritten since.
//
// What it cannot find without a head kept elsewhere: the end of the log cut off, or the whole log written anew by
// somebody who holds the public key. docs/audit-format.md describes the files.
package audit

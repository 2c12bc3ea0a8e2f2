// Package keystore keeps keys on disk: encrypted records in one bbolt file, and a small header file with the slots that open it.
//
// Nothing in the two files tells a key's name, its algorithm or how often it is used. Reads never write. A change is one
// transaction: either all of it is durable when Apply returns, or none of it happened. Every record is authenticated, and so is
// the set of records: a record that was altered, exchanged for another, put back to an older state or taken away is reported as
// ErrDamaged when it is asked for, and everything else goes on working.
//
// What a single store cannot tell is that all of its files were put back: for that it can be bound to a Counter outside of them. And
// what its slots should not be enough for, the keys of a namespace, a device can guard: see NamespaceGuard.
//
// The store enforces structure only. What a state, a usage or a validity period means is the business of its caller.
//
// docs/store-format.md describes both files completely. Every format that was ever released opens for ever.
package keystore

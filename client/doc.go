// Package client talks to kmsd: it makes keys, uses them, and never sees a private one.
//
//	c, err := client.Dial(ctx)
//	key, err := c.Key(ctx, "billing/invoices")
//	signature, err := key.Sign(nil, digest, crypto.SHA256)
//
// A [Key] implements [crypto.Signer], [crypto.MessageSigner] and [crypto.Decrypter], so it goes where a private key of
// the standard library goes: certificates, TLS ([Key.Certificate]), ssh ([Key.SSHSigner]). Keys for data are used
// through [Key.AEAD]. Operations without a method of their own are reached with [Client.Call].
//
// # Connection
//
// A Client has one connection that all goroutines share, and no goroutine of its own: whoever waits for an answer reads
// the answers of the others too. A lost connection is made again by the next call. Operations that may be repeated
// without harm are repeated then, until the deadline; for the others the error is [ErrOutcomeUnknown].
//
// # Errors
//
// What the daemon answers is an [*Error]; compare its code with errors.Is and the sentinels of this package:
//
//	if errors.Is(err, client.ErrLocked) { ... }
//
// # Platforms
//
// The package needs no cgo and builds wherever Go has Unix sockets, kmsd itself runs on Linux.
package client

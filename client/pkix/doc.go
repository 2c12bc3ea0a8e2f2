// Package pkix reads and writes public keys and certificates as crypto/x509 does, and also those of them that crypto/x509 refuses
// although they are in use: keys of the curve secp256k1 (SEC 2 section 2.4.1, ES256K of RFC 8812) and certificates with a
// negative serial number, which MOSIP gives to every second of its certificates.
//
// What is refused is shown to crypto/x509 with stand-ins of the same length in its place, and put back afterwards from the
// original bytes. Signatures, chains and pools of crypto/x509 work with the results: they cover the original bytes, and
// crypto/ecdsa verifies on any curve. Nothing here depends on GODEBUG or on how a program was linked.
//
// crypto/tls parses the certificates of the other side by itself: a program whose peers have negative serial numbers needs a line
// //go:debug x509negativeserial=1 in its main package, and no program can use TLS with secp256k1.
package pkix

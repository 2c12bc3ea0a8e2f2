package mechanism

import (
	"crypto"
	"crypto/ecdh"
	"crypto/elliptic"
	"fmt"

	"github.com/kmsd-project/kmsd/client/pkix"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Kind is the family of an algorithm. All rows of a kind share their code.
type Kind string

// The kinds.
const (
	KindRSA     Kind = "rsa"
	KindECDSA   Kind = "ecdsa"
	KindEd25519 Kind = "ed25519"
	KindECDH    Kind = "ecdh" // X25519 among them
	KindAEAD    Kind = "aead"
	KindHMAC    Kind = "hmac"
	KindHKDF    Kind = "hkdf"
)

// Class says whether an algorithm is one to choose today.
type Class string

// The classes. A legacy algorithm works only where key and policy both allow it.
const (
	Modern Class = "modern"
	Legacy Class = "legacy"
)

// Cost is the order of magnitude of one private operation, by which work is put into lanes.
type Cost string

// The costs.
const (
	CostCheap Cost = "cheap" // a few microseconds: symmetric
	CostCurve Cost = "curve" // 20 to 500 microseconds: elliptic curves
	CostRSA   Cost = "rsa"   // 1 to 10 milliseconds; making a key takes up to seconds
)

// Row is one algorithm.
//
// Invariant: rows are constant. Nobody outside this file writes to one.
type Row struct {
	Algorithm keyspec.Algorithm
	Kind      Kind
	Class     Class
	Cost      Cost
	Usages    []keyspec.Usage  // all that some key of the algorithm may have; see ValidateUsages for the sets
	Default   []keyspec.Usage  // what a key gets when its creator names none
	Schemes   []keyspec.Scheme // the first signing scheme is the default; empty where there is only one way

	size  int         // bytes of material
	curve curve       // ECDSA and ECDH
	hash  crypto.Hash // HMAC and HKDF
	known knownAnswer // of the self-test
}

// curve is an elliptic curve as the standard library's two packages know it. elliptic is nil for X25519, ecdh for secp256k1.
type curve struct {
	elliptic elliptic.Curve
	ecdh     ecdh.Curve
}

var (
	p256   = curve{elliptic.P256(), ecdh.P256()}
	p384   = curve{elliptic.P384(), ecdh.P384()}
	p521   = curve{elliptic.P521(), ecdh.P521()}
	k256   = curve{pkix.Secp256k1(), nil}
	x25519 = curve{nil, ecdh.X25519()}
)

// The sets of usages and schemes the table is made of.
var (
	signing     = []keyspec.Usage{keyspec.Sign, keyspec.Verify}
	certifying  = []keyspec.Usage{keyspec.Sign, keyspec.Verify, keyspec.Certify}
	encrypting  = []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt}
	wrapping    = []keyspec.Usage{keyspec.Wrap, keyspec.Unwrap}
	decrypting  = []keyspec.Usage{keyspec.Encrypt, keyspec.Decrypt, keyspec.Wrap, keyspec.Unwrap}
	everyRSA    = append(certifying[:3:3], decrypting...)
	macing      = []keyspec.Usage{keyspec.MAC, keyspec.Verify}
	agreeing    = []keyspec.Usage{keyspec.Agree}
	deriving    = []keyspec.Usage{keyspec.Derive}
	rsaSchemes  = []keyspec.Scheme{keyspec.RSAPSSSHA256, keyspec.RSAPSSSHA384, keyspec.RSAPSSSHA512, keyspec.RSAPKCS1SHA256, keyspec.RSAPKCS1SHA384, keyspec.RSAPKCS1SHA512, keyspec.RSAOAEPSHA256}
	p256Schemes = []keyspec.Scheme{keyspec.ECDSASHA256, keyspec.ECDSASHA384, keyspec.ECDSASHA512}
	p384Schemes = []keyspec.Scheme{keyspec.ECDSASHA384, keyspec.ECDSASHA256, keyspec.ECDSASHA512}
	p521Schemes = []keyspec.Scheme{keyspec.ECDSASHA512, keyspec.ECDSASHA256, keyspec.ECDSASHA384}
	k256Schemes = []keyspec.Scheme{keyspec.ECDSASHA256} // what ES256K is (RFC 8812 section 3.2)
	edSchemes   = []keyspec.Scheme{keyspec.PureEd25519}
)

// table is every algorithm of kmsd, in the order of keyspec.Algorithms.
var table = []*Row{
	{keyspec.RSA2048, KindRSA, Modern, CostRSA, everyRSA, signing, rsaSchemes, 256, curve{}, 0, knownRSA2048},
	{keyspec.RSA3072, KindRSA, Modern, CostRSA, everyRSA, signing, rsaSchemes, 384, curve{}, 0, knownRSA3072},
	{keyspec.RSA4096, KindRSA, Modern, CostRSA, everyRSA, signing, rsaSchemes, 512, curve{}, 0, knownRSA4096},
	{keyspec.ECDSAP256, KindECDSA, Modern, CostCurve, certifying, signing, p256Schemes, 32, p256, 0, knownECDSAP256},
	{keyspec.ECDSAP384, KindECDSA, Modern, CostCurve, certifying, signing, p384Schemes, 48, p384, 0, knownECDSAP384},
	{keyspec.ECDSAP521, KindECDSA, Modern, CostCurve, certifying, signing, p521Schemes, 66, p521, 0, knownECDSAP521},
	{keyspec.ECDSASecp256k1, KindECDSA, Modern, CostCurve, certifying, signing, k256Schemes, 32, k256, 0, knownECDSASecp256k1},
	{keyspec.Ed25519, KindEd25519, Modern, CostCurve, certifying, signing, edSchemes, 32, curve{}, 0, knownEd25519},
	{keyspec.X25519, KindECDH, Modern, CostCurve, agreeing, agreeing, nil, 32, x25519, 0, knownX25519},
	{keyspec.ECDHP256, KindECDH, Modern, CostCurve, agreeing, agreeing, nil, 32, p256, 0, knownECDHP256},
	{keyspec.ECDHP384, KindECDH, Modern, CostCurve, agreeing, agreeing, nil, 48, p384, 0, knownECDHP384},
	{keyspec.ECDHP521, KindECDH, Modern, CostCurve, agreeing, agreeing, nil, 66, p521, 0, knownECDHP521},
	{keyspec.AES128GCM, KindAEAD, Modern, CostCheap, decrypting, encrypting, nil, 16, curve{}, 0, knownAES128GCM},
	{keyspec.AES256GCM, KindAEAD, Modern, CostCheap, decrypting, encrypting, nil, 32, curve{}, 0, knownAES256GCM},
	{keyspec.ChaCha20Poly1305, KindAEAD, Modern, CostCheap, encrypting, encrypting, nil, 32, curve{}, 0, knownChaCha20Poly1305},
	{keyspec.HMACSHA256, KindHMAC, Modern, CostCheap, macing, macing, nil, 32, curve{}, crypto.SHA256, knownHMACSHA256},
	{keyspec.HMACSHA384, KindHMAC, Modern, CostCheap, macing, macing, nil, 48, curve{}, crypto.SHA384, knownHMACSHA384},
	{keyspec.HMACSHA512, KindHMAC, Modern, CostCheap, macing, macing, nil, 64, curve{}, crypto.SHA512, knownHMACSHA512},
	{keyspec.HKDFSHA256, KindHKDF, Modern, CostCheap, deriving, deriving, nil, 32, curve{}, crypto.SHA256, knownHKDFSHA256},
}

// Table returns every row, in the order in which tools show them.
func Table() []*Row { return append([]*Row(nil), table...) }

// Lookup returns the row of a or an error that wraps keyspec.ErrAlgorithm.
func Lookup(a keyspec.Algorithm) (*Row, error) {
	for _, r := range table {
		if r.Algorithm == a {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%w %q", keyspec.ErrAlgorithm, string(a))
}

// Symmetric reports whether keys of the row have no public half.
func (r *Row) Symmetric() bool {
	switch r.Kind {
	case KindAEAD, KindHMAC, KindHKDF:
		return true
	}
	return false
}

// Size returns the length of the algorithm's key material in bytes.
func (r *Row) Size() int { return r.size }

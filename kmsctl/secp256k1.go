package main

import (
	"bytes"
	algorithm "crypto/x509/pkix"
	"encoding/asn1"
)

var (
	oidECPublicKey = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidSecp256k1   = asn1.ObjectIdentifier{1, 3, 132, 0, 10}
)

// secp256k1PKCS8 returns a private key of secp256k1, which crypto/x509 does not read, as PKCS#8 (RFC 5958), given as that or as SEC 1
// (RFC 5915). For anything else it returns nil. It looks at the curve only: the daemon checks the rest.
func secp256k1PKCS8(der []byte) []byte {
	var curve asn1.ObjectIdentifier
	var pkcs8 struct {
		Version   int
		Algorithm algorithm.AlgorithmIdentifier
		Key       []byte
	}
	if _, err := asn1.Unmarshal(der, &pkcs8); err == nil && pkcs8.Algorithm.Algorithm.Equal(oidECPublicKey) {
		defer clear(pkcs8.Key)
		if _, err := asn1.Unmarshal(pkcs8.Algorithm.Parameters.FullBytes, &curve); err != nil || !curve.Equal(oidSecp256k1) {
			return nil
		}
		return bytes.Clone(der)
	}
	var sec1 struct {
		Version int
		Key     []byte
		Curve   asn1.ObjectIdentifier `asn1:"explicit,tag:0"`
	}
	if _, err := asn1.Unmarshal(der, &sec1); err != nil || !sec1.Curve.Equal(oidSecp256k1) {
		return nil
	}
	clear(sec1.Key)
	pkcs8.Version = 0
	pkcs8.Algorithm.Algorithm = oidECPublicKey
	pkcs8.Algorithm.Parameters.FullBytes, _ = asn1.Marshal(oidSecp256k1)
	pkcs8.Key = der
	encoded, err := asn1.Marshal(pkcs8)
	if err != nil {
		return nil
	}
	return encoded
}

package packet

import (
	"crypto/x509"

	"github.com/kmsd-project/kmsd/client/pkix"
)

// ParseCertificate parses one certificate in DER. It is [pkix.ParseCertificate]: MOSIP's certificates are read too, of which half have a
// negative serial number, because MOSIP takes a signed random number for it, and some a key of secp256k1.
func ParseCertificate(der []byte) (*x509.Certificate, error) { return pkix.ParseCertificate(der) }

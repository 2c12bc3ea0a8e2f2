package pki

// ParseName turns the text of a distinguished name (RFC 4514: "CN=host,O=Example,C=IN") into the DER of a Name. As RFC 4514
// says, the text runs from the last RDN to the first: the example is encoded in the order C, O, CN. Errors wrap ErrName.
func ParseName(text string) ([]byte, error) { panic("pki: being written") }

// FormatName is the inverse of ParseName. Errors wrap ErrName.
func FormatName(raw []byte) (string, error) { panic("pki: being written") }

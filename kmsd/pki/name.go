package pki

import (
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxValue bounds one attribute value in bytes. The upper bounds of RFC 5280 appendix A.1 (64 for a common name) are not
// enforced: common names made of a key's name are longer, and nothing that verifies looks.
const maxValue = 256

// attributeType is an attribute type that has a short name (RFC 4514 section 3, RFC 4519).
type attributeType struct {
	name string
	oid  asn1.ObjectIdentifier
	tag  int // of the string type that RFC 5280 appendix A.1 prescribes
}

var attributeTypes = []attributeType{
	{"CN", asn1.ObjectIdentifier{2, 5, 4, 3}, asn1.TagUTF8String},
	{"SN", asn1.ObjectIdentifier{2, 5, 4, 4}, asn1.TagUTF8String},
	{"serialNumber", asn1.ObjectIdentifier{2, 5, 4, 5}, asn1.TagPrintableString},
	{"C", asn1.ObjectIdentifier{2, 5, 4, 6}, asn1.TagPrintableString},
	{"L", asn1.ObjectIdentifier{2, 5, 4, 7}, asn1.TagUTF8String},
	{"ST", asn1.ObjectIdentifier{2, 5, 4, 8}, asn1.TagUTF8String},
	{"STREET", asn1.ObjectIdentifier{2, 5, 4, 9}, asn1.TagUTF8String},
	{"O", asn1.ObjectIdentifier{2, 5, 4, 10}, asn1.TagUTF8String},
	{"OU", asn1.ObjectIdentifier{2, 5, 4, 11}, asn1.TagUTF8String},
	{"title", asn1.ObjectIdentifier{2, 5, 4, 12}, asn1.TagUTF8String},
	{"postalCode", asn1.ObjectIdentifier{2, 5, 4, 17}, asn1.TagUTF8String},
	{"GN", asn1.ObjectIdentifier{2, 5, 4, 42}, asn1.TagUTF8String},
	{"organizationIdentifier", asn1.ObjectIdentifier{2, 5, 4, 97}, asn1.TagUTF8String},
	{"UID", asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}, asn1.TagUTF8String},
	{"DC", asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}, asn1.TagIA5String},
	{"emailAddress", asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, asn1.TagIA5String},
}

// attribute is AttributeTypeAndValue (RFC 5280 section 4.1.2.4).
type attribute struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue
}

// rdnSET is RelativeDistinguishedName. The suffix tells encoding/asn1 that it is a SET.
type rdnSET []attribute

// ParseName turns the text of a distinguished name (RFC 4514: "CN=host,O=Example,C=IN") into the DER of a Name. As RFC 4514
// says, the text runs from the last RDN to the first: the example is encoded in the order C, O, CN. The empty text is the
// empty Name.
//
// The parser is strict: known attribute types or dotted OIDs with a #hexadecimal value, special characters escaped, valid
// UTF-8 without control characters, no empty values. Spaces before an attribute type are let pass, for nothing else can
// begin with one. Errors wrap ErrName.
func ParseName(text string) ([]byte, error) {
	if len(text) > MaxName {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrName, MaxName)
	}
	if !utf8.ValidString(text) {
		return nil, fmt.Errorf("%w: not UTF-8", ErrName)
	}
	rdns := []rdnSET{}
	attributes := 0
	for separator := byte(','); text != ""; {
		a, rest, err := parseAttribute(text)
		if err != nil {
			return nil, err
		}
		if attributes++; attributes > MaxRDNs {
			return nil, fmt.Errorf("%w: more than %d attributes", ErrName, MaxRDNs)
		}
		if separator == ',' {
			rdns = append(rdns, nil)
		}
		last := &rdns[len(rdns)-1]
		if slices.ContainsFunc(*last, func(b attribute) bool { return b.Type.Equal(a.Type) }) {
			return nil, fmt.Errorf("%w: an RDN has an attribute type once", ErrName)
		}
		*last = append(*last, a)
		if rest == "" {
			break
		}
		separator, text = rest[0], rest[1:]
		if strings.Trim(text, " ") == "" {
			return nil, fmt.Errorf("%w: nothing after %q", ErrName, separator)
		}
	}
	slices.Reverse(rdns)
	raw, err := asn1.Marshal(rdns)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrName, err)
	}
	return raw, nil
}

// parseAttribute parses type=value at the start of text and returns what follows, which is empty or begins with , or +.
func parseAttribute(text string) (attribute, string, error) {
	name, text, found := strings.Cut(strings.TrimLeft(text, " "), "=")
	if !found {
		return attribute{}, "", fmt.Errorf("%w: %q is not type=value", ErrName, name)
	}
	known, oid, err := lookupType(name)
	if err != nil {
		return attribute{}, "", err
	}
	if strings.HasPrefix(text, "#") {
		end := strings.IndexAny(text, ",+")
		if end < 0 {
			end = len(text)
		}
		value, err := parseHexValue(text[1:end])
		return attribute{oid, value}, text[end:], err
	}
	if known == nil {
		return attribute{}, "", fmt.Errorf("%w: the value of %s is written #hexadecimal", ErrName, name)
	}
	value, rest, err := unescape(text)
	if err != nil {
		return attribute{}, "", err
	}
	if err := known.check(value); err != nil {
		return attribute{}, "", err
	}
	return attribute{oid, asn1.RawValue{Tag: known.tag, Bytes: []byte(value)}}, rest, nil
}

// lookupType finds an attribute type by its short name or dotted OID; known is nil for an OID without a short name.
func lookupType(name string) (known *attributeType, oid asn1.ObjectIdentifier, err error) {
	for i := range attributeTypes {
		if strings.EqualFold(attributeTypes[i].name, name) || attributeTypes[i].oid.String() == name {
			return &attributeTypes[i], attributeTypes[i].oid, nil
		}
	}
	for arc := range strings.SplitSeq(name, ".") {
		n, err := strconv.ParseUint(arc, 10, 31)
		if err != nil || strconv.FormatUint(n, 10) != arc {
			return nil, nil, fmt.Errorf("%w: unknown attribute type %q", ErrName, name)
		}
		oid = append(oid, int(n))
	}
	if encoded, err := asn1.Marshal(oid); err != nil || len(encoded) > maxValue {
		return nil, nil, fmt.Errorf("%w: %q is not an object identifier", ErrName, name)
	}
	return nil, oid, nil
}

// parseHexValue parses the hexstring form of a value: the DER of one ASN.1 value.
func parseHexValue(text string) (asn1.RawValue, error) {
	der, err := hex.DecodeString(text)
	if err != nil {
		return asn1.RawValue{}, fmt.Errorf("%w: not hexadecimal after #", ErrName)
	}
	var value asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &value); err != nil || len(rest) > 0 || len(der) > maxValue {
		return asn1.RawValue{}, fmt.Errorf("%w: the bytes after # are not one DER value of at most %d bytes", ErrName, maxValue)
	}
	return value, nil
}

// unescape reads a string value up to an unescaped , or + (RFC 4514 section 3).
func unescape(text string) (value, rest string, err error) {
	var b strings.Builder
	i, space := 0, false // space: the last character is an unescaped space
	for ; i < len(text) && text[i] != ',' && text[i] != '+'; i++ {
		c := text[i]
		space = false
		switch {
		case c == '\\':
			i++
			switch {
			case i < len(text) && strings.IndexByte(` "#+,;<=>\`, text[i]) >= 0:
				b.WriteByte(text[i])
			case i+1 < len(text) && isHex(text[i]) && isHex(text[i+1]):
				octet, _ := strconv.ParseUint(text[i:i+2], 16, 8)
				b.WriteByte(byte(octet))
				i++
			default:
				return "", "", fmt.Errorf("%w: after \\ comes a special character or two hexadecimal digits", ErrName)
			}
		case strings.IndexByte("\";<>\x00", c) >= 0:
			return "", "", fmt.Errorf("%w: %q is escaped with \\", ErrName, c)
		case c == ' ' && b.Len() == 0:
			return "", "", fmt.Errorf("%w: a space at the start of a value is escaped with \\", ErrName)
		default:
			space = c == ' '
			b.WriteByte(c)
		}
	}
	if space {
		return "", "", fmt.Errorf("%w: a space at the end of a value is escaped with \\", ErrName)
	}
	return b.String(), text[i:], nil
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// check says whether value may stand for the attribute.
func (t *attributeType) check(value string) error {
	switch {
	case value == "" || len(value) > maxValue:
		return fmt.Errorf("%w: %s has 1 to %d bytes", ErrName, t.name, maxValue)
	case !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl):
		return fmt.Errorf("%w: %s is UTF-8 without control characters", ErrName, t.name)
	case t.name == "C" && (len(value) != 2 || !isLetter(value[0]) || !isLetter(value[1])):
		return fmt.Errorf("%w: C is a country code of two letters", ErrName)
	case t.tag == asn1.TagPrintableString && strings.ContainsFunc(value, notPrintable):
		return fmt.Errorf("%w: %s has letters, digits, spaces and '()+,-./:=? only", ErrName, t.name)
	case t.tag == asn1.TagIA5String && strings.ContainsFunc(value, func(r rune) bool { return r > unicode.MaxASCII }):
		return fmt.Errorf("%w: %s is ASCII", ErrName, t.name)
	}
	return nil
}

func isLetter(c byte) bool { return 'a' <= c|0x20 && c|0x20 <= 'z' }

func notPrintable(r rune) bool {
	return !(r <= unicode.MaxASCII && (isLetter(byte(r)) || '0' <= r && r <= '9' || strings.ContainsRune(" '()+,-./:=?", r)))
}

// parseRDNs decodes the DER of a Name.
func parseRDNs(raw []byte) ([]rdnSET, error) {
	var rdns []rdnSET
	if rest, err := asn1.Unmarshal(raw, &rdns); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("%w: not a Name in DER", ErrName)
	}
	return rdns, nil
}

// text returns the value of a as a string, if it is of one of the string types in use.
func (a attribute) text() (string, bool) {
	switch a.Value.Tag {
	case asn1.TagUTF8String, asn1.TagPrintableString, asn1.TagIA5String, asn1.TagNumericString:
	case asn1.TagT61String, asn1.TagBMPString:
		var s string
		_, err := asn1.Unmarshal(a.Value.FullBytes, &s)
		return s, err == nil && a.Value.Class == asn1.ClassUniversal
	default:
		return "", false
	}
	s := string(a.Value.Bytes)
	return s, a.Value.Class == asn1.ClassUniversal && !a.Value.IsCompound && utf8.ValidString(s)
}

// FormatName writes the DER of a Name as RFC 4514 text. ParseName of the text gives the same name, with the string types of
// RFC 5280. Errors wrap ErrName.
func FormatName(raw []byte) (string, error) {
	rdns, err := parseRDNs(raw)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for i, rdn := range slices.Backward(rdns) {
		if i < len(rdns)-1 {
			b.WriteByte(',')
		}
		for j, a := range rdn {
			if j > 0 {
				b.WriteByte('+')
			}
			a.format(&b)
		}
	}
	return b.String(), nil
}

func (a attribute) format(b *strings.Builder) {
	for _, t := range attributeTypes {
		if !t.oid.Equal(a.Type) {
			continue
		}
		if value, ok := a.text(); ok && t.check(value) == nil {
			b.WriteString(t.name + "=")
			escape(b, value)
			return
		}
	}
	b.WriteString(a.Type.String() + "=#" + hex.EncodeToString(a.Value.FullBytes))
}

func escape(b *strings.Builder, value string) {
	for i := range len(value) {
		c := value[i]
		edge := c == ' ' && (i == 0 || i == len(value)-1)
		if edge || c == '#' && i == 0 || strings.IndexByte("\"+,;<>\\", c) >= 0 {
			b.WriteByte('\\')
		}
		b.WriteByte(c)
	}
}

// sameName compares two Names as RFC 5280 section 7.1 says: string types, letter case and runs of spaces make no
// difference. Issuers that re-encode their own name (MOSIP does) differ from it in just these.
func sameName(a, b []byte) bool {
	if string(a) == string(b) {
		return true
	}
	one, err1 := canonicalName(a)
	two, err2 := canonicalName(b)
	return err1 == nil && err2 == nil && one == two
}

func canonicalName(raw []byte) (string, error) {
	rdns, err := parseRDNs(raw)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, rdn := range rdns {
		var values []string
		for _, a := range rdn {
			value, ok := a.text()
			if ok {
				value = strconv.Quote(strings.ToLower(strings.Join(strings.Fields(value), " ")))
			} else {
				value = hex.EncodeToString(a.Value.FullBytes)
			}
			values = append(values, a.Type.String()+"="+value)
		}
		slices.Sort(values) // the order within a SET carries no meaning
		b.WriteString(strings.Join(values, "+") + "\n")
	}
	return b.String(), nil
}

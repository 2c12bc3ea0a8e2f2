package mosipdbtest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"unicode/utf16"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// encodeStore writes a PKCS#12 file with many entries as current Java does: all by PBES2 with AES-256, secret keys in bags of their own.
func encodeStore(entries []Entry, password string) ([]byte, error) {
	var keys, certificates, secrets []byte
	for i, e := range entries {
		attributes := bagAttributes(e.Alias, []byte{byte(i)})
		if e.Key == nil {
			info := sequence(integer(0), sequence(oid(2, 16, 840, 1, 101, 3, 4, 1)), octets(e.Secret))
			sealed, err := encryptedInfo(info, password)
			if err != nil {
				return nil, err
			}
			secrets = append(secrets, sequence(oid(1, 2, 840, 113549, 1, 12, 10, 1, 5), explicit(sequence(oid(1, 2, 840, 113549, 1, 12, 10, 1, 2), explicit(octets(sealed)))), attributes)...)
			continue
		}
		pkcs8, err := x509.MarshalPKCS8PrivateKey(e.Key)
		if err != nil {
			return nil, err
		}
		sealed, err := encryptedInfo(pkcs8, password)
		if err != nil {
			return nil, err
		}
		keys = append(keys, sequence(oid(1, 2, 840, 113549, 1, 12, 10, 1, 2), explicit(sealed), attributes)...)
		certificates = append(certificates, sequence(oid(1, 2, 840, 113549, 1, 12, 10, 1, 3),
			explicit(sequence(oid(1, 2, 840, 113549, 1, 9, 22, 1), explicit(octets(e.Certificate)))), attributes)...)
	}
	data := oid(1, 2, 840, 113549, 1, 7, 1)
	algorithm, sealed, err := encrypt(sequence(certificates), password)
	if err != nil {
		return nil, err
	}
	encrypted := sequence(oid(1, 2, 840, 113549, 1, 7, 6), explicit(sequence(integer(0), sequence(data, algorithm, tagged(casn1.Tag(0).ContextSpecific(), sealed)))))
	safe := sequence(sequence(data, explicit(octets(sequence(keys)))), encrypted, sequence(data, explicit(octets(sequence(secrets)))))

	salt := make([]byte, 20)
	rand.Read(salt)
	const iterations = 1000
	m := hmac.New(sha256.New, macKey(password, salt, iterations))
	m.Write(safe)
	mac := sequence(sequence(sequence(oid(2, 16, 840, 1, 101, 3, 4, 2, 1), []byte{5, 0}), octets(m.Sum(nil))), octets(salt), integer(iterations))
	return sequence(integer(3), sequence(data, explicit(octets(safe))), mac), nil
}

// macKey is RFC 7292 appendix B.2 for one round of SHA-256.
func macKey(password string, salt []byte, iterations int) []byte {
	var p []byte
	for _, u := range utf16.Encode([]rune(password + "\x00")) {
		p = append(p, byte(u>>8), byte(u))
	}
	fill := func(b []byte) []byte { return bytes.Repeat(b, 64)[:(len(b)+63)/64*64] }
	h := sha256.Sum256(append(append(bytes.Repeat([]byte{3}, 64), fill(salt)...), fill(p)...))
	for range iterations - 1 {
		h = sha256.Sum256(h[:])
	}
	return h[:]
}

func encryptedInfo(plain []byte, password string) ([]byte, error) {
	algorithm, sealed, err := encrypt(plain, password)
	return sequence(algorithm, octets(sealed)), err
}

// encrypt is PBES2 with PBKDF2-HMAC-SHA256 and AES-256-CBC.
func encrypt(plain []byte, password string) (algorithm, sealed []byte, err error) {
	salt, iv := make([]byte, 20), make([]byte, 16)
	rand.Read(salt)
	rand.Read(iv)
	const iterations = 1000
	key, err := pbkdf2.Key(sha256.New, password, salt, iterations, 32)
	if err != nil {
		return nil, nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, nil, err
	}
	n := 16 - len(plain)%16
	sealed = append(bytes.Clone(plain), bytes.Repeat([]byte{byte(n)}, n)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(sealed, sealed)
	kdf := sequence(oid(1, 2, 840, 113549, 1, 5, 12), sequence(octets(salt), integer(iterations), sequence(oid(1, 2, 840, 113549, 2, 9), []byte{5, 0})))
	return sequence(oid(1, 2, 840, 113549, 1, 5, 13), sequence(kdf, sequence(oid(2, 16, 840, 1, 101, 3, 4, 1, 42), octets(iv)))), sealed, nil
}

func bagAttributes(name string, id []byte) []byte {
	var text []byte
	for _, u := range utf16.Encode([]rune(name)) {
		text = append(text, byte(u>>8), byte(u))
	}
	return tagged(casn1.SET, sequence(oid(1, 2, 840, 113549, 1, 9, 20), tagged(casn1.SET, tagged(casn1.Tag(30), text))),
		sequence(oid(1, 2, 840, 113549, 1, 9, 21), tagged(casn1.SET, octets(id))))
}

func tagged(tag casn1.Tag, parts ...[]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(tag, func(b *cryptobyte.Builder) { b.AddBytes(bytes.Join(parts, nil)) })
	return b.BytesOrPanic()
}

func sequence(parts ...[]byte) []byte { return tagged(casn1.SEQUENCE, parts...) }
func explicit(b []byte) []byte        { return tagged(casn1.Tag(0).ContextSpecific().Constructed(), b) }
func octets(b []byte) []byte          { return tagged(casn1.OCTET_STRING, b) }

func integer(n int64) []byte {
	var b cryptobyte.Builder
	b.AddASN1Int64(n)
	return b.BytesOrPanic()
}

func oid(arcs ...int) []byte {
	b, err := asn1.Marshal(asn1.ObjectIdentifier(arcs))
	if err != nil {
		panic(err)
	}
	return b
}

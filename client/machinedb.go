package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"slices"
	"unicode/utf8"
)

// MachineDatabase is what the file db.conf of a registration machine holds: how its local database is opened. The fields are UTF-8. Wipe it after
// use.
type MachineDatabase struct {
	BootPassword []byte // of the encryption of the database
	User         []byte
	Password     []byte
	Encrypted    bool // the database is encrypted under BootPassword already; the last field, 0 or 1
}

// Limits of db.conf. A block of RSA-2048 holds 190 bytes.
const (
	maxDatabase     = 190
	maxDatabaseText = 1024 // bytes of the file
)

// separator stands between the fields of db.conf.
const separator = "-BREAK-"

// Lengths of the fields that MOSIP's client makes, in characters.
const (
	bootPasswordSize = 20
	userSize         = 10
	passwordSize     = 20
)

// Wipe overwrites the secrets.
func (d *MachineDatabase) Wipe() {
	clear(d.BootPassword)
	clear(d.User)
	clear(d.Password)
}

// NewMachineDatabase makes what MOSIP's client makes on a new machine: random letters and digits, 119 bits of them in each password.
func NewMachineDatabase() *MachineDatabase {
	return &MachineDatabase{BootPassword: randomText(bootPasswordSize), User: randomText(userSize), Password: randomText(passwordSize)}
}

const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"

func randomText(n int) []byte {
	text := make([]byte, 0, n)
	var b [32]byte
	defer clear(b[:])
	for len(text) < n {
		rand.Read(b[:])
		for _, x := range b {
			if x &= 63; int(x) < len(alphabet) && len(text) < n {
				text = append(text, alphabet[x])
			}
		}
	}
	return text
}

// marshal writes the four fields. The caller wipes the result.
func (d *MachineDatabase) marshal() ([]byte, error) {
	fields := [][]byte{d.BootPassword, d.User, d.Password, []byte("0")}
	if d.Encrypted {
		fields[3] = []byte("1")
	}
	for _, f := range fields {
		if len(f) == 0 || len(f) > maxDatabase {
			return nil, fmt.Errorf("%w: a field of db.conf is empty or too long", ErrInvalid)
		}
	}
	text := make([]byte, 0, 4*maxDatabase)
	for i, f := range fields {
		if i > 0 {
			text = append(text, separator...)
		}
		text = append(text, f...)
	}
	// What a field and the separator beside it make up may be a separator too: only what is read as it was written is written.
	if again, err := parseMachineDatabase(text); err != nil || !bytes.Equal(again.BootPassword, d.BootPassword) || !bytes.Equal(again.User, d.User) ||
		!bytes.Equal(again.Password, d.Password) {
		clear(text)
		return nil, fmt.Errorf("%w: the fields of db.conf hold %q, what is no UTF-8, or more than %d bytes", ErrInvalid, separator, maxDatabase)
	}
	return text, nil
}

// parseMachineDatabase reads the four fields, which are copied.
func parseMachineDatabase(text []byte) (*MachineDatabase, error) {
	if len(text) > maxDatabase {
		return nil, fmt.Errorf("%w: db.conf of %d bytes", ErrTooLarge, len(text))
	}
	fields := bytes.Split(text, []byte(separator))
	if len(fields) != 4 || !utf8.Valid(text) || len(fields[3]) != 1 || fields[3][0] != '0' && fields[3][0] != '1' ||
		slices.ContainsFunc(fields, func(f []byte) bool { return len(f) == 0 }) {
		return nil, fmt.Errorf("%w: db.conf has not the four fields boot password, user, password and state", ErrInvalid)
	}
	return &MachineDatabase{BootPassword: bytes.Clone(fields[0]), User: bytes.Clone(fields[1]), Password: bytes.Clone(fields[2]), Encrypted: fields[3][0] == '1'}, nil
}

// OpenDatabase reads a db.conf: standard base64 of one RSA block to the machine's encryption key.
func (m *Machine) OpenDatabase(ctx context.Context, file []byte) (*MachineDatabase, error) {
	if len(file) > maxDatabaseText {
		return nil, fmt.Errorf("%w: db.conf of %d bytes", ErrTooLarge, len(file))
	}
	file = bytes.TrimSpace(file)
	block := make([]byte, base64.StdEncoding.DecodedLen(len(file)))
	n, err := base64.StdEncoding.Strict().Decode(block, file)
	if err != nil || n != machineBits/8 {
		return nil, fmt.Errorf("%w: db.conf is not the base64 of one RSA block", ErrInvalid)
	}
	text, err := m.DecryptBlock(ctx, m.Padding(), block[:n])
	if err != nil {
		return nil, err
	}
	defer clear(text)
	return parseMachineDatabase(text)
}

// SealDatabase writes a db.conf.
func (m *Machine) SealDatabase(d *MachineDatabase) ([]byte, error) {
	text, err := d.marshal()
	if err != nil {
		return nil, err
	}
	defer clear(text)
	block, err := m.EncryptBlock(text)
	if err != nil {
		return nil, err
	}
	return base64.StdEncoding.AppendEncode(nil, block), nil
}

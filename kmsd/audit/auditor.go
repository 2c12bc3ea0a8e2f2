package audit

import (
	"bytes"
	"crypto/hpke"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kmsd-project/kmsd/keystore/durable"
)

// The auditor's public key lies beside the log, so that entries can be written while the keystore is locked.
const (
	auditorFile = "auditor.pub"
	auditorHead = "kmsd-auditor-1 "
)

// auditorKey derives the auditor's key pair from the seed (RFC 9180 section 7.1.3).
func auditorKey(seed []byte) (hpke.PrivateKey, error) {
	if len(seed) < 32 {
		return nil, fmt.Errorf("%w: seed of %d bytes", ErrKey, len(seed))
	}
	return kem().DeriveKeyPair(seed)
}

// readAuditor returns the public key in dir, or nil when there is none yet.
func readAuditor(dir string) (hpke.PublicKey, error) {
	text, err := os.ReadFile(filepath.Join(dir, auditorFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	encoded, ok := bytes.CutPrefix(bytes.TrimSpace(text), []byte(auditorHead))
	if !ok || len(text) > 16<<10 {
		return nil, fmt.Errorf("%w: %s is not an auditor's key", ErrDamaged, auditorFile)
	}
	raw, err := base64.StdEncoding.DecodeString(string(encoded))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, auditorFile, err)
	}
	key, err := kem().NewPublicKey(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, auditorFile, err)
	}
	return key, nil
}

// HasAuditor reports whether the log in dir has been begun with some auditor's key.
func HasAuditor(dir string) (bool, error) {
	key, err := readAuditor(dir)
	return key != nil, err
}

func writeAuditor(dir string, key hpke.PublicKey) error {
	text := auditorHead + base64.StdEncoding.EncodeToString(key.Bytes()) + "\n"
	return durable.Replace(filepath.Join(dir, auditorFile), []byte(text))
}

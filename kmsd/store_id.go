package main

import (
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/kmsd-project/kmsd/keystore"
)

// storePin says which keystore is the only one to be opened. Somebody who can replace the state directory could otherwise put a keystore of
// his own there, which opens by itself with slots of his own, and would learn every key that is made from then on.
//
// As text it is the id of the keystore, a minus sign, and a fingerprint of its lifetime key, in hexadecimal. Anybody can give another keystore
// the same id, but not the same fingerprint. The id alone guards against mistakes.
type storePin struct {
	id          string
	fingerprint string // may be empty
}

// errOtherStore is returned for a keystore that is not the pinned one.
var errOtherStore = errors.New("this is not the keystore that store_id in the configuration names")

const (
	storeIDSize = 16 // bytes
	printSize   = 16
	printLabel  = "store pin v1"
)

// parseStorePin reads store_id of the configuration; an empty one pins nothing.
func parseStorePin(text string) (storePin, error) {
	id, print, both := strings.Cut(text, "-")
	if text == "" {
		return storePin{}, nil
	}
	for _, part := range []struct {
		text string
		size int
		need bool
	}{{id, storeIDSize, true}, {print, printSize, both}} {
		if b, err := hex.DecodeString(part.text); err != nil || part.need && len(b) != part.size || part.text != strings.ToLower(part.text) {
			return storePin{}, fmt.Errorf("%w: store_id %.100q is not what kmsctl status shows as the pin of the keystore", errConfig, text)
		}
	}
	return storePin{id, print}, nil
}

// pinOf returns the pin of an unlocked keystore.
func pinOf(s *keystore.Store) (storePin, error) {
	print := make([]byte, printSize)
	if err := s.DeriveSecret(printLabel, print); err != nil {
		return storePin{}, err
	}
	id := s.Info().StoreID
	return storePin{hex.EncodeToString(id[:]), hex.EncodeToString(print)}, nil
}

func (p storePin) String() string {
	if p.fingerprint == "" {
		return p.id
	}
	return p.id + "-" + p.fingerprint
}

// admits returns errOtherStore for a keystore that is not the pinned one. A locked keystore is known by its id
// alone.
func (p storePin) admits(s *keystore.Store) error {
	if p.id == "" {
		return nil
	}
	id := s.Info().StoreID
	same := hex.EncodeToString(id[:]) == p.id
	if same && p.fingerprint != "" && !s.Locked() {
		have, err := pinOf(s)
		if err != nil {
			return err
		}
		same = subtle.ConstantTimeCompare([]byte(have.fingerprint), []byte(p.fingerprint)) == 1
	}
	if !same {
		return errOtherStore
	}
	return nil
}

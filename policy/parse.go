package policy

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/pelletier/go-toml/v2"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Limits of a policy file.
const (
	MaxFile         = 1 << 20 // bytes
	MaxApplications = 10_000
	MaxSubjects     = 100_000 // uids over all applications
)

// ErrFile is wrapped by every error of Parse. The text says where in the file it is, where that is known.
var ErrFile = errors.New("invalid policy file")

// file is the policy file, version 1.
//
//	version = 1
//	[applications]
//	REGISTRATION = [1001, 1002]
//	"wallet.example" = [1003]
type file struct {
	Version      int                 `toml:"version"`
	Applications map[string][]uint32 `toml:"applications"`
}

// Parse reads the policy file of a system daemon: for every application (the first segment of a key name) the uids that
// may use its keys on the application socket. Root administrates on the admin socket; see WithAdminGroup. Keys of the
// file that are not known are refused.
func Parse(data []byte) (*Policy, error) {
	if len(data) > MaxFile {
		return nil, fmt.Errorf("%w: over %d bytes", ErrFile, MaxFile)
	}
	var f file
	if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&f); err != nil {
		return nil, describe(err)
	}
	if f.Version != 1 {
		return nil, fmt.Errorf("%w: version is %d, this release reads 1", ErrFile, f.Version)
	}
	if len(f.Applications) > MaxApplications {
		return nil, fmt.Errorf("%w: over %d applications", ErrFile, MaxApplications)
	}
	p := &Policy{
		mode:         systemMode,
		applications: make(map[subject]struct{}),
		principals:   make(map[uint32]string),
		digest:       sha256.Sum256(append([]byte("kmsd policy file v1"), data...)),
	}
	for application, uids := range f.Applications {
		name, err := keyspec.ParseName(application)
		if err != nil || !name.IsModule() {
			return nil, fmt.Errorf("%w: application %q is not the first segment of a key name", ErrFile, application)
		}
		for _, uid := range uids {
			s := subject{application, uid}
			if _, twice := p.applications[s]; twice {
				return nil, fmt.Errorf("%w: application %q lists uid %d twice", ErrFile, application, uid)
			}
			p.applications[s] = struct{}{}
			p.principals[uid] = principalName(uid)
		}
	}
	if len(p.applications) > MaxSubjects {
		return nil, fmt.Errorf("%w: over %d uids", ErrFile, MaxSubjects)
	}
	return p, nil
}

// describe puts the position, where the parser knows it, before the text of a parser's error.
func describe(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		row, column := strict.Errors[0].Position()
		return fmt.Errorf("%w: line %d column %d: unknown key %v", ErrFile, row, column, strict.Errors[0].Key())
	}
	var decode *toml.DecodeError
	if errors.As(err, &decode) {
		row, column := decode.Position()
		return fmt.Errorf("%w: line %d column %d: %s", ErrFile, row, column, decode.Error())
	}
	return fmt.Errorf("%w: %s", ErrFile, err)
}

package helper

import (
	"context"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// MaxInput is the longest Op.Input in bytes that a driver in a helper takes, and MaxOutput the longest result.
const (
	MaxInput  = proto.MaxHelperData
	MaxOutput = proto.MaxHelperData
)

// Resident is an Enclave whose driver holds resident keys. It implements enclave.Resident, enclave.Session and enclave.Importer besides; when the helper
// does not announce those, their methods fail with ErrUnsupported.
//
// Calls of Generate and Do run at once in the helper, as many as the driver can work on; more wait here, so that one that is given up
// while it waits disturbs nobody. One that is given up later is let finish: the device works on, nobody is told the result, and its turn ends
// with it.
//
// A login ends with the process of the helper. It is not repeated, since no PIN is kept.
type Resident struct{ *Enclave }

// How long a device may take, in the end: hardware takes seconds for an operation, and minutes to find the primes of a key.
const (
	useTime      = 30 * time.Second
	generateTime = 5 * time.Minute
)

// NewResident returns the enclave. The helper is started by the first call that needs it.
func NewResident(d Dialer, c Config) *Resident {
	e := New(d, c)
	e.patience = patience{use: useTime, generate: generateTime}
	return &Resident{e}
}

// Generate is enclave.Resident.Generate.
func (r *Resident) Generate(ctx context.Context, s enclave.Spec) (enclave.Blob, []byte, error) {
	return r.key(ctx, s, nil)
}

// Import is enclave.Importer.Import, for drivers that have it, without a password.
func (r *Resident) Import(ctx context.Context, file, password []byte, s enclave.Spec) (enclave.Blob, []byte, error) {
	switch {
	case len(password) > 0:
		return nil, nil, fmt.Errorf("a key file with a password: %w", enclave.ErrUnsupported)
	case len(file) == 0 || len(file) > proto.MaxHelperFile:
		return nil, nil, tooLong("key file", len(file))
	}
	return r.key(ctx, s, file)
}

// key has the helper make a key, or take over the one of a file.
func (r *Resident) key(ctx context.Context, s enclave.Spec, file []byte) (blob enclave.Blob, spki []byte, err error) {
	if len(s.AAD) > enclave.MaxAAD {
		return nil, nil, tooLong("associated data", len(s.AAD))
	}
	m := &proto.HelperGenerate{ID: s.ID[:], Algorithm: string(s.Algorithm), AAD: s.AAD, File: file}
	for _, u := range s.Usages {
		m.Usages = append(m.Usages, string(u))
	}
	err = r.call(ctx, proto.OpHelperGenerate, m, func(reply *proto.HelperReply) error {
		if len(reply.Blob) == 0 || len(reply.Blob) > enclave.MaxBlob {
			return fmt.Errorf("blob of %d bytes", len(reply.Blob))
		}
		blob = append(blob, reply.Blob...)
		spki = append(spki, reply.SPKI...)
		return nil
	})
	return blob, spki, err
}

// Do is enclave.Resident.Do.
func (r *Resident) Do(ctx context.Context, b enclave.Blob, op enclave.Op, dst []byte) ([]byte, error) {
	if err := checkBlob(b); err != nil {
		return nil, err
	}
	switch {
	case len(op.Input) > MaxInput:
		return nil, tooLong("input", len(op.Input))
	case len(op.Bound) > enclave.MaxAAD:
		return nil, tooLong("associated data of the key", len(op.Bound))
	}
	m := &proto.HelperDo{Blob: b, Usage: string(op.Usage), Scheme: string(op.Scheme), Digest: op.Digest, Input: op.Input, Nonce: op.Nonce,
		AAD: op.AAD, Bound: op.Bound}
	err := r.call(ctx, proto.OpHelperDo, m, func(reply *proto.HelperReply) error {
		dst = append(dst[:0], reply.Output...)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return dst, nil
}

// Destroy is enclave.Resident.Destroy.
func (r *Resident) Destroy(ctx context.Context, b enclave.Blob) error {
	if err := checkBlob(b); err != nil {
		return err
	}
	return r.call(ctx, proto.OpHelperDestroy, &proto.HelperBlob{Blob: b}, noResult)
}

// Mechanisms is enclave.Resident.Mechanisms.
func (r *Resident) Mechanisms(ctx context.Context) (rows []enclave.Mechanism, err error) {
	err = r.call(ctx, proto.OpHelperMechanisms, &proto.Empty{}, func(reply *proto.HelperReply) error {
		for _, m := range reply.Mechanisms {
			row := enclave.Mechanism{Algorithm: keyspec.Algorithm(m.Algorithm), Usage: keyspec.Usage(m.Usage)}
			for _, s := range m.Schemes {
				row.Schemes = append(row.Schemes, keyspec.Scheme(s))
			}
			rows = append(rows, row)
		}
		return nil
	})
	return rows, err
}

// MaxParallel is what the driver said last, 1 before it was asked anything.
func (r *Resident) MaxParallel() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return max(r.parallel, 1)
}

// Login is enclave.Session.Login.
func (r *Resident) Login(ctx context.Context, a enclave.Auth) error {
	return r.call(ctx, proto.OpHelperLogin, &proto.HelperLogin{Auth: a.Secret, Shares: a.Shares}, noResult)
}

func tooLong(what string, n int) error {
	return fmt.Errorf("%s of %d bytes: %w", what, n, enclave.ErrUnsupported)
}

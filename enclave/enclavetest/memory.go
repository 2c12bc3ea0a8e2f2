package enclavetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/subtle"
	"sync"

	"github.com/kmsd-project/kmsd/enclave"
)

// Memory is a fake enclave whose device is a random key in memory, and whose faults a test can choose. It is safe for concurrent use.
type Memory struct {
	mu     sync.Mutex
	key    [32]byte
	pin    []byte
	faults Faults
	closed bool
	wraps  int
	gone   [][]byte // blobs that were forgotten
}

// Faults are what is wrong with a Memory at the moment.
type Faults struct {
	Wrap, Unwrap error               // returned instead of doing anything
	Resident     error               // the same for the methods of Resident
	WrongSecret  bool                // Unwrap succeeds with another secret: a device that lies
	Hang         bool                // calls return only when their context is done
	Health       enclave.HealthState // other than ready
}

// NewMemory returns a healthy fake. With a PIN, it needs a person.
func NewMemory(pin string) *Memory {
	m := &Memory{pin: []byte(pin)}
	rand.Read(m.key[:])
	return m
}

// MemoryOf returns a healthy fake with a given key, for one device that is seen from several processes.
func MemoryOf(key [32]byte, pin string) *Memory { return &Memory{key: key, pin: []byte(pin)} }

// SetFaults replaces the faults.
func (m *Memory) SetFaults(f Faults) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.faults = f
}

// Clear makes the device another one, as clearing a TPM does.
func (m *Memory) Clear() {
	m.mu.Lock()
	defer m.mu.Unlock()
	rand.Read(m.key[:])
}

// Wraps is how often Wrap was called.
func (m *Memory) Wraps() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wraps
}

// Forgotten is how many blobs were forgotten.
func (m *Memory) Forgotten() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.gone)
}

// Reopen returns another driver for the same device, which shares nothing else.
func (m *Memory) Reopen() *Memory {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &Memory{key: m.key, pin: m.pin}
}

// Info describes the fake.
func (m *Memory) Info() enclave.Info {
	return enclave.Info{Kind: "memory", Level: "test: protects nothing", Binding: "memory", NeedsYou: len(m.pin) > 0}
}

func (m *Memory) begin(ctx context.Context) (Faults, [32]byte, error) {
	m.mu.Lock()
	f, key, closed := m.faults, m.key, m.closed
	m.mu.Unlock()
	if f.Hang {
		<-ctx.Done()
	}
	if err := ctx.Err(); err != nil {
		return f, key, err
	}
	if closed {
		return f, key, &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the driver is closed"}
	}
	return f, key, nil
}

// Wrap seals the secret under the key in memory.
func (m *Memory) Wrap(ctx context.Context, secret, aad []byte) (enclave.Blob, error) {
	f, key, err := m.begin(ctx)
	if err != nil {
		return nil, err
	}
	if f.Wrap != nil {
		return nil, f.Wrap
	}
	m.mu.Lock()
	m.wraps++
	m.mu.Unlock()
	sealed, err := enclave.Seal(key[:], "memory", secret, aad)
	if err != nil {
		return nil, err
	}
	return enclave.EncodeBlob("memory", 1, sealed)
}

// Unwrap opens the blob.
func (m *Memory) Unwrap(ctx context.Context, b enclave.Blob, aad []byte, a enclave.Auth, dst []byte) error {
	f, key, err := m.begin(ctx)
	if err != nil {
		return err
	}
	if f.Unwrap != nil {
		return f.Unwrap
	}
	_, sealed, err := enclave.DecodeBlob("memory", b)
	if err != nil {
		return err
	}
	if len(m.pin) > 0 {
		if len(a.Secret) == 0 {
			return &enclave.Error{Kind: enclave.ErrLocked, Remedy: "give the PIN"}
		}
		if subtle.ConstantTimeCompare(a.Secret, m.pin) != 1 {
			return &enclave.Error{Kind: enclave.ErrAuth, Remedy: "give another PIN"}
		}
	}
	if err := enclave.Open(key[:], "memory", sealed, aad, dst); err != nil {
		return err
	}
	if m.forgot(b) {
		clear(dst)
		return &enclave.Error{Kind: enclave.ErrReplaced, Detail: "forgotten"}
	}
	if f.WrongSecret {
		dst[0] ^= 1
	}
	return nil
}

// Forget makes the blob useless.
func (m *Memory) Forget(ctx context.Context, b enclave.Blob) error {
	if _, _, err := m.begin(ctx); err != nil {
		return err
	}
	if _, _, err := enclave.DecodeBlob("memory", b); err != nil {
		return err
	}
	m.forget(b)
	return nil
}

func (m *Memory) forget(b enclave.Blob) {
	if !m.forgot(b) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.gone = append(m.gone, bytes.Clone(b))
	}
}

func (m *Memory) forgot(b enclave.Blob) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, g := range m.gone {
		if string(g) == string(b) {
			return true
		}
	}
	return false
}

// Health is ready unless a fault says otherwise.
func (m *Memory) Health(ctx context.Context) enclave.Health {
	f, _, err := m.begin(ctx)
	if err != nil {
		return enclave.Health{State: enclave.Absent, Detail: err.Error()}
	}
	if f.Health != "" {
		return enclave.Health{State: f.Health}
	}
	return enclave.Health{State: enclave.Ready}
}

// Close makes every later call fail.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

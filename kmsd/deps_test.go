package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The dependency law of kmsd: who may import whom. It is the shortest true description of the architecture. When this
// test fails, the question is first whether the import is right, and only then whether the law is.

const module = "github.com/kmsd-project/kmsd"

// law lists, for every package, the packages outside the standard library that it may import. Names without a dot are
// packages of kmsd.
var law = map[string][]string{
	// The vocabulary, which all may import and which imports nothing.
	"keystore/keyspec": {},

	// Transport knows nothing about keys, and messages nothing about transport.
	"ipc":       {"golang.org/x/sys/unix"},
	"ipc/proto": {"keystore/keyspec", "github.com/vmihailenco/msgpack/v5", "github.com/vmihailenco/msgpack/v5/msgpcode"},

	// What decides and computes. None of it does I/O (see pure).
	"policy":            {"keystore/keyspec", "github.com/pelletier/go-toml/v2"},
	"kmsd/mechanism":    {"keystore/keyspec", "client/pkix", "golang.org/x/crypto/chacha20poly1305", "github.com/decred/dcrd/dcrec/secp256k1/v4"},
	"kmsd/pki":          {"keystore/keyspec", "client/pkix"},
	"client/pkix":       {"golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1", "github.com/decred/dcrd/dcrec/secp256k1/v4"},
	"client/ciphertext": {"keystore/keyspec", "golang.org/x/crypto/chacha20poly1305"},
	"client/jose":       {"client/pkix"},
	"client/cms":        {"client/pkix", "golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1"},
	"client/cose":       {"client/jose", "github.com/fxamacker/cbor/v2"},
	"client/packet":     {"keystore/keyspec", "client/ciphertext", "client/pkix", "golang.org/x/crypto/argon2", "golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1"},

	// The store, and alone with bbolt.
	"keystore/secmem":  {"golang.org/x/sys/unix"},
	"keystore/durable": {}, // files that outlive a loss of power, for all who have some
	"keystore": {"keystore/keyspec", "keystore/secmem", "keystore/durable", "golang.org/x/sys/unix", "filippo.io/age",
		"go.etcd.io/bbolt", "go.etcd.io/bbolt/errors"},

	// What guards the root key.
	"enclave":             {"keystore/keyspec"},
	"enclave/enclavetest": {"enclave", "keystore/keyspec"},
	"enclave/recovery":    {"enclave"},
	"enclave/keyring":     {"enclave", "keystore/durable", "enclave/helper", "golang.org/x/sys/unix"},
	"enclave/keyfile":     {"enclave", "keystore/durable", "keystore/secmem", "golang.org/x/sys/unix"},
	"enclave/pkcs11":      {"enclave", "enclave/helper", "keystore/keyspec", "golang.org/x/crypto/cryptobyte"},
	"enclave/tpm": {"enclave", "keystore/keyspec", "keystore/secmem", "github.com/google/go-tpm/tpm2", "golang.org/x/crypto/cryptobyte",
		"golang.org/x/crypto/cryptobyte/asn1", "golang.org/x/sys/unix"},
	"enclave/tpm/swtpmtest":        {},
	"enclave/helper":               {"enclave", "ipc", "ipc/proto", "keystore/keyspec", "golang.org/x/sys/unix"},
	"enclave/keyring/kmsd-keyring": {"enclave", "enclave/helper", "enclave/keyring", "enclave/keyring/ring", "github.com/godbus/dbus"},
	"enclave/keyring/ring":         {"github.com/99designs/keyring"},
	"enclave/pkcs11/token": {"client/pkix", "enclave", "enclave/pkcs11", "keystore/keyspec", "github.com/ThalesIgnite/crypto11", "github.com/miekg/pkcs11",
		"golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1"},
	"enclave/pkcs11/pkcs11test":  {},
	"enclave/pkcs11/kmsd-pkcs11": {"enclave", "enclave/helper", "enclave/pkcs11", "enclave/pkcs11/token"},

	// The daemon. Only its main package joins the wire and the engine.
	"kmsd/audit": {"keystore/keyspec", "keystore/durable"},
	"kmsd/engine": {"policy", "keystore", "keystore/keyspec", "keystore/secmem", "kmsd/mechanism", "kmsd/pki", "kmsd/audit",
		"client/packet", "client/pkix", "client/ciphertext", "enclave"},
	"kmsd": {"ipc", "ipc/proto", "keystore/durable", "kmsd/engine", "kmsd/mechanism", "kmsd/pki", "kmsd/audit", "policy", "keystore", "keystore/keyspec",
		"keystore/secmem", "client/ciphertext", "enclave", "enclave/helper", "enclave/keyfile", "enclave/keyring", "enclave/pkcs11", "enclave/recovery", "enclave/tpm", "golang.org/x/sys/unix",
		"golang.org/x/term", "github.com/pelletier/go-toml/v2", "github.com/coreos/go-systemd/v22/daemon",
		"github.com/coreos/go-systemd/v22/activation", "filippo.io/age"},
	"kmsd/bench":                    {},
	"kmsd/programs":                 {}, // for tests only: what tests run
	"kmsd/mechanism/wycheprooftest": {},
	"packaging":                     {},

	// The library and the tool of the outside.
	"client":        {"client/ciphertext", "client/cms", "client/cose", "client/jose", "client/packet", "client/pkix", "ipc/proto", "keystore/keyspec", "golang.org/x/crypto/ssh"},
	"kmsctl/keymap": {"keystore/keyspec"},
	"kmsctl": {"kmsctl/keymap", "kmsctl/mosipdb", "kmsctl/pkcs12", "client", "client/ciphertext", "client/cms", "client/cose", "client/jose", "client/packet", "client/pkix", "ipc/proto", "keystore/keyspec",
		"keystore", "keystore/secmem", "enclave", "enclave/recovery", "policy", "kmsd/audit", // without a daemon: verify, restore
		"kmsd/pki", "github.com/pelletier/go-toml/v2", // certificates of every kind and PKCS #7 in files; lists of keys to make
		"filippo.io/age", "github.com/spf13/cobra", "golang.org/x/crypto/ssh", "golang.org/x/sys/unix", "golang.org/x/term"},
	"kmsctl/mosipdb":                      {"client/packet", "client/pkix", "keystore/keyspec"},
	"kmsctl/mosipdb/mosipdbtest":          {"client/packet", "golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1"},
	"kmsctl/mosipdb/mosipdbtest/generate": {"kmsctl/mosipdb/mosipdbtest"},
	"kmsctl/pkcs12":                       {"golang.org/x/crypto/cryptobyte", "golang.org/x/crypto/cryptobyte/asn1"},
	"docs/examples/demo":                  {"client", "client/packet"},
}

// examples under docs may import what an application may.
var example = []string{"client", "client/ciphertext", "client/cms", "client/packet", "client/pkix", "ipc/proto", "keystore/keyspec"}

// pure packages do no I/O: they get bytes and give bytes.
var pure = []string{"kmsctl/mosipdb", "kmsctl/pkcs12", "keystore/keyspec", "ipc/proto", "policy", "kmsd/mechanism", "kmsd/pki", "client/packet", "client/pkix", "client/jose", "client/cose", "client/cms", "client/ciphertext", "enclave", "enclave/recovery"}

// impure are the packages of the standard library that do I/O.
var impure = []string{"os", "os/exec", "os/signal", "os/user", "net", "syscall", "io/ioutil", "log", "plugin"}

// mayUseUnsafe lists the packages that may import unsafe.
var mayUseUnsafe = []string{
	"ipc",             // recvmsg with credentials, without an allocation for each read
	"keystore/secmem", // secret memory is outside of the Go heap
}

// forbidden packages are imported by nothing that is shipped.
var forbidden = []string{"net/http", "math/rand", "math/rand/v2", "net/rpc", "encoding/gob", "C"}

// unreachable lists, for programs and libraries, what must not even be reached through others.
var unreachable = map[string][]string{
	"kmsd":   {"net/http", "runtime/cgo", "github.com/99designs/keyring", "github.com/miekg/pkcs11"},
	"kmsctl": {"net/http", "runtime/cgo", "github.com/99designs/keyring", "github.com/miekg/pkcs11", module + "/kmsd/engine"},
	"client": {"net/http", "runtime/cgo", "go.etcd.io/bbolt", "github.com/99designs/keyring", module + "/ipc", module + "/keystore", module + "/enclave"},
	"ipc":    {module + "/keystore", module + "/keystore/keyspec", module + "/ipc/proto", module + "/policy", module + "/enclave"},

	"enclave/keyring/kmsd-keyring": {"net/http", module + "/keystore", module + "/kmsd/engine", "go.etcd.io/bbolt"},
	"enclave/pkcs11/kmsd-pkcs11":   {"net/http", module + "/keystore", module + "/kmsd/engine", "go.etcd.io/bbolt", "github.com/99designs/keyring"},
}

// withCgo matches the packages that are shipped with cgo: the helper that loads PKCS#11 modules, and nothing else.
const withCgo = "./enclave/pkcs11/..."

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Module     *struct{ Path string }
	Standard   bool
}

func TestDependencyLaw(t *testing.T) {
	packages := slices.Concat(list(t, false, "./..."), list(t, true, withCgo))
	seen := make(map[string]bool)
	for _, p := range packages {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		seen[name] = true
		allowed, known := law[name]
		if strings.HasPrefix(name, "docs/examples/") && !known {
			allowed, known = example, true
		}
		if !known {
			t.Errorf("package %s is not in the law: add a line that says what it may import", name)
			continue
		}
		for _, imported := range p.Imports {
			short := strings.TrimPrefix(imported, module+"/")
			switch {
			case slices.Contains(forbidden, imported):
				t.Errorf("%s imports %s, which nothing may", name, imported)
			case imported == "unsafe" && !slices.Contains(mayUseUnsafe, name):
				t.Errorf("%s imports unsafe", name)
			case slices.Contains(impure, imported) && slices.Contains(pure, name):
				t.Errorf("%s is pure and imports %s", name, imported)
			case outside(imported) && !slices.Contains(allowed, short):
				t.Errorf("%s may not import %s", name, short)
			}
		}
		for _, dep := range unreachable[name] {
			if slices.Contains(p.Deps, dep) {
				t.Errorf("%s reaches %s", name, dep)
			}
		}
	}
	for name := range law {
		if !seen[name] {
			t.Errorf("the law names package %s, which does not exist", name)
		}
	}
	for _, name := range append(slices.Clone(pure), mayUseUnsafe...) {
		if !seen[name] {
			t.Errorf("package %s does not exist", name)
		}
	}
}

// outside reports whether an import path is not of the standard library.
func outside(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return strings.Contains(first, ".")
}

// list runs go list on packages as they are shipped.
func list(t *testing.T, cgo bool, patterns ...string) []listed {
	t.Helper()
	enabled := "0"
	if cgo {
		enabled = "1"
	}
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,Deps,Module,Standard"}, patterns...)...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+enabled)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var packages []listed
	for d := json.NewDecoder(out); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(packages) < 3 {
		t.Fatalf("go list found only %d packages", len(packages))
	}
	return packages
}

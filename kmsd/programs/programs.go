// Package programs builds the programs of kmsd for the tests that run them. Only tests import it.
package programs

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/kmsd-project/kmsd/"

// Set is a directory with programs, built when a test first asks for them.
type Set struct {
	packages []string

	once sync.Once
	dir  string
	fail string
}

// New returns the set of the programs in packages, which are named below the module: New("kmsd", "enclave/keyring/kmsd-keyring").
func New(packages ...string) *Set { return &Set{packages: packages} }

// Dir returns the directory of the programs. It is for everybody to enter, as /usr/bin is, so that a test can run them as another
// user.
func (s *Set) Dir(t testing.TB) string {
	t.Helper()
	s.once.Do(s.build)
	if s.fail != "" {
		t.Fatal(s.fail)
	}
	return s.dir
}

// Remove removes what was built, at the end of TestMain.
func (s *Set) Remove() {
	if s.dir != "" {
		os.RemoveAll(s.dir)
	}
}

func (s *Set) build() {
	dir, err := os.MkdirTemp("", "kmsd-programs-")
	if err == nil {
		s.dir = dir
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		s.fail = err.Error()
		return
	}
	for _, p := range s.packages {
		// As the Makefile does it: what is freed is overwritten, and only what loads a module written in C has cgo.
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
			"-ldflags", "-s -w -X runtime.godebugDefault=clobberfree=1,x509negativeserial=1 -X main.version=test", "-o", dir+"/", module+p)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOEXPERIMENT=runtimesecret", "GOFLAGS=")
		if strings.HasSuffix(p, "/kmsd-pkcs11") {
			cmd.Env = append(cmd.Env, "CGO_ENABLED=1")
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			s.fail = "build " + p + ": " + err.Error() + "\n" + string(out)
			return
		}
	}
}

// Package wycheprooftest reads the test vectors of Project Wycheproof. Only tests import it.
package wycheprooftest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// module is read as a downloaded directory: importing it would embed its 109 MB into the test binary.
const module = "github.com/c2sp/wycheproof@v0.0.0-20260902155932-3fa63dd0344a"

// Dir returns the directory of the vectors and fails the test when they cannot be had.
func Dir(t testing.TB) string {
	t.Helper()
	output, err := exec.Command("go", "mod", "download", "-json", module).Output()
	var downloaded struct{ Dir, Error string }
	if json.Unmarshal(output, &downloaded) != nil || downloaded.Dir == "" {
		t.Fatalf("download %s: %v %s", module, err, downloaded.Error)
	}
	return filepath.Join(downloaded.Dir, "testvectors_v1")
}

// Read reads the file called name into to, as encoding/json does.
func Read(t testing.TB, name string, to any) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(Dir(t), name))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(content, to); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

package keyring

import (
	"path/filepath"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
)

// ParamDir is the parameter of the helper that names the directory of the file backend.
const ParamDir = "dir"

// DialFile returns the daemon's side of the file backend: an enclave whose driver runs in the helper, with its files in the directory
// keyring of the state directory.
func DialFile(d helper.Dialer, stateDir string) *helper.Enclave {
	return helper.New(d, helper.Config{
		Kind:   FileKind,
		Params: map[string]string{ParamDir: filepath.Join(stateDir, "keyring")},
		Info:   enclave.Info{Kind: FileKind, Level: FileLevel},
	})
}

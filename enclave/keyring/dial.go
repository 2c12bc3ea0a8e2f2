package keyring

import (
	"path/filepath"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/enclave/helper"
)

// Parameters of the helper.
const (
	ParamDir        = "dir"        // of the file backend: its directory
	ParamCollection = "collection" // of the Secret Service: the name of the collection, DefaultCollection if empty
	ParamAnswer     = "answer"     // of the Secret Service: how long it may take for an answer, a duration; ten seconds if empty
	ParamPrompt     = "prompt"     // of the Secret Service: how long its own prompt waits for a person, a duration; a minute if empty
)

// SecretServiceKind is the kind of slots that the Secret Service of a desktop session guards: gnome-keyring and its like.
const SecretServiceKind = "keyring:secret-service"

// SecretServiceLevel is what that is worth, in honest words.
const SecretServiceLevel = "login: protects against theft of the disk as well as the login password does; not against root or programs of the same user"

// DefaultCollection is the collection that a login with a password makes and unlocks. Any other would have to be made, which takes a
// person at a prompt.
const DefaultCollection = "login"

// promptRoom is what a call that may wait for a person gets when its context has no deadline.
const promptRoom = 65 * time.Second

// DialFile returns the daemon's side of the file backend: an enclave whose driver runs in the helper, with its files in the directory
// keyring of the state directory.
func DialFile(d helper.Dialer, stateDir string) *helper.Enclave {
	return helper.New(d, helper.Config{
		Kind:   FileKind,
		Params: map[string]string{ParamDir: filepath.Join(stateDir, "keyring")},
		Info:   enclave.Info{Kind: FileKind, Level: FileLevel},
	})
}

// DialSecretService returns the daemon's side of the Secret Service: an enclave whose driver runs in the helper. Wrap and Unwrap of a
// locked keyring wait up to a minute for a person where there is a display; give them a context that allows it.
func DialSecretService(d helper.Dialer) *helper.Enclave {
	return helper.New(d, helper.Config{
		Kind:    SecretServiceKind,
		Timeout: promptRoom,
		Info:    enclave.Info{Kind: SecretServiceKind, Level: SecretServiceLevel},
	})
}

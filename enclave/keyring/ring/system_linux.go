package ring

import library "github.com/99designs/keyring"

func systemConfig(name string) library.Config {
	return library.Config{AllowedBackends: []library.BackendType{library.SecretServiceBackend}, LibSecretCollectionName: name}
}

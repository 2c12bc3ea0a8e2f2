//go:build !goexperiment.runtimesecret

package secmem

// Do calls f. This build has no runtime/secret (GOEXPERIMENT=runtimesecret), so nothing is erased afterwards.
func Do(f func()) { f() }

// Enabled reports whether Do erases anything in this build.
func Enabled() bool { return false }

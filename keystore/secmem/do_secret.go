//go:build goexperiment.runtimesecret

package secmem

import (
	"runtime"
	"runtime/secret"
)

// Do calls f and then erases the registers and the stack it used; heap memory that f allocated is erased when the garbage collector
// sweeps it. It works on linux/amd64 and linux/arm64, elsewhere it just calls f. It costs about 0.3 us on a shallow stack. Goroutines
// started by f, globals and memory that stays reachable are not covered.
func Do(f func()) { secret.Do(f) }

// Enabled reports whether Do erases anything in this build.
func Enabled() bool {
	return runtime.GOOS == "linux" && (runtime.GOARCH == "amd64" || runtime.GOARCH == "arm64")
}

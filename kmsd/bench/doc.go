// Package bench measures kmsd against what the machine can do without it: the same cryptography in process, a bare
// echo over a Unix socket, bare commits of the storage engine.
//
// Every figure is a ratio of two things measured in turn in the same run, because machines differ and are noisy; the
// median of the passes is reported. "make bench" runs it and docs/benchmarks.md holds a run with its machine.
package bench

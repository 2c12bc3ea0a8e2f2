// Command generate writes a deployment of MOSIP Key Manager that never was, to try the import with: see package mosipdbtest.
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/kmsd-project/kmsd/kmsctl/mosipdb/mosipdbtest"
)

func main() {
	var o mosipdbtest.Options
	dir := flag.String("out", "", "directory for the files")
	flag.IntVar(&o.BaseKeys, "keys", 10_000, "base keys")
	flag.IntVar(&o.Pool, "pool", 300, "RSA keys that the base keys share")
	flag.IntVar(&o.Random, "random", 10_000, "zero-knowledge random keys")
	flag.IntVar(&o.Foreign, "foreign", 50, "certificates of others")
	flag.BoolVar(&o.Broken, "broken", false, "with rows that cannot be imported")
	flag.Parse()
	d, err := mosipdbtest.Write(*dir, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("%d keys, %d generations in %s; the password of keystore.p12 is %q\n", d.Keys, d.Generations, *dir, mosipdbtest.Password)
}

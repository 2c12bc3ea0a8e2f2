package main

import (
	"context"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kmsd-project/kmsd/client"
)

// TestKeyLists reads lists of keys: in the order in which they are made, and with a word about what is wrong.
func TestKeyLists(t *testing.T) {
	names := func(text string) string {
		keys, err := parseKeyList([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, k := range keys {
			names = append(names, k.name+":"+k.kind+":"+k.protection)
		}
		return strings.Join(names, " ")
	}
	got := names(`
[[application]]
name = "A"
base = ["b"]
aes = ["c"]
sign = ["ED25519_SIGN", "SIGN"]
protection = "tpm"
[[application]]
name = "B"
module = false
base = ["x/y"]
[[application]]
name = "ROOT"
protection = "hsm"
`)
	want := "ROOT:root:hsm A:module:tpm A/ED25519_SIGN:sign:tpm A/SIGN:sign:tpm A/b:base: B/x/y:base: A/c:aes:"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for text, wrong := range map[string]string{
		"": "no keys",
		"[[application]]\nname = \"A\"\nbases = []":                  `line 3: unknown setting "application.bases"`,
		"[[application]]\nname = 1":                                  "line 2",
		"[[application]":                                             "line 1",
		"[[application]]\nname = \"A/B\"":                            "one segment",
		"[[application]]\nsign = [\"SIGN\"]":                         "one segment",
		"[[application]]\nname = \"A\"\nbase = [\"b\", \"b\"]":       "twice",
		"[[application]]\nname = \"A\"\nbase = [\"SIGN\"]":           "is a sign key",
		"[[application]]\nname = \"A\"\nsign = [\"b\"]":              "a sign key is one of",
		"[[application]]\nname = \"A\"\nbase = [\"b c\"]":            "invalid key name",
		"[[application]]\nname = \"A\"\nprotection = \"paper\"":      "none of hsm",
		"[[application]]\nname = \"ROOT\"\nbase = [\"b\"]":           "no other keys",
		"[[application]]\nname = \"A\"\n[[application]]\nname=\"A\"": "twice",
	} {
		if _, err := parseKeyList([]byte(text)); err == nil || !strings.Contains(err.Error(), wrong) {
			t.Errorf("%q: %v, want %s", text, err, wrong)
		}
	}
}

// TestMOSIPKeyList holds the list that is shipped to that of MOSIP's key generator.
func TestMOSIPKeyList(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "packaging", "mosip-keys.toml"))
	if err != nil {
		t.Fatal(err)
	}
	keys, err := parseKeyList(text)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, k := range keys {
		names = append(names, k.name)
	}
	for _, want := range strings.Fields(`ROOT KERNEL/SIGN PRE_REGISTRATION REGISTRATION REGISTRATION_PROCESSOR ID_REPO KERNEL/IDENTITY_CACHE RESIDENT
		PMS ADMIN_SERVICES DIGITAL_CARD COMPLIANCE_TOOLKIT RESIDENT/mpartner-default-resident COMPLIANCE_TOOLKIT/COMP-FIR`) {
		if !slices.Contains(names, want) {
			t.Errorf("%s is not made", want)
		}
	}
}

func FuzzKeyList(f *testing.F) {
	text, err := os.ReadFile(filepath.Join("..", "packaging", "mosip-keys.toml"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte("[[application]]\nname = \"A\"\nbase = [\"b\"]\nmodule = false\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := parseKeyList(text)
		if err != nil {
			return
		}
		if len(keys) == 0 || len(keys) > maxListed {
			t.Errorf("%d keys", len(keys))
		}
		order := slices.IsSortedFunc(keys, func(a, b listedKey) int { return slices.Index(keyKinds, a.kind) - slices.Index(keyKinds, b.kind) })
		if !order {
			t.Errorf("keys before what they need: %v", keys)
		}
	})
}

// chain NAME [PURPOSE] has OpenSSL verify the chain of a key up to the root at its end, for a purpose of "openssl verify".
func chainCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: chain name [purpose]")
	}
	ts.Check(ts.Exec("kmsctl", "cert", "chain", args[0]))
	var list []string
	for rest := []byte(ts.ReadFile("stdout")); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		list = append(list, string(pem.EncodeToMemory(block)))
	}
	if len(list) < 2 {
		ts.Fatalf("a chain of %d certificates", len(list))
	}
	write := func(name, text string) string {
		ts.Check(os.WriteFile(ts.MkAbs(name), []byte(text), 0o600))
		return name
	}
	last := len(list) - 1
	verify := []string{"verify", "-x509_strict", "-CAfile", write("chain-root.pem", list[last])}
	if last > 1 {
		verify = append(verify, "-untrusted", write("chain-middle.pem", strings.Join(list[1:last], "")))
	}
	if len(args) > 1 {
		verify = append(verify, "-purpose", args[1])
	}
	ts.Check(ts.Exec("openssl", append(verify, write("chain-leaf.pem", list[0]))...))
}

// together N NAME asks for the certificate of a key N times at once, each time on a connection of
// its own: all answers are the same.
func togetherCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: together n name")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	type answer struct {
		key *client.CertifiedKey
		err error
	}
	begin, answers := make(chan struct{}), make(chan answer, n)
	for range n {
		c, err := client.Dial(context.Background(), client.WithSocket(ts.Getenv("KMSD_SOCKET")))
		ts.Check(err)
		defer c.Close()
		go func() {
			<-begin
			key, err := c.CurrentCertificate(context.Background(), args[1], client.Holder{})
			answers <- answer{key, err}
		}()
	}
	close(begin)
	var first *client.CertifiedKey
	made := 0
	for range n {
		a := <-answers
		ts.Check(a.err)
		if first == nil {
			first = a.key
		}
		if a.key.Ref != first.Ref || !a.key.Chain[0].Equal(first.Chain[0]) {
			ts.Fatalf("%s and %s", a.key.Ref, first.Ref)
		}
		if a.key.Made {
			made++
		}
	}
	if made != 1 {
		ts.Fatalf("%d of %d say that they made the key", made, n)
	}
}

package policy

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// decision is one line of testdata/decisions.json.
type decision struct {
	Policy    string // user, file or none
	UID       uint32
	GID       uint32
	Groups    []uint32
	Admin     bool // admin socket
	Op        string
	Name      string
	Act       bool // administration
	Bad       bool // compromised
	Allowed   bool
	Principal string
	Rule      string
}

func TestDecide(t *testing.T) {
	file, err := os.ReadFile("testdata/policy.toml")
	if err != nil {
		t.Fatal(err)
	}
	system, err := Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	policies := map[string]*Policy{"user": UserMode(1000), "file": system.WithAdminGroup(990), "groupless": system, "none": nil, "zero": {}}
	data, err := os.ReadFile("testdata/decisions.json")
	if err != nil {
		t.Fatal(err)
	}
	var table []decision
	if err := json.Unmarshal(data, &table); err != nil {
		t.Fatal(err)
	}
	if len(table) < 30 {
		t.Fatalf("only %d decisions", len(table))
	}
	for i, c := range table {
		p, ok := policies[c.Policy]
		if !ok {
			t.Fatalf("line %d: policy %q", i, c.Policy)
		}
		got := Decide(p, &Request{
			Caller:    Facts{UID: c.UID, GID: c.GID, Groups: c.Groups, Admin: c.Admin},
			Operation: c.Op, Name: keyspec.Name(c.Name), Administration: c.Act, Compromised: c.Bad,
		})
		if got != (Decision{c.Allowed, c.Principal, c.Rule}) {
			t.Errorf("line %d %+v: got %+v", i, c, got)
		}
	}
}

// Whoever no rule knows is refused everything, whatever else the request says.
func TestDefaultDeny(t *testing.T) {
	system, err := Parse([]byte("version = 1\n[applications]\nAPP = [1]\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []*Policy{nil, {}, UserMode(1), system, system.WithAdminGroup(5)} {
		for _, admin := range []bool{false, true} {
			for _, name := range []keyspec.Name{"", "APP", "APP/x", "OTHER"} {
				for _, act := range []bool{false, true} {
					r := &Request{Caller: Facts{UID: 2, GID: 2, Groups: []uint32{3}, Admin: admin}, Operation: "sign", Name: name, Administration: act}
					if d := Decide(p, r); d.Allowed {
						t.Errorf("%+v is allowed: %+v", r, d)
					}
				}
			}
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct{ file, text string }{
		"unknown key":         {"version = 1\n[applications]\nAPP = [1]\n[aplications]\n", "line 4 column 2: unknown key"},
		"unknown nested key":  {"version = 1\nextra = 2\n", "line 2 column 1"},
		"no version":          {"[applications]\nAPP = [1]\n", "version is 0"},
		"version":             {"version = 2\n", "version is 2"},
		"not TOML":            {"version = = 1\n", "line 1"},
		"name as text":        {"version = 1\n[applications]\nAPP = \"me\"\n", "line 3"},
		"negative":            {"version = 1\n[applications]\nAPP = [-1]\n", "line 3"},
		"too large":           {"version = 1\n[applications]\nAPP = [4294967296]\n", "line 3"},
		"twice":               {"version = 1\n[applications]\nAPP = [1, 1]\n", "uid 1 twice"},
		"key twice":           {"version = 1\n[applications]\nAPP = [1]\nAPP = [2]\n", "line 4"},
		"not an application":  {"version = 1\n[applications]\n\"A/B\" = [1]\n", "A/B"},
		"bad application":     {"version = 1\n[applications]\n\"A B\" = [1]\n", "A B"},
		"nested table":        {"version = 1\n[applications.APP]\nuid = 1\n", ""},
		"long":                {"#" + strings.Repeat("x", MaxFile), "bytes"},
		"applications twice ": {"version = 1\n[applications]\n[applications]\n", "line 3"},
	} {
		_, err := Parse([]byte(c.file))
		if !errors.Is(err, ErrFile) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEpoch(t *testing.T) {
	a, err := Parse([]byte("version = 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := Parse([]byte("version = 1\n# comment\n"))
	if err != nil {
		t.Fatal(err)
	}
	again, _ := Parse([]byte("version = 1\n"))
	seen := make(map[uint64]bool)
	for _, p := range []*Policy{a, b, a.WithAdminGroup(1), a.WithAdminGroup(2), UserMode(1), UserMode(2)} {
		if p.Epoch() == 0 || p.Epoch() >= 1<<63 || seen[p.Epoch()] {
			t.Errorf("epoch %d", p.Epoch())
		}
		seen[p.Epoch()] = true
	}
	if a.Epoch() != again.Epoch() || a.Digest() != again.Digest() {
		t.Error("the same content has two epochs")
	}
}

func BenchmarkDecide(b *testing.B) {
	p, err := Parse([]byte("version = 1\n[applications]\nAPP = [1, 2, 3]\n"))
	if err != nil {
		b.Fatal(err)
	}
	r := &Request{Caller: Facts{UID: 2}, Operation: "sign", Name: "APP/key"}
	b.ReportAllocs()
	for b.Loop() {
		if !Decide(p, r).Allowed {
			b.Fatal("refused")
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version = 1\n[applications]\nREGISTRATION = [1001, 1002]\n\"wallet.example\" = [0x3eb]\n"))
	f.Add([]byte("version = 1\napplications = {A = [1]}\n"))
	f.Add([]byte("[applications.A]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrFile) {
				t.Errorf("error without ErrFile: %v", err)
			}
			return
		}
		for s := range p.applications {
			r := &Request{Caller: Facts{UID: s.uid}, Operation: "sign", Name: keyspec.Name(s.namespace + "/x")}
			if !Decide(p, r).Allowed {
				t.Errorf("%+v is listed and refused", s)
			}
			if r.Administration = true; Decide(p, r).Allowed {
				t.Errorf("%+v administrates", s)
			}
		}
	})
}

package mosipdb_test

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"crypto/x509"

	"github.com/kmsd-project/kmsd/client/packet"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb"
	"github.com/kmsd-project/kmsd/kmsctl/mosipdb/mosipdbtest"
)

func deployment(t *testing.T, o mosipdbtest.Options) (*mosipdbtest.Deployment, []mosipdb.Entry) {
	t.Helper()
	d, err := mosipdbtest.Write(t.TempDir(), o)
	if err != nil {
		t.Fatal(err)
	}
	var entries []mosipdb.Entry
	for _, e := range d.Entries {
		entry := mosipdb.Entry{Alias: strings.ToUpper(e.Alias), Certificate: e.Certificate, Secret: e.Key == nil}
		if e.Key != nil {
			if entry.SPKI, err = x509.MarshalPKIXPublicKey(e.Key.Public()); err != nil {
				t.Fatal(err)
			}
		}
		entries = append(entries, entry)
	}
	return d, entries
}

func read(t *testing.T, r *mosipdb.Reader, paths ...string) {
	t.Helper()
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := r.Read(filepath.Base(path), f); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
}

// TestDeployment reads the same deployment from a dump and from CSV.
func TestDeployment(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 9, Pool: 4, Foreign: 2, Random: 5})
	csv := mosipdb.NewReader()
	for _, table := range []string{"key_store", "key_alias", "key_policy_def", "ca_cert_store", "data_encrypt_keystore"} {
		read(t, csv, filepath.Join(made.Dir, table+".csv"))
	}
	dump := mosipdb.NewReader()
	read(t, dump, filepath.Join(made.Dir, "dump.sql"))
	for name, r := range map[string]*mosipdb.Reader{"dump": dump, "csv": csv} {
		d := r.Deployment(entries, time.Now())
		if d.Broken() > 0 {
			t.Fatalf("%s: %+v", name, d.Problems)
		}
		if len(d.Keys) != made.Keys || len(d.Policies) != 5 || len(d.Certificates) != 1 || len(d.RandomKeys) != 5 {
			t.Errorf("%s: %d keys of %d, %d policies, %d certificates, %d random keys", name, len(d.Keys), made.Keys, len(d.Policies), len(d.Certificates), len(d.RandomKeys))
		}
		generations, rank := 0, -1
		for _, k := range d.Keys {
			next := map[mosipdb.Kind]int{mosipdb.Root: 0, mosipdb.Module: 1, mosipdb.Symmetric: 2, mosipdb.Sign: 3, mosipdb.Foreign: 4, mosipdb.Base: 5}[k.Kind]
			if next < rank {
				t.Errorf("%s: %s comes too late", name, k.Name)
			}
			rank = next
			for i, g := range k.Generations {
				generations++
				if i > 0 && g.Created.Before(k.Generations[i-1].Created) {
					t.Errorf("%s: generations of %s are not in order", name, k.Name)
				}
				if (k.Kind == mosipdb.Base) != (g.Wrapped != nil && g.Module != nil) && k.Name != "KERNEL/ED25519_SIGN" {
					t.Errorf("%s: %s@%d, a %s key: wrapped %t, module key %t", name, k.Name, i+1, k.Kind, g.Wrapped != nil, g.Module != nil)
				}
				if (g.Unique != "") != strings.Contains(string(k.Name), "b64u:") { // the name is not MOSIP's
					t.Errorf("%s: %s@%d has uni_ident %s", name, k.Name, i+1, g.Unique)
				}
			}
		}
		if generations != made.Generations {
			t.Errorf("%s: %d generations of %d", name, generations, made.Generations)
		}
		for _, c := range d.Counts {
			if c.Application == "REGISTRATION" && (c.Keys != 11 || c.Generations != 3+3+6+9+1 || c.Current != 11 || c.Expired != 11) {
				t.Errorf("%s: %+v", name, c)
			}
			if c.Application == "PARTNER" && (c.Keys != 2 || c.Foreign != 2) {
				t.Errorf("%s: %+v", name, c)
			}
		}
	}
}

// TestBroken: every broken row is reported with its line, and nothing else.
func TestBroken(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 3, Pool: 2, Broken: true})
	r := mosipdb.NewReader()
	read(t, r, filepath.Join(made.Dir, "dump.sql"))
	d := r.Deployment(entries, time.Now())
	if len(d.Keys) != made.Keys+1 { // of broken-alias the first row is good
		t.Errorf("%d keys, want %d", len(d.Keys), made.Keys+1)
	}
	text, err := os.ReadFile(filepath.Join(made.Dir, "dump.sql"))
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	found := make(map[string]bool)
	for _, p := range d.Problems {
		if p.Severity != mosipdb.Broken {
			continue
		}
		if p.File != "dump.sql" || p.Line < 1 || p.Alias != "" && !strings.HasPrefix(lines[p.Line-1], p.Alias) {
			t.Errorf("%+v is not at its line", p)
		}
		for _, want := range []string{"no base64", "cert_thumbprint", "the module key that wraps it", "no certificate that", "key_expire_dtimes", "second row of this id",
			"neither in key_store nor", "no row of key_alias", "no name", "#KEY_SPLITTER#"} {
			if strings.Contains(p.Reason, want) {
				found[want] = true
			}
		}
	}
	if len(found) != 10 {
		t.Errorf("found only %v in %+v", found, d.Problems)
	}
}

// TestModuleKeys: without its module key no base key is imported, nor with one of another certificate.
func TestModuleKeys(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 3, Pool: 2})
	for name, change := range map[string]func([]mosipdb.Entry) []mosipdb.Entry{
		"none":           func([]mosipdb.Entry) []mosipdb.Entry { return nil },
		"other key":      func(e []mosipdb.Entry) []mosipdb.Entry { e[1].SPKI, e[2].SPKI = e[2].SPKI, e[1].SPKI; return e },
		"other kind":     func(e []mosipdb.Entry) []mosipdb.Entry { e[1].Secret = true; return e },
		"no certificate": func(e []mosipdb.Entry) []mosipdb.Entry { e[1].Certificate = nil; return e },
		"swapped": func(e []mosipdb.Entry) []mosipdb.Entry {
			e[1], e[2] = mosipdb.Entry{Alias: e[1].Alias, Certificate: e[2].Certificate, SPKI: e[2].SPKI}, mosipdb.Entry{Alias: e[2].Alias, Certificate: e[1].Certificate, SPKI: e[1].SPKI}
			return e
		},
	} {
		r := mosipdb.NewReader()
		read(t, r, filepath.Join(made.Dir, "dump.sql"))
		d := r.Deployment(change(append([]mosipdb.Entry(nil), entries...)), time.Now())
		if d.Broken() == 0 {
			t.Errorf("%s: nothing is broken", name)
		}
		for _, k := range d.Keys {
			for _, g := range k.Generations {
				if name == "none" && k.Kind != mosipdb.Foreign {
					t.Errorf("%s: %s is there", name, k.Name)
				}
				if g.Wrapped != nil && bytes.Equal(g.Module, made.Entries[1].Certificate) {
					t.Errorf("%s: %s is there", name, k.Name)
				}
			}
		}
	}
}

// TestUnique: the uni_ident of a certificate that was uploaded on a later day is kept, since the kid rests on it.
func TestUnique(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 1, Pool: 1})
	b, err := os.ReadFile(filepath.Join(made.Dir, "key_alias.csv"))
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now().UTC().AddDate(0, 0, -30)
	was, is := packet.UniqueIdentifier("REGISTRATION", "10001_100000", at), packet.UniqueIdentifier("REGISTRATION", "10001_100000", at.AddDate(0, 0, 3))
	r := mosipdb.NewReader()
	if err := r.Read("key_alias.csv", bytes.NewReader(bytes.Replace(b, []byte(was), []byte(is), 1))); err != nil {
		t.Fatal(err)
	}
	read(t, r, filepath.Join(made.Dir, "key_store.csv"))
	d := r.Deployment(entries, time.Now())
	n := 0
	for _, k := range d.Keys {
		for _, g := range k.Generations {
			if g.Unique != "" && !strings.Contains(string(k.Name), "b64u:") {
				n++
				if g.Unique != is || k.Name != "REGISTRATION/10001_100000" {
					t.Errorf("%s: %s", k.Name, g.Unique)
				}
			}
		}
	}
	if n != 1 || d.Broken() != 0 {
		t.Errorf("%d, %+v", n, d.Problems)
	}
}

// alter reads a deployment after a change of the text of its key_alias.
func alter(t *testing.T, made *mosipdbtest.Deployment, entries []mosipdb.Entry, change func(alias string) string) *mosipdb.Deployment {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(made.Dir, "key_alias.csv"))
	if err != nil {
		t.Fatal(err)
	}
	r := mosipdb.NewReader()
	if err := r.Read("key_alias.csv", strings.NewReader(change(string(b)))); err != nil {
		t.Fatal(err)
	}
	read(t, r, filepath.Join(made.Dir, "key_store.csv"))
	return r.Deployment(entries, time.Now())
}

func find(t *testing.T, d *mosipdb.Deployment, name keyspec.Name) *mosipdb.Key {
	t.Helper()
	for _, k := range d.Keys {
		if k.Name == name {
			return k
		}
	}
	t.Fatalf("%s is not there: %+v", name, d.Problems)
	return nil
}

// TestUniqueOfName: where MOSIP's uni_ident cannot be made again of name and day, it is kept.
func TestUniqueOfName(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 1, Pool: 1})
	const ref, blank = "10001_100000", "10001 100000"
	at := time.Now().UTC().AddDate(0, 0, -30)
	day := packet.UniqueIdentifier("REGISTRATION", ref, at)
	name, err := mosipdb.KeyName("REGISTRATION", blank)
	if err != nil {
		t.Fatal(err)
	}
	for _, was := range []string{packet.UniqueIdentifier("REGISTRATION", blank, at), ""} {
		d := alter(t, made, entries, func(s string) string { return strings.ReplaceAll(strings.Replace(s, day, was, 1), ref, blank) })
		if g := find(t, d, name).Generations; d.Broken() > 0 || g[len(g)-1].Unique != packet.UniqueIdentifier("REGISTRATION", blank, at) {
			t.Errorf("a reference that a name cannot hold: %q, %+v", g[len(g)-1].Unique, d.Problems)
		}
	}
	// A key that MOSIP's own migration has brought in.
	d := alter(t, made, entries, func(s string) string { return s })
	g := find(t, d, "REGISTRATION/"+ref).Generations
	migrated := packet.UniqueIdentifierOf("REGISTRATION", ref, sha256.Sum256(g[len(g)-1].Certificate))
	d = alter(t, made, entries, func(s string) string { return strings.Replace(s, day, migrated, 1) })
	if g := find(t, d, "REGISTRATION/"+ref).Generations; g[len(g)-1].Unique != migrated || len(d.Problems) != 0 {
		t.Errorf("of a migrated key: %q, %+v", g[len(g)-1].Unique, d.Problems)
	}
}

// TestTimes: a key that was revoked at once is imported, expired; what comes from the future is refused before anything is begun.
func TestTimes(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 1, Pool: 1})
	d := alter(t, made, entries, func(s string) string { return s })
	const stamp = "2006-01-02 15:04:05.000000"
	list := find(t, d, "REGISTRATION/10001_100000").Generations
	g := list[len(list)-1]
	for _, c := range []struct {
		created, expires time.Time
		broken           int
	}{
		{g.Created, g.Created.Add(-30 * time.Second), 0},
		{g.Created, g.Created.Add(-time.Minute), 0},
		{g.Created, g.Created.Add(-61 * time.Second), 1},
		{time.Now().UTC().Add(4 * time.Minute), g.Expires, 0},
		{time.Now().UTC().Add(6 * time.Minute), g.Expires, 1},
	} {
		d := alter(t, made, entries, func(s string) string {
			at := strings.Index(s, g.Alias)
			row, rest, _ := strings.Cut(s[at:], "\n")
			row = strings.NewReplacer(g.Expires.Format(stamp), c.expires.Format(stamp), g.Created.Format(stamp), c.created.Format(stamp)).Replace(row)
			return s[:at] + row + "\n" + rest
		})
		if d.Broken() != c.broken { // once, not for its row in key_store again
			t.Errorf("made %s, expires %s: %+v", c.created, c.expires, d.Problems)
		}
		for _, k := range d.Keys {
			for _, g := range k.Generations {
				if !g.Expires.After(g.Created) {
					t.Errorf("%s expires at %s, made at %s", k.Name, g.Expires, g.Created)
				}
			}
		}
	}
}

// TestOtherModule: a base key below the module key of another application is told before anything is begun, since kmsd refuses it.
func TestOtherModule(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 1, Pool: 1})
	d := alter(t, made, entries, func(s string) string {
		return strings.ReplaceAll(s, ",REGISTRATION,10001_100000,", ",KERNEL,10001_100000,")
	})
	n := 0
	for _, p := range d.Problems {
		if p.Severity == mosipdb.Broken && strings.Contains(p.Reason, "another application, REGISTRATION") {
			n++
		}
	}
	if n == 0 {
		t.Errorf("%+v", d.Problems)
	}
}

// others writes rows for certificates of somebody else, the oldest first, and reads them.
func others(t *testing.T, certificates ...[]byte) *mosipdb.Deployment {
	t.Helper()
	aliases, stored := "id,app_id,ref_id,key_gen_dtimes,key_expire_dtimes\n", "id,master_key,private_key,certificate_data\n"
	for i, der := range certificates {
		aliases += fmt.Sprintf("id%d,PARTNER,p,2025-01-%02d 00:00:00,2030-01-01 00:00:00\n", i, i+1)
		stored += fmt.Sprintf("id%d,id%d,NA,\"%s\"\n", i, i, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	r := mosipdb.NewReader()
	for name, text := range map[string]string{"a": aliases, "s": stored} {
		if err := r.Read(name, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	return r.Deployment(nil, time.Now())
}

// TestRenewed: a partner that has renewed its certificate with the same key has one version of it, the newer; and a key has one algorithm.
// kmsd would refuse the whole key.
func TestRenewed(t *testing.T) {
	make := func(key crypto.Signer, serial int64) []byte {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(serial)}, &x509.Certificate{}, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	var keys []crypto.Signer
	for _, bits := range []int{2048, 2048, 3072} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	first, second, third, newest := make(keys[0], 1), make(keys[1], 2), make(keys[0], 3), make(keys[0], 4)
	d := others(t, first, second, third, newest)
	if g := find(t, d, "PARTNER/p").Generations; d.Broken() > 0 || len(g) != 2 || !bytes.Equal(g[0].Certificate, second) || !bytes.Equal(g[1].Certificate, newest) || len(d.Problems) != 2 {
		t.Errorf("%d generations, %+v", len(g), d.Problems)
	}
	d = others(t, first, make(keys[2], 5))
	if g := find(t, d, "PARTNER/p").Generations; d.Broken() != 1 || len(g) != 1 || !strings.Contains(d.Problems[0].Reason, "RSA-3072 among keys for RSA-2048") {
		t.Errorf("%d generations, %+v", len(g), d.Problems)
	}
}

// TestSameTime: generations of one time have one order, whatever that of the rows is.
func TestSameTime(t *testing.T) {
	made, entries := deployment(t, mosipdbtest.Options{BaseKeys: 3, Pool: 4})
	const name = "REGISTRATION/10001_100002"
	var orders []string
	for i := range 2 {
		d := alter(t, made, entries, func(s string) string {
			head, body, _ := strings.Cut(s, "\n")
			lines := strings.Split(strings.TrimSuffix(body, "\n"), "\n")
			at := ""
			for i, line := range lines {
				cells := strings.Split(line, ",")
				if len(cells) > 4 && cells[1]+"/"+cells[2] == name {
					at = cmp.Or(at, cells[3])
					cells[3] = at
					lines[i] = strings.Join(cells, ",")
				}
			}
			if i == 1 {
				slices.Reverse(lines)
			}
			return head + "\n" + strings.Join(lines, "\n") + "\n"
		})
		var order []string
		for _, g := range find(t, d, name).Generations {
			order = append(order, g.Alias)
		}
		orders = append(orders, fmt.Sprint(len(order), order))
	}
	if orders[0] != orders[1] || orders[0][0] == '1' {
		t.Error(orders)
	}
}

func rows(t *testing.T, text string) (list []*mosipdb.Row, bad []*mosipdb.RowError, err error) {
	t.Helper()
	for row, e := range mosipdb.Rows(iotest.OneByteReader(strings.NewReader(text))) {
		var b *mosipdb.RowError
		switch {
		case errors.As(e, &b):
			bad = append(bad, b)
		case e != nil:
			err = e
		default:
			list = append(list, row)
		}
	}
	return list, bad, err
}

const copyAlias = "COPY keymgr.key_alias (ref_id, id, app_id, key_gen_dtimes, key_expire_dtimes) FROM stdin;\n"

// TestCopy reads COPY text in its finer points.
func TestCopy(t *testing.T) {
	list, bad, err := rows(t, "\n-- a dump\nCOPY other.table (id) FROM stdin;\n"+copyAlias+"r\tid\tA\t2026-01-01 00:00:00\t2027-01-01 00:00:00\n\\.\n-- end\n")
	if err != nil || len(list) != 0 || len(bad) != 0 {
		t.Errorf("what another table holds is read: %d rows, %v, %v", len(list), bad, err)
	}
	list, bad, err = rows(t, "SET x = 1;\nCOPY \"keymgr\".\"key_alias\" (\"ref_id\", id, app_id, key_gen_dtimes, key_expire_dtimes) FROM stdin;\r\n"+
		"a\\tb\\\\c\\x41\\102\\q\\n\tid1\tAPP\t2026-01-01 00:00:00\t2027-01-01 00:00:00\r\n"+
		"\\N\tid2\tAPP\t2026-01-01 00:00:00\t2027-01-01 00:00:00\n"+
		"too\tfew\n"+
		"a\tb\tc\td\te\tf\n"+
		"half\\\tid3\tAPP\t2026-01-01 00:00:00\t2027-01-01 00:00:00\n"+
		"\xff\tid4\tAPP\t2026-01-01 00:00:00\t2027-01-01 00:00:00\n"+
		strings.Repeat("x", mosipdb.MaxRow+1)+"\n"+
		"last\tid5\tAPP\t2026-01-01 00:00:00\t2027-01-01 00:00:00\n\\.\n")
	if err != nil || len(list) != 3 || len(bad) != 5 {
		t.Fatalf("%d rows, %d bad, %v", len(list), len(bad), err)
	}
	if list[0].Cell("ref_id") != "a\tb\\cABq\n" || list[1].Cell("ref_id") != "" || list[2].Cell("id") != "id5" || list[2].Line != 10 {
		t.Errorf("%q, %q, %q at %d", list[0].Cell("ref_id"), list[1].Cell("ref_id"), list[2].Cell("id"), list[2].Line)
	}
	for i, line := range []int{5, 6, 7, 8, 9} {
		if bad[i].Line != line {
			t.Errorf("bad row %d: %v", i, bad[i])
		}
	}
}

// TestFormats: what cannot be read as a whole is refused, with the way out where there is one.
func TestFormats(t *testing.T) {
	for text, want := range map[string]string{
		"":               "empty",
		"PGDMP\x01\x0e":  "pg_restore",
		"a,b,c\n1,2,3\n": "no columns of a table",
		"-- x\nINSERT INTO keymgr.key_store (id) VALUES ('x');\n":                                              "--inserts",
		"-- x\n" + copyAlias + "a\tb\n":                                                                        "not whole",
		"-- PostgreSQL database dump\n" + copyAlias + "\\.\n":                                                  "no end",
		"-- PostgreSQL database dump\nCOPY public.other (id) FROM stdin;\n1\n":                                 "no end",
		"-- x\n" + copyAlias + "\\.\n" + strings.Replace(copyAlias, "keymgr", "ida", 1) + "\\.\n":              "ida.key_alias, besides keymgr.key_alias",
		"-- x\nCOPY keymgr.key_store (id, private_key) FROM stdin;\n\\.\n":                                     "no column",
		"-- x\nCOPY k.key_alias (id, id, app_id) FROM stdin;\n\\.\n":                                           "twice",
		"id,app_id,ref_id,key_gen_dtimes,key_expire_dtimes\n\"x":                                               "line",
		"id,app_id,ref_id,key_gen_dtimes,key_expire_dtimes\n\"" + strings.Repeat("x", 3*mosipdb.MaxRow) + "\"": "over",
	} {
		_, _, err := rows(t, text)
		if !errors.Is(err, mosipdb.ErrFormat) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

func TestNames(t *testing.T) {
	for _, v := range []struct{ app, ref, want string }{
		{"KERNEL", "", "KERNEL"}, {"REGISTRATION", "10001_110011", "REGISTRATION/10001_110011"}, {"A", "b/c", "A/b/c"},
		{"A", "two words", "A/b64u:dHdvIHdvcmRz"}, {"A", "b64u:x", "A/b64u:YjY0dTp4"}, {"A", "/", "A/b64u:Lw"}, {"A", "Zürich", "A/b64u:WsO8cmljaA"},
	} {
		n, err := mosipdb.KeyName(v.app, v.ref)
		if err != nil || string(n) != v.want {
			t.Errorf("%q, %q: %s, %v", v.app, v.ref, n, err)
			continue
		}
		app, ref, err := mosipdb.Reference(n)
		if err != nil || app != v.app || ref != v.ref {
			t.Errorf("%s: %q, %q, %v", n, app, ref, err)
		}
	}
	for _, v := range [][2]string{{"", ""}, {"a/b", ""}, {"a b", ""}, {"A", strings.Repeat("ü", 60)}} {
		if n, err := mosipdb.KeyName(v[0], v[1]); !errors.Is(err, keyspec.ErrName) {
			t.Errorf("%q: %s, %v", v, n, err)
		}
	}
}

func FuzzRows(f *testing.F) {
	f.Add([]byte("-- x\n" + copyAlias + "r\\n\\x41\\101\tid\tA\t2026-01-01 00:00:00\t2027-01-01 00:00:00+00\n\\.\n"))
	f.Add([]byte("id,app_id,ref_id,key_gen_dtimes,key_expire_dtimes\n\"a\"\"\n\",A,R,2026-01-01 00:00:00.1,2027-01-01\n"))
	f.Add([]byte("id,master_key,private_key,certificate_data\nx,y,NA,\n"))
	f.Add([]byte("id,key,key_status\n1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=,Active\n"))
	f.Add([]byte("-- x\nCOPY key_policy_def (app_id, key_validity_duration, pre_expire_days) FROM stdin;\nROOT\t1\t2\n"))
	f.Add([]byte("cert_id,partner_domain,cert_data\n1,AUTH,-----BEGIN\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := mosipdb.NewReader()
		if err := r.Read("f", bytes.NewReader(b)); err != nil && !errors.Is(err, mosipdb.ErrFormat) && !errors.Is(err, mosipdb.ErrTooMany) {
			t.Error(err)
		}
		d := r.Deployment(nil, time.Unix(1e9, 0))
		for _, k := range d.Keys {
			if _, err := keyspec.ParseName(string(k.Name)); err != nil || len(k.Generations) == 0 {
				t.Errorf("%+v: %v", k, err)
			}
		}
		for _, p := range d.Problems {
			if p.Line < 1 || p.Reason == "" || len(p.Reason) > 512 {
				t.Errorf("%+v", p)
			}
		}
	})
}

func FuzzNames(f *testing.F) {
	f.Add("A", "b64u:x")
	f.Add("A", "x/y z")
	f.Fuzz(func(t *testing.T, app, ref string) {
		n, err := mosipdb.KeyName(app, ref)
		if err != nil {
			return
		}
		if a, r, err := mosipdb.Reference(n); err != nil || a != app || r != ref {
			t.Error(fmt.Sprintf("%q %q became %s became %q %q", app, ref, n, a, r), err)
		}
	})
}

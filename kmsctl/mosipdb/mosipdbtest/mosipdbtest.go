// Package mosipdbtest makes deployments of MOSIP Key Manager out of nothing, for tests: the dump of a database, the same as CSV, the
// PKCS#12 keystore with the module keys, and payloads that were encrypted to them.
//
// The base keys of a large deployment share a pool of RSA keys, since making ten thousand would take longer than everything else: each row
// has its own certificate, with its own serial number and dates, and its own wrapping of the private key, but not its own modulus.
package mosipdbtest

import (
	"bufio"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/csv"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kmsd-project/kmsd/client/packet"
)

// Password is that of keystore.p12.
const Password = "keystore password"

// Options says what to make.
type Options struct {
	BaseKeys int  // below REGISTRATION; every third has an expired generation before
	Pool     int  // RSA keys for them; 0: 8
	Random   int  // zero-knowledge random keys
	Foreign  int  // certificates of others, below PARTNER
	Broken   bool // rows that cannot be imported
	NoStore  bool // no keystore.p12: the module keys are elsewhere
	Now      time.Time
}

// Sample is a payload that the deployment has encrypted.
type Sample struct {
	Application, Reference string
	Version                int
	Plain, Payload         []byte
}

// Deployment is what was made. The files are dump.sql, keystore.p12, modules.pem with the certificates of the module keys, one CSV for
// each table, and samples.json.
type Deployment struct {
	Dir               string
	Keys, Generations int
	Samples           []Sample
	Entries           []Entry // the module keys
	IdentityCache     [32]byte
	Random            map[uint32][32]byte // the random keys themselves
	Root              *x509.Certificate
}

// Entry is a module key.
type Entry struct {
	Alias       string
	Key         crypto.Signer // nil for a symmetric key
	Secret      []byte
	Certificate []byte
}

type generation struct {
	alias       string
	app, ref    string
	created     time.Time
	expires     time.Time
	key         crypto.Signer
	certificate []byte
	parsed      *x509.Certificate
}

type writer struct {
	o      Options
	out    *Deployment
	alias  [][]string
	store  [][]string
	pool   []*rsa.PrivateKey
	serial int64
	err    error
}

func (w *writer) fail(err error) {
	if w.err == nil {
		w.err = err
	}
}

func uuid() string {
	var b [16]byte
	rand.Read(b[:])
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Write makes a deployment in a directory.
func Write(dir string, o Options) (*Deployment, error) {
	if o.Pool == 0 {
		o.Pool = 8
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	o.Now = o.Now.UTC().Truncate(time.Second)
	w := &writer{o: o, out: &Deployment{Dir: dir, Random: make(map[uint32][32]byte)}}
	w.pool = make([]*rsa.PrivateKey, o.Pool+8) // the last ones are of root and module keys
	var group sync.WaitGroup
	for i := range w.pool {
		group.Go(func() {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				panic(err)
			}
			w.pool[i] = key
		})
	}
	group.Wait()
	w.hierarchy()
	if w.err != nil {
		return nil, w.err
	}
	return w.out, nil
}

func (w *writer) moduleKey() *rsa.PrivateKey {
	key := w.pool[len(w.pool)-1]
	w.pool = w.pool[:len(w.pool)-1]
	return key
}

// make certifies a key. Half of the serial numbers are negative, as MOSIP's are.
func (w *writer) certify(g *generation, issuer *generation) {
	w.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(w.serial<<32 + 0x7000000000000000), NotBefore: g.created, NotAfter: g.expires, BasicConstraintsValid: true,
		Subject: pkix.Name{Country: []string{"IN"}, Organization: []string{"IITB"}, OrganizationalUnit: []string{"MOSIP-TECH-CENTER"}, CommonName: strings.Trim(g.app+"-"+g.ref, "-")},
	}
	switch {
	case g.app == "ROOT":
		template.IsCA, template.MaxPathLen, template.KeyUsage = true, 2, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	case g.ref == "" || strings.HasSuffix(g.ref, "SIGN"):
		template.IsCA, template.MaxPathLen, template.KeyUsage = true, 1, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	default:
		template.KeyUsage = x509.KeyUsageKeyEncipherment
	}
	parent, signer := template, g.key
	if issuer != nil {
		parent, signer = issuer.parsed, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, g.key.Public(), signer)
	if err == nil && w.serial%2 == 0 {
		der, err = negate(der, signer)
	}
	if err == nil {
		g.parsed, err = packet.ParseCertificate(der)
	}
	if err != nil {
		w.fail(err)
		return
	}
	g.certificate = der
}

// negate makes the serial number of a certificate negative and signs it again, by RSA.
func negate(der []byte, signer crypto.Signer) ([]byte, error) {
	key, ok := signer.(*rsa.PrivateKey)
	if !ok {
		return der, nil
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	out := append([]byte(nil), der...)
	serial := c.SerialNumber.Bytes()
	at := strings.Index(string(out), string(serial))
	out[at] |= 0x80
	tbs := out[strings.Index(string(der), string(c.RawTBSCertificate)):][:len(c.RawTBSCertificate)]
	sum := sha256.Sum256(tbs)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, sum[:])
	if err != nil {
		return nil, err
	}
	copy(out[len(out)-len(signature):], signature)
	return out, nil
}

func (w *writer) newGeneration(app, ref string, created time.Time, days int, key crypto.Signer, issuer *generation) *generation {
	g := &generation{alias: uuid(), app: app, ref: ref, created: created, expires: created.AddDate(0, 0, days), key: key}
	w.certify(g, issuer)
	w.out.Generations++
	return g
}

const stamp = "2006-01-02 15:04:05.000000"

// addAlias adds the row of key_alias.
func (w *writer) addAlias(g *generation) {
	thumbprint, unique := "", ""
	if g.certificate != nil {
		thumbprint = packet.ThumbprintText(sha256.Sum256(g.certificate))
		unique = packet.UniqueIdentifier(g.app, g.ref, g.created)
		if g.key == nil {
			unique = packet.UniqueIdentifierOf(g.app, g.ref, sha256.Sum256(g.certificate))
		}
	}
	w.alias = append(w.alias, []string{g.alias, g.app, g.ref, g.created.Format(stamp), g.expires.Format(stamp), "", "", thumbprint, unique, "system", g.created.Format(stamp), "", "", "f", ""})
}

// addStored adds the row of key_store: wrapped by a module key, or NA.
func (w *writer) addStored(g *generation, module *generation) {
	master, private := g.alias, "NA"
	if module != nil {
		pkcs8, err := x509.MarshalPKCS8PrivateKey(g.key)
		if err != nil {
			w.fail(err)
			return
		}
		wrapped, err := packet.WrapPrivateKey(&module.key.(*rsa.PrivateKey).PublicKey, pkcs8)
		if err != nil {
			w.fail(err)
			return
		}
		master, private = module.alias, base64.RawURLEncoding.EncodeToString(wrapped)
	}
	w.store = append(w.store, []string{g.alias, master, private, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.certificate})), "system", g.created.Format(stamp)})
}

func (w *writer) entry(g *generation) {
	w.addAlias(g)
	w.out.Entries = append(w.out.Entries, Entry{Alias: g.alias, Key: g.key, Certificate: g.certificate})
}

func (w *writer) sample(g *generation, version int) {
	plain := fmt.Appendf(nil, "secret of %s/%s, generation %d", g.app, g.ref, version)
	payload, err := packet.EncryptPayload(g.parsed, plain, packet.Options{})
	if err != nil {
		w.fail(err)
		return
	}
	w.out.Samples = append(w.out.Samples, Sample{g.app, g.ref, version, plain, payload})
}

// hierarchy makes everything and writes it.
func (w *writer) hierarchy() {
	now := w.o.Now
	ago := func(days int) time.Time { return now.AddDate(0, 0, -days) }
	root := w.newGeneration("ROOT", "", ago(1500), 2920, w.moduleKey(), nil)
	w.out.Root = root.parsed
	w.entry(root)
	// A module key of three generations, of which two are over: base keys of all three are there.
	var registration []*generation
	for _, age := range []int{2300, 1200, 100} {
		g := w.newGeneration("REGISTRATION", "", ago(age), 1095, w.moduleKey(), root)
		w.entry(g)
		registration = append(registration, g)
	}
	kernel := w.newGeneration("KERNEL", "", ago(400), 1095, w.moduleKey(), root)
	w.entry(kernel)
	w.entry(w.newGeneration("KERNEL", "SIGN", ago(400), 1095, w.moduleKey(), root))
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.fail(err)
		return
	}
	w.entry(w.newGeneration("KERNEL", "EC_SECP256R1_SIGN", ago(300), 1095, ec, root))
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		w.fail(err)
		return
	}
	edwards := w.newGeneration("KERNEL", "ED25519_SIGN", ago(300), 1095, ed, kernel)
	w.addAlias(edwards)
	w.addStored(edwards, kernel)
	rand.Read(w.out.IdentityCache[:])
	cache := &generation{alias: uuid(), app: "KERNEL", ref: "IDENTITY_CACHE", created: ago(400), expires: ago(400).AddDate(0, 0, 1825)}
	w.addAlias(cache)
	w.out.Entries = append(w.out.Entries, Entry{Alias: cache.alias, Secret: w.out.IdentityCache[:]})
	w.out.Generations++
	w.out.Keys = 7 // so far

	for i := range w.o.BaseKeys {
		ref := fmt.Sprintf("10001_%d", 100000+i)
		ages, modules := []int{30 + i%60}, registration[2:]
		switch i % 3 {
		case 1:
			ages, modules = []int{900 + i%100, 40 + i%50}, registration[1:]
		case 2:
			ages, modules = []int{2000, 1000, 20}, registration
		}
		for n, age := range ages {
			g := w.newGeneration("REGISTRATION", ref, ago(age), 730, w.pool[(i+n)%w.o.Pool], modules[n])
			w.addAlias(g)
			w.addStored(g, modules[n])
			if i < 12 {
				w.sample(g, n+1)
			}
			if w.err != nil {
				return
			}
		}
		w.out.Keys++
	}
	odd := w.newGeneration("REGISTRATION", "centre 7 / Zürich", ago(10), 730, w.pool[0], registration[2])
	w.addAlias(odd)
	w.addStored(odd, registration[2])
	w.sample(odd, 1)
	w.out.Keys++
	for i := range w.o.Foreign {
		g := w.newGeneration("PARTNER", fmt.Sprintf("partner-%d", i), ago(50), 365, w.pool[i%w.o.Pool], nil)
		g.key = nil
		w.addAlias(g)
		w.addStored(g, nil)
		w.out.Keys++
	}
	if w.o.Broken {
		w.broken(registration[2])
	}
	if w.err == nil {
		w.fail(w.write(root))
	}
}

// broken adds rows that cannot be imported: ten of them.
func (w *writer) broken(module *generation) {
	at := w.o.Now.AddDate(0, 0, -5)
	add := func(ref string) *generation {
		g := w.newGeneration("REGISTRATION", ref, at, 730, w.pool[1], module)
		w.out.Generations--
		w.addAlias(g)
		w.addStored(g, module)
		return g
	}
	last := func(rows [][]string) []string { return rows[len(rows)-1] }
	add("broken-base64")
	last(w.store)[2] = "this is no base64!"
	add("broken-blob")
	last(w.store)[2] = "VGhpcyBpcyBubyB3cmFwcGVkIGtleQ"
	add("broken-thumbprint")
	last(w.alias)[7] = strings.Repeat("A", 64)
	add("broken-module")
	last(w.store)[1] = uuid()
	add("broken-certificate")
	last(w.store)[3] = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	add("broken-time")
	last(w.alias)[4] = "tomorrow"
	add("broken-alias")
	w.alias = append(w.alias, last(w.alias)) // the second is the broken one
	add("broken-missing")
	w.store = w.store[:len(w.store)-1]
	add("broken-orphan")
	w.alias = w.alias[:len(w.alias)-1]
	add(strings.Repeat("long ", 30))
}

var columns = map[string][]string{
	"key_alias":             {"id", "app_id", "ref_id", "key_gen_dtimes", "key_expire_dtimes", "status_code", "lang_code", "cert_thumbprint", "uni_ident", "cr_by", "cr_dtimes", "upd_by", "upd_dtimes", "is_deleted", "del_dtimes"},
	"key_store":             {"id", "master_key", "private_key", "certificate_data", "cr_by", "cr_dtimes"},
	"key_policy_def":        {"app_id", "key_validity_duration", "is_active", "pre_expire_days", "access_allowed"},
	"ca_cert_store":         {"cert_id", "cert_subject", "cert_issuer", "cert_data", "cert_thumbprint", "partner_domain", "is_deleted"},
	"data_encrypt_keystore": {"id", "key", "key_status", "cr_by"},
}

func (w *writer) write(root *generation) error {
	tables := map[string][][]string{"key_alias": w.alias, "key_store": w.store}
	tables["key_policy_def"] = [][]string{{"ROOT", "2920", "t", "1125", "NA"}, {"BASE", "730", "t", "30", "NA"}, {"REGISTRATION", "1095", "t", "60", "NA"},
		{"KERNEL", "1095", "t", "60", "NA"}, {"PARTNER", "1095", "f", "60", "NA"}}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.certificate})
	tables["ca_cert_store"] = [][]string{{uuid(), "CN=ROOT", "CN=ROOT", string(ca), "", "AUTH", "f"}, {uuid(), "CN=ROOT", "CN=ROOT", string(ca), "", "FTM", "t"}}
	for i := range w.o.Random {
		var random [32]byte
		rand.Read(random[:])
		wrapped, err := packet.WrapRandomKey(w.out.IdentityCache, random)
		if err != nil {
			return err
		}
		w.out.Random[uint32(i)] = random
		tables["data_encrypt_keystore"] = append(tables["data_encrypt_keystore"], []string{fmt.Sprint(i), base64.StdEncoding.EncodeToString(wrapped[:]), "Active", "system"})
	}
	if err := writeDump(filepath.Join(w.out.Dir, "dump.sql"), tables); err != nil {
		return err
	}
	for table, rows := range tables {
		if err := writeCSV(filepath.Join(w.out.Dir, table+".csv"), columns[table], rows); err != nil {
			return err
		}
	}
	var modules []byte
	for _, e := range w.out.Entries {
		if e.Certificate != nil {
			modules = append(modules, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate})...)
		}
	}
	if err := os.WriteFile(filepath.Join(w.out.Dir, "modules.pem"), modules, 0o600); err != nil {
		return err
	}
	if !w.o.NoStore {
		store, err := encodeStore(w.out.Entries, Password)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(w.out.Dir, "keystore.p12"), store, 0o600); err != nil {
			return err
		}
	}
	samples, err := json.MarshalIndent(w.out.Samples, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.out.Dir, "samples.json"), samples, 0o600)
}

var escapes = strings.NewReplacer("\\", `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`)

func writeDump(path string, tables map[string][][]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	fmt.Fprint(w, "--\n-- PostgreSQL database dump\n--\n\nSET client_encoding = 'UTF8';\n\nCREATE TABLE keymgr.key_alias (\n    id character varying(36) NOT NULL\n);\n\n")
	for table, names := range columns {
		fmt.Fprintf(w, "COPY keymgr.%s (%s) FROM stdin;\n", table, strings.Join(names, ", "))
		for _, row := range tables[table] {
			for i, cell := range row {
				if i > 0 {
					w.WriteByte('\t')
				}
				if cell == "" {
					w.WriteString(`\N`)
				} else {
					escapes.WriteString(w, cell)
				}
			}
			w.WriteByte('\n')
		}
		fmt.Fprint(w, "\\.\n\n\n")
	}
	fmt.Fprint(w, "COPY keymgr.licensekey_list (license_key) FROM stdin;\nABC\n\\.\n--\n-- PostgreSQL database dump complete\n--\n")
	if err := w.Flush(); err != nil {
		return err
	}
	return f.Close()
}

func writeCSV(path string, header []string, rows [][]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := csv.NewWriter(f)
	w.Write(header)
	w.WriteAll(rows)
	w.Flush()
	if err := w.Error(); err != nil {
		return err
	}
	return f.Close()
}

// Index makes the four bytes before an attribute of the zero-knowledge encryption.
func Index(i uint32) []byte { return binary.BigEndian.AppendUint32(nil, i) }

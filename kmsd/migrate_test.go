package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"path/filepath"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// TestMigrateLargeFrame brings in a key with as many generations as a key may have, in a frame that is larger than others may be, on the
// admin socket and on no other.
func TestMigrateLargeFrame(t *testing.T) {
	dir := t.TempDir()
	if run := runInitProgram(t, nil, "--state-dir", filepath.Join(dir, "s"), "--no-recovery", "--enclave", "keyring:file"); run.code != 0 {
		t.Fatalf("%+v", run)
	}
	d := startReal(t, dir)
	m := &proto.KeyMigrate{Name: "REGISTRATION/partner"}
	size := 0
	for i := range keyspec.MaxVersions {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(t, err)
		created := time.Now().AddDate(0, 0, i-keyspec.MaxVersions-2).Truncate(time.Second)
		template := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), NotBefore: created, NotAfter: created.AddDate(1, 0, 0), Subject: pkix.Name{CommonName: "a partner with a name of some length"}}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		must(t, err)
		size += len(der)
		m.Generations = append(m.Generations, proto.Generation{Created: created.Unix(), Expires: template.NotAfter.Unix(), Certificate: der})
	}
	if size <= proto.MaxControlFrame {
		t.Fatalf("%d bytes of certificates fit any frame", size)
	}
	var reply proto.KeyMigrateReply
	d.ask(proto.OpKeyMigrate, m, &reply)
	if reply.Outcome != "made" || reply.Key.Current != keyspec.MaxVersions || reply.Key.Origin != "foreign" || reply.Key.Algorithm != "ecdsa-p256" {
		t.Errorf("%+v", reply)
	}
	d = d.restart()
	d.ask(proto.OpKeyMigrate, m, &reply)
	if reply.Outcome != "present" {
		t.Errorf("%s after a restart", reply.Outcome)
	}
	m.Generations[0] = m.Generations[1]
	d.refused(proto.OpKeyMigrate, m, proto.CodeInvalid)
	d.conn.Close()
	d.conn = bound(t, d.app)
	m.Generations = m.Generations[:1]
	d.refused(proto.OpKeyMigrate, m, proto.CodeUnknownOp)
	d.refused(proto.OpKeyExportMOSIP, &proto.KeyExportMOSIP{Key: "REGISTRATION/partner"}, proto.CodeUnknownOp)
}

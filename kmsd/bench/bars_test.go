package bench

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/client/ciphertext"
	"github.com/kmsd-project/kmsd/ipc/proto"
	bolt "go.etcd.io/bbolt"
)

// row is one line of the table.
type row struct {
	what   string
	bar    string
	value  float64
	unit   string
	held   bool
	detail string
}

type table struct{ rows []row }

func (tb *table) atLeast(what string, value, bar float64, detail string) {
	tb.rows = append(tb.rows, row{what, fmt.Sprintf(">= %.2f", bar), value, "", value >= bar, detail})
}

func (tb *table) atMost(what string, value, bar float64, unit, detail string) {
	tb.rows = append(tb.rows, row{what, fmt.Sprintf("<= %.4g%s", bar, unit), value, unit, value <= bar, detail})
}

func (tb *table) print(w io.Writer) {
	fmt.Fprintf(w, "| what | bar | measured | held | detail |\n|---|---|---|---|---|\n")
	for _, r := range tb.rows {
		held := "yes"
		if !r.held {
			held = "NO"
		}
		fmt.Fprintf(w, "| %s | %s | %.3g%s | %s | %s |\n", r.what, r.bar, r.value, r.unit, held, r.detail)
	}
}

// TestBars measures every bar and prints the table. It never fails for a figure: a noisy machine is not a defect.
func TestBars(t *testing.T) {
	if !*bars {
		t.Skip("a measurement, not a test: run it with make bench")
	}
	var tb table
	d := startDaemon(t)
	c := d.dial(t)
	for _, part := range []struct {
		name    string
		measure func()
	}{
		{"footprint", func() { footprint(t, &tb, d) }},
		{"roundtrip", func() { roundTrip(t, &tb, c) }},
		{"signing", func() { signing(t, &tb, d, c) }},
		{"sealing", func() { sealing(t, &tb, d, c) }},
		{"creation", func() { creation(t, &tb, d, c) }},
		{"fairness", func() { fairness(t, &tb, d, c) }},
		{"bulk", func() {
			d := startDaemon(t) // the keys of creation are in the memory of the first one, as pages of its database
			bulkData(t, &tb, d, d.dial(t))
		}},
		{"scale", func() { scale(t, &tb) }},
		{"resident", func() { resident(t, &tb) }},
	} {
		if *only == "" || slices.Contains(strings.Split(*only, ","), part.name) {
			part.measure()
		}
	}
	fmt.Println()
	tb.print(os.Stdout)
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func create(t *testing.T, c *client.Client, k *proto.KeyCreate) {
	t.Helper()
	if err := c.Call(context.Background(), proto.OpKeyCreate, k, &proto.KeyInfo{}, nil); err != nil {
		t.Fatalf("create %s: %v", k.Name, err)
	}
}

// footprint: idle memory, size of the binary, start to the first signature.
func footprint(t *testing.T, tb *table, d *daemon) {
	c := d.dial(t)
	begin := time.Now()
	create(t, c, &proto.KeyCreate{Name: "bench/first", Algorithm: "ed25519"})
	sign(t, c, "bench/first", &proto.Sign{Key: "bench/first", Data: []byte("first")})
	tb.atMost("start to ready, create and first signature", (d.ready + time.Since(begin)).Seconds(), 0.1, " s", "includes the enclave")
	time.Sleep(3 * time.Second)
	tb.atMost("idle RSS", float64(d.memory("VmRSS"))/1e6, 20, " MB", fmt.Sprintf("anonymous %.1f MB", float64(d.memory("RssAnon"))/1e6))
	if st, err := os.Stat(filepath.Join(*bins, "kmsd")); err == nil {
		tb.atMost("size of the binary", float64(st.Size())/1e6, 20, " MB", "")
	}
}

func sign(t *testing.T, c *client.Client, key string, p *proto.Sign) []byte {
	t.Helper()
	var r proto.SignReply
	if err := c.Call(context.Background(), proto.OpSign, p, &r, nil); err != nil {
		t.Fatalf("sign with %s: %v", key, err)
	}
	return r.Signature
}

// p50 of one request after the other for the length of a slice.
func p50(f func()) float64 {
	var v []float64
	for end := time.Now().Add(*slice); time.Now().Before(end); {
		begin := time.Now()
		f()
		v = append(v, float64(time.Since(begin).Nanoseconds())/1e3)
	}
	return median(v)
}

func roundTrip(t *testing.T, tb *table, c *client.Client) {
	conn, err := net.Dial("unix", startEcho(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	buf := make([]byte, 64)
	bare := func() {
		conn.Write(buf)
		io.ReadFull(conn, buf)
	}
	ping := func() {
		if err := c.Call(context.Background(), proto.OpPing, &proto.Empty{}, &proto.Empty{}, nil); err != nil {
			t.Fatal(err)
		}
	}
	var ratio, e, p []float64
	for range *passes {
		be, bp := p50(bare), p50(ping)
		ratio, e, p = append(ratio, bp/be), append(e, be), append(p, bp)
	}
	tb.atMost("null op p50 / bare Go echo p50", median(ratio), 1.25, "", fmt.Sprintf("%.1f us / %.1f us", median(p), median(e)))
}

// load keeps n requests in flight for the length of a slice and returns how many were answered.
func load(n int, f func()) int64 {
	var done atomic.Int64
	var wg sync.WaitGroup
	end := time.Now().Add(*slice)
	for range n {
		wg.Go(func() {
			for time.Now().Before(end) {
				f()
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return done.Load()
}

// perOp returns the processor time of one operation with n in flight, in microseconds: of this process and of the daemon.
func perOp(d *daemon, n int, f func()) (own, theirs float64) {
	before, dc := ownCPU(), d.cpu()
	count := float64(load(n, f))
	return micro(ownCPU()-before) / count, micro(d.cpu()-dc) / count
}

func micro(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// efficiency is the processor time of f in process over that of remote on both sides. The former is measured before and
// after each pass of the latter.
func efficiency(d *daemon, inProcess, remote func()) (ratio float64, detail string) {
	var r, base, client, server []float64
	for range *passes {
		before, _ := perOp(d, 2, inProcess)
		own, theirs := perOp(d, 64, remote)
		after, _ := perOp(d, 2, inProcess)
		here := (before + after) / 2
		r, base = append(r, here/(own+theirs)), append(base, here)
		client, server = append(client, own), append(server, theirs)
	}
	return median(r), fmt.Sprintf("%.1f us in process; client %.1f us, daemon %.1f us", median(base), median(client), median(server))
}

func signing(t *testing.T, tb *table, d *daemon, c *client.Client) {
	digest := sha256.Sum256([]byte("bench"))
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	ec, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rs, _ := rsa.GenerateKey(rand.Reader, 2048)
	oaep, _ := rsa.EncryptOAEP(sha256.New(), rand.Reader, &rs.PublicKey, digest[:], nil)
	create(t, c, &proto.KeyCreate{Name: "bench/ed", Algorithm: "ed25519"})
	create(t, c, &proto.KeyCreate{Name: "bench/ec", Algorithm: "ecdsa-p256"})
	create(t, c, &proto.KeyCreate{Name: "bench/rsa", Algorithm: "rsa-2048"})
	create(t, c, &proto.KeyCreate{Name: "bench/oaep", Algorithm: "rsa-2048", Usage: []string{"encrypt", "decrypt"}})
	pub, err := c.Key(context.Background(), "bench/oaep")
	if err != nil {
		t.Fatal(err)
	}
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, pub.Public().(*rsa.PublicKey), digest[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	must := func(op string, p proto.Message, r proto.Message) {
		if err := c.Call(context.Background(), op, p, r, nil); err != nil {
			t.Error(op, err)
		}
	}
	measure := func(what string, bar float64, inProcess, remote func()) {
		r, detail := efficiency(d, inProcess, remote)
		tb.atLeast(what+", 64 in flight, CPU efficiency", r, bar, detail)
	}
	measure("Ed25519 sign", 0.75,
		func() { ed25519.Sign(ed, digest[:]) },
		func() { must(proto.OpSign, &proto.Sign{Key: "bench/ed", Data: digest[:]}, &proto.SignReply{}) })
	measure("P-256 sign", 0.75,
		func() { ecdsa.SignASN1(rand.Reader, ec, digest[:]) },
		func() { must(proto.OpSign, &proto.Sign{Key: "bench/ec", Digest: digest[:]}, &proto.SignReply{}) })
	measure("RSA-2048 PSS sign", 0.95,
		func() { rsa.SignPSS(rand.Reader, rs, crypto.SHA256, digest[:], nil) },
		func() { must(proto.OpSign, &proto.Sign{Key: "bench/rsa", Digest: digest[:]}, &proto.SignReply{}) })
	measure("RSA-2048 OAEP decrypt", 0.95,
		func() { rsa.DecryptOAEP(sha256.New(), nil, rs, oaep, nil) },
		func() {
			must(proto.OpDecrypt, &proto.Decrypt{Key: "bench/oaep", Ciphertext: block}, &proto.DecryptReply{})
		})
}

func sealing(t *testing.T, tb *table, d *daemon, c *client.Client) {
	create(t, c, &proto.KeyCreate{Name: "bench/aes", Algorithm: "aes-256-gcm"})
	data := make([]byte, 1024)
	for _, m := range []struct {
		what   string
		bar    float64
		params proto.Message
		reply  func() proto.Message
		op     string
	}{
		{"null op", 3, &proto.Empty{}, func() proto.Message { return &proto.Empty{} }, proto.OpPing},
		{"AES-256-GCM 1 KiB", 5, &proto.Encrypt{Key: "bench/aes", Data: data}, func() proto.Message { return &proto.EncryptReply{} }, proto.OpEncrypt},
	} {
		var both, client, server []float64
		for range *passes {
			own, theirs := perOp(d, 64, func() {
				if err := c.Call(context.Background(), m.op, m.params, m.reply(), nil); err != nil {
					t.Error(err)
				}
			})
			both, client, server = append(both, own+theirs), append(client, own), append(server, theirs)
		}
		tb.atMost(m.what+", 64 in flight, CPU both sides", median(both), m.bar, " us", fmt.Sprintf("client %.1f us, daemon %.1f us", median(client), median(server)))
	}
}

// creation compares durable key creation with bare commits of the storage engine on the same disk.
func creation(t *testing.T, tb *table, d *daemon, c *client.Client) {
	db, err := bolt.Open(filepath.Join(t.TempDir(), "bare.db"), 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var n atomic.Int64
	value := make([]byte, 600)
	commit := func() {
		err := db.Update(func(tx *bolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte("k"))
			if err != nil {
				return err
			}
			return b.Put(fmt.Appendf(nil, "%016d", n.Add(1)), value)
		})
		if err != nil {
			t.Error(err)
		}
	}
	key := func() {
		k := &proto.KeyCreate{Name: fmt.Sprintf("bench/made-%d", n.Add(1)), Algorithm: "ecdsa-p256"}
		if err := c.Call(context.Background(), proto.OpKeyCreate, k, &proto.KeyInfo{}, nil); err != nil {
			t.Error(err)
		}
	}
	// rate is per second; the processor time is that of both sides for one of them.
	rate := func(n int, f func()) (perSecond, cpu float64) {
		before, begin := ownCPU()+d.cpu(), time.Now()
		count := float64(load(n, f))
		return count / time.Since(begin).Seconds(), micro(ownCPU()+d.cpu()-before) / count
	}
	var bare, one, many, oneRatio, manyRatio, bareCPU, manyCPU []float64
	for range *passes {
		b1, c1 := rate(1, commit)
		o, _ := rate(1, key)
		b2, c2 := rate(1, commit)
		m, c := rate(64, key)
		b3, c3 := rate(1, commit)
		bare, one, many = append(bare, b1, b2, b3), append(one, o), append(many, m)
		oneRatio, manyRatio = append(oneRatio, o/((b1+b2)/2)), append(manyRatio, m/((b2+b3)/2))
		bareCPU, manyCPU = append(bareCPU, c1, c2, c3), append(manyCPU, c)
	}
	tb.atLeast("durable P-256 key creation, 1 in flight / bare commit", median(oneRatio), 0.5,
		fmt.Sprintf("%.0f per second, bare %.0f", median(one), median(bare)))
	tb.atLeast("durable P-256 key creation, 64 in flight / bare commit", median(manyRatio), 3.5,
		fmt.Sprintf("%.0f per second; CPU %.0f us each, bare %.0f us", median(many), median(manyCPU), median(bareCPU)))
}

// fairness: many connections do not collapse, and somebody who makes RSA keys does not stop somebody who signs.
func fairness(t *testing.T, tb *table, d *daemon, c *client.Client) {
	create(t, c, &proto.KeyCreate{Name: "bench/fair", Algorithm: "ed25519"})
	throughput := func(n int) float64 {
		clients := make([]*client.Client, n)
		for i := range clients {
			clients[i] = d.dial(t)
		}
		var done atomic.Int64
		var wg sync.WaitGroup
		end := time.Now().Add(*slice)
		for _, c := range clients {
			wg.Go(func() {
				for time.Now().Before(end) {
					if err := c.Call(context.Background(), proto.OpSign, &proto.Sign{Key: "bench/fair", Data: []byte("x")}, &proto.SignReply{}, nil); err == nil {
						done.Add(1)
					}
				}
			})
		}
		wg.Wait()
		for _, c := range clients {
			c.Close()
		}
		return float64(done.Load())
	}
	var ratio []float64
	for range *passes {
		eight := throughput(8)
		ratio = append(ratio, throughput(64)/eight)
	}
	tb.atLeast("Ed25519 sign, 64 clients / 8 clients", median(ratio), 0.9, "")

	p99 := func() float64 {
		var v []float64
		for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
			begin := time.Now()
			sign(t, c, "bench/fair", &proto.Sign{Key: "bench/fair", Data: []byte("x")})
			v = append(v, float64(time.Since(begin).Microseconds())/1e3)
		}
		slices.Sort(v)
		return v[len(v)*99/100]
	}
	alone := p99()
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var busy, made atomic.Int64
	for i := range 64 {
		a := d.dial(t)
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				err := a.Call(ctx, proto.OpKeyCreate, &proto.KeyCreate{Name: fmt.Sprintf("abuse/%d-%d", i, n), Algorithm: "rsa-2048"}, &proto.KeyInfo{}, nil)
				switch {
				case err == nil:
					made.Add(1)
				case errors.Is(err, client.ErrBusy):
					busy.Add(1)
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
	time.Sleep(200 * time.Millisecond)
	abused := p99()
	stop()
	wg.Wait()
	tb.atMost("p99 of a signature while 64 clients make RSA keys", abused, 20, " ms", fmt.Sprintf("alone %.2f ms; %d keys made, %d answered busy", alone, made.Load(), busy.Load()))
}

// bulkData compares large data through kmsd with AES-GCM in process, by one thread, over the same source and segments of
// the same size.
func bulkData(t *testing.T, tb *table, d *daemon, c *client.Client) {
	create(t, c, &proto.KeyCreate{Name: "bench/bulk", Algorithm: "aes-256-gcm"})
	key, err := c.Key(context.Background(), "bench/bulk")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := aes.NewCipher(make([]byte, 32))
	gcm, _ := cipher.NewGCM(block)
	source := make([]byte, 1<<20)
	out := make([]byte, 0, ciphertext.SealedSegmentSize)
	nonce := make([]byte, 12)
	inProcess := func() {
		for n := int64(0); n < *bulk; n += int64(len(source)) {
			for segment := range slices.Chunk(source, ciphertext.SegmentSize) {
				gcm.Seal(out, nonce, segment, nil)
			}
		}
	}
	feed := func(w io.WriteCloser, err error) {
		if err != nil {
			t.Fatal(err)
		}
		for n := int64(0); n < *bulk; n += int64(len(source)) {
			if _, err := w.Write(source); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// pass returns milliseconds for one MiB: the time, and the processor time of this process and of the daemon.
	pass := func(f func()) (wall, own, theirs float64) {
		begin, before, dc := time.Now(), ownCPU(), d.cpu()
		f()
		per := func(d time.Duration) float64 { return d.Seconds() * 1e3 / float64(*bulk>>20) }
		return per(time.Since(begin)), per(ownCPU() - before), per(d.cpu() - dc)
	}
	measure := func(what string, bar float64, f func()) {
		var ratio, efficiency, base, client, server []float64
		for range *passes {
			w1, c1, _ := pass(inProcess)
			w, own, theirs := pass(f)
			w2, c2, _ := pass(inProcess)
			ratio, efficiency = append(ratio, (w1+w2)/2/w), append(efficiency, (c1+c2)/2/(own+theirs))
			base, client, server = append(base, (c1+c2)/2), append(client, own), append(server, theirs)
		}
		tb.atLeast(what, median(ratio), bar, fmt.Sprintf("by processor time %.3g: %.2f ms per MiB in process, %.2f client and %.2f daemon",
			median(efficiency), median(base), median(client), median(server)))
	}
	size := fmt.Sprintf("bulk %d MiB by ", *bulk>>20)
	measure(size+"envelope / in-process AES-GCM", 0.95, func() { feed(key.EncryptEnvelope(context.Background(), io.Discard, nil)) })
	d.resetPeak()
	measure(size+"frames / in-process AES-GCM", 0.28, func() { feed(key.EncryptStream(context.Background(), io.Discard, nil)) })
	tb.atMost("daemon peak RSS during bulk by frames", float64(d.memory("VmHWM"))/1e6, 24, " MB", fmt.Sprintf("afterwards %.1f MB", float64(d.memory("VmRSS"))/1e6))
}

package ipc

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// FuzzFrames sends bytes to a server that echoes frames: the whole frames in front of the first bad one come back, and
// nothing else.
func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x01a\x00\x00\x00\x02bc"), uint16(3))
	f.Add([]byte("\x00\x00\x00\x00"), uint16(1))
	f.Add([]byte("\x00\x00\x00\x05abc"), uint16(0))
	f.Add([]byte("\xff\xff\xff\xffabc"), uint16(2))
	f.Add(append([]byte("\x00\x00\x50\x00"), make([]byte, 0x5000+3)...), uint16(0x4000))
	path := filepath.Join(f.TempDir(), "s")
	l, err := Listen(f.Context(), path, 0o600, -1)
	if err != nil {
		f.Fatal(err)
	}
	s := &Server{Handler: &echo{}, Limits: Limits{MaxConnsPerUID: 1 << 20, MaxConns: 1 << 20}}
	go s.Serve(f.Context(), l)
	f.Fuzz(func(t *testing.T, in []byte, cut uint16) {
		var want []byte
		for rest := in; len(rest) > lengthSize; {
			n := binary.BigEndian.Uint32(rest)
			if n == 0 || n > 1<<20+4096 || int(n) > len(rest)-lengthSize {
				break
			}
			whole := rest[:lengthSize+int(n)]
			if string(whole[lengthSize:]) == "quit" {
				break
			}
			want = append(want, whole...)
			rest = rest[len(whole):]
		}
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		go func() {
			at := min(int(cut), len(in))
			c.Write(in[:at])
			c.Write(in[at:])
			c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		// A server that hangs up on bytes it has not read makes the kernel report a reset, after what it has sent.
		if !bytes.Equal(got, want) {
			t.Fatalf("%d bytes came back, want %d; %v", len(got), len(want), err)
		}
	})
}

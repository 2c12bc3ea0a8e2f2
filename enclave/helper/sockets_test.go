package helper

import (
	"errors"
	"io"
	"os"
	"os/user"
	"strconv"
	"testing"
)

// Who answers is told by what the kernel attaches to each read, not by who made the socket.
func TestLinkReadsTheHelperOnly(t *testing.T) {
	me := uint32(os.Geteuid())
	for _, test := range []struct {
		senders []uint32
		want    error
	}{{[]uint32{me}, nil}, {[]uint32{me + 1, me}, nil}, {[]uint32{me + 1}, errSender}, {[]uint32{}, errSender}} {
		ours, theirs := connect(t)
		if err := passCredentials(ours); err != nil {
			t.Fatal(err)
		}
		l := &Link{conn: ours, senders: test.senders}
		theirs.Write([]byte("secret"))
		p := make([]byte, 100)
		n, err := l.Read(p)
		if !errors.Is(err, test.want) {
			t.Errorf("senders %v: %v", test.senders, err)
		}
		if test.want == nil && string(p[:n]) != "secret" || test.want != nil && string(p[:6]) == "secret" {
			t.Errorf("senders %v: read %q", test.senders, p[:6])
		}
		theirs.Close()
		if _, err := l.Read(p); err != io.EOF {
			t.Errorf("end of the connection: %v", err)
		}
		l.Close()
	}
}

func TestAllowUser(t *testing.T) {
	var s Server
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{me.Username, me.Uid} {
		if err := s.AllowUser(name); err != nil || strconv.Itoa(int(s.UIDs[len(s.UIDs)-1])) != me.Uid {
			t.Errorf("%q: %v, error %v", name, s.UIDs, err)
		}
	}
	for _, name := range []string{"", "no-such-user-of-kmsd", "-1", "99999999999"} {
		if err := s.AllowUser(name); err == nil {
			t.Errorf("%q is allowed", name)
		}
	}
}

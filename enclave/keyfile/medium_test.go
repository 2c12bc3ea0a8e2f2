package keyfile

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// insideEnv tells the part of the test that runs in a mount namespace of its own, where to work.
const insideEnv = "KMSD_KEYFILE_INSIDE"

// TestMedia mounts and pulls real file systems. It runs in a mount namespace of its own, so that nothing it mounts is seen outside or
// outlives it.
func TestMedia(t *testing.T) {
	if dir := os.Getenv(insideEnv); dir != "" {
		must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		t.Run("UUID", func(t *testing.T) { testUUID(t, newDesk(t, filepath.Join(dir, "uuid"))) })
		t.Run("FSID", func(t *testing.T) { testFSID(t, newDesk(t, filepath.Join(dir, "fsid"))) })
		t.Run("Writing", func(t *testing.T) { testWriting(t, newDesk(t, filepath.Join(dir, "writing"))) })
		return
	}
	asRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestMedia$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "--- PASS") != 4 {
		t.Fatalf("%v\n%s", err, out)
	}
}

// desk is where media are plugged in: a directory for mount points and one that plays udev's by-uuid.
type desk struct {
	t            *testing.T
	dir, uuids   string
	images, seen int
}

func newDesk(t *testing.T, dir string) *desk {
	d := &desk{t: t, dir: dir, uuids: filepath.Join(dir, "by-uuid")}
	must(t, os.MkdirAll(d.uuids, 0o755))
	return d
}

func (d *desk) open(path string) *Keyfile {
	k := open(d.t, path)
	k.system.uuids = d.uuids
	return k
}

// image makes a medium with an ext4 file system.
func (d *desk) image(uuid string) string {
	d.t.Helper()
	d.images++
	path := filepath.Join(d.dir, fmt.Sprintf("image%d", d.images))
	must(d.t, os.WriteFile(path, nil, 0o600))
	must(d.t, os.Truncate(path, 4<<20))
	d.run("mkfs.ext4", "-q", "-F", "-U", uuid, path)
	return path
}

func (d *desk) run(name string, arguments ...string) string {
	d.t.Helper()
	cmd := exec.Command(name, arguments...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s %q: %v\n%s", name, arguments, err, out)
	}
	return strings.TrimSpace(string(out))
}

// plug mounts a medium somewhere new and does what udev does. The result is where.
func (d *desk) plug(image, uuid string, options ...string) string {
	d.t.Helper()
	d.seen++
	point := filepath.Join(d.dir, fmt.Sprintf("run media %d", d.seen)) // with blanks, as the labels of sticks have them
	must(d.t, os.Mkdir(point, 0o755))
	d.mount(image, uuid, point, options...)
	return point
}

func (d *desk) mount(image, uuid, point string, options ...string) {
	d.t.Helper()
	d.run("mount", "-o", strings.Join(append([]string{"loop"}, options...), ","), image, point)
	d.t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) })
	if uuid != "" {
		device := d.run("findmnt", "-n", "-o", "SOURCE", "--target", point)
		must(d.t, os.Symlink(device, filepath.Join(d.uuids, uuid)))
	}
}

// pull is the orderly way: unmounted, then unplugged.
func (d *desk) pull(point, uuid string) {
	d.t.Helper()
	must(d.t, unix.Unmount(point, 0))
	if uuid != "" {
		remove(d.t, filepath.Join(d.uuids, uuid))
	}
}

func testUUID(t *testing.T, d *desk) {
	const uuid, otherUUID = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
	image, other := d.image(uuid), d.image(otherUUID)
	first := d.plug(image, uuid)
	must(t, os.Mkdir(filepath.Join(first, "keys"), 0o700))
	path := filepath.Join(first, "keys", "kmsd.key")
	k := d.open(path)
	b := wrap(t, k)
	if info := k.Info(); !strings.HasPrefix(info.Binding, "uuid:"+uuid+" ") || len(info.Warnings) != 0 {
		t.Errorf("info %+v", info)
	}
	expect(t, "enrolled", k, b, enclave.Ready, nil, "")

	d.pull(first, uuid)
	expect(t, "pulled", k, b, enclave.Absent, enclave.ErrAbsent, "not mounted")
	if h := d.open(path).Health(t.Context()); h.State != enclave.Absent { // with no slot known
		t.Errorf("pulled: %+v", h)
	}
	d.mount(other, otherUUID, first)
	expect(t, "another medium at the same place", k, b, enclave.Absent, enclave.ErrAbsent, "not mounted")
	second := d.plug(image, uuid)
	expect(t, "plugged in elsewhere", k, b, enclave.Ready, nil, "")
	fresh := d.open(path)
	must(t, fresh.Expect(b))
	expect(t, "after a restart", fresh, b, enclave.Ready, nil, "")

	// Nothing may be mounted on the way to the file.
	must(t, unix.Mount("between", filepath.Join(second, "keys"), "tmpfs", 0, ""))
	expect(t, "mounted over a directory", k, b, enclave.Misconfigured, enclave.ErrMisconfigured, "another file system")
	must(t, unix.Unmount(filepath.Join(second, "keys"), 0))

	// Pulled without being unmounted: the mount is still there, and the pages may still be in memory; the device is not.
	device, err := os.Readlink(filepath.Join(d.uuids, uuid))
	must(t, err)
	must(t, os.Rename(d.uuids, d.uuids+".away"))
	expect(t, "no udev", k, b, enclave.Absent, enclave.ErrAbsent, "without "+d.uuids)
	must(t, os.Rename(d.uuids+".away", d.uuids))
	remove(t, filepath.Join(d.uuids, uuid))
	expect(t, "pulled while mounted", k, b, enclave.Absent, enclave.ErrAbsent, "not mounted")
	must(t, os.Symlink(device, filepath.Join(d.uuids, uuid)))
	expect(t, "back again", k, b, enclave.Ready, nil, "")

	// Only a part of it is mounted, elsewhere, and the whole is hidden.
	part := filepath.Join(d.dir, "part")
	must(t, os.Mkdir(part, 0o755))
	must(t, unix.Mount(filepath.Join(second, "keys"), part, "", unix.MS_BIND, ""))
	must(t, unix.Mount("hidden", second, "tmpfs", 0, ""))
	expect(t, "part of it", k, b, enclave.Ready, nil, "")
	if b2 := wrap(t, d.open(filepath.Join(part, "kmsd.key"))); unwrap(t, k, b2) != nil {
		t.Error("enrolled through a part of the file system: does not open")
	}
	must(t, unix.Unmount(part, 0))
	expect(t, "hidden", k, b, enclave.Absent, enclave.ErrAbsent, "mounted")
	must(t, unix.Unmount(second, 0))
	expect(t, "no longer hidden", k, b, enclave.Ready, nil, "")

	// The medium is copied, and the copy is as good; the copy is wiped; the copy gets a keyfile of its own.
	d.pull(second, uuid)
	d.run("dd", "status=none", "if="+image, "of="+image+".copy")
	third := d.plug(image+".copy", uuid)
	expect(t, "copied", k, b, enclave.Ready, nil, "")
	remove(t, filepath.Join(third, "keys", "kmsd.key"))
	expect(t, "wiped", k, b, enclave.Replaced, enclave.ErrReplaced, "gone")
	wrap(t, d.open(filepath.Join(third, "keys", "kmsd.key")))
	expect(t, "exchanged", k, b, enclave.Replaced, enclave.ErrReplaced, "another keyfile")
}

// Without udev a file system is known by its number, which ext4 derives from its UUID and tmpfs makes up.
func testFSID(t *testing.T, d *desk) {
	image := d.image("11111111-2222-3333-4444-555555555555")
	first := d.plug(image, "")
	k := d.open(filepath.Join(first, "kmsd.key"))
	b := wrap(t, k)
	if info := k.Info(); !strings.HasPrefix(info.Binding, "fsid:") || len(info.Warnings) != 0 {
		t.Errorf("info %+v", info)
	}
	d.pull(first, "")
	expect(t, "pulled", k, b, enclave.Absent, enclave.ErrAbsent, "not mounted")
	d.plug(image, "")
	expect(t, "plugged in elsewhere", k, b, enclave.Ready, nil, "")

	point := filepath.Join(d.dir, "tmpfs")
	must(t, os.Mkdir(point, 0o755))
	must(t, unix.Mount("first", point, "tmpfs", 0, ""))
	k = d.open(filepath.Join(point, "kmsd.key"))
	b = wrap(t, k)
	if info := k.Info(); len(info.Warnings) != 1 || !strings.Contains(info.Warnings[0], "next time") {
		t.Errorf("info %+v", info)
	}
	expect(t, "tmpfs", k, b, enclave.Ready, nil, "")
	must(t, unix.Unmount(point, 0))
	must(t, unix.Mount("second", point, "tmpfs", 0, ""))
	expect(t, "another tmpfs", k, b, enclave.Absent, enclave.ErrAbsent, "not mounted")
}

func testWriting(t *testing.T, d *desk) {
	const uuid = "11111111-2222-3333-4444-555555555555"
	image := d.image(uuid)
	point := d.plug(image, uuid)
	k := d.open(filepath.Join(point, "kmsd.key"))
	b := wrap(t, k)
	d.pull(point, uuid)
	point = d.plug(image, uuid, "ro")
	expect(t, "read only", k, b, enclave.Ready, nil, "")
	for what, path := range map[string]string{
		"a read-only medium": filepath.Join(point, "another.key"),
		"a full medium":      filepath.Join(d.full(), "kmsd.key"),
	} {
		if _, err := d.open(path).Wrap(t.Context(), secret, aad); !errors.Is(err, enclave.ErrMisconfigured) {
			t.Errorf("enrolled on %s: %v", what, err)
		}
		left, err := os.ReadDir(filepath.Dir(path))
		must(t, err)
		for _, e := range left {
			if strings.Contains(e.Name(), "keyfile") {
				t.Errorf("%s: left %s", what, e.Name())
			}
		}
	}
}

func (d *desk) full() string {
	point := filepath.Join(d.dir, "full")
	must(d.t, os.Mkdir(point, 0o755))
	must(d.t, unix.Mount("full", point, "tmpfs", 0, "size=4k"))
	must(d.t, os.WriteFile(filepath.Join(point, "filler"), make([]byte, 4096), 0o600))
	return point
}

func TestParseMounts(t *testing.T) {
	all := parseMounts([]byte(`36 35 98:0 /mnt1 /mnt\0402\134x rw,noatime master:1 - ext3 /dev/root\0401 rw,errors=continue
28 27 0:25 / /mnt/no/options ro - tmpfs none ro
1 2 bad / / rw - ext4 /dev/x rw
1 2 0:4 net:[4026531840] /run/netns/a rw - nsfs nsfs rw
1 2 0:4 / relative rw - ext4 /dev/x rw
short line
`))
	want := []mount{
		{36, unix.Mkdev(98, 0), "/mnt1", `/mnt 2\x`, "ext3", "/dev/root 1"},
		{28, unix.Mkdev(0, 25), "/", "/mnt/no/options", "tmpfs", "none"},
	}
	if fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("%+v", all)
	}
	m := all[0]
	if !m.covers("/mnt1/a/b") || m.covers("/mnt1") || m.covers("/mnt12/a") || m.covers("/") {
		t.Error("covers")
	}
	if p := m.outside("/mnt1/a/b"); p != `/mnt 2\x/a/b` {
		t.Error(p)
	}
}

func FuzzMounts(f *testing.F) {
	f.Add([]byte(`36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`))
	f.Add([]byte(`36 35 98:0 \ \134\ rw - \0 \400`))
	if b, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, m := range parseMounts(b) {
			if !filepath.IsAbs(m.root) || !filepath.IsAbs(m.point) || m.kind == "" {
				t.Fatalf("%+v", m)
			}
			if m.covers("/a/b") && !strings.HasPrefix(m.outside("/a/b"), filepath.Clean(m.point)) {
				t.Fatalf("%+v leads to %s", m, m.outside("/a/b"))
			}
		}
	})
}

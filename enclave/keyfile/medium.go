package keyfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kmsd-project/kmsd/enclave"
)

// system is where the kernel and udev say what is mounted and who it is.
type system struct {
	mounts string // proc(5), mountinfo
	uuids  string // links from the UUID of a file system to its block device, made by udev
}

func theSystem() system {
	return system{mounts: "/proc/self/mountinfo", uuids: "/dev/disk/by-uuid"}
}

// found is a keyfile and where it was.
type found struct {
	content
	where    location
	warnings []string
}

// enrol returns the keyfile at path, and makes it if there is none.
func (s system) enrol(path string) (f found, err error) {
	m, where, err := s.locate(path)
	if err != nil {
		return f, err
	}
	f.where = where
	f.content, err = m.read(where.path)
	if errors.Is(err, enclave.ErrCorrupt) {
		return f, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "there is a file at " + path + " that is no keyfile", Remedy: "give another name"}
	}
	if errors.Is(err, fs.ErrNotExist) {
		c := newContent()
		defer c.wipe()
		if err = create(filepath.Dir(m.outside(where.path)), filepath.Base(where.path), &c); err == nil {
			f.content, err = m.read(where.path)
		}
		if err == nil && f.content != c {
			err = &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the medium does not return what was written", Remedy: "use another medium"}
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = errGone()
	}
	if err != nil {
		f.wipe()
		return f, err
	}
	if m.point == "/" {
		f.warnings = append(f.warnings, "the keyfile is on the root file system, which nobody takes away")
	}
	if strings.HasPrefix(where.identity, fsidPrefix) && !m.lasting() {
		f.warnings = append(f.warnings, "the "+m.kind+" file system shows no UUID here, and may not be known again when it is mounted the next time")
	}
	if !m.hasModes() {
		f.warnings = append(f.warnings, "the medium keeps no owners: every program that sees it can read the keyfile")
	}
	return f, nil
}

// look returns the keyfile at path, for a slot that is not known.
func (s system) look(path string) (f found, err error) {
	m, where, err := s.locate(path)
	if err != nil {
		return f, err
	}
	f.where = where
	f.content, err = m.read(where.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = &enclave.Error{Kind: enclave.ErrAbsent, Detail: "there is no keyfile at " + path, Remedy: remedyAbsent}
	}
	return f, err
}

// find returns the keyfile at a location, wherever its file system is mounted.
func (s system) find(where location) (f found, err error) {
	all, err := s.all()
	if err != nil {
		return f, err
	}
	there := false
	f.where = where
	for _, m := range all {
		if !m.covers(where.path) || !s.is(m, where.identity) {
			continue
		}
		f.content, err = m.read(where.path)
		if errors.Is(err, errHidden) {
			continue
		}
		there = true
		if !errors.Is(err, fs.ErrNotExist) { // the same file wherever it is seen
			return f, err
		}
	}
	if there {
		return f, errGone()
	}
	absent := &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the medium " + where.identity + " is not mounted", Remedy: remedyAbsent}
	if _, err := os.Stat(s.uuids); err != nil && strings.HasPrefix(where.identity, uuidPrefix) {
		absent.Detail += ", as far as one can tell without " + s.uuids
	}
	return f, absent
}

func errGone() error {
	return &enclave.Error{Kind: enclave.ErrReplaced, Detail: "the medium is there, but the keyfile on it is gone", Remedy: remedyLost}
}

// locate says which file system a path is on, and where on it.
func (s system) locate(path string) (mount, location, error) {
	absent := &enclave.Error{Kind: enclave.ErrAbsent, Detail: "there is no directory for " + path, Remedy: remedyAbsent}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path)) // the way to the medium may use links, the way on it not
	if err != nil {
		if err = fileError(err); errors.Is(err, fs.ErrNotExist) {
			err = absent
		}
		return mount{}, location{}, err
	}
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE|unix.STATX_MNT_ID, &stat); err != nil {
		return mount{}, location{}, fileError(err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return mount{}, location{}, absent
	}
	all, err := s.all()
	if err != nil {
		return mount{}, location{}, err
	}
	i := slices.IndexFunc(all, func(m mount) bool { return m.id == stat.Mnt_id })
	if i < 0 {
		return mount{}, location{}, absent
	}
	m := all[i]
	inside, err := filepath.Rel(m.point, filepath.Join(dir, filepath.Base(path)))
	if err != nil || !filepath.IsLocal(inside) {
		return mount{}, location{}, absent
	}
	where := location{path: filepath.Join(m.root, inside)}
	if where.identity = s.identity(m); where.identity == "" {
		return mount{}, location{}, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("the %s file system on %s has no identity to find it by", m.kind, m.point),
			Remedy: "use a medium with a file system that has a UUID"}
	}
	if !where.valid() {
		return mount{}, location{}, &enclave.Error{Kind: enclave.ErrUnsupported, Detail: fmt.Sprintf("keyfile %q", path)}
	}
	return m, where, nil
}

const (
	uuidPrefix = "uuid:"
	fsidPrefix = "fsid:"
)

// identity names a file system: by its UUID as udev shows it (a serial number for vfat), else by the number that statfs(2) gives, if
// it gives one. The latter is stable for ext4, xfs and btrfs, which derive it from their UUID; others make it up at each mount.
func (s system) identity(m mount) string {
	if device, ok := m.device(); ok {
		entries, err := os.ReadDir(s.uuids)
		if err == nil {
			for _, e := range entries {
				if d, ok := blockDevice(filepath.Join(s.uuids, e.Name())); ok && d == device {
					return uuidPrefix + e.Name()
				}
			}
		}
	}
	if id := m.fsid(); id != 0 {
		return fmt.Sprintf("%s%016x", fsidPrefix, id)
	}
	return ""
}

// is reports whether m is the file system of that identity. A UUID counts only while the device behind it is there.
func (s system) is(m mount, identity string) bool {
	if uuid, ok := strings.CutPrefix(identity, uuidPrefix); ok {
		if uuid == "" || strings.Contains(uuid, "/") {
			return false
		}
		wanted, ok := blockDevice(filepath.Join(s.uuids, uuid))
		if !ok {
			return false
		}
		device, ok := m.device()
		return ok && device == wanted
	}
	if text, ok := strings.CutPrefix(identity, fsidPrefix); ok && m.local() {
		id, err := strconv.ParseUint(text, 16, 64)
		return err == nil && id != 0 && m.fsid() == id
	}
	return false
}

// blockDevice returns the number of the block device at path.
func blockDevice(path string) (uint64, bool) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil || stat.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	return stat.Rdev, true
}

// maxMounts is how much of mountinfo is read, in bytes: some ten thousand mounts.
const maxMounts = 4 << 20

// all lists what is mounted.
func (s system) all() ([]mount, error) {
	file, err := os.Open(s.mounts)
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "cannot see what is mounted", Cause: err}
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxMounts))
	if err != nil {
		return nil, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "cannot see what is mounted", Cause: err}
	}
	return parseMounts(b), nil
}

// mount is one line of mountinfo.
type mount struct {
	id     uint64
	number uint64 // of the device, as st_dev
	root   string // what of the file system is mounted
	point  string // and where
	kind   string // ext4, vfat, ...
	source string // often a device
}

// parseMounts reads the lines of mountinfo, proc(5), and passes over what is none.
func parseMounts(b []byte) (all []mount) {
	for line := range bytes.Lines(b) {
		fields := strings.Fields(string(line))
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+3 {
			continue
		}
		id, err := strconv.ParseUint(fields[0], 10, 64)
		major, minor, ok := strings.Cut(fields[2], ":")
		ma, err1 := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		m := mount{id: id, number: unix.Mkdev(uint32(ma), uint32(mi)), root: unescape(fields[3]), point: unescape(fields[4]), kind: fields[dash+1], source: unescape(fields[dash+2])}
		if err != nil || err1 != nil || err2 != nil || !ok || !filepath.IsAbs(m.root) || !filepath.IsAbs(m.point) {
			continue // a root of another kind is no directory: nsfs, or one that was deleted
		}
		all = append(all, m)
	}
	return all
}

// unescape replaces the octal escapes of mountinfo: blank, tab, newline and backslash.
func unescape(s string) string {
	for i := strings.IndexByte(s, '\\'); i >= 0 && i+4 <= len(s); {
		if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
			s = s[:i] + string([]byte{byte(n)}) + s[i+4:]
		}
		next := strings.IndexByte(s[i+1:], '\\')
		if next < 0 {
			break
		}
		i += 1 + next
	}
	return s
}

// covers reports whether a path of the file system can be seen through this mount.
func (m mount) covers(path string) bool {
	inside, err := filepath.Rel(m.root, path)
	return err == nil && inside != "." && filepath.IsLocal(inside)
}

// outside is the path at which a path of the file system is seen.
func (m mount) outside(path string) string {
	return filepath.Join(m.point, strings.TrimPrefix(path, strings.TrimSuffix(m.root, "/")))
}

// errHidden says that a mount cannot be looked into.
var errHidden = &enclave.Error{Kind: enclave.ErrAbsent, Detail: "the medium is mounted, but something is mounted over it", Remedy: remedyAbsent}

// read reads the keyfile at a path of the file system.
func (m mount) read(path string) (content, error) {
	dir, err := os.OpenFile(m.point, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return content{}, errHidden // or in a directory that is closed to us
	}
	defer dir.Close()
	// Something else may have been mounted over it, and only what is on top is seen.
	var stat unix.Statx_t
	if err := unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &stat); err != nil {
		return content{}, fileError(err)
	}
	if stat.Mnt_id != m.id {
		return content{}, errHidden
	}
	inside, err := filepath.Rel(m.root, path)
	if err != nil {
		return content{}, fs.ErrNotExist
	}
	return read(dir, m.id, inside, m.hasModes())
}

// device returns the block device below the file system. btrfs and its like have a number of their own, so the source is asked first.
func (m mount) device() (uint64, bool) {
	if filepath.IsAbs(m.source) {
		if d, ok := blockDevice(m.source); ok {
			return d, true
		}
	}
	return m.number, unix.Major(m.number) != 0
}

// fsid is the number that statfs(2) gives, 0 for none.
func (m mount) fsid() uint64 {
	var stat unix.Statfs_t
	if !m.local() || unix.Statfs(m.point, &stat) != nil {
		return 0
	}
	return uint64(uint32(stat.Fsid.Val[0])) | uint64(uint32(stat.Fsid.Val[1]))<<32
}

// lasting reports whether the file system derives its fsid from its UUID.
func (m mount) lasting() bool {
	switch m.kind {
	case "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "erofs":
		return true
	}
	return false
}

// local reports whether asking the file system waits for nobody but this machine.
func (m mount) local() bool {
	switch m.kind {
	case "nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "glusterfs", "autofs", "fuse":
		return false
	}
	return !strings.HasPrefix(m.kind, "fuse.")
}

// hasModes reports whether the file system keeps owners and modes.
func (m mount) hasModes() bool {
	switch m.kind {
	case "vfat", "msdos", "exfat", "ntfs", "ntfs3", "fuseblk", "iso9660":
		return false
	}
	return true
}

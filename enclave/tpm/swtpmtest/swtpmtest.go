// Package swtpmtest runs software TPMs for the tests of those who use package tpm: each test its own, which it can switch off, clear and
// change behind the back of whoever uses it. It must not be imported outside tests.
package swtpmtest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// TPM is a software TPM, which runs from Start to Close.
type TPM struct {
	dir string
	cmd *exec.Cmd
}

// Start makes a new TPM and switches it on. A machine without swtpm is an error, which fails the test: nothing is skipped.
func Start() (*TPM, error) {
	dir, err := os.MkdirTemp("", "swtpm") // short, because a socket path has 108 bytes
	if err != nil {
		return nil, err
	}
	s := &TPM{dir: dir}
	if err := s.PowerOn(); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return s, nil
}

// Close switches the TPM off and removes its state.
func (s *TPM) Close() error {
	s.PowerOff()
	return os.RemoveAll(s.dir)
}

// Path is the path of the socket; unix:PATH is the name of the device for package tpm.
func (s *TPM) Path() string { return filepath.Join(s.dir, "sock") }

// PowerOn starts the TPM, which then wants TPM2_Startup.
func (s *TPM) PowerOn() error {
	os.Remove(s.Path())
	s.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.dir, "--flags", "not-need-init",
		"--server", "type=unixio,path="+s.Path()+",mode=0600", "--ctrl", "type=unixio,path="+s.Path()+".ctrl,mode=0600")
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("the tests need swtpm (make test-packages): %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("unix", s.Path())
		if err == nil {
			return conn.Close()
		}
		if time.Now().After(deadline) {
			s.PowerOff()
			return fmt.Errorf("swtpm does not start: %w", err)
		}
	}
}

// Replace puts another TPM in its place, which is off then.
func (s *TPM) Replace() error {
	s.PowerOff()
	state, err := filepath.Glob(filepath.Join(s.dir, "tpm2-*"))
	if err == nil && len(state) == 0 {
		err = fmt.Errorf("no state of swtpm in %s", s.dir)
	}
	for _, path := range state {
		if err == nil {
			err = os.Remove(path)
		}
	}
	return err
}

// PowerOff pulls the plug: no TPM2_Shutdown.
func (s *TPM) PowerOff() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// Freeze makes the TPM take commands and answer none, until Thaw or PowerOff.
func (s *TPM) Freeze() error { return s.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw ends Freeze.
func (s *TPM) Thaw() error { return s.cmd.Process.Signal(syscall.SIGCONT) }

// Clear makes it another TPM, as far as anybody can tell who sealed something in it (TPM2_Clear, TPM 2.0 part 3 section 24.6).
func (s *TPM) Clear() error { return s.send(0x126, 0x4000000a, nil) }

// SetOwnerPassword gives the owner hierarchy, which has none, a password (TPM2_HierarchyChangeAuth, section 24.8).
func (s *TPM) SetOwnerPassword(password string) error {
	return s.send(0x129, 0x40000001, append(binary.BigEndian.AppendUint16(nil, uint16(len(password))), password...))
}

// Extend changes a PCR of the SHA-256 bank (TPM2_PCR_Extend, section 22.2).
func (s *TPM) Extend(pcr uint32) error {
	return s.send(0x182, pcr, append([]byte{0, 0, 0, 1, 0, 0x0b}, make([]byte, 32)...))
}

// send sends one command on one handle that is authorised by an empty password. It waits until whoever uses the TPM has hung up.
func (s *TPM) send(code, handle uint32, parameters []byte) error {
	conn, err := net.Dial("unix", s.Path())
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	startup := []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x44, 0, 0}
	if _, err := roundTrip(conn, startup); err != nil {
		return err
	}
	command := []byte{0x80, 0x02, 0, 0, 0, 0}
	command = binary.BigEndian.AppendUint32(command, code)
	command = binary.BigEndian.AppendUint32(command, handle)
	command = append(command, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0) // TPM_RS_PW
	command = append(command, parameters...)
	binary.BigEndian.PutUint32(command[2:], uint32(len(command)))
	rc, err := roundTrip(conn, command)
	if err == nil && rc != 0 {
		err = fmt.Errorf("the TPM answers %#x", rc)
	}
	return err
}

// roundTrip returns the response code.
func roundTrip(conn net.Conn, command []byte) (uint32, error) {
	if _, err := conn.Write(command); err != nil {
		return 0, err
	}
	var header [10]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		return 0, err
	}
	if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(header[2:]))-10); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(header[6:]), nil
}

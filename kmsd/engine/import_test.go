package engine

import (
	"errors"
	"testing"
	"time"
)

// TestImportsAreShared: neither a process nor a user with many processes can have all the one-time keys there are.
func TestImportsAreShared(t *testing.T) {
	var i imports
	now := time.Now()
	begun := 0
	begin := func(uid uint32, pid int32) error {
		begun++
		return i.add(ImportToken{byte(begun), byte(begun >> 8)}, importKey{uid: uid, pid: pid, until: now.Add(importLife)}, now)
	}
	for n := range importsUID {
		if err := begin(1000, int32(1+n/importsEach)); err != nil {
			t.Fatalf("import %d: %v", n, err)
		}
	}
	if err := begin(1000, 9999); !errors.Is(err, ErrInput) {
		t.Errorf("one import too many of a user: %v", err)
	}
	for range importsEach {
		if err := begin(1001, 1); err != nil {
			t.Fatalf("another user: %v", err)
		}
	}
	if err := begin(1001, 1); !errors.Is(err, ErrInput) {
		t.Errorf("one import too many of a process: %v", err)
	}
	now = now.Add(importLife)
	if err := begin(1000, 1); err != nil {
		t.Errorf("after all are over: %v", err)
	}
}

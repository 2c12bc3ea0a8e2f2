package keystore

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/keystore/secmem"
)

// The tests run this binary again in other roles.
const (
	roleVariable = "KEYSTORE_TEST_ROLE"
	roleWriter   = "writer"   // changes the store in $1 until it is killed, or $2 operations, and says what was acknowledged; its counter shows $3
	roleExaminer = "examiner" // examines the stores named on standard input
	roleCheck    = "check"    // CheckMain
	roleMemory   = "memory"   // uses a guarded namespace
	roleFull     = "full"     // runs out of space for its files
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVariable) {
	case "":
		os.Exit(m.Run())
	case roleWriter:
		n, _ := strconv.Atoi(os.Args[2])
		count, _ := strconv.ParseUint(os.Args[3], 10, 64)
		writerMain(os.Args[1], n, printedCounter(count))
	case roleExaminer:
		examinerMain()
	case roleMemory:
		memoryMain(os.Args[1])
	case roleFull:
		fullMain(os.Args[1])
	case roleCheck:
		os.Exit(CheckMain(os.Args[1]))
	}
	os.Exit(0)
}

// scaled is how often a long test does its thing: full, or less of it with -short or under the race detector.
func scaled(full, short int) int {
	if testing.Short() || raceDetector {
		return short
	}
	return full
}

func runAs(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	return cmd
}

func childConfig(dir string) Config {
	arena, err := secmem.NewArena(4096)
	if err != nil {
		panic(err)
	}
	return Config{Dir: dir, Arena: arena, Now: func() time.Time { return testTime }}
}

// writerMain makes keys from several goroutines, so that commits share transactions, rotates and destroys some, and renews root and
// epoch now and then. After each it writes a line that says so.
func writerMain(dir string, limit int, counter *testCounter) {
	s, err := Open(context.Background(), childConfig(dir))
	if err == nil {
		err = s.UnlockWith(context.Background(), 1, testSecret(1), UnlockOptions{Counter: counter})
	}
	if err != nil {
		fmt.Println("failed", err)
		os.Exit(3)
	}
	if err := s.OpenNamespace("app0", fixedGuard().Key); err != nil {
		fmt.Println("failed", err)
		os.Exit(3)
	}
	start := int(s.Info().Keys)
	var mu sync.Mutex
	next, done := start, 0
	say := func(format string, args ...any) {
		os.Stdout.WriteString(fmt.Sprintf(format, args...) + "\n")
		mu.Lock()
		done++
		over := limit > 0 && done >= limit
		mu.Unlock()
		if over {
			s.Close()
			os.Exit(0)
		}
	}
	fail := func(err error) {
		switch {
		case errors.Is(err, ErrClosed):
			select {} // another one was the last and ends the process; this change was not made and must not be acknowledged
		case err != nil:
			fmt.Println("failed", err)
			os.Exit(3)
		}
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				name := fmt.Sprintf("app%d/key%d", i%3, i)
				// A key may be there already, from a run that was killed before it was acknowledged.
				err := s.Apply(context.Background(), Commit{
					Changes: []Change{testKey(name, keyspec.Ed25519, 32)}, Documents: []DocumentChange{testDocument("made", name)}, Audit: []byte(name),
				})
				if errors.Is(err, ErrExists) {
					continue
				}
				fail(err)
				say("create %s", name)
				if i%7 == 3 {
					// As an import does: many keys, and what is left of it, a document that changes each time.
					batch := fmt.Sprintf("app%d/batch%d", i%3, i)
					c := Commit{Audit: []byte(batch), Documents: []DocumentChange{testDocument("batch", batch)}}
					for _, k := range batchKeys(batch) {
						c.Changes = append(c.Changes, testKey(k, keyspec.Ed25519, 32))
					}
					progress, err := s.Document("import", "progress")
					if err != nil && !errors.Is(err, ErrNotFound) {
						fail(err)
					}
					progress.Kind, progress.Name = "import", "progress"
					progress.Data = append(progress.Data[:max(0, len(progress.Data)-2000)], batch...) // of a size that varies
					c.Documents = append(c.Documents, DocumentChange{Document: progress})
					switch err := s.Apply(context.Background(), c); {
					case err == nil:
						say("batch %s", batch)
					case !errors.Is(err, ErrConflict) && !errors.Is(err, ErrExists): // with another one's progress
						fail(err)
					}
				}
				if i%5 == 0 {
					k, err := s.Get(keyspec.Name(name))
					fail(err)
					k.Versions[0].State = keyspec.Deactivated
					k.Versions = append(k.Versions, Version{Number: 2, State: keyspec.Active})
					k.Current = 2
					fail(s.Apply(context.Background(), Commit{Changes: []Change{{
						Key: k, Material: map[keyspec.Version][]byte{2: testMaterial(name, 2, 32)}, Public: map[keyspec.Version]Public{2: testPublic(name, 2)},
					}}}))
					say("rotate %s", name)
				}
				if i%15 == 0 {
					k, err := s.Get(keyspec.Name(name))
					fail(err)
					k.Versions[0].State = keyspec.Destroyed
					d, err := s.Document("made", name)
					fail(err)
					fail(s.Apply(context.Background(), Commit{Changes: []Change{{Key: k}}, Documents: []DocumentChange{{Document: d, Delete: true, Bump: true}}}))
					say("destroy %s", name)
				}
				if i%25 == 10 {
					k, err := s.Get("app0")
					fail(err)
					n := k.Current + 1
					k.Versions[len(k.Versions)-1].State = keyspec.Deactivated
					k.Versions = append(k.Versions, Version{Number: n, State: keyspec.Active})
					k.Current = n
					err = s.Apply(context.Background(), Commit{Changes: []Change{{
						Key: k, Material: map[keyspec.Version][]byte{n: testMaterial("app0", n, 900)}, Public: map[keyspec.Version]Public{n: testPublic("app0", n)},
						Guard: fixedGuard(),
					}}})
					if !errors.Is(err, ErrConflict) { // another one did the same
						fail(err)
						say("wrap app0@%d", n)
					}
				}
				if i%40 == 20 {
					fail(s.RotateRoot(context.Background()))
				}
				if i%60 == 30 {
					fail(s.RotateEpoch(context.Background(), nil))
				}
			}
		})
	}
	wg.Wait()
}

// batchKeys are the keys that are made in one commit with the document that has the batch's name.
func batchKeys(batch string) (names []string) {
	for i := range 8 {
		names = append(names, fmt.Sprintf("%s-%d", batch, i))
	}
	return names
}

// together checks that what was committed together is there together: with each key the document that it was made with, unless both
// went, and with each batch all of its keys.
func together(s *Store) error {
	names := map[string]map[string]bool{}
	for _, kind := range []string{"made", "batch"} {
		names[kind] = map[string]bool{}
		for cursor, more := []byte(nil), true; more; more = cursor != nil {
			list, next, err := s.Documents(kind, cursor, 100)
			if err != nil {
				return err
			}
			for _, d := range list {
				if !bytes.Equal(d.Data, testData(kind, d.Name, 0)) {
					return fmt.Errorf("%w: %s", errWrongAnswer, d.label())
				}
				names[kind][d.Name] = true
			}
			cursor = next
		}
	}
	made, batched := 0, 0
	for cursor, more := []byte(nil), true; more; more = cursor != nil {
		keys, next, err := s.Page("", "", cursor, 1000)
		if err != nil {
			return err
		}
		for _, k := range keys {
			name := string(k.Name)
			batch, _, isBatch := strings.Cut(name, "-")
			switch {
			case isBatch && !names["batch"][batch]:
				return fmt.Errorf("%w: %s without its document", errWrongAnswer, name)
			case isBatch:
				batched++
			case strings.Contains(name, "/key") && names["made"][name] == (k.Versions[0].State == keyspec.Destroyed):
				return fmt.Errorf("%w: %s is %s, its document is there: %v", errWrongAnswer, name, k.Versions[0].State, names["made"][name])
			case names["made"][name]:
				made++
			}
		}
		cursor = next
	}
	if s.Info().Damaged > 0 {
		return ErrDamaged // the list left something out
	}
	if made != len(names["made"]) || batched != len(names["batch"])*len(batchKeys("")) {
		return fmt.Errorf("%w: %d documents of %d keys, %d batches with %d keys", errWrongAnswer, len(names["made"]), made, len(names["batch"]), batched)
	}
	return nil
}

// printedCounter is a counter that writes each new number to standard output, which is what makes the number hold.
func printedCounter(value uint64) *testCounter {
	c := &testCounter{value: value}
	c.after = func() error {
		_, err := fmt.Fprintf(os.Stdout, "%s%d\n", counterLine, c.value)
		return err
	}
	return c
}

// counterLine begins a line that says what the counter shows from then on.
const counterLine = "counter "

// lastCount is what the counter shows after these lines, if before them it showed count.
func lastCount(lines []string, count uint64) uint64 {
	for _, line := range lines {
		if text, ok := strings.CutPrefix(line, counterLine); ok {
			count, _ = strconv.ParseUint(text, 10, 64)
		}
	}
	return count
}

// acknowledged checks that everything in the list is in the store.
func acknowledged(s *Store, list []string) error {
	for _, line := range list {
		what, name, _ := strings.Cut(line, " ")
		if what+" " == counterLine {
			continue
		}
		if what == "wrap" {
			ref, _ := keyspec.ParseRef(name)
			k, err := s.Get(ref.Name)
			if err == nil {
				err = keyError(s, string(ref.Name), 900)
			}
			if err != nil || k.Current < ref.Version {
				return fmt.Errorf("%s: %v", line, err)
			}
			continue
		}
		if what == "batch" {
			for _, k := range batchKeys(name) {
				if err := keyError(s, k, 32); err != nil {
					return fmt.Errorf("%s: %w", line, err)
				}
			}
			if err := documentError(s, what, name); err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
			continue
		}
		if err := keyError(s, name, 32); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
		k, err := s.Get(keyspec.Name(name))
		if err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
		switch {
		case what == "rotate" && (k.Current != 2 || len(k.Versions) != 2):
			return fmt.Errorf("%s: lost", line)
		case what == "destroy":
			if _, err := s.Document("made", name); !errors.Is(err, ErrNotFound) {
				return fmt.Errorf("%s: its document: %v", line, err)
			}
			if _, err := s.Material(keyspec.Ref{Name: k.Name, Version: 1}, nil); !errors.Is(err, ErrNotFound) || k.Versions[0].State != keyspec.Destroyed {
				return fmt.Errorf("%s: lost", line)
			}
		}
	}
	return together(s)
}

// examinerMain reads "directory file-with-acknowledged-lines number-of-lines counter" and answers each with a line: "ok", "refused: reason",
// or "LOST: reason". It may use 512 MiB.
func examinerMain() {
	var path string
	in := bufio.NewScanner(os.Stdin)
	limited := false
	for in.Scan() {
		var dir, acks string
		var n int
		var count uint64
		fmt.Sscan(in.Text(), &dir, &acks, &n, &count)
		path = dir + "/" + databaseFile
		if !limited {
			if err := limitMemory(path); err != nil {
				fmt.Println("LOST:", err)
				return
			}
			limited = true // the time is per image, the parent watches it
		}
		fmt.Println(examine(dir, acks, n, count))
	}
}

func examine(dir, acks string, n int, count uint64) string {
	oneLine := func(err error) string { return strings.ReplaceAll(err.Error(), "\n", " ") }
	s, err := Open(context.Background(), childConfig(dir))
	if err != nil {
		return "refused: " + oneLine(err)
	}
	defer s.config.Arena.Close()
	defer s.Close()
	if err := s.UnlockWith(context.Background(), 1, testSecret(1), UnlockOptions{Counter: &testCounter{value: count}}); err != nil {
		return "refused: " + oneLine(err)
	}
	if err := s.OpenNamespace("app0", fixedGuard().Key); err != nil {
		return "LOST: " + oneLine(err)
	}
	b, err := os.ReadFile(acks)
	if err != nil {
		return "LOST: " + oneLine(err)
	}
	lines := strings.Split(string(bytes.TrimSpace(b)), "\n")
	if err := acknowledged(s, lines[:n]); err != nil {
		return "LOST: " + oneLine(err)
	}
	report, err := s.Verify(context.Background(), nil)
	if err != nil {
		return "LOST: " + oneLine(err)
	}
	if len(report.Damaged) > 0 {
		return fmt.Sprintf("LOST: damaged %v", report.Damaged[0])
	}
	if err := s.Apply(context.Background(), Commit{Changes: []Change{testKey("after/crash", keyspec.Ed25519, 32)}}); err != nil {
		return "LOST: cannot write: " + oneLine(err)
	}
	return "ok"
}

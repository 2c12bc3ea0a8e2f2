package recovery

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func mustSplit(t *testing.T, k, n int) (*Key, []*Share) {
	t.Helper()
	key, shares, err := Split(k, n)
	if err != nil {
		t.Fatal(err)
	}
	return key, shares
}

func same(a, b *Key) bool { return a.id == b.id && a.secret == b.secret }

// These texts were printed by the first release. They must be read for ever: somebody has them in a safe.
var golden = []struct{ text, meaning string }{
	{"K4939AR-YD0000T-23GV50T-TM4KTW0-D5V874S-4XNAVW1-9MEYXFR-W2844B1", "key 1234abcd 010e1b2835424f5c697683909daab7c4d1deebf8"},
	{"K6ASF69-B2000F4-3CHKD6N-S7YN3S3-GS996QH-AJ8KS96-VE4SXCA-YZSMCHE", "key 95979962 f1b23369b27f54798652935d5244f29db899eb3d"},
	{"S6ASF67-B2080Y9-E1VXPNT-QJ191XP-PBXVZY2-N7KXJW0-6189YM3-8NJNH1P", "share 95979962 1/2 e7077db56f20a43db2fbbffaa79f65c30509f511"},
	{"S6ASF67-B2081DE-VGXFS8Y-9W3BZHD-XRDWP2Z-53X73J2-3PD2TXF-JS08WZ3", "share 95979962 2/2 ddc3afca13c1aff1ee1bcb08a3e9c721d9a2d765"},
	{"S6ASF67-B2081W9-PXQ12VH-79WQXNR-VASEFBC-TP69874-YS1JS56-4Y6XE2V", "share 95979962 3/2 cb76e116ce9e5fb5dab2e7af5632507f6432c949"},
}

func TestFieldAgreesWithItsDefinition(t *testing.T) {
	// The schoolbook product, then reduction by the polynomial: another algorithm than the one under test.
	product := func(a, b byte) byte {
		var p uint16
		for i := range 8 {
			if b>>i&1 == 1 {
				p ^= uint16(a) << i
			}
		}
		for i := 15; i >= 8; i-- {
			if p>>i&1 == 1 {
				p ^= 0x11b << (i - 8)
			}
		}
		return byte(p)
	}
	for a := range 256 {
		for b := range 256 {
			if got, want := multiply(byte(a), byte(b)), product(byte(a), byte(b)); got != want {
				t.Fatalf("%#x * %#x = %#x, want %#x", a, b, got, want)
			}
		}
		if a != 0 && multiply(byte(a), invert(byte(a))) != 1 {
			t.Fatalf("1/%#x = %#x", a, invert(byte(a)))
		}
	}
	if multiply(0x57, 0x83) != 0xc1 { // the example of FIPS 197 section 4.2
		t.Fatal("not the field of FIPS 197")
	}
}

func TestKeyRoundTrip(t *testing.T) {
	seen := map[string]bool{}
	for range 200 {
		k := NewKey()
		text := k.Text()
		if len(text) != textSize || text[0] != 'K' || bytes.Count(text, []byte("-")) != groups-1 {
			t.Fatalf("printed form %q", text)
		}
		if seen[string(text)] {
			t.Fatal("the same key twice")
		}
		seen[string(text)] = true
		back, err := ParseKey(text)
		if err != nil || !same(k, back) {
			t.Fatalf("%q reads as %v, %v", text, back, err)
		}
	}
}

func TestTypingStyleDoesNotMatter(t *testing.T) {
	k := NewKey()
	text := string(k.Text())
	look := strings.NewReplacer("0", "O", "1", "l")
	for _, typed := range []string{
		strings.ToLower(text),
		strings.ReplaceAll(text, "-", ""),
		strings.ReplaceAll(text, "-", " "),
		"\n " + strings.ReplaceAll(text, "-", "\r\n") + "\t\n",
		strings.Join(strings.Split(text, ""), " "),
		look.Replace(text),
		strings.ToLower(look.Replace(text)),
		strings.ReplaceAll(text, "1", "I"),
	} {
		back, err := ParseKey([]byte(typed))
		if err != nil || !same(k, back) {
			t.Errorf("%q: %v", typed, err)
		}
	}
}

// Every wrong character, every swap inside a group and every swap of groups is found, and the error names a group that is wrong.
func TestTypingErrorNamesItsGroup(t *testing.T) {
	text := NewKey().Text()
	check := func(typed []byte, wrong ...int) {
		t.Helper()
		_, err := ParseKey(typed)
		if !errors.Is(err, ErrText) {
			t.Fatalf("%q was read for %q: %v", typed, text, err)
		}
		for _, g := range wrong {
			if strings.Contains(err.Error(), fmt.Sprintf("group %d of 8", g+1)) {
				return
			}
		}
		t.Fatalf("%q for %q: %q names none of the groups %v", typed, text, err, wrong)
	}
	for i, right := range text {
		if right == '-' {
			continue
		}
		g := i / (groupSize + 1)
		for _, wrong := range []byte(alphabet) {
			if wrong != right {
				typed := bytes.Clone(text)
				typed[i] = wrong
				check(typed, g)
			}
		}
		typed := bytes.Clone(text)
		typed[i] = 'U' // never used
		check(typed, g)
		check(append(bytes.Clone(text[:i]), text[i+1:]...), g) // left out
		for j := i + 1; j < len(text) && text[j] != '-'; j++ {
			if text[j] != right {
				typed := bytes.Clone(text)
				typed[i], typed[j] = typed[j], typed[i]
				check(typed, g)
			}
		}
	}
	for a := range groups {
		for b := range a {
			typed := bytes.Split(bytes.Clone(text), []byte("-"))
			if bytes.Equal(typed[a], typed[b]) {
				continue
			}
			typed[a], typed[b] = typed[b], typed[a]
			check(bytes.Join(typed, []byte("-")), a, b)
		}
	}
}

func TestWrongLengths(t *testing.T) {
	text := NewKey().Text()
	for _, typed := range [][]byte{nil, []byte("K"), text[:len(text)-8], append(bytes.Clone(text), text...), bytes.Repeat([]byte(" "), maxText+1), bytes.Repeat([]byte("0"), maxText)} {
		if _, err := ParseKey(typed); !errors.Is(err, ErrText) {
			t.Errorf("%q: %v", typed, err)
		}
	}
}

// The groups can all be right and the text still wrong; that is what the checksum over all of them is for.
func TestChecksumOverAllGroups(t *testing.T) {
	a := bytes.Split(NewKey().Text(), []byte("-"))
	b := bytes.Split(NewKey().Text(), []byte("-"))
	a[3] = b[3]
	if _, err := ParseKey(bytes.Join(a, []byte("-"))); !errors.Is(err, ErrText) {
		t.Fatalf("groups of two keys were read as one: %v", err)
	}
}

func TestKeyAndShareAreToldApart(t *testing.T) {
	key, shares := mustSplit(t, 2, 3)
	if _, err := ParseKey(shares[0].Text()); !errors.Is(err, ErrText) || !strings.Contains(err.Error(), "share") {
		t.Errorf("a share as a key: %v", err)
	}
	if _, err := ParseShare(key.Text()); !errors.Is(err, ErrText) || !strings.Contains(err.Error(), "whole key") {
		t.Errorf("a key as a share: %v", err)
	}
	if shares[0].Text()[0] != 'S' {
		t.Errorf("a share begins with %c", shares[0].Text()[0])
	}
}

func TestAnyThresholdSharesMakeTheKey(t *testing.T) {
	for _, g := range []struct{ k, n int }{{2, 2}, {2, 3}, {3, 5}, {5, 5}, {4, 6}} {
		key, shares := mustSplit(t, g.k, g.n)
		for set := range 1 << g.n {
			var chosen []*Share
			for i, s := range shares {
				if set>>i&1 == 1 {
					read, err := ParseShare(s.Text())
					if err != nil {
						t.Fatal(err)
					}
					chosen = append(chosen, read)
				}
			}
			got, err := Combine(chosen)
			if len(chosen) < g.k {
				if !errors.Is(err, ErrTooFew) {
					t.Fatalf("%d of %d with %d shares: %v", g.k, g.n, len(chosen), err)
				}
				continue
			}
			if err != nil || !same(key, got) {
				t.Fatalf("%d of %d with set %b: %v", g.k, g.n, set, err)
			}
		}
	}
}

// With one share fewer than the threshold every key is as likely as every other: for each value the secret byte could have there is a
// missing share that makes it so.
func TestOneShareFewerTellsNothing(t *testing.T) {
	_, shares := mustSplit(t, 3, 3)
	possible := map[byte]bool{}
	for missing := range 256 {
		forged := *shares[2]
		forged.value[0] = byte(missing)
		k, err := Combine([]*Share{shares[0], shares[1], &forged})
		if err != nil {
			t.Fatal(err)
		}
		possible[k.secret[0]] = true
	}
	if len(possible) != 256 {
		t.Fatalf("two of three shares leave only %d values of the first byte", len(possible))
	}
}

func TestWrongShares(t *testing.T) {
	_, a := mustSplit(t, 2, 3)
	_, b := mustSplit(t, 2, 3)
	if _, err := Combine([]*Share{a[0], b[1]}); !errors.Is(err, ErrShares) {
		t.Errorf("shares of two sets: %v", err)
	}
	if _, err := Combine([]*Share{a[0], a[0]}); !errors.Is(err, ErrShares) {
		t.Errorf("one share twice: %v", err)
	}
	if _, err := Combine([]*Share{a[0], a[1], a[1]}); !errors.Is(err, ErrShares) {
		t.Errorf("one share twice among enough: %v", err)
	}
	other := *a[1]
	other.threshold = 3
	if _, err := Combine([]*Share{a[0], &other}); !errors.Is(err, ErrShares) {
		t.Errorf("shares with two thresholds: %v", err)
	}
	if _, err := Combine(nil); !errors.Is(err, ErrTooFew) {
		t.Errorf("no shares: %v", err)
	}
}

func TestGeometry(t *testing.T) {
	for _, g := range []struct{ k, n int }{{0, 0}, {1, 1}, {1, 3}, {3, 2}, {2, MaxShares + 1}, {-1, 5}, {2, -1}} {
		if _, _, err := Split(g.k, g.n); !errors.Is(err, ErrGeometry) {
			t.Errorf("%d of %d: %v", g.k, g.n, err)
		}
	}
	key, shares := mustSplit(t, MaxShares, MaxShares)
	if got, err := Combine(shares); err != nil || !same(key, got) {
		t.Errorf("%d of %d: %v", MaxShares, MaxShares, err)
	}
}

func TestSecretsAreNotFormatted(t *testing.T) {
	key, shares := mustSplit(t, 2, 2)
	text, share := string(key.Text()), string(shares[0].Text())
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%x", "%q"} {
		for _, s := range []string{fmt.Sprintf(verb, key), fmt.Sprintf(verb, *key), fmt.Sprintf(verb, shares[0]), fmt.Sprintf(verb, shares)} {
			if strings.Contains(s, text) || strings.Contains(s, share) || strings.Contains(s, fmt.Sprintf("%x", key.secret)) ||
				strings.Contains(s, fmt.Sprintf("%d", key.secret)) || strings.Contains(s, fmt.Sprintf("%d", shares[0].value)) ||
				strings.Contains(s, fmt.Sprintf("%x", shares[0].value)) {
				t.Errorf("%s shows the secret: %s", verb, s)
			}
		}
	}
}

func TestGoldenTexts(t *testing.T) {
	for _, g := range golden {
		var got string
		if g.text[0] == 'K' {
			k, err := ParseKey([]byte(g.text))
			if err != nil {
				t.Errorf("%s: %v", g.text, err)
				continue
			}
			got = fmt.Sprintf("key %x %x", k.id, k.secret[:])
			if string(k.Text()) != g.text {
				t.Errorf("%s prints as %s", g.text, k.Text())
			}
		} else {
			s, err := ParseShare([]byte(g.text))
			if err != nil {
				t.Errorf("%s: %v", g.text, err)
				continue
			}
			got = fmt.Sprintf("share %x %d/%d %x", s.id, s.index, s.threshold, s.value[:])
			if string(s.Text()) != g.text {
				t.Errorf("%s prints as %s", g.text, s.Text())
			}
		}
		if got != g.meaning {
			t.Errorf("%s means %q, want %q", g.text, got, g.meaning)
		}
	}
}

// The shares above make the second key above, and shall do so for ever.
func TestGoldenShares(t *testing.T) {
	want, err := ParseKey([]byte(golden[1].text))
	if err != nil {
		t.Fatal(err)
	}
	var shares []*Share
	for _, g := range golden[2:] {
		s, err := ParseShare([]byte(g.text))
		if err != nil {
			t.Fatal(err)
		}
		shares = append(shares, s)
	}
	for i := range shares {
		got, err := Combine([]*Share{shares[i], shares[(i+1)%3]})
		if err != nil || !same(want, got) {
			t.Errorf("shares %d and %d: %v", i+1, (i+1)%3+1, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, g := range golden {
		f.Add([]byte(g.text))
		f.Add([]byte(strings.ToLower(strings.ReplaceAll(g.text, "-", ""))))
	}
	f.Add([]byte("-------"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if k, err := ParseKey(text); err == nil {
			if back, err := ParseKey(k.Text()); err != nil || !same(k, back) {
				t.Fatalf("%q reads as a key that prints as something else", text)
			}
		} else if !errors.Is(err, ErrText) {
			t.Fatalf("%q: %v", text, err)
		}
		if s, err := ParseShare(text); err == nil {
			if back, err := ParseShare(s.Text()); err != nil || *back != *s {
				t.Fatalf("%q reads as a share that prints as something else", text)
			}
		} else if !errors.Is(err, ErrText) {
			t.Fatalf("%q: %v", text, err)
		}
	})
}

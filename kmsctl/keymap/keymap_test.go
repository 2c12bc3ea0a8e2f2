package keymap

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func days(n int) time.Time { return now.AddDate(0, 0, n) }

// deployment returns the keys of an identity system with n base keys.
func deployment(n int) []Key {
	root := Key{Name: "ROOT", Algorithm: "rsa-2048", Protection: "hsm", Origin: "generated", Usages: []string{"sign", "certify"}, Versions: []Version{{
		Number: 1, Current: true, State: "active", Begins: days(-400), Expires: days(1425), Certificate: &Certificate{Subject: "CN=www.example.org (ROOT)",
			Issuer: "CN=www.example.org (ROOT)", NotBefore: days(-400), NotAfter: days(1425), IssuedBy: "ROOT@1", Serial: "4f", SHA256: strings.Repeat("ab", 32)},
	}}}
	keys := []Key{root}
	applications := []string{"KERNEL", "REGISTRATION", "REGISTRATION_PROCESSOR", "ID_REPO", "RESIDENT"}
	for i, name := range applications {
		module := Key{Name: name, Algorithm: "rsa-2048", Protection: "software", Origin: "generated", Usages: []string{"sign", "certify", "unwrap"}, Versions: []Version{
			{Number: 1, State: "deactivated", Begins: days(-1200), Expires: days(-105)},
			{Number: 2, Current: true, State: "active", Begins: days(-165), Expires: days(930 - 200*i), Certificate: &Certificate{Subject: "CN=" + name,
				Issuer: "CN=www.example.org (ROOT)", NotBefore: days(-165), NotAfter: days(930 - 200*i), IssuedBy: "ROOT@1"}},
		}}
		if name == "RESIDENT" {
			module.Versions[1].Certificate.IssuedBy, module.Versions[1].Certificate.Issuer = "", `CN=Other "CA" <x> & Co`
		}
		keys = append(keys, module)
	}
	keys = append(keys, Key{Name: "KERNEL/IDENTITY_CACHE", Algorithm: "aes-256-gcm", Protection: "hsm", Origin: "generated", Versions: []Version{{Number: 1, Current: true, State: "active", Begins: days(-30)}}},
		Key{Name: "SOFT/one", Algorithm: "ed25519", Protection: "tpm", Origin: "generated", Versions: []Version{{Number: 1, Current: true, State: "suspended", Begins: days(-3), Expires: days(700)}}})
	states := []Version{
		{State: "active", Begins: days(-20), Expires: days(710)},
		{State: "active", Begins: days(-700), Expires: days(30)},
		{State: "deactivated", Begins: days(-800), Expires: days(-70)},
		{State: "deactivated", Reason: "superseded", Begins: days(-100), Expires: days(630)},
		{State: "pre-active", Begins: days(10), Expires: days(740)},
		{State: "destroyed", Begins: days(-900), Expires: days(-170)},
		{State: "compromised", Reason: "key-compromise", Begins: days(-10), Expires: days(720)},
	}
	for i := range n {
		v := states[0]
		if i%9 == 0 {
			v = states[i/9%len(states)]
		}
		v.Number, v.Current = 2, true
		module := applications[1+i%4]
		keys = append(keys, Key{Name: fmt.Sprintf("%s/%d_%d", module, 10001+i/20, 110000+i), Algorithm: "rsa-2048", Protection: "software", Origin: "generated",
			Usages: []string{"decrypt"}, Versions: []Version{{Number: 1, State: "deactivated", Begins: days(-900), Expires: days(-20)}, v}})
	}
	return keys
}

func draw(t *testing.T, f func(io.Writer) error) string {
	t.Helper()
	var b bytes.Buffer
	if err := f(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// wellFormed fails the test unless text is XML, and returns how many elements of a name it has.
func wellFormed(t *testing.T, text, element string) (n int) {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(text))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		if start, ok := token.(xml.StartElement); ok && start.Name.Local == element {
			n++
		}
	}
}

// TestEveryKeyIsDrawn: nothing is left out, whatever the number, and what came from outside cannot break out of the picture.
func TestEveryKeyIsDrawn(t *testing.T) {
	for _, n := range []int{0, 10, 1000} {
		keys := deployment(n)
		keys = append(keys, Key{Name: "odd/key", Algorithm: "rsa-2048", Versions: []Version{{Number: 1, Current: true, State: "active", Certificate: &Certificate{
			Subject: `</title><script>alert("1")</script>` + "\x00\xff\\\"", Issuer: "]]>"}}}})
		m := New(`Keys <of> "here" & there`, now, keys)
		svg := draw(t, m.SVG)
		if drawn := wellFormed(t, svg, "g") - len(m.Applications); drawn != len(keys) {
			t.Errorf("%d keys: %d are drawn of %d", n, drawn, len(keys))
		}
		html := draw(t, m.HTML)
		versions := 0
		for _, k := range keys {
			versions += len(k.Versions)
			if !strings.Contains(svg, `data-key="`+k.Name+`"`) || strings.Count(html, `<tr data-key="`+k.Name+`"`) != len(k.Versions) {
				t.Fatalf("%s is not there", k.Name)
			}
		}
		if got := strings.Count(html, "<tr data-key="); got != versions {
			t.Errorf("%d versions of %d", got, versions)
		}
		dot := draw(t, m.DOT)
		if got := strings.Count(dot, " [label="); got != len(keys) {
			t.Errorf("%d nodes of %d", got, len(keys))
		}
		for name, text := range map[string]string{"svg": svg, "html": html} {
			if strings.Contains(text, "<script>alert") {
				t.Errorf("%s: markup of a certificate is markup of the picture", name)
			}
			if strings.Contains(text, "http:") && strings.Count(text, "http:") != 1 || strings.Contains(text, "https:") {
				t.Errorf("%s refers to something outside", name)
			}
		}
		if !strings.Contains(dot, `"ROOT" -> "KERNEL"`) || strings.Contains(dot, `-> "RESIDENT"`) {
			t.Error("edges")
		}
		if m.Applications[0].Name != "ROOT" {
			t.Errorf("first is %s", m.Applications[0].Name)
		}
		if dir := os.Getenv("KEYMAP_OUT"); dir != "" { // to look at
			for ending, text := range map[string]string{"svg": svg, "html": html, "dot": dot} {
				if err := os.WriteFile(fmt.Sprintf("%s/map%d.%s", dir, n, ending), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

func TestStatus(t *testing.T) {
	for name, c := range map[string]struct {
		v    Version
		want status
	}{
		"active":                       {Version{State: "active", Current: true, Expires: days(400)}, good},
		"no expiry":                    {Version{State: "active", Current: true}, good},
		"soon":                         {Version{State: "active", Current: true, Expires: days(89)}, soon},
		"certificate ends first":       {Version{State: "active", Current: true, Expires: days(400), Certificate: &Certificate{NotAfter: days(3)}}, soon},
		"at its end":                   {Version{State: "deactivated", Current: true, Expires: now}, over},
		"rotated out":                  {Version{State: "deactivated", Expires: days(5)}, former},
		"revoked":                      {Version{State: "deactivated", Reason: "superseded", Expires: days(5)}, withdraw},
		"compromised":                  {Version{State: "compromised", Current: true, Reason: "key-compromise"}, withdraw},
		"suspended":                    {Version{State: "suspended", Current: true, Expires: days(-5)}, paused},
		"destroyed after a revocation": {Version{State: "destroyed", Reason: "superseded"}, gone},
		"begins later":                 {Version{State: "pre-active", Expires: days(5)}, early},
	} {
		if got := c.v.status(now); got != c.want {
			t.Errorf("%s: %s, want %s", name, got.name, c.want.name)
		}
	}
}

func TestSpan(t *testing.T) {
	for at, want := range map[time.Time]string{days(1): "in 1 d", days(-1): "1 d ago", days(120): "in 4 months", days(1461): "in 4.0 y", {}: ""} {
		if got := span(now, at); got != want {
			t.Errorf("%v: %q, want %q", at, got, want)
		}
	}
}

// Package keymap draws what a keystore holds: applications, their keys, the versions of each, who certified whom, and what
// expires when. It gets data and gives one self-contained file: SVG, HTML or the DOT language of Graphviz.
package keymap

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// Map is what a keystore held at one moment.
type Map struct {
	Title        string
	Made         time.Time
	Applications []Application
}

// Application is a namespace: its module key and the keys below it.
type Application struct {
	Name   string
	Module *Key // nil if there is none
	Keys   []Key
}

// Key is a key with all its versions, ascending.
type Key struct {
	Name       string
	Algorithm  string
	Protection string
	Origin     string
	Usages     []string
	Versions   []Version
}

// Version is one generation of a key. Zero times are not set.
type Version struct {
	Number      uint32
	Current     bool
	State       string
	Reason      string // of a revocation
	Begins      time.Time
	Expires     time.Time
	Certificate *Certificate // nil if there is none
}

// Certificate is the certificate of a version.
type Certificate struct {
	Subject, Issuer     string
	Serial              string // hexadecimal
	SHA256              string // hexadecimal
	NotBefore, NotAfter time.Time
	IssuedBy            string // NAME@N of the key in this map that signed it, its own included; empty for one from outside
}

// New arranges keys: the root's application first, the others by name, with their keys by name.
func New(title string, made time.Time, keys []Key) *Map {
	m := &Map{Title: title, Made: made}
	byName := make(map[string]*Application)
	for _, k := range keys {
		namespace := keyspec.Name(k.Name).Namespace()
		a := byName[namespace]
		if a == nil {
			a = &Application{Name: namespace}
			byName[namespace] = a
		}
		if keyspec.Name(k.Name).IsModule() {
			a.Module = &k
		} else {
			a.Keys = append(a.Keys, k)
		}
	}
	for _, a := range byName {
		slices.SortFunc(a.Keys, func(x, y Key) int { return strings.Compare(x.Name, y.Name) })
		m.Applications = append(m.Applications, *a)
	}
	slices.SortFunc(m.Applications, func(x, y Application) int {
		return cmp.Or(x.rank()-y.rank(), strings.Compare(x.Name, y.Name))
	})
	return m
}

// rank puts what certifies itself before what others certified.
func (a *Application) rank() int {
	if v := a.Module.current(); v != nil && v.Certificate != nil && v.Certificate.IssuedBy == ref(a.Module, v) {
		return 0
	}
	return 1
}

func ref(k *Key, v *Version) string { return fmt.Sprintf("%s@%d", k.Name, v.Number) }

// current returns the current version of a key, its newest if there is none, or nil.
func (k *Key) current() *Version {
	if k == nil || len(k.Versions) == 0 {
		return nil
	}
	for i := range k.Versions {
		if k.Versions[i].Current {
			return &k.Versions[i]
		}
	}
	return &k.Versions[len(k.Versions)-1]
}

// status is what the picture tells of a version, by colour and by a sign, so that it does not take colours to read it.
type status struct {
	name, sign, colour string
}

var (
	good     = status{"active", "●", "#1b7f4b"}
	soon     = status{"expires soon", "◐", "#c77700"}
	over     = status{"expired", "○", "#b3261e"}
	withdraw = status{"revoked", "✕", "#7a1fa2"}
	paused   = status{"suspended", "‖", "#7a1fa2"}
	early    = status{"not yet active", "◌", "#1763b6"}
	former   = status{"former version", "–", "#8a94a3"}
	gone     = status{"destroyed", "†", "#8a94a3"}
)

// legend lists every status in the order of the picture's key.
var legend = []status{good, soon, over, withdraw, paused, early, former, gone}

// Soon is how long before its expiry a key is drawn as one that expires soon.
const Soon = 90 * 24 * time.Hour

func (v *Version) status(now time.Time) status {
	switch keyspec.State(v.State) {
	case keyspec.Destroyed:
		return gone
	case keyspec.Suspended:
		return paused
	case keyspec.Compromised:
		return withdraw
	case keyspec.PreActive:
		return early
	}
	switch end := v.end(); {
	case v.Reason != "":
		return withdraw
	case !v.Current:
		return former
	case !end.IsZero() && !now.Before(end):
		return over
	case v.State == string(keyspec.Deactivated):
		return former
	case !end.IsZero() && end.Sub(now) < Soon:
		return soon
	}
	return good
}

// end is when a version can no longer be used for what is new: its expiry or that of its certificate, whichever is first.
func (v *Version) end() time.Time {
	if c := v.Certificate; c != nil && (v.Expires.IsZero() || c.NotAfter.Before(v.Expires)) {
		return c.NotAfter
	}
	return v.Expires
}

// counts are the numbers above the picture.
type counts struct{ applications, keys, versions, soon, over, revoked int }

func (m *Map) count() (n counts) {
	n.applications = len(m.Applications)
	for k := range m.keys() {
		n.keys++
		n.versions += len(k.Versions)
		v := k.current()
		if v == nil {
			continue
		}
		switch v.status(m.Made) {
		case soon:
			n.soon++
		case over:
			n.over++
		}
		for i := range k.Versions {
			if k.Versions[i].status(m.Made) == withdraw {
				n.revoked++
			}
		}
	}
	return n
}

// keys goes over every key, module keys before those below them.
func (m *Map) keys() func(yield func(*Key) bool) {
	return func(yield func(*Key) bool) {
		for i := range m.Applications {
			a := &m.Applications[i]
			if a.Module != nil && !yield(a.Module) {
				return
			}
			for j := range a.Keys {
				if !yield(&a.Keys[j]) {
					return
				}
			}
		}
	}
}

// issuer returns the name of the key in this map that certified k, without its version, and whether k has a certificate.
func (k *Key) issuer() (name string, certified bool) {
	v := k.current()
	if v == nil || v.Certificate == nil {
		return "", false
	}
	name, _, _ = strings.Cut(v.Certificate.IssuedBy, "@")
	return name, true
}

func date(t time.Time) string {
	if t.IsZero() {
		return "no expiry"
	}
	return t.UTC().Format("2006-01-02")
}

// span is a time from now in words: "in 3 y", "5 d ago".
func span(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	d := t.Sub(now)
	days := int(max(d, -d) / (24 * time.Hour))
	var text string
	switch {
	case days >= 2*365:
		text = fmt.Sprintf("%.1f y", float64(days)/365.25)
	case days >= 90:
		text = fmt.Sprintf("%d months", days/30)
	default:
		text = fmt.Sprintf("%d d", days)
	}
	if d < 0 {
		return text + " ago"
	}
	return "in " + text
}

// describe is all that is known of a key, for a tooltip.
func (k *Key) describe(now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s, %s, %s\n%s", k.Name, k.Algorithm, k.Protection, k.Origin, strings.Join(k.Usages, ", "))
	for i := range slices.Backward(k.Versions) {
		v := &k.Versions[i]
		fmt.Fprintf(&b, "\n\n@%d %s", v.Number, v.status(now).name)
		if v.Reason != "" {
			fmt.Fprintf(&b, " (%s)", v.Reason)
		}
		fmt.Fprintf(&b, ": %s to %s", date(v.Begins), date(v.Expires))
		if c := v.Certificate; c != nil {
			fmt.Fprintf(&b, "\ncertificate of %s\nissued by %s", c.Subject, cmp.Or(c.IssuedBy, c.Issuer))
			fmt.Fprintf(&b, "\n%s to %s, serial %s\nSHA-256 %s", date(c.NotBefore), date(c.NotAfter), c.Serial, c.SHA256)
		}
	}
	return b.String()
}

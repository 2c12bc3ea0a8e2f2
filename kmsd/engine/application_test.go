package engine

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

// TestApplications: those of MOSIP are there, others are added, and a change holds for keys that are made after it.
func TestApplications(t *testing.T) {
	h := newHouse(t)
	list, err := h.Applications(t.Context(), h.admin)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, a := range list {
		names = append(names, a.Name)
		if a.Stored || !a.Active() || a.Profile != ProfileDocs {
			t.Errorf("%+v", a)
		}
	}
	if !slices.IsSorted(names) || len(names) != 11 || !slices.Contains(names, "REGISTRATION_PROCESSOR") {
		t.Errorf("%q", names)
	}
	periods := func(name string) [4]int {
		t.Helper()
		a, err := h.Application(t.Context(), h.app, name)
		if err != nil {
			t.Fatal(err)
		}
		return [4]int{a.Days, a.PreExpireDays, a.BaseDays, a.BasePreExpireDays}
	}
	set := func(a Application) *Application {
		t.Helper()
		after, err := h.SetApplication(t.Context(), h.admin, &a)
		if err != nil {
			t.Fatalf("%+v: %v", a, err)
		}
		return after
	}
	for name, p := range map[string][4]int{"ROOT": {1825, 1125, 730, 30}, "KERNEL": {1095, 60, 730, 30}, "PMS": {1095, 60, 730, 30}} {
		if got := periods(name); got != p {
			t.Errorf("%s: %v", name, got)
		}
	}
	// What ROOT says holds for all that say nothing else.
	set(Application{Name: "ROOT", Profile: ProfileDeployed, Subject: DN{C: "XX", O: "Ministry", CN: "id.example"}})
	for name, p := range map[string][4]int{"ROOT": {2920, 1125, 730, 30}, "KERNEL": {1095, 60, 730, 30}, "PMS": {1460, 395, 730, 30}} {
		if got := periods(name); got != p {
			t.Errorf("%s: %v", name, got)
		}
	}
	set(Application{Name: "PMS", Profile: ProfileDocs})
	if got := periods("PMS"); got != [4]int{1095, 60, 730, 30} {
		t.Errorf("PMS: %v", got)
	}
	// Short periods shorten the pre-expire days that are not set, too.
	after := set(Application{Name: "SHORT", Days: 30, BaseDays: 3, Protection: keyspec.Software, Algorithm: keyspec.RSA3072, Subject: DN{OU: "Short"},
		SANs:       map[string][]string{"": {"dns:short.example"}, "x": {"ip:192.0.2.1", "EMAIL:a@short.example", "uri:https://short.example/x"}},
		References: []Reference{{Name: "SIGN"}, {Name: "cache", Algorithm: keyspec.AES256GCM, Days: 7}, {Name: "x"}}})
	if !after.Stored || after.PreExpireDays != 10 || after.BasePreExpireDays != 1 || after.Subject.O != "Ministry" || after.Subject.OU != "Short" {
		t.Errorf("%+v", after)
	}
	h.master(Master{Name: RootName})
	module := h.master(Master{Name: "SHORT"})
	c := leaf(t, module)
	if got := dn(t, c.RawSubject); got != "CN=id.example (SHORT),OU=Short,O=Ministry,L=BANGALORE,ST=KA,C=XX" || !slices.Equal(c.DNSNames, []string{"short.example"}) ||
		!module.Expires.Equal(module.NotBefore.Add(30*day)) || !strings.Contains(fmt.Sprint(c.PublicKey), "65537") || len(c.Signature) != 256 || len(module.Chain) != 2 {
		t.Errorf("%s, %v", got, c.DNSNames)
	}
	base := h.base("SHORT/x")
	if c := leaf(t, base); len(c.IPAddresses) != 1 || len(c.EmailAddresses) != 1 || len(c.URIs) != 1 || !base.Expires.Equal(base.NotBefore.Add(3*day)) {
		t.Errorf("%+v", c)
	}
	if cache := h.master(Master{Name: "SHORT/cache"}); !cache.Expires.Equal(cache.NotBefore.Add(7 * day)) {
		t.Errorf("%+v", cache)
	}
	set(Application{Name: "SHORT", Days: 30, BaseDays: 5})
	if again := h.base("SHORT/x"); again.Made {
		t.Error("a change of the periods made another key")
	}
	h.clock.add(2 * day)
	if again := h.base("SHORT/x"); !again.Made || !again.Expires.Equal(again.NotBefore.Add(5*day)) || len(leaf(t, again).IPAddresses) != 1 {
		t.Errorf("%+v", again) // the alternative names of the certificate before stay
	}
	h.restart()
	if got := periods("SHORT"); got != [4]int{30, 10, 5, 1} {
		t.Errorf("SHORT: %v", got)
	}
	if list, err = h.Applications(t.Context(), h.admin); err != nil || len(list) != 12 {
		t.Errorf("%d, %v", len(list), err)
	}
	if !slices.Contains(h.records(), "app_set SHORT@0 ok") {
		t.Errorf("%q", h.records())
	}
}

func TestApplicationRefusals(t *testing.T) {
	h := newHouse(t)
	many := make([]Reference, MaxReferences+1)
	for i := range many {
		many[i].Name = fmt.Sprint("r", i)
	}
	for what, c := range map[string]struct {
		a   Application
		err error
	}{
		"no name":             {Application{}, ErrInput},
		"two segments":        {Application{Name: "A/B"}, ErrInput},
		"a long name":         {Application{Name: strings.Repeat("A", 37)}, ErrInput},
		"unknown profile":     {Application{Name: "A", Profile: "x"}, ErrInput},
		"negative days":       {Application{Name: "A", Days: -1}, ErrInput},
		"too many days":       {Application{Name: "A", Days: 40_000}, ErrInput},
		"due when made":       {Application{Name: "A", Days: 10, PreExpireDays: 10}, ErrInput},
		"base due when made":  {Application{Name: "A", BaseDays: 10, BasePreExpireDays: 11}, ErrInput},
		"an EC module key":    {Application{Name: "A", Algorithm: keyspec.ECDSAP256}, ErrInput},
		"unknown protection":  {Application{Name: "A", Protection: "paper"}, ErrInput},
		"country":             {Application{Name: "A", Subject: DN{C: "Ü"}}, pki.ErrName},
		"long organisation":   {Application{Name: "A", Subject: DN{O: strings.Repeat("x", 257)}}, pki.ErrName},
		"bad reference":       {Application{Name: "A", References: []Reference{{Name: "a b"}}}, ErrInput},
		"empty reference":     {Application{Name: "A", References: []Reference{{}}}, ErrInput},
		"reference twice":     {Application{Name: "A", References: []Reference{{Name: "a"}, {Name: "a"}}}, ErrInput},
		"too many references": {Application{Name: "A", References: many}, ErrInput},
		"other algorithm":     {Application{Name: "A", References: []Reference{{Name: "a", Algorithm: keyspec.Ed25519}}}, ErrInput},
		"symmetric SIGN":      {Application{Name: "A", References: []Reference{{Name: "SIGN", Algorithm: keyspec.AES256GCM}}}, ErrInput},
		"days of a base key":  {Application{Name: "A", References: []Reference{{Name: "a", Days: 1}}}, ErrInput},
		"keys below the root": {Application{Name: "ROOT", References: []Reference{{Name: "a"}}}, ErrInput},
		"bad SAN":             {Application{Name: "A", SANs: map[string][]string{"": {"x.example"}}}, ErrInput},
		"bad SAN value":       {Application{Name: "A", SANs: map[string][]string{"": {"ip:1.2.3"}}}, pki.ErrSubject},
		"bad SAN reference":   {Application{Name: "A", SANs: map[string][]string{" ": {"dns:x.example"}}}, ErrInput},
		"too many SANs":       {Application{Name: "A", SANs: map[string][]string{"": slices.Repeat([]string{"dns:x.example"}, maxSANs+1)}}, ErrInput},
	} {
		_, err := h.SetApplication(t.Context(), h.admin, &c.a)
		want(t, what, err, c.err)
	}
	_, err := h.Application(t.Context(), h.app, "A")
	want(t, "an application that was refused", err, ErrApplication)
	if d, _, err := h.store.Load().Documents(kindApplication, nil, 10); err != nil || len(d) > 0 {
		t.Errorf("%d documents, %v", len(d), err)
	}
}

// TestApplicationDocument: what is kept is strict, so that nothing is lost that a later release wrote.
func TestApplicationDocument(t *testing.T) {
	a := &Application{Name: "A", Days: 3, Inactive: true, Subject: DN{O: "Ü"}, SANs: map[string][]string{"": {"dns:a.example"}}, References: []Reference{{Name: "SIGN"}}}
	change, err := document(kindApplication, a.Name, 0, storedApplication{applicationFormat, *a}, false)
	if err != nil {
		t.Fatal(err)
	}
	data := change.Data
	if string(data) != `{"format":1,"name":"A","days":3,"subject":{"o":"Ü"},"sans":{"":["dns:a.example"]},"references":[{"name":"SIGN"}],"inactive":true}` {
		t.Errorf("%s", data)
	}
	again, err := decodeApplication(&keystore.Document{Data: data})
	if err != nil || !again.Stored || again.Subject != a.Subject || again.Days != 3 || again.Active() {
		t.Errorf("%+v, %v", again, err)
	}
	for text, target := range map[string]error{
		`{"format":2,"name":"A","new":1}`: ErrUnsupported, `{"format":2,"name":"A"}`: ErrUnsupported, `{"name":"A"}`: ErrUnsupported,
		`{"format":1,"name":"A","new":1}`: keystore.ErrDamaged, `{"format":1,"name":"A"}{}`: keystore.ErrDamaged, `[]`: keystore.ErrDamaged, ``: keystore.ErrDamaged,
	} {
		_, err := decodeApplication(&keystore.Document{Data: []byte(text)})
		want(t, text, err, target)
	}
}

// FuzzApplication: whatever is in a document is refused or written the same way again.
func FuzzApplication(f *testing.F) {
	f.Add([]byte(`{"format":1,"name":"A","days":3,"subject":{"o":"x"},"sans":{"":["dns:a.example"]},"references":[{"name":"SIGN"}]}`))
	f.Add([]byte(`{"format":1,"name":"ROOT","profile":"mosip-deployed"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := decodeApplication(&keystore.Document{Data: data})
		if err != nil {
			return
		}
		one, err := json.Marshal(storedApplication{applicationFormat, *a})
		if err != nil {
			t.Fatal(err)
		}
		b, err := decodeApplication(&keystore.Document{Data: one})
		if err != nil {
			t.Fatal(err)
		}
		two, err := json.Marshal(storedApplication{applicationFormat, *b})
		if err != nil || !bytes.Equal(one, two) {
			t.Fatalf("%s, %s, %v", one, two, err)
		}
		if err := b.resolve(&Application{}); err == nil {
			b.check()
		}
	})
}

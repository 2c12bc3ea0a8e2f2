package keymap

import (
	"bufio"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// Sizes in user units of the picture, which are pixels at its own size.
const (
	width    = 1680
	margin   = 32
	indent   = 36 // of the cards, for the lines from the root
	columns  = 3
	cellW    = (width - 2*margin - indent - 2*cardPad) / columns
	cellH    = 24
	cardPad  = 14
	cardHead = 44
	cardGap  = 18
	headH    = 132
	barW     = 140
)

// SVG writes the map as one SVG document. Everything in it that comes from the keystore is escaped.
func (m *Map) SVG(w io.Writer) error {
	b := bufio.NewWriter(w)
	d := &drawing{Writer: b, Map: m}
	d.from, d.until = m.period()
	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif">`+"\n",
		width, m.height())
	fmt.Fprintf(b, "<title>%s</title>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#f5f6f8\"/>\n", escape(m.Title))
	d.head()
	d.cards()
	fmt.Fprintln(b, "</svg>")
	return b.Flush()
}

// drawing is a picture in the making.
type drawing struct {
	io.Writer
	*Map
	from, until time.Time // of the axis of time
}

func escape(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(strings.ToValidUTF8(s, "?"))) // a strings.Builder does not fail
	return b.String()
}

// cut shortens s to n characters, in the middle, since names differ at both ends.
func cut(s string, n int) string {
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	r := []rune(s)
	return string(r[:n/2]) + "…" + string(r[len(r)-(n-n/2-1):])
}

func (d *drawing) text(x, y int, size int, colour, extra, s string) {
	fmt.Fprintf(d, `<text x="%d" y="%d" font-size="%d" fill="%s" %s>%s</text>`+"\n", x, y, size, colour, extra, escape(s))
}

const (
	ink   = "#1d2430"
	faint = "#5b6675"
	line  = "#c3cad4"
)

func (d *drawing) head() {
	n := d.count()
	d.text(margin, 48, 26, ink, `font-weight="600"`, d.Title)
	summary := fmt.Sprintf("%s · %d applications, %d keys, %d versions", d.Made.UTC().Format("2006-01-02 15:04 UTC"), n.applications, n.keys, n.versions)
	for _, c := range []struct {
		n    int
		text string
	}{{n.soon, "expire within 90 days"}, {n.over, "expired"}, {n.revoked, "versions revoked"}} {
		if c.n > 0 {
			summary += fmt.Sprintf(" · %d %s", c.n, c.text)
		}
	}
	d.text(margin, 74, 14, faint, "", summary)
	x := margin
	for _, s := range legend {
		d.text(x, 106, 14, s.colour, "", s.sign)
		d.text(x+18, 106, 13, faint, "", s.name)
		x += 40 + 8*utf8.RuneCountInString(s.name)
	}
	d.text(width-margin, 106, 13, faint, `text-anchor="end"`,
		fmt.Sprintf("bars: %s to %s, the line is now", date(d.from), date(d.until)))
}

// period is the axis of time of the bars.
func (m *Map) period() (from, until time.Time) {
	from, until = m.Made.AddDate(0, 0, -30), m.Made.AddDate(1, 0, 0)
	for k := range m.keys() {
		for i := range k.Versions {
			v := &k.Versions[i]
			if !v.Begins.IsZero() && v.Begins.Before(from) {
				from = v.Begins
			}
			if end := v.end(); end.After(until) {
				until = end
			}
		}
	}
	if latest := m.Made.AddDate(12, 0, 0); until.After(latest) {
		until = latest // one key for a hundred years shall not make points of all others
	}
	if earliest := m.Made.AddDate(-8, 0, 0); from.Before(earliest) {
		from = earliest
	}
	return from, until
}

// at is where a time is on a bar.
func (d *drawing) at(t time.Time) float64 {
	share := float64(t.Sub(d.from)) / float64(d.until.Sub(d.from))
	return barW * min(max(share, 0), 1)
}

func (a *Application) height() int {
	rows := (len(a.Keys) + columns - 1) / columns
	h := cardHead + cardPad
	if rows > 0 {
		h += rows*cellH + cardPad
	}
	return h
}

func (m *Map) height() int {
	h := headH + margin
	for i := range m.Applications {
		h += m.Applications[i].height() + cardGap
	}
	return h
}

// cards draws a card for each application, and lines from the ones whose module key certified the others.
func (d *drawing) cards() {
	top := make(map[string]int) // of the card of a module key
	y := headH
	for i := range d.Applications {
		a := &d.Applications[i]
		top[a.Name] = y
		y += a.height() + cardGap
	}
	y = headH
	for i := range d.Applications {
		a := &d.Applications[i]
		if issuer, certified := a.Module.issuer(); certified && issuer != a.Name {
			if from, known := top[issuer]; known && issuer != "" {
				trunk := margin + 14
				fmt.Fprintf(d, `<path d="M%d %d V%d H%d" fill="none" stroke="%s" stroke-width="2"/>`+"\n", trunk, from+cardHead/2, y+cardHead/2, margin+indent, line)
				fmt.Fprintf(d, `<path d="M%d %d H%d" fill="none" stroke="%s" stroke-width="2"/>`+"\n", trunk, from+cardHead/2, margin+indent, line)
			} else {
				fmt.Fprintf(d, `<path d="M%d %d H%d" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="4 4"/>`+"\n", margin, y+cardHead/2, margin+indent, faint)
			}
		}
		d.card(a, margin+indent, y)
		y += a.height() + cardGap
	}
}

func (d *drawing) card(a *Application, x, y int) {
	w := width - margin - x
	fmt.Fprintf(d, `<g class="card"><rect x="%d" y="%d" width="%d" height="%d" rx="8" fill="#fff" stroke="%s"/>`+"\n", x, y, w, a.height(), line)
	d.text(x+cardPad, y+cardHead-15, 18, ink, `font-weight="600"`, a.Name)
	keys := fmt.Sprintf("%d keys below it", len(a.Keys))
	switch len(a.Keys) {
	case 0:
		keys = "no keys below it"
	case 1:
		keys = "1 key below it"
	}
	left := x + cardPad + 330
	if a.Module == nil {
		d.text(left, y+cardHead-16, 13, faint, "", "no module key · "+keys)
	} else {
		d.module(a.Module, left, y, keys)
	}
	for i := range a.Keys {
		d.cell(&a.Keys[i], x+cardPad+(i%columns)*cellW, y+cardHead+cardPad/2+(i/columns)*cellH)
	}
	fmt.Fprintln(d, "</g>")
}

// module draws the module key into the head of its card.
func (d *drawing) module(k *Key, x, y int, keys string) {
	v := k.current()
	if v == nil {
		return
	}
	s := v.status(d.Made)
	fmt.Fprintf(d, `<g data-key="%s"><title>%s</title>`+"\n", escape(k.Name), escape(k.describe(d.Made)))
	base := y + cardHead - 16
	d.text(x, base, 15, s.colour, "", s.sign)
	certified := "no certificate"
	if c := v.Certificate; c != nil {
		switch {
		case c.IssuedBy == ref(k, v):
			certified = "certifies itself"
		case c.IssuedBy != "":
			certified = "certified by " + c.IssuedBy
		default:
			certified = "certified from outside: " + cut(c.Issuer, 48)
		}
	}
	d.text(x+20, base, 13, faint, "", fmt.Sprintf("module key @%d · %s · in %s · %s · %s", v.Number, k.Algorithm, k.Protection, certified, keys))
	right := width - margin - cardPad
	d.bar(k, right-barW-180, base-9)
	d.text(right, base, 13, s.colour, `text-anchor="end"`, date(v.end())+"  "+span(d.Made, v.end()))
	fmt.Fprintln(d, "</g>")
}

// cell draws one key of an application.
func (d *drawing) cell(k *Key, x, y int) {
	v := k.current()
	if v == nil {
		return
	}
	s := v.status(d.Made)
	reference := strings.TrimPrefix(k.Name, strings.SplitN(k.Name, "/", 2)[0]+"/")
	fmt.Fprintf(d, `<g data-key="%s"><title>%s</title><rect x="%d" y="%d" width="%d" height="%d" fill="#fff"/>`+"\n",
		escape(k.Name), escape(k.describe(d.Made)), x, y, cellW-8, cellH-2)
	base := y + 16
	d.text(x, base, 13, s.colour, "", s.sign)
	d.text(x+18, base, 12, ink, "", cut(reference, 23))
	d.text(x+186, base, 11, faint, "", fmt.Sprintf("@%d %s%s", v.Number, short(k.Algorithm), where(k.Protection)))
	d.bar(k, x+cellW-barW-84, base-9)
	d.text(x+cellW-14, base, 11, s.colour, `text-anchor="end"`, date(v.end()))
	fmt.Fprintln(d, "</g>")
}

// bar draws the versions of a key over time.
func (d *drawing) bar(k *Key, x, y int) {
	fmt.Fprintf(d, `<rect x="%d" y="%d" width="%d" height="8" rx="2" fill="#edf0f3"/>`+"\n", x, y+1, barW)
	for i := range k.Versions {
		v := &k.Versions[i]
		s := v.status(d.Made)
		end := v.end()
		if end.IsZero() {
			end = d.until
		}
		from, until := d.at(v.Begins), d.at(end)
		height, opacity := 8, "0.85"
		if !v.Current {
			height, opacity = 4, "0.5"
		}
		fmt.Fprintf(d, `<rect x="%.1f" y="%d" width="%.1f" height="%d" rx="1.5" fill="%s" opacity="%s"/>`+"\n",
			float64(x)+from, y+1+(8-height), max(until-from, 1.5), height, s.colour, opacity)
	}
	now := float64(x) + d.at(d.Made)
	fmt.Fprintf(d, `<path d="M%.1f %d V%d" stroke="%s" stroke-width="1"/>`+"\n", now, y-1, y+11, ink)
}

// short leaves out of the name of an algorithm what most keys have in common.
func short(algorithm string) string {
	return strings.NewReplacer("ecdsa-", "", "aes-256-gcm", "aes-256", "aes-128-gcm", "aes-128").Replace(algorithm)
}

// where marks keys that are in a device.
func where(protection string) string {
	if protection == "" || protection == "software" {
		return ""
	}
	return " " + strings.ToUpper(protection)
}

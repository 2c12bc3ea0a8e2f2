package keymap

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"io"
)

// HTML writes the map as one page: the picture, and below it a table of every version that a line of text narrows down, as it does the
// picture. It loads nothing and sends nothing.
func (m *Map) HTML(w io.Writer) error {
	b := bufio.NewWriter(w)
	var picture bytes.Buffer
	if err := m.SVG(&picture); err != nil {
		return err
	}
	fmt.Fprintf(b, pageHead, escape(m.Title))
	b.Write(picture.Bytes())
	b.WriteString(tableHead)
	for k := range m.keys() {
		for i := range k.Versions {
			v := &k.Versions[i]
			s := v.status(m.Made)
			subject, issuer, thumbprint := "", "", ""
			if c := v.Certificate; c != nil {
				subject, issuer, thumbprint = c.Subject, cmp.Or(c.IssuedBy, c.Issuer), c.SHA256
			}
			fmt.Fprintf(b, `<tr data-key="%s"><td>%[1]s<td>@%d<td style="color:%s">%s %s<td>%s<td>%s<td>%s<td>%s<td>%s<td>%s<td class="mono">%s`+"\n",
				escape(k.Name), v.Number, s.colour, s.sign, escape(s.name), escape(k.Algorithm), escape(k.Protection), date(v.Begins), date(v.end()),
				escape(subject), escape(issuer), escape(thumbprint))
		}
	}
	b.WriteString(pageTail)
	return b.Flush()
}

const pageHead = `<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>%s</title>
<style>
body { margin: 0; background: #f5f6f8; color: #1d2430; font: 14px system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif }
form { position: sticky; top: 0; padding: 10px 32px; background: #fff; border-bottom: 1px solid #c3cad4; z-index: 1 }
input { width: 28em; max-width: 70vw; padding: 6px 8px; font: inherit; border: 1px solid #8a94a3; border-radius: 4px }
svg { display: block; max-width: 100%%; height: auto }
.other { opacity: .12 }
section { padding: 0 32px 32px; overflow-x: auto }
table { border-collapse: collapse; background: #fff; font-size: 13px }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid #e3e7ec; white-space: nowrap }
th { background: #edf0f3 }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11px }
</style>
<form onsubmit="return false"><label>Show <input id="filter" type="search" placeholder="name, state, algorithm, certificate ..." autocomplete="off"></label> <output id="found"></output></form>
`

const tableHead = `<section>
<h2>Every version</h2>
<table><thead><tr><th>Key<th>Version<th>State<th>Algorithm<th>Protection<th>From<th>Until<th>Subject<th>Issued by<th>SHA-256 of the certificate</thead><tbody>
`

const pageTail = `</tbody></table>
</section>
<script>
const filter = document.getElementById("filter"), found = document.getElementById("found");
const rows = [...document.querySelectorAll("tr[data-key]")], cells = [...document.querySelectorAll("g[data-key]")];
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(w => w);
  const keys = new Set();
  let n = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(w => text.includes(w));
    if (!row.hidden) { n++; keys.add(row.dataset.key) }
  }
  for (const cell of cells) cell.classList.toggle("other", words.length > 0 && !keys.has(cell.dataset.key));
  found.textContent = words.length ? n + " of " + rows.length + " versions" : "";
});
</script>
`

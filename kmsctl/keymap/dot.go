package keymap

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// DOT writes the map in the language of Graphviz: a cluster for each application, an edge from each key to the keys it certified.
func (m *Map) DOT(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "digraph keys {\n  label=%s;\n  labelloc=t; rankdir=LR; ranksep=1.2; nodesep=0.15;\n", quote(m.Title+", "+date(m.Made)))
	fmt.Fprintln(b, `  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica", fontsize=10];`)
	for i := range m.Applications {
		a := &m.Applications[i]
		fmt.Fprintf(b, "  subgraph %s {\n    label=%s; color=\"#c3cad4\";\n", quote("cluster "+a.Name), quote(a.Name))
		if a.Module != nil {
			m.node(b, a.Module, ", penwidth=2")
		}
		for j := range a.Keys {
			m.node(b, &a.Keys[j], "")
		}
		fmt.Fprintln(b, "  }")
	}
	for k := range m.keys() {
		if issuer, certified := k.issuer(); certified && issuer != "" && issuer != k.Name {
			fmt.Fprintf(b, "  %s -> %s;\n", quote(issuer), quote(k.Name))
		}
	}
	fmt.Fprintln(b, "}")
	return b.Flush()
}

func (m *Map) node(w io.Writer, k *Key, extra string) {
	v := k.current()
	if v == nil {
		return
	}
	s := v.status(m.Made)
	label := fmt.Sprintf("%s\n@%d %s, %s\n%s until %s", k.Name, v.Number, k.Algorithm, k.Protection, s.name, date(v.end()))
	fmt.Fprintf(w, "    %s [label=%s, color=%s, tooltip=%s%s];\n", quote(k.Name), quote(label), quote(s.colour), quote(k.describe(m.Made)), extra)
}

// quote makes a quoted string of the DOT language. In a label a backslash begins an escape, so it is doubled.
func quote(s string) string {
	s = strings.ToValidUTF8(s, "?")
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\r", "", "\x00", "").Replace(s) + `"`
}

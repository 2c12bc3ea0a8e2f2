package mosipdb

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"unicode/utf8"
)

// Row is one row of a table, by column. A column that is NULL or missing is empty.
type Row struct {
	Table Table
	Line  int // where it begins in its file, from 1
	cells map[string]string
}

// Cell returns the text of a column, empty when it is NULL or there is none.
func (r *Row) Cell(column string) string { return r.cells[column] }

// Rows reads a file. What is wrong with one row comes as a *RowError and reading goes on; every other error ends it, and wraps ErrFormat
// when the file is not what it should be.
func Rows(r io.Reader) iter.Seq2[*Row, error] {
	return func(yield func(*Row, error) bool) {
		b := bufio.NewReaderSize(r, 64<<10)
		head, err := b.Peek(5)
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			yield(nil, err)
			return
		case len(head) == 0:
			yield(nil, fmt.Errorf("%w: the file is empty", ErrFormat))
			return
		case string(head) == "PGDMP":
			yield(nil, fmt.Errorf("%w: a dump in PostgreSQL's own format; make it plain text with: pg_restore --file=-", ErrFormat))
			return
		case bytes.HasPrefix(head, []byte("\xef\xbb\xbf")):
			b.Discard(3)
		}
		if isDump(b) {
			dump(b, yield)
		} else {
			commas(b, yield)
		}
	}
}

// RowError says what is wrong with a row whose text cannot be read.
type RowError struct {
	Table  Table
	Line   int
	Reason string
}

func (e *RowError) Error() string { return fmt.Sprintf("%s, line %d: %s", e.Table, e.Line, e.Reason) }

// isDump looks at the first line that says anything: a CSV begins with the names of columns.
func isDump(b *bufio.Reader) bool {
	head, _ := b.Peek(b.Size())
	for line := range bytes.Lines(head) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		if bytes.HasPrefix(line, []byte("--")) || bytes.HasPrefix(line, []byte("\\")) {
			return true
		}
		word, _, _ := bytes.Cut(line, []byte(" "))
		return slices.Contains([]string{"SET", "COPY", "SELECT", "CREATE", "BEGIN;", "ALTER", "INSERT"}, string(bytes.ToUpper(word)))
	}
	return false
}

// lines reads lines of at most MaxRow bytes and counts them.
type lines struct {
	b    *bufio.Reader
	n    int
	line []byte
}

var errLong = fmt.Errorf("longer than %d bytes", MaxRow)

// next returns a line without its end, or io.EOF. The line is valid until the next call. A line that is too long is skipped and answered with errLong.
func (l *lines) next() ([]byte, error) {
	l.line = l.line[:0]
	l.n++
	long := false
	for {
		part, err := l.b.ReadSlice('\n')
		if long = long || len(l.line)+len(part) > MaxRow; !long {
			l.line = append(l.line, part...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil && (!errors.Is(err, io.EOF) || len(l.line) == 0 && !long):
			return nil, err
		case long:
			return nil, errLong
		}
		return bytes.TrimSuffix(bytes.TrimSuffix(l.line, []byte("\n")), []byte("\r")), nil
	}
}

// dump reads a plain dump of PostgreSQL: the COPY statements of the tables that we know, and nothing else.
func dump(b *bufio.Reader, yield func(*Row, error) bool) {
	l := lines{b: b}
	rows, open := 0, 0 // open: dumps whose end has not come
	seen := make(map[Table]string)
	for {
		line, err := l.next()
		switch {
		case errors.Is(err, io.EOF):
			if open > 0 {
				yield(nil, fmt.Errorf("%w: the dump has no end, at line %d: it is not whole", ErrFormat, l.n))
			}
			return
		case errors.Is(err, errLong):
			continue // no COPY statement is
		case err != nil:
			yield(nil, err)
			return
		}
		text := string(line)
		switch text { // as pg_dump and pg_restore write them
		case "-- PostgreSQL database dump":
			open++
		case "-- PostgreSQL database dump complete":
			open--
		}
		if t, ok := inserted(text); ok {
			yield(nil, fmt.Errorf("%w: line %d: %s as INSERT statements; dump it without --inserts", ErrFormat, l.n, t))
			return
		}
		table, columns, ok := copied(text)
		if !ok {
			continue
		}
		if table == "" { // what another table holds is not for us, whatever it looks like
			for err == nil && string(line) != `\.` || errors.Is(err, errLong) {
				line, err = l.next()
			}
			continue
		}
		if err := checkColumns(table, columns); err != nil {
			yield(nil, fmt.Errorf("%w: line %d: %w", ErrFormat, l.n, err))
			return
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "COPY "), " (")
		if before, ok := seen[table]; ok { // MOSIP has several databases with tables of these names, and their keys must not be mixed
			yield(nil, fmt.Errorf("%w: line %d: a second table %.64s, besides %.64s; dump one database and schema only: --schema=keymgr", ErrFormat, l.n, name, before))
			return
		}
		seen[table] = name
		for {
			line, err := l.next()
			if err == nil && string(line) == `\.` {
				break
			}
			switch {
			case errors.Is(err, io.EOF):
				yield(nil, fmt.Errorf("%w: the dump ends in the middle of %s, at line %d: it is not whole", ErrFormat, table, l.n))
				return
			case errors.Is(err, errLong):
			case err != nil:
				yield(nil, err)
				return
			}
			if rows++; rows > MaxRows {
				yield(nil, fmt.Errorf("%w: over %d rows", ErrFormat, MaxRows))
				return
			}
			var row *Row
			if err == nil {
				row, err = copyRow(table, columns, line)
			}
			if err != nil {
				if !yield(nil, &RowError{table, l.n, err.Error()}) {
					return
				}
				continue
			}
			row.Line = l.n
			if !yield(row, nil) {
				return
			}
		}
	}
}

// inserted recognises rows in the form that we do not read, so that they are not passed over in silence.
func inserted(line string) (Table, bool) {
	rest, ok := strings.CutPrefix(line, "INSERT INTO ")
	if !ok {
		return "", false
	}
	name, _, _ := strings.Cut(rest, " ")
	return known(name)
}

// copied takes "COPY schema.table (a, b, c) FROM stdin;" apart. The table is empty when it is none of ours.
func copied(line string) (table Table, columns []string, ok bool) {
	rest, ok := strings.CutPrefix(line, "COPY ")
	if !ok {
		return "", nil, false
	}
	name, rest, ok := strings.Cut(rest, " (")
	if !ok {
		return "", nil, false
	}
	list, end, ok := strings.Cut(rest, ") FROM ")
	if !ok || !strings.EqualFold(strings.TrimSpace(end), "stdin;") {
		return "", nil, false
	}
	if table, ok = known(name); !ok {
		return "", nil, true
	}
	for c := range strings.SplitSeq(list, ",") {
		columns = append(columns, strings.ToLower(strings.Trim(strings.TrimSpace(c), `"`)))
	}
	return table, columns, true
}

// known returns the table of a name with or without its schema.
func known(name string) (Table, bool) {
	if i := strings.LastIndexByte(name, '.'); i >= 0 {
		name = name[i+1:]
	}
	name = strings.ToLower(strings.Trim(name, `"`))
	for _, r := range required {
		if string(r.table) == name {
			return r.table, true
		}
	}
	return "", false
}

func checkColumns(table Table, columns []string) error {
	if len(columns) > MaxColumns {
		return fmt.Errorf("%s with %d columns", table, len(columns))
	}
	for i, c := range columns {
		if slices.Contains(columns[:i], c) {
			return fmt.Errorf("%s has column %.64q twice", table, c)
		}
	}
	for _, r := range required {
		if r.table != table {
			continue
		}
		for _, c := range r.columns {
			if !slices.Contains(columns, c) && c != "organization_name" {
				return fmt.Errorf("%s has no column %s", table, c)
			}
		}
	}
	return nil
}

// copyRow takes a line of COPY text apart (PostgreSQL, COPY, file formats, text format).
func copyRow(table Table, columns []string, line []byte) (*Row, error) {
	row := &Row{Table: table, cells: make(map[string]string, len(columns))}
	n := 0
	for cell := range bytes.SplitSeq(line, []byte("\t")) {
		if n == len(columns) {
			return nil, fmt.Errorf("more than %d columns", len(columns))
		}
		if string(cell) != `\N` {
			s, err := unescape(cell)
			if err == nil {
				err = checkCell(s)
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", columns[n], err)
			}
			row.cells[columns[n]] = s
		}
		n++
	}
	if n < len(columns) {
		return nil, fmt.Errorf("%d columns where there should be %d", n, len(columns))
	}
	return row, nil
}

func checkCell(s string) error {
	if len(s) > maxField {
		return fmt.Errorf("longer than %d bytes", maxField)
	}
	if !utf8.ValidString(s) || strings.IndexByte(s, 0) >= 0 {
		return errors.New("is no text")
	}
	return nil
}

// unescape undoes the escapes of COPY text. One that is none stands for the character itself, as in PostgreSQL.
func unescape(cell []byte) (string, error) {
	if bytes.IndexByte(cell, '\\') < 0 {
		return string(cell), nil
	}
	out := make([]byte, 0, len(cell))
	for i := 0; i < len(cell); i++ {
		c := cell[i]
		if c != '\\' {
			out = append(out, c)
			continue
		}
		if i++; i == len(cell) {
			return "", errors.New("ends in the middle of an escape")
		}
		switch c = cell[i]; c {
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'v':
			out = append(out, '\v')
		case 'x':
			v, n := digits(cell[i+1:], 16, 2)
			if n == 0 {
				out = append(out, 'x')
				continue
			}
			out = append(out, v)
			i += n
		default:
			if v, n := digits(cell[i:], 8, 3); n > 0 {
				out = append(out, v)
				i += n - 1
				continue
			}
			out = append(out, c)
		}
	}
	return string(out), nil
}

// digits reads up to most digits to a base. What is over a byte is cut off, as PostgreSQL does.
func digits(b []byte, base, most int) (v byte, n int) {
	for n < most && n < len(b) {
		d := strings.IndexByte("0123456789abcdef"[:base], b[n])
		if c := b[n]; base == 16 && 'A' <= c && c <= 'F' {
			d = int(c-'A') + 10
		}
		if d < 0 {
			break
		}
		v = v*byte(base) + byte(d)
		n++
	}
	return v, n
}

// gauge lets no more than MaxRow bytes be read, and some for the buffer in between, before it is set back.
type gauge struct {
	r    io.Reader
	left int
}

const ahead = 8 << 10 // of encoding/csv's own buffer

func (g *gauge) Read(p []byte) (int, error) {
	if g.left <= 0 {
		return 0, fmt.Errorf("%w: a row of over %d bytes", ErrFormat, MaxRow)
	}
	n, err := g.r.Read(p[:min(len(p), g.left)])
	g.left -= n
	return n, err
}

// commas reads CSV (RFC 4180). The header says which table it is.
func commas(b *bufio.Reader, yield func(*Row, error) bool) {
	g := &gauge{b, MaxRow + ahead}
	r := csv.NewReader(g)
	r.ReuseRecord = true
	r.FieldsPerRecord = -1
	header, err := r.Read()
	if err != nil {
		yield(nil, formatError(err))
		return
	}
	columns := make([]string, len(header))
	for i, c := range header {
		columns[i] = strings.ToLower(strings.TrimSpace(c))
	}
	table, ok := tableOf(columns)
	if !ok {
		yield(nil, fmt.Errorf("%w: the first line names no columns of a table that we know", ErrFormat))
		return
	}
	if err := checkColumns(table, columns); err != nil {
		yield(nil, fmt.Errorf("%w: %w", ErrFormat, err))
		return
	}
	for rows := 0; ; rows++ {
		g.left = MaxRow + ahead
		cells, err := r.Read()
		switch {
		case errors.Is(err, io.EOF):
			return
		case rows >= MaxRows:
			err = fmt.Errorf("%w: over %d rows", ErrFormat, MaxRows)
		}
		if err != nil {
			yield(nil, formatError(err)) // where the next row begins is not known
			return
		}
		line, _ := r.FieldPos(0)
		row := &Row{Table: table, Line: line, cells: make(map[string]string, len(columns))}
		if len(cells) != len(columns) {
			err = fmt.Errorf("%d columns where there should be %d", len(cells), len(columns))
		}
		for i := 0; i < len(cells) && err == nil; i++ {
			if err = checkCell(cells[i]); err != nil {
				err = fmt.Errorf("%s: %w", columns[i], err)
				break
			}
			row.cells[columns[i]] = strings.Clone(cells[i])
		}
		if err != nil {
			if !yield(nil, &RowError{table, line, err.Error()}) {
				return
			}
			continue
		}
		if !yield(row, nil) {
			return
		}
	}
}

func formatError(err error) error {
	var parse *csv.ParseError
	switch {
	case errors.As(err, &parse):
		return fmt.Errorf("%w: line %d: %w", ErrFormat, parse.Line, parse.Err)
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: there is nothing in it", ErrFormat)
	}
	return err
}

// tableOf finds the table that has the columns of a CSV.
func tableOf(columns []string) (Table, bool) {
	for _, r := range required {
		if !slices.ContainsFunc(r.columns, func(c string) bool { return !slices.Contains(columns, c) }) {
			return r.table, true
		}
	}
	return "", false
}

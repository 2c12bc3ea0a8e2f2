package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// maxBatch is how many items one request of the daemon may hold; longer input is sent in several requests.
const maxBatch = 100

func newBatch(a *app) *cobra.Command {
	var in string
	c := uses(&cobra.Command{
		Use:   "batch --in F",
		Short: "Run many operations, one JSON object per line",
		Long: `Run many operations in few requests. Each line of the input is {"op": OP, "params": {...}} with the names of the protocol
(docs/protocol.md) and bytes in base64; each line of the output is {"op": OP, "result": {...}} or {"op": OP, "error": {...}},
in the same order. The exit code is 1 when one of them failed.`,
		Example: `  echo '{"op":"sign","params":{"key":"app/k","data":"aGVsbG8="}}' | kmsctl batch`,
		Args:    exactArgs(),
		RunE: func(c *cobra.Command, args []string) error {
			r, _, err := a.open(in)
			if err != nil {
				return err
			}
			defer r.Close()
			lines := bufio.NewScanner(r)
			lines.Buffer(nil, 128<<10)
			out := json.NewEncoder(a.stdout)
			out.SetEscapeHTML(false)
			var items []proto.BatchItem
			failed, bytes, line := 0, 0, 0
			flush := func() error {
				if len(items) == 0 {
					return nil
				}
				var reply proto.BatchReply
				if err := a.call(c.Context(), proto.OpBatch, &proto.Batch{Items: items}, &reply); err != nil {
					return err
				}
				if len(reply.Items) != len(items) {
					return errors.New("the daemon answered another number of items than it was asked")
				}
				for i, item := range reply.Items {
					view, err := viewBatch(items[i].Op, item)
					if err != nil {
						return err
					}
					if item.Error != nil {
						failed++
					}
					if err := out.Encode(view); err != nil {
						return err
					}
				}
				items, bytes = items[:0], 0
				return nil
			}
			for lines.Scan() {
				line++
				if len(strings.TrimSpace(lines.Text())) == 0 {
					continue
				}
				item, err := parseBatch(lines.Bytes())
				if err != nil {
					return fmt.Errorf("line %d: %w", line, err)
				}
				if len(items) == maxBatch || bytes+len(item.Params) > proto.MaxData/2 {
					if err := flush(); err != nil {
						return err
					}
				}
				items, bytes = append(items, item), bytes+len(item.Params)
			}
			if err := lines.Err(); err != nil {
				return err
			}
			if err := flush(); err != nil {
				return err
			}
			if failed > 0 {
				return fmt.Errorf("%d operations failed", failed)
			}
			return nil
		},
	}, proto.OpBatch)
	inFlag(c, &in, "operations")
	return c
}

// parseBatch turns one line of JSON into an item. The words of the wire are the Go names of the messages in snake case,
// and encoding/json does not mind the case, so that taking the underscores out is all that is needed.
func parseBatch(line []byte) (proto.BatchItem, error) {
	var call struct {
		Op     string         `json:"op"`
		Params map[string]any `json:"params"`
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	d.UseNumber()
	if err := d.Decode(&call); err != nil {
		return proto.BatchItem{}, err
	}
	body, ok := proto.Lookup(call.Op)
	if !ok {
		return proto.BatchItem{}, fmt.Errorf("no operation is called %q", call.Op)
	}
	text, err := json.Marshal(withoutUnderscores(call.Params))
	if err != nil {
		return proto.BatchItem{}, err
	}
	params := body.Params()
	d = json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(params); err != nil {
		return proto.BatchItem{}, err
	}
	encoded, err := proto.AppendParams(nil, params)
	return proto.BatchItem{Op: call.Op, Params: encoded}, err
}

func withoutUnderscores(m map[string]any) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		if inner, ok := v.(map[string]any); ok && k != "labels" { // the keys of labels are the user's
			v = withoutUnderscores(inner)
		}
		out[strings.ReplaceAll(k, "_", "")] = v
	}
	return out
}

func viewBatch(op string, item proto.BatchResult) (any, error) {
	if item.Error != nil {
		return map[string]any{"op": op, "error": errorView{Code: string(item.Error.Code), Message: item.Error.Message, RetryAfterMS: item.Error.RetryAfterMS}}, nil
	}
	body, ok := proto.Lookup(op)
	if !ok {
		return nil, fmt.Errorf("no operation is called %q", op)
	}
	result := body.Result()
	if err := proto.DecodeReply(item.Result, result); err != nil {
		return nil, err
	}
	var view any = snakeFields(reflect.ValueOf(result).Elem())
	if k, ok := result.(*proto.KeyInfo); ok {
		view = viewKey(k)
	}
	return map[string]any{"op": op, "result": view}, nil
}

// snakeFields returns the fields of a flat message under their names on the wire.
func snakeFields(v reflect.Value) map[string]any {
	out := make(map[string]any)
	for i := range v.NumField() {
		out[snake(v.Type().Field(i).Name)] = v.Field(i).Interface()
	}
	return out
}

// snake writes a Go name in snake case; a run of capitals is one word.
func snake(name string) string {
	var b strings.Builder
	upper := func(i int) bool { return 'A' <= name[i] && name[i] <= 'Z' }
	lower := func(i int) bool { return i < len(name) && 'a' <= name[i] && name[i] <= 'z' }
	for i := range len(name) {
		if upper(i) && i > 0 && (lower(i-1) || lower(i+1)) {
			b.WriteByte('_')
		}
		b.WriteByte(name[i])
	}
	return strings.ToLower(b.String())
}

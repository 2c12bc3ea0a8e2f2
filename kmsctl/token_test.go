package main

import (
	"encoding/json"
	"math"
	"testing"
)

// TestPlain shows as JSON what CBOR has and JSON has not.
func TestPlain(t *testing.T) {
	v := []any{math.NaN(), math.Inf(1), 1.5, []byte("a"), map[any]any{int64(-1): math.Inf(-1)}, nil}
	b, err := json.Marshal(plain(v))
	if want := `["NaN","+Inf",1.5,"YQ==",{"-1":"-Inf"},null]`; err != nil || string(b) != want {
		t.Errorf("%s, %v, want %s", b, err, want)
	}
}

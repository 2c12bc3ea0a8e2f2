package engine

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func TestLabelsAreBounded(t *testing.T) {
	h := newHouse(t)
	many := make(map[string]string)
	for i := range keyspec.MaxLabels {
		many[fmt.Sprint(i)] = "v"
	}
	h.create("APP/k", keyspec.AES256GCM)
	if _, err := h.Set(t.Context(), h.app, "APP/k", &Settings{Labels: many}); err != nil {
		t.Fatal(err)
	}
	_, err := h.Set(t.Context(), h.app, "APP/k", &Settings{Labels: map[string]string{"more": "v"}})
	want(t, "one label more", err, ErrInput)
	large := make(map[string]string)
	for i := range keyspec.MaxLabels {
		large[fmt.Sprint(i)] = strings.Repeat("v", keyspec.MaxLabelValue)
	}
	_, err = h.Set(t.Context(), h.app, "APP/k", &Settings{Labels: large})
	want(t, "labels that are too large together", err, ErrInput)
}

// TestVersionsAreBounded rotates a key to its limit. There, destroyed versions are forgotten to make room for new ones.
func TestVersionsAreBounded(t *testing.T) {
	h := newHouse(t)
	h.create("APP/k", keyspec.AES256GCM)
	rotate := func() error {
		_, err := h.Rotate(t.Context(), h.app, "APP/k", time.Time{}, time.Time{}, false)
		return err
	}
	for range keyspec.MaxVersions - 1 {
		if err := rotate(); err != nil {
			t.Fatal(err)
		}
	}
	want(t, "one version too many", rotate(), ErrExhausted)
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/k@7")); err != nil {
		t.Fatal(err)
	}
	if err := rotate(); err != nil {
		t.Fatal(err)
	}
	key, err := h.Get(t.Context(), h.app, keyspec.Ref{Name: "APP/k"})
	if err != nil || len(key.Versions) != keyspec.MaxVersions || key.Current != keyspec.MaxVersions+1 || key.Versions[6].Number != 8 {
		t.Fatalf("%d versions, current %d, %v", len(key.Versions), key.Current, err)
	}
	want(t, "full again", rotate(), ErrExhausted)
	s, err := h.opened()
	if err != nil {
		t.Fatal(err)
	}
	if report, err := s.Verify(t.Context(), nil); err != nil || len(report.Damaged) > 0 {
		t.Errorf("the store: %+v %v", report, err)
	}
	if _, err := h.DestroyNow(t.Context(), h.app, ref(t, "APP/k@7")); err == nil || errors.Is(err, ErrInternal) {
		t.Errorf("a version that is forgotten: %v", err)
	}
}

package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// parseTime reads a point in time: RFC 3339, YYYY-MM-DD (midnight, local time) or a span from now: a number with y, w,
// d, h, m or s. Empty is 0, "none" is proto.NoExpiry.
func parseTime(s string, now time.Time) (int64, error) {
	switch s {
	case "":
		return 0, nil
	case "none":
		return proto.NoExpiry, nil
	case "now":
		return now.Unix(), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t, err = time.ParseInLocation(time.DateOnly, s, time.Local)
	}
	if err == nil {
		if t.Unix() <= 0 { // on the wire, 0 is the default and -1 is none
			return 0, usagef("the time %q is before 1970", s)
		}
		return t.Unix(), nil
	}
	years, rest, err := parseSpan(s)
	if err != nil {
		return 0, withHint(usagef("cannot read the time %q", s), "use RFC 3339, YYYY-MM-DD, or a span such as 12h, 90d, 2y")
	}
	return now.AddDate(years, 0, 0).Add(rest).Unix(), nil
}

// parseDelay reads a span such as 36h, 7d or 2y and returns it in seconds; a year counts 365 days.
func parseDelay(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	years, rest, err := parseSpan(s)
	if err != nil {
		return 0, withHint(usagef("cannot read the span %q", s), "use a number with y, w, d, h, m or s, such as 7d")
	}
	return uint64((time.Duration(years)*365*24*time.Hour + rest) / time.Second), nil
}

// parseSpan returns years apart from the rest because a year is a matter of the calendar.
func parseSpan(s string) (years int, rest time.Duration, err error) {
	if len(s) < 2 {
		return 0, 0, fmt.Errorf("span %q is too short", s)
	}
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if err != nil {
		return 0, 0, err
	}
	limit := uint64(200 * 365 * 24 * 3600) // 200 years in seconds, so that nothing below overflows
	var unit time.Duration
	switch s[len(s)-1] {
	case 'y':
		if n > 200 {
			return 0, 0, fmt.Errorf("span %q is too long", s)
		}
		return int(n), 0, nil
	case 'w':
		unit = 7 * 24 * time.Hour
	case 'd':
		unit = 24 * time.Hour
	case 'h':
		unit = time.Hour
	case 'm':
		unit = time.Minute
	case 's':
		unit = time.Second
	default:
		return 0, 0, fmt.Errorf("span %q has no unit", s)
	}
	if n > limit/uint64(unit/time.Second) {
		return 0, 0, fmt.Errorf("span %q is too long", s)
	}
	return 0, time.Duration(n) * unit, nil
}

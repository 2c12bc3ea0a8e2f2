package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/kmsd-project/kmsd/client"
)

// TestTimeline writes what expires in the order in which something happens.
func TestTimeline(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	at := func(days int) int64 { return now.AddDate(0, 0, days).Unix() }
	list := []client.Due{
		{Key: "ROOT@1", What: "key", At: at(1825), ActAt: at(700), Then: "rotate"},
		{Key: "PMS@1", What: "certificate", At: at(100), ActAt: at(40), Then: "alert", Detail: "its certificate is issued outside"},
		{Key: "REGISTRATION/1_1@2", What: "key", At: at(60), ActAt: at(30), Then: "rotate"},
		{Key: "REGISTRATION/1_1@1", What: "certificate", At: at(5), Then: "deactivate"},
		{Key: "app/token@3", What: "key", At: at(-2), Then: "alert", Detail: "the token needs a PIN"},
		{Key: "ROOT@1", What: "crl", At: at(7), ActAt: at(3), Then: "publish"},
		{Key: "app/x@1", What: "key", At: at(5), Then: "nothing"},
	}
	sortDue(list)
	var out bytes.Buffer
	writeTimeline(&out, list, now)
	want := strings.TrimLeft(`
2026-11-23  now
! 2026-11-21  2 days ago    app/token@3         key expired; somebody has to see to it: the token needs a PIN
  2026-11-26  in 3 days     ROOT@1              kmsd publishes a new list (revocation list expires 2026-11-30)
  2026-11-28  in 5 days     REGISTRATION/1_1@1  certificate expires; it still decrypts and verifies
  2026-11-28  in 5 days     app/x@1             key expires
December 2026
  2026-12-23  in 30 days    REGISTRATION/1_1@2  kmsd makes a new version (key expires 2027-01-22)
January 2027
! 2027-01-02  in 40 days    PMS@1               somebody has to see to it (certificate expires 2027-03-03): its certificate is issued outside
October 2028
  2028-10-23  in 23 months  ROOT@1              kmsd makes a new version (key expires 2031-11-22)
`, "\n")
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	out.Reset()
	writeTimeline(&out, nil, now)
	if out.String() != "Nothing expires in that time.\n" {
		t.Errorf("%q", out.String())
	}
	if v := viewDue(&list[0], now); v.Days != -2 || !v.Person || v.NextTime != "2026-11-21T12:00:00Z" {
		t.Errorf("%+v", v)
	}
}

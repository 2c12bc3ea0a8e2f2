package engine

import (
	"errors"
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// That something expires which kmsd does not replace is told some days before, once for each of these times: a document has the time up
// to which notices were given.
var noticeDays = []int{90, 30, 7, 1, 0}

const (
	kindNotices   = "renewal"
	noticesName   = "notices"
	noticesFormat = 1

	staleNotice = 7 * 24 * time.Hour // after which it is no news that something has expired
	maxNotices  = 100                // of one pass
)

// storedNotices is the document of the notices.
type storedNotices struct {
	Format int       `json:"format"`
	Until  time.Time `json:"until"` // what was to be told until then has been told
}

// notice is something that expires and is not replaced by itself.
type notice struct {
	Due
	begin time.Time // of its validity
}

// days returns the number of days before the end that a notice is to be given for, or -1. A time that is not in the second half of the
// validity is too early to speak of its end.
func (n *notice) days(last, now time.Time) int {
	told := -1
	for _, d := range noticeDays {
		at := n.At.Add(-days(d))
		if 2*days(d) <= n.At.Sub(n.begin) && !now.Before(at) && last.Before(at) {
			told = d
		}
	}
	if now.Sub(n.At) > staleNotice {
		return -1
	}
	return told
}

func (n *notice) text(d int, now time.Time) string {
	var text string
	switch left := n.At.Sub(now); {
	case d == 0:
		text = fmt.Sprintf("%s expired on %s", n.What.text(), n.At.UTC().Format(time.DateOnly))
	case left < days(2):
		text = fmt.Sprintf("%s expires in %d hours", n.What.text(), int(left.Hours()))
	default:
		text = fmt.Sprintf("%s expires in %d days, on %s", n.What.text(), int(left.Hours()/24), n.At.UTC().Format(time.DateOnly))
	}
	if n.Detail != "" {
		text += ": " + n.Detail
	}
	return text
}

// notice takes something that expires, unless that is far away.
func (r *round) notice(n *notice, now time.Time) {
	if left := n.At.Sub(now); left < days(noticeDays[0]+1) && left > -2*staleNotice {
		r.notices = append(r.notices, *n)
	}
}

// giveNotice tells what expires soon, of others as well.
func (y *survey) giveNotice(r *round) error {
	now := y.now
	failure := y.outsiders(func(n *notice) { r.notice(n, now) })
	var last storedNotices
	d, err := y.store.Document(kindNotices, noticesName)
	switch {
	case err == nil:
		if err := decodeDocument(&d, noticesFormat, &last); err != nil {
			return err
		}
		if now.Before(last.Until) { // the clock was set back, and that was accepted
			last.Until = now
		}
	case !errors.Is(err, keystore.ErrNotFound):
		return err
	}
	given := 0
	for i := range r.notices {
		n := &r.notices[i]
		d := n.days(last.Until, now)
		if d < 0 {
			continue
		}
		if given++; given <= maxNotices {
			y.log.Warn("something expires that kmsd does not replace", "key", n.Key, "what", n.text(d, now))
			y.happened(EventExpiring, n.Key, n.text(d, now))
		}
	}
	if given > maxNotices {
		y.happened(EventExpiring, keyspec.Ref{}, fmt.Sprintf("and %d more: kmsctl expiry", given-maxNotices))
	}
	if given == 0 && now.Sub(last.Until) < 24*time.Hour {
		return failure
	}
	change, err := document(kindNotices, noticesName, d.Revision, storedNotices{noticesFormat, now.UTC()}, false)
	if err != nil {
		return err
	}
	return errors.Join(failure, y.store.Apply(y.ctx, keystore.Commit{Documents: []keystore.DocumentChange{change}}))
}

package engine

import (
	"context"
	"time"

	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

// What is it that expires, and what happens then.
type (
	DueWhat string
	DueThen string
)

const (
	DueKey         DueWhat = "key"
	DueCertificate DueWhat = "certificate"
	DueCRL         DueWhat = "crl"

	ThenRotate     DueThen = "rotate"     // a new version
	ThenRecertify  DueThen = "recertify"  // a new certificate for the version
	ThenPublish    DueThen = "publish"    // a new revocation list
	ThenDeactivate DueThen = "deactivate" // nothing is made instead
	ThenAlert      DueThen = "alert"      // a person has to do something
	ThenNothing    DueThen = "nothing"
)

// Due is one thing that expires.
type Due struct {
	Key    keyspec.Ref
	What   DueWhat
	At     time.Time
	Then   DueThen
	ActAt  time.Time // when kmsd acts, zero when it does not
	Detail string
}

// Expiry returns a page of what expires until a time, or with the zero time of everything that does.
func (e *Engine) Expiry(ctx context.Context, c *Caller, until time.Time, after []byte, limit int) (list []Due, next []byte, err error) {
	err = e.do(ctx, c, &act{op: "expiry", admin: true, quiet: true}, func(u *use) error {
		_, err := u.opened()
		return err
	})
	return list, next, err
}

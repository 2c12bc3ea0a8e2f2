//go:build cgo

package token

import (
	"fmt"

	"github.com/ThalesIgnite/crypto11"
	"github.com/miekg/pkcs11"

	"github.com/kmsd-project/kmsd/enclave"
	driver "github.com/kmsd-project/kmsd/enclave/pkcs11"
)

// object is what we search a token for: what has all of the attributes that are not empty.
type object struct {
	class     uint
	id, label string // CKA_ID and CKA_LABEL
}

func keyObject(class uint, id []byte) object { return object{class: class, id: string(id)} }

// objectOf is the object with the secret of a key.
func objectOf(class uint, k *driver.Key) object { return object{class, string(k.ID), k.Label} }

func (o object) String() string {
	if o.label != "" {
		return fmt.Sprintf("CKA_LABEL %q and CKA_ID %x", o.label, o.id)
	}
	return fmt.Sprintf("CKA_ID %x", o.id)
}

// handle returns the handle of the one key with our CKA_ID. Labels and CKA_IDs are not unique on a token: with two hits it is not known
// which is ours, and neither is used.
func (c *connection) handle(s pkcs11.SessionHandle, o object) (pkcs11.ObjectHandle, error) {
	if err := c.usable(); err != nil {
		return 0, err
	}
	c.mu.Lock()
	h, ok := c.handles[o]
	c.mu.Unlock()
	if ok {
		return h, nil
	}
	found, err := c.search(s, o)
	if err == nil && len(found) == 0 {
		found, err = c.searchAgain(s, o)
	}
	if err != nil {
		return 0, err
	}
	switch len(found) {
	case 0:
		c.missed.Store(true)
		return 0, replaced(fmt.Sprintf("the token is there, but not the key with %s: it was initialised anew, or somebody removed the key", o))
	case 1:
	default:
		return 0, &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: fmt.Sprintf("the token has more than one key with %s", o),
			Remedy: "somebody has put another key there: remove it"}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handles[o] = found[0]
	return found[0], nil
}

// search returns the objects that o names, two at most.
func (c *connection) search(s pkcs11.SessionHandle, o object) ([]pkcs11.ObjectHandle, error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, o.class)}
	if o.id != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, []byte(o.id)))
	}
	if o.label != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, o.label))
	}
	err := c.module.FindObjectsInit(s, template)
	if err != nil {
		return nil, err
	}
	var found []pkcs11.ObjectHandle
	for len(found) < 2 {
		var more []pkcs11.ObjectHandle
		if more, _, err = c.module.FindObjects(s, 2); err != nil || len(more) == 0 {
			break
		}
		found = append(found, more...)
	}
	if end := c.module.FindObjectsFinal(s); err == nil {
		err = end
	}
	return found, err
}

// searchAgain makes sure that a key that was not found is not there: the token may have gone, or nobody may be logged in any more.
func (c *connection) searchAgain(s pkcs11.SessionHandle, o object) ([]pkcs11.ObjectHandle, error) {
	if _, err := c.module.GetTokenInfo(c.slot); err != nil {
		return nil, pkcs11.Error(pkcs11.CKR_TOKEN_NOT_PRESENT)
	}
	process.Lock() // nobody is between a logout and a login
	defer process.Unlock()
	state, err := c.module.GetSessionInfo(s)
	if err != nil {
		return nil, err
	}
	if c.needsLogin() && state.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return nil, pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	return c.search(s, o)
}

func (c *connection) forgetHandles() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.handles)
}

// destroy removes every object with the CKA_ID. None is no error.
func (c *connection) destroy(s pkcs11.SessionHandle, id []byte) error {
	if err := c.usable(); err != nil {
		return err
	}
	for _, class := range []uint{pkcs11.CKO_SECRET_KEY, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		o := keyObject(class, id)
		c.mu.Lock()
		delete(c.handles, o)
		c.mu.Unlock()
		for {
			found, err := c.search(s, o)
			if err != nil {
				return err
			}
			if len(found) == 0 {
				break
			}
			for _, h := range found {
				if err := c.module.DestroyObject(s, h); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// secretTemplate is the template of a symmetric key that may do only what is named.
func secretTemplate(id []byte, label string, may ...crypto11.AttributeType) (crypto11.AttributeSet, error) {
	return template(id, label, []crypto11.AttributeType{crypto11.CkaEncrypt, crypto11.CkaDecrypt, crypto11.CkaSign, crypto11.CkaVerify,
		crypto11.CkaWrap, crypto11.CkaUnwrap, crypto11.CkaDerive}, may)
}

// pairTemplates are the same for a pair: its private half may do only what is named, and the public half is for those who look at the token.
func pairTemplates(id []byte, label string, may ...crypto11.AttributeType) (private, public crypto11.AttributeSet, err error) {
	private, err = template(id, label, []crypto11.AttributeType{crypto11.CkaDecrypt, crypto11.CkaSign, crypto11.CkaSignRecover, crypto11.CkaUnwrap,
		crypto11.CkaDerive}, may)
	if err == nil {
		public, err = publicTemplate(id, label)
	}
	return private, public, err
}

func template(id []byte, label string, all, may []crypto11.AttributeType) (crypto11.AttributeSet, error) {
	a, err := crypto11.NewAttributeSetWithIDAndLabel(id, []byte(label))
	if err != nil {
		return nil, err
	}
	values := map[crypto11.AttributeType]any{crypto11.CkaToken: true, crypto11.CkaPrivate: true, crypto11.CkaSensitive: true, crypto11.CkaExtractable: false}
	for _, t := range all {
		values[t] = false
	}
	for _, t := range may {
		values[t] = true
	}
	for t, v := range values {
		if err := a.Set(t, v); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func publicTemplate(id []byte, label string) (crypto11.AttributeSet, error) {
	a, err := crypto11.NewAttributeSetWithIDAndLabel(id, []byte(label))
	if err != nil {
		return nil, err
	}
	for t, v := range map[crypto11.AttributeType]any{crypto11.CkaToken: true, crypto11.CkaPrivate: false, crypto11.CkaVerify: true} {
		if err := a.Set(t, v); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// confined refuses a new key that can leave the token after all, because the token did not keep to the template.
func (c *connection) confined(s pkcs11.SessionHandle, h pkcs11.ObjectHandle) error {
	got, err := c.module.GetAttributeValue(s, h, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, nil), pkcs11.NewAttribute(pkcs11.CKA_ALWAYS_SENSITIVE, nil),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, nil), pkcs11.NewAttribute(pkcs11.CKA_NEVER_EXTRACTABLE, nil),
	})
	if err != nil {
		return err
	}
	for i, want := range []bool{true, true, false, true} {
		if len(got[i].Value) != 1 || (got[i].Value[0] != 0) != want {
			return &enclave.Error{Kind: enclave.ErrMisconfigured, Detail: "the token makes keys that can be copied out of it"}
		}
	}
	return nil
}

// labelOf is what people see when they look at the token.
func labelOf(what string, id []byte) string { return fmt.Sprintf("kmsd %s %x", what, id[:4]) }

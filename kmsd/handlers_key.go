package main

import (
	"fmt"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

func handleKeyCreate(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyCreate](c)
	if err != nil {
		return nil, err
	}
	n, err := newKey(in)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Create(c.ctx, &c.session.who, n, c.request.Options.RequestKey))
}

func handleKeyImportBegin(c *call) (proto.Message, error) {
	if _, err := decode[proto.KeyImportBegin](c); err != nil {
		return nil, err
	}
	public, token, err := c.daemon.engine.ImportBegin(c.ctx, &c.session.who)
	if err != nil {
		return nil, err
	}
	return &proto.KeyImportBeginReply{PublicKey: public, Token: token[:]}, nil
}

func handleKeyImport(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyImport](c)
	if err != nil {
		return nil, err
	}
	n, err := newKey(&in.Key)
	if err != nil {
		return nil, err
	}
	if (len(in.Material) > 0) == (len(in.Wrapped) > 0) {
		return nil, invalid("exactly one of material and wrapped")
	}
	e, who, requestKey := c.daemon.engine, &c.session.who, c.request.Options.RequestKey
	if len(in.Material) > 0 {
		return c.keyReply(e.Import(c.ctx, who, n, in.Material, requestKey))
	}
	if len(in.Token) != len(engine.ImportToken{}) {
		return nil, invalid("token is not one of key_import_begin")
	}
	return c.keyReply(e.ImportWrapped(c.ctx, who, n, in.Wrapped, engine.ImportToken(in.Token), requestKey))
}

func handleKeyGet(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Get(c.ctx, &c.session.who, ref))
}

// listSpace is what of a frame the keys on one page may take, in bytes.
const listSpace = 48 << 10

func handleKeyList(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyList](c)
	if err != nil {
		return nil, err
	}
	limit := int(min(in.Limit, engine.MaxPage))
	if limit == 0 {
		limit = engine.MaxPage
	}
	// A page that does not fit a frame is asked for again, smaller.
	for {
		keys, next, err := c.daemon.engine.List(c.ctx, &c.session.who, in.Prefix, in.After, limit)
		if err != nil {
			return nil, err
		}
		reply := &proto.KeyListReply{Next: next, Keys: make([]proto.KeyInfo, len(keys))}
		size := 0
		for i, key := range keys {
			reply.Keys[i] = *listRow(key)
			size += infoSize(&reply.Keys[i])
		}
		if size <= listSpace || limit == 1 {
			return reply, nil
		}
		limit = max(1, min(limit, len(keys))/2)
	}
}

// listVersions is how many versions of a key a list shows.
const listVersions = 4

// listRow describes a key in a list: with its newest versions only, the current one among them. That is at most 8 KiB.
func listRow(key *keystore.Key) *proto.KeyInfo {
	info := keyInfo(key)
	info.Warnings = nil
	older := len(info.Versions) - listVersions
	if older <= 0 {
		return info
	}
	newest := info.Versions[older:]
	for i := range older {
		if info.Versions[i].Version == info.Current {
			newest[0] = info.Versions[i]
		}
	}
	info.Versions = newest
	return info
}

// infoSize estimates the encoded size of k in bytes, rather too large.
func infoSize(k *proto.KeyInfo) int {
	n := 512 + len(k.Name) + 224*len(k.Versions)
	for name, value := range k.Labels {
		n += 8 + len(name) + len(value)
	}
	for _, via := range k.UsableVia {
		n += 4 + len(via)
	}
	return n
}

func handleKeyFind(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyFind](c)
	if err != nil {
		return nil, err
	}
	key, number, err := c.daemon.engine.Find(c.ctx, &c.session.who, keystore.AliasKind(in.Kind), in.Value)
	if err != nil {
		return nil, err
	}
	return &proto.KeyFindReply{Key: *keyInfo(key), Version: uint32(number)}, nil
}

func handleKeySet(c *call) (proto.Message, error) {
	in, err := decode[proto.KeySet](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Set(c.ctx, &c.session.who, name, &engine.Settings{
		Labels: in.Labels, MinVersion: keyspec.Version(in.MinVersion), Keep: in.Keep, Uses: in.Uses,
	}))
}

func handleKeyRotate(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyRotate](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	notBefore, expires, none, err := validity(in.NotBefore, in.Expires)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Rotate(c.ctx, &c.session.who, name, notBefore, expires, none))
}

func handleKeySuspend(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Suspend(c.ctx, &c.session.who, ref))
}

func handleKeyResume(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.Resume(c.ctx, &c.session.who, ref))
}

func handleKeyRevoke(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyRevoke](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	reason := keyspec.Unspecified
	if in.Reason != "" {
		if reason, err = keyspec.ParseReason(in.Reason); err != nil {
			return nil, err
		}
	}
	return c.keyReply(c.daemon.engine.Revoke(c.ctx, &c.session.who, ref, reason, engine.Replace(in.Replace)))
}

func handleKeyDestroy(c *call) (proto.Message, error) {
	in, err := decode[proto.KeyDestroy](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	if in.Now {
		if in.DelaySeconds != 0 {
			return nil, invalid("now and a delay")
		}
		return c.keyReply(c.daemon.engine.DestroyNow(c.ctx, &c.session.who, ref))
	}
	if in.DelaySeconds > uint64(engine.MaxDestroyDelay/time.Second) {
		return nil, invalid("delay is over a year")
	}
	return c.keyReply(c.daemon.engine.Destroy(c.ctx, &c.session.who, ref, time.Duration(in.DelaySeconds)*time.Second))
}

func handleKeyDestroyCancel(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	return c.keyReply(c.daemon.engine.DestroyCancel(c.ctx, &c.session.who, ref))
}

func handlePublic(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	algorithm, number, p, err := c.daemon.engine.Public(c.ctx, &c.session.who, ref)
	if err != nil {
		return nil, err
	}
	reply := &proto.PublicReply{Algorithm: string(algorithm), Version: uint32(number), SPKI: p.SPKI}
	for _, alias := range engine.Aliases(number, p.SPKI) {
		switch alias.Kind {
		case keystore.AliasCKAID:
			reply.CKAID = alias.Value
		case keystore.AliasSSH:
			reply.SSHSHA256 = alias.Value
		}
	}
	return reply, nil
}

// keyRef decodes the params of an operation that takes nothing but a key.
func keyRef(c *call) (keyspec.Ref, error) {
	in, err := decode[proto.KeyRef](c)
	if err != nil {
		return keyspec.Ref{}, err
	}
	return keyspec.ParseRef(in.Key)
}

// newKey turns the description of a key into words.
func newKey(in *proto.KeyCreate) (*engine.NewKey, error) {
	name, err := keyspec.ParseName(in.Name)
	if err != nil {
		return nil, err
	}
	algorithm, err := keyspec.ParseAlgorithm(in.Algorithm)
	if err != nil {
		return nil, err
	}
	usages := make([]keyspec.Usage, len(in.Usage))
	for i, u := range in.Usage {
		if usages[i], err = keyspec.ParseUsage(u); err != nil {
			return nil, err
		}
	}
	notBefore, expires, none, err := validity(in.NotBefore, in.Expires)
	if err != nil {
		return nil, err
	}
	return &engine.NewKey{
		Name: name, Algorithm: algorithm, Usages: usages, Protection: keyspec.Protection(in.Protection),
		NotBefore: notBefore, Expires: expires, NoExpiry: none, Exportable: in.Exportable, Labels: in.Labels,
		Profile: in.Profile, Keep: in.Keep, UsableVia: in.UsableVia, Durable: in.Durable, Escrow: keyspec.Escrow(in.Escrow),
		Uses: in.Uses,
	}, nil
}

// maxTime is the last second of the year 9999, which certificates can still name.
const maxTime = 253402300799

func validity(notBefore, expires int64) (from, until time.Time, none bool, err error) {
	if notBefore < 0 || notBefore > maxTime || expires < proto.NoExpiry || expires > maxTime {
		return from, until, false, invalid("time out of range")
	}
	if notBefore != 0 {
		from = time.Unix(notBefore, 0)
	}
	if expires > 0 {
		until = time.Unix(expires, 0)
	}
	return from, until, expires == proto.NoExpiry, nil
}

// keyReply is the result of operations that return a key.
func (c *call) keyReply(key *keystore.Key, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	info := keyInfo(key)
	if key.Protection != keyspec.Software && key.Name.IsModule() {
		escrow := c.daemon.engine.NamespaceEscrow(key.Name)
		info.Escrow = string(escrow)
		switch escrow {
		case keyspec.EscrowNone:
			info.Warnings = append(info.Warnings, fmt.Sprintf("the keys %s/... open with this device only, and die with it: no backup can bring them back", key.Name))
		case keyspec.EscrowRecipients:
			info.Warnings = append(info.Warnings, fmt.Sprintf("the keys %s/... open with this device only, or by the escrow recipients from a backup", key.Name))
		}
	}
	return info, nil
}

// keyInfo describes a key to a client.
func keyInfo(key *keystore.Key) *proto.KeyInfo {
	info := &proto.KeyInfo{
		Name: string(key.Name), Algorithm: string(key.Algorithm), Usage: words(key.Usages), Origin: string(key.Origin),
		Protection: string(key.Protection), Profile: key.Profile, Exportable: key.Exportable, Durable: key.Durable,
		Owner: key.Owner, Labels: key.Labels, UsableVia: key.UsableVia, Created: seconds(key.Created),
		Current: uint32(key.Current), MinVersion: uint32(key.MinVersion), Keep: key.Keep,
		Limited: key.Limited, UsesLeft: key.UsesLeft,
		Versions: make([]proto.VersionInfo, len(key.Versions)),
	}
	info.Warnings = warnings(key)
	if row, err := mechanism.Lookup(key.Algorithm); err == nil {
		info.Schemes = words(row.SchemesFor(key.Usages))
	}
	for i := range key.Versions {
		v := &key.Versions[i]
		info.Versions[i] = proto.VersionInfo{
			Version: uint32(v.Number), State: string(v.State), Created: seconds(v.Created), NotBefore: seconds(v.NotBefore),
			Expires: seconds(v.Expires), Reason: string(v.Reason), Revoked: seconds(v.Revoked), DestroyAt: seconds(v.DestroyAt),
			Invocations: v.Invocations,
		}
		if v.Expires.IsZero() {
			info.Versions[i].Expires = proto.NoExpiry
		}
		if v.SPKISHA256 != [32]byte{} {
			info.Versions[i].SPKISHA256 = v.SPKISHA256[:]
		}
	}
	return info
}

// warnings says what the owner of a key should know, when it is made and whenever it is shown.
func warnings(key *keystore.Key) []string {
	switch key.Protection {
	case keyspec.TPM:
		return []string{"no backup possible: the private key exists in this TPM only, and is lost when the TPM is cleared, breaks or stays with another machine"}
	case keyspec.HSM:
		return []string{"no backup possible: the private key exists in this token only, and no backup of the keystore holds it"}
	}
	return nil
}

// seconds is the time on the wire, 0 for the zero time.
func seconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

func words[T ~string](in []T) []string {
	out := make([]string, len(in))
	for i, w := range in {
		out[i] = string(w)
	}
	return out
}

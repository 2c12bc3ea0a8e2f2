package main

import (
	"encoding/base64"
	"encoding/hex"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

// The shapes of --json. A field is never renamed or removed; scripts rely on them. Times are RFC 3339 in UTC, bytes are
// base64 where nothing else is said.

type identityView struct {
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	PID       uint32 `json:"pid"`
	Unit      string `json:"unit"`
	Principal string `json:"principal"`
	Admin     bool   `json:"admin"`
}

func viewIdentity(i proto.Identity) identityView {
	return identityView{i.UID, i.GID, i.PID, i.Unit, i.Principal, i.Admin}
}

type statusView struct {
	Version          string     `json:"version"`
	Mode             string     `json:"mode"`
	State            string     `json:"state"`
	StoreID          string     `json:"store_id"`
	InstanceID       string     `json:"instance_id"`
	Epoch            uint64     `json:"epoch"`
	Keys             uint64     `json:"keys"`
	ErasurePending   uint64     `json:"erasure_pending"`
	Rollback         string     `json:"rollback"`
	MemoryProtection string     `json:"memory_protection"`
	Warnings         []string   `json:"warnings"`
	Slots            []slotView `json:"slots"`
	Escrow           []string   `json:"escrow"`
	UptimeSeconds    uint64     `json:"uptime_seconds"`
	Connections      uint64     `json:"connections"`
	Requests         uint64     `json:"requests"`
	Busy             uint64     `json:"busy"`
	Panics           uint64     `json:"panics"`
	AuditEntries     uint64     `json:"audit_entries"`
	PolicyEpoch      uint64     `json:"policy_epoch"`
	LockReason       string     `json:"lock_reason,omitempty"`
	LockDetail       string     `json:"lock_detail,omitempty"`
	StorePin         string     `json:"store_pin,omitempty"`
}

func viewStatus(s *proto.Status) statusView {
	return statusView{
		Version: s.Version, Mode: s.Mode, State: s.State, StoreID: s.StoreID, InstanceID: s.InstanceID, Epoch: s.Epoch,
		Keys: s.Keys, ErasurePending: s.ErasurePending, Rollback: s.Rollback, MemoryProtection: s.MemoryProtection,
		Warnings: orEmpty(s.Warnings), Slots: viewSlots(s.Slots), Escrow: orEmpty(s.Escrow), UptimeSeconds: s.UptimeSeconds,
		Connections: s.Connections, Requests: s.Requests, Busy: s.Busy, Panics: s.Panics, AuditEntries: s.AuditEntries,
		PolicyEpoch: s.PolicyEpoch, LockReason: s.LockReason, LockDetail: s.LockDetail, StorePin: s.StorePin,
	}
}

type slotView struct {
	ID       uint32 `json:"id"`
	Kind     string `json:"kind"`
	Label    string `json:"label"`
	Level    string `json:"level"`
	Health   string `json:"health"`
	Until    string `json:"until,omitempty"`
	Detail   string `json:"detail,omitempty"`
	Binding  string `json:"binding"`
	Location string `json:"location"`
	Created  string `json:"created"`
}

func viewSlot(s proto.Slot) slotView {
	return slotView{s.ID, s.Kind, s.Label, s.Level, s.Health, stamp(s.Until), s.Detail, s.Binding, s.Location, stamp(s.Created)}
}

func viewSlots(slots []proto.Slot) []slotView {
	out := make([]slotView, len(slots))
	for i, s := range slots {
		out[i] = viewSlot(s)
	}
	return out
}

type keyView struct {
	Name       string            `json:"name"`
	Algorithm  string            `json:"algorithm"`
	Usage      []string          `json:"usage"`
	Schemes    []string          `json:"schemes"`
	Origin     string            `json:"origin"`
	Protection string            `json:"protection"`
	Escrow     string            `json:"escrow,omitempty"`
	Warnings   []string          `json:"warnings,omitempty"`
	Profile    string            `json:"profile,omitempty"`
	Exportable bool              `json:"exportable"`
	Durable    bool              `json:"durable"`
	Owner      uint32            `json:"owner"`
	Labels     map[string]string `json:"labels"`
	UsableVia  []string          `json:"usable_via"`
	Created    string            `json:"created"`
	Current    uint32            `json:"current"`
	MinVersion uint32            `json:"min_version"`
	Keep       uint32            `json:"keep"`
	UsesLeft   *uint64           `json:"uses_left,omitempty"` // of a key that is limited to a number of uses
	Versions   []versionView     `json:"versions"`
}

type versionView struct {
	Version     uint32 `json:"version"`
	State       string `json:"state"`
	Created     string `json:"created"`
	NotBefore   string `json:"not_before"`
	Expires     string `json:"expires"`
	Reason      string `json:"reason,omitempty"`
	Revoked     string `json:"revoked,omitempty"`
	DestroyAt   string `json:"destroy_at,omitempty"`
	Invocations uint64 `json:"invocations"`
	SPKISHA256  string `json:"spki_sha256,omitempty"` // hexadecimal
}

func viewKey(k *proto.KeyInfo) keyView {
	v := keyView{
		Name: k.Name, Algorithm: k.Algorithm, Usage: orEmpty(k.Usage), Schemes: orEmpty(k.Schemes), Origin: k.Origin,
		Protection: k.Protection, Escrow: k.Escrow, Warnings: k.Warnings, Profile: k.Profile, Exportable: k.Exportable, Durable: k.Durable, Owner: k.Owner,
		Labels: k.Labels, UsableVia: orEmpty(k.UsableVia), Created: stamp(k.Created), Current: k.Current,
		MinVersion: k.MinVersion, Keep: k.Keep, Versions: make([]versionView, len(k.Versions)),
	}
	if k.Limited {
		v.UsesLeft = &k.UsesLeft
	}
	if v.Labels == nil {
		v.Labels = map[string]string{}
	}
	for i, n := range k.Versions {
		v.Versions[i] = versionView{
			n.Version, n.State, stamp(n.Created), stamp(n.NotBefore), stamp(n.Expires), n.Reason, stamp(n.Revoked),
			stamp(n.DestroyAt), n.Invocations, hex.EncodeToString(n.SPKISHA256),
		}
	}
	return v
}

type auditView struct {
	Number      uint64 `json:"number"`
	Time        string `json:"time"`
	Op          string `json:"op"`
	Key         string `json:"key,omitempty"`
	Version     uint32 `json:"version,omitempty"`
	UID         uint32 `json:"uid"`
	PID         uint32 `json:"pid"`
	Principal   string `json:"principal"`
	Via         string `json:"via,omitempty"`
	Allowed     bool   `json:"allowed"`
	Code        string `json:"code"`
	Detail      string `json:"detail,omitempty"`
	DetailID    string `json:"detail_id,omitempty"`
	PolicyEpoch uint64 `json:"policy_epoch"`
}

func viewAudit(e proto.AuditEntry) auditView {
	return auditView{
		e.Number, time.UnixMilli(e.Time).UTC().Format("2006-01-02T15:04:05.000Z07:00"), e.Op, e.Key, e.Version, e.UID, e.PID,
		e.Principal, e.Via, e.Allowed, e.Code, e.Detail, e.DetailID, e.Epoch,
	}
}

type progressView struct {
	Records  uint64   `json:"records"`
	Damaged  []string `json:"damaged"`
	Messages []string `json:"messages"`
	Epoch    uint64   `json:"epoch"`
}

func viewProgress(p *proto.ProgressReply) progressView {
	return progressView{p.Records, orEmpty(p.Damaged), orEmpty(p.Messages), p.Epoch}
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

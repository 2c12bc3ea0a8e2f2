package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"filippo.io/age"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/kmsd/audit"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

func handleRootRotate(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	s := c.daemon.store.Load()
	err := c.change("", func() error { return s.RotateRoot(c.ctx) })
	if err != nil {
		return nil, err
	}
	return &proto.ProgressReply{Epoch: uint64(s.Info().Epoch), Messages: []string{"the root key was replaced and sealed to every slot"}}, nil
}

func handleEpochRotate(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	s := c.daemon.store.Load()
	var progress keystore.Progress
	err := c.change("", func() error { return s.RotateEpoch(c.ctx, &progress) })
	if err != nil {
		return nil, err
	}
	return &proto.ProgressReply{Records: progress.Done.Load(), Epoch: uint64(s.Info().Epoch)}, nil
}

func handleStoreVerify(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	s := c.daemon.store.Load()
	var progress keystore.Progress
	var report keystore.Report
	err := c.administrate("", func() (err error) {
		report, err = s.Verify(c.ctx, &progress)
		return err
	})
	if err != nil && len(report.Damaged) == 0 {
		return nil, err
	}
	reply := &proto.ProgressReply{
		Records: report.Versions, Epoch: uint64(s.Info().Epoch),
		Messages: []string{fmt.Sprintf("%d keys, %d versions, %d documents, %d orphans", report.Keys, report.Versions, report.Documents, report.Orphans)},
	}
	if report.Unopened > 0 {
		reply.Messages = append(reply.Messages, fmt.Sprintf("%d versions of closed namespaces could be checked from outside only", report.Unopened))
	}
	for i, d := range report.Damaged {
		if i == proto.MaxFindings {
			reply.Messages = append(reply.Messages, fmt.Sprintf("%d more are damaged", len(report.Damaged)-i))
			break
		}
		name := d.Ref.String()
		if d.Ref.Name == "" {
			name = "?"
		}
		reply.Damaged = append(reply.Damaged, name+": "+d.Text)
	}
	return reply, nil
}

func handleStoreCompact(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	s := c.daemon.store.Load()
	if err := c.change("", func() error { return s.Compact(c.ctx) }); err != nil {
		return nil, err
	}
	return &proto.ProgressReply{Epoch: uint64(s.Info().Epoch)}, nil
}

// administrate carries out an act of administration, authorised and recorded. It is for acts that only look: recorded on disk
// before they are answered, so that nobody gets to see what is not recorded.
func (c *call) administrate(info string, f func() error) error {
	return c.daemon.engine.Administrate(c.ctx, &c.session.who, c.request.Op, info, f)
}

// change is administrate for acts that change something: recorded before they are begun, and afterwards.
func (c *call) change(info string, f func() error) error {
	return c.daemon.engine.Change(c.ctx, &c.session.who, c.request.Op, info, f)
}

func handleBackupCreate(c *call) (proto.Message, error) {
	in, err := decode[proto.BackupCreate](c)
	if err != nil {
		return nil, err
	}
	d := c.daemon
	store := d.store.Load()
	all := in.Recipients
	for _, r := range store.Info().Escrow {
		if !slices.Contains(all, r) {
			all = append(all, r)
		}
	}
	if len(all) == 0 {
		return nil, invalid("a backup needs a recipient")
	}
	recipients, err := age.ParseRecipients(strings.NewReader(strings.Join(all, "\n")))
	if err != nil {
		return nil, invalid("recipient: " + err.Error())
	}
	reply := &proto.BackupReply{Recipients: all}
	err = c.change(strings.Join(all, " "), func() error {
		if err := d.engine.FlushAudit(c.ctx); err != nil {
			return err
		}
		head := d.audit.Head()
		options := keystore.BackupOptions{
			Recipients: recipients, AuditHead: fmt.Appendf(nil, "%d %x", head.Size, head.Root),
		}
		if p := d.policy.Load(); p != nil {
			digest := p.Digest()
			options.PolicyDigest = digest[:]
		}
		reply.Stream, err = c.session.addStream(d.backup(store, options))
		return err
	})
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// backupStream is a backup on its way to the client. It is written as fast as it is read.
type backupStream struct {
	pipe   *io.PipeReader
	cancel context.CancelFunc
	chunk  uint64
}

// backup begins a backup of s.
func (d *daemon) backup(s *keystore.Store, o keystore.BackupOptions) *backupStream {
	ctx, cancel := context.WithCancel(context.Background())
	r, w := io.Pipe()
	go func() {
		defer func() {
			if p := recover(); p != nil {
				d.panics.Add(1)
				text, stack := engine.DescribePanic(p)
				d.log.Error("the backup panicked", "panic", text, "stack", stack)
				w.CloseWithError(engine.ErrInternal)
			}
		}()
		_, err := s.Backup(ctx, w, o)
		w.CloseWithError(err)
	}()
	return &backupStream{pipe: r, cancel: cancel}
}

// read returns the next chunk and whether it is the last.
func (b *backupStream) read(n uint64) (data []byte, done bool, err error) {
	if n != b.chunk {
		return nil, false, engine.ErrStream
	}
	b.chunk++
	var buf bytes.Buffer
	_, err = io.CopyN(&buf, b.pipe, proto.MaxChunk)
	if errors.Is(err, io.EOF) {
		return buf.Bytes(), true, nil
	}
	return buf.Bytes(), false, err
}

// Close ends the backup.
func (b *backupStream) Close() {
	b.cancel()
	b.pipe.Close()
}

const (
	auditPage  = 100      // audit entries of one reply
	auditSpace = 60 << 10 // bytes of a frame that they may take
)

func handleAuditTail(c *call) (proto.Message, error) {
	in, err := decode[proto.AuditTail](c)
	if err != nil {
		return nil, err
	}
	limit := int(min(in.Limit, auditPage))
	if limit == 0 {
		limit = auditPage
	}
	d := c.daemon
	var entries []audit.Entry
	reply := &proto.AuditTailReply{}
	err = c.administrate("", func() error {
		if err := d.engine.FlushAudit(c.ctx); err != nil {
			return err
		}
		return d.engine.AuditSeed(func(seed []byte) (err error) {
			if in.Last {
				entries, reply.Next, err = d.audit.Last(c.ctx, seed, limit)
			} else {
				entries, reply.Next, err = d.audit.Tail(c.ctx, seed, in.From, limit)
			}
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	if !in.Last {
		// Reading is recorded too. Without this, whoever reads to the end would never find one.
		for n := len(entries); n > 0 && c.session.reads(&entries[n-1]); n-- {
			entries = entries[:n-1]
		}
	}
	return reply, fillAudit(reply, entries, in.Last)
}

// fillAudit puts as many entries into reply as fit a frame: the last ones, or else the first, and the next page begins
// with the first one that was left out.
func fillAudit(reply *proto.AuditTailReply, entries []audit.Entry, last bool) error {
	list := make([]proto.AuditEntry, len(entries))
	sizes := make([]int, len(entries))
	total := 0
	for i := range entries {
		e := &entries[i]
		list[i] = proto.AuditEntry{
			Number: e.Number, Time: e.Time.UnixMilli(), Op: e.Op, Key: e.Key, Version: uint32(e.Version), UID: e.UID, PID: uint32(e.PID),
			Principal: e.Principal, Via: e.Via, Client: e.Client, Trace: e.Trace, Allowed: e.Allowed, Code: e.Code, Detail: e.Detail,
			DetailID: e.DetailID, Epoch: e.PolicyEpoch,
		}
		encoded, err := proto.AppendParams(nil, &list[i])
		if err != nil {
			return err
		}
		sizes[i] = len(encoded)
		total += len(encoded)
	}
	for ; total > auditSpace && last; list, sizes = list[1:], sizes[1:] {
		total -= sizes[0]
	}
	for ; total > auditSpace; list = list[:len(list)-1] {
		reply.Next = list[len(list)-1].Number
		total -= sizes[len(list)-1]
	}
	reply.Entries = list
	return nil
}

// reads reports whether e records that this client has read the audit.
func (s *session) reads(e *audit.Entry) bool {
	return e.Op == proto.OpAuditTail && e.UID == s.who.UID && e.PID == s.who.PID
}

// handleAuditHead answers with the head of the tree after everything that was done before is on disk.
func handleAuditHead(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	d := c.daemon
	var head audit.Head
	err := d.engine.Inspect(c.ctx, &c.session.who, proto.OpAuditHead, func() error {
		if err := d.engine.FlushAudit(c.ctx); err != nil {
			return err
		}
		head = d.audit.Head()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &proto.AuditHead{Size: head.Size, Root: head.Root[:]}, nil
}

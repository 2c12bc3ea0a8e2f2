package main

import (
	"context"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
)

func handleCRLGet(c *call) (proto.Message, error) {
	in, err := decode[proto.CRLGet](c)
	if err != nil {
		return nil, err
	}
	issuer, err := keyspec.ParseRef(in.Issuer)
	if err != nil {
		return nil, err
	}
	list, err := c.daemon.engine.CRL(c.ctx, &c.session.who, issuer)
	if err != nil {
		return nil, err
	}
	switch {
	case in.Offset == 0:
	case in.Number != list.Number:
		return nil, keystore.ErrConflict
	case int(in.Offset) >= len(list.DER):
		return nil, invalid("offset behind the end of the list")
	}
	part := list.DER[in.Offset:]
	return &proto.CRLReply{
		CRL: part[:min(len(part), proto.MaxCRLPart)], Size: uint32(len(list.DER)), Number: list.Number, ThisUpdate: seconds(list.ThisUpdate),
		NextUpdate: seconds(list.NextUpdate), Entries: uint32(list.Entries),
	}, nil
}

func handleEvents(c *call) (proto.Message, error) {
	in, err := decode[proto.Events](c)
	if err != nil {
		return nil, err
	}
	source, after := in.Source, in.After
	switch {
	case len(source) == 0 && after != 0, len(source) > 0 && in.Recent:
		return nil, invalid("a page goes on after the one before, by its source and its number, or is the first")
	case in.WaitMS > proto.MaxWait:
		return nil, invalid("that is too long to wait")
	case len(source) == 0 && !in.Recent:
		source, after = c.daemon.engine.LastEvent()
	}
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	defer context.AfterFunc(c.daemon.stopping, cancel)() // who waits for an event does not hold up the end of kmsd
	page, err := c.daemon.engine.Events(ctx, &c.session.who, source, after, time.Duration(in.WaitMS)*time.Millisecond, proto.MaxEvents)
	if err != nil && c.ctx.Err() == nil && ctx.Err() != nil {
		return nil, keystore.ErrClosed
	}
	if err != nil {
		return nil, err
	}
	reply := &proto.EventsReply{Source: page.Source, Next: page.Next, Lost: page.Lost, Events: make([]proto.Event, len(page.Events))}
	for i := range page.Events {
		e := &page.Events[i]
		reply.Events[i] = proto.Event{Number: e.Number, Time: seconds(e.Time), Kind: string(e.Kind), Detail: e.Detail}
		if e.Key.Name != "" {
			reply.Events[i].Key = e.Key.String()
		}
	}
	return reply, nil
}

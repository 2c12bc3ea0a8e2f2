package main

import (
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
)

func handleExpiry(c *call) (proto.Message, error) {
	in, err := decode[proto.Expiry](c)
	if err != nil {
		return nil, err
	}
	if in.Until < 0 || in.Until > maxTime {
		return nil, invalid("time out of range")
	}
	var until time.Time
	if in.Until > 0 {
		until = time.Unix(in.Until, 0)
	}
	limit := int(in.Limit)
	if limit == 0 || limit > proto.MaxDue {
		limit = proto.MaxDue
	}
	list, next, err := c.daemon.engine.Expiry(c.ctx, &c.session.who, until, in.After, limit)
	if err != nil {
		return nil, err
	}
	reply := &proto.ExpiryReply{Next: next, Due: make([]proto.Due, len(list))}
	for i := range list {
		d := &list[i]
		reply.Due[i] = proto.Due{What: string(d.What), At: seconds(d.At), ActAt: seconds(d.ActAt), Then: string(d.Then), Detail: d.Detail}
		if d.Key.Name != "" {
			reply.Due[i].Key = d.Key.String()
		}
	}
	return reply, nil
}

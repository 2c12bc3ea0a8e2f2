package main

import (
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

func handleStreamBegin(c *call) (proto.Message, error) {
	in, err := decode[proto.StreamBegin](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	s, err := c.daemon.engine.BeginStream(c.ctx, &c.session.who, in.Op, ref, in.AAD, in.MAC, in.Head)
	if err != nil {
		return nil, err
	}
	id, err := c.session.addStream(s)
	if err != nil {
		return nil, err
	}
	return &proto.StreamBeginReply{Stream: id, Version: uint32(s.Version), Data: s.Head}, nil
}

func handleStreamUpdate(c *call) (proto.Message, error) {
	in, err := decode[proto.StreamUpdate](c)
	if err != nil {
		return nil, err
	}
	o, err := c.session.stream(in.Stream)
	if err != nil {
		return nil, err
	}
	reply := &proto.StreamData{}
	switch s := o.value.(type) {
	case *engine.Stream:
		reply.Data, err = s.Update(in.Chunk, in.Data, nil)
	case *backupStream:
		if len(in.Data) > 0 {
			err = invalid("a backup is read, not written")
			break
		}
		reply.Data, reply.Done, err = s.read(in.Chunk)
	}
	o.release()
	if err != nil || reply.Done {
		c.session.dropStream(in.Stream)
	}
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func handleStreamFinish(c *call) (proto.Message, error) {
	in, err := decode[proto.StreamRef](c)
	if err != nil {
		return nil, err
	}
	o, err := c.session.stream(in.Stream)
	if err != nil {
		return nil, err
	}
	reply := &proto.StreamData{Done: true}
	s, ok := o.value.(*engine.Stream)
	if ok {
		reply.Data, err = s.Finish(nil)
	}
	o.release()
	if !ok {
		return nil, invalid("this stream ends by itself")
	}
	c.session.dropStream(in.Stream)
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func handleStreamAbort(c *call) (proto.Message, error) {
	in, err := decode[proto.StreamRef](c)
	if err != nil {
		return nil, err
	}
	o, err := c.session.stream(in.Stream)
	if err != nil {
		return nil, err
	}
	o.release()
	c.session.dropStream(in.Stream)
	return &proto.Empty{}, nil
}

// streamLane is the lane of a chunk. Chunks to be worked on stay in the reader, which keeps them in order; a backup waits
// for the disk, and its client asks for one chunk after the other.
func streamLane(c *call) lane {
	var in proto.StreamRef
	if proto.DecodeReply(c.request.Params, &in) != nil {
		return laneInline
	}
	c.session.mu.Lock()
	defer c.session.mu.Unlock()
	if o := c.session.streams[in.Stream]; o != nil && o.waits {
		return laneStore
	}
	return laneInline
}

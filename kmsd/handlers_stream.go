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
	reply, err := o.update(c, in)
	if err != nil || reply.Done {
		c.session.dropStream(in.Stream)
	}
	if err != nil {
		return nil, err
	}
	return reply, nil
}

// update hands a chunk to the stream. It releases o whatever happens, or the next chunk would wait for ever.
func (o *openStream) update(c *call, in *proto.StreamUpdate) (*proto.StreamData, error) {
	defer o.release()
	reply := &proto.StreamData{}
	var err error
	switch s := o.value.(type) {
	case *engine.Stream:
		reply.Data, err = s.Update(in.Chunk, in.Data, c.chunk())
	case *backupStream:
		if len(in.Data) > 0 {
			return nil, invalid("a backup is read, not written")
		}
		reply.Data, reply.Done, err = s.read(in.Chunk)
	}
	return reply, err
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
	if o.waits {
		o.release()
		return nil, invalid("this stream ends by itself")
	}
	data, err := o.finish(c)
	c.session.dropStream(in.Stream)
	if err != nil {
		return nil, err
	}
	return &proto.StreamData{Data: data, Done: true}, nil
}

// finish ends the stream. It releases o whatever happens.
func (o *openStream) finish(c *call) ([]byte, error) {
	defer o.release()
	return o.value.(*engine.Stream).Finish(c.chunk())
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

package main

import "github.com/kmsd-project/kmsd/ipc/proto"

func operations() map[string]operation { return nil }

func wireError(err error) *proto.Error {
	if e, ok := err.(*proto.Error); ok {
		return e
	}
	return &proto.Error{Code: proto.CodeInternal, Class: proto.ClassInternal, Message: "internal error"}
}

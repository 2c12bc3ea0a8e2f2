package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
)

// pending is an enrolment whose secrets were sent to a client, who has not yet confirmed that they are safe. It ends with the connection.
//
// Invariant: a slot that a recovery key or shares open is part of a keystore only after somebody has those. A connection that breaks in
// between leaves nothing behind.
type pending struct {
	op        string
	token     [16]byte
	enrolment *enrolment
}

// await keeps the enrolment until it is confirmed, and returns what for. It takes the place of an earlier one of the connection.
func (s *session) await(op string, n *enrolment) []byte {
	p := &pending{op: op, enrolment: n}
	rand.Read(p.token[:])
	s.mu.Lock()
	gone := s.pending
	if s.closed {
		gone = p
	} else {
		s.pending = p
	}
	s.mu.Unlock()
	gone.drop()
	return p.token[:]
}

// confirmed returns the enrolment that the client confirms. The caller closes it.
func (s *session) confirmed(op string, token []byte) (*enrolment, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pending
	if p == nil || p.op != op || subtle.ConstantTimeCompare(p.token[:], token) != 1 {
		return nil, invalid("there is nothing to confirm, or no longer: ask for it again")
	}
	s.pending = nil
	return p.enrolment, nil
}

// drop lets the devices forget what was not confirmed.
func (p *pending) drop() {
	if p != nil {
		p.enrolment.abort(context.Background())
		p.enrolment.close()
	}
}

package main

import (
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/pki"
)

func handleCertRequest(c *call) (proto.Message, error) {
	in, err := decode[proto.CertRequest](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	s, err := subject(&in.Subject)
	if err != nil {
		return nil, err
	}
	der, err := c.daemon.engine.CertRequest(c.ctx, &c.session.who, ref, s)
	if err != nil {
		return nil, err
	}
	return &proto.CertChain{Chain: [][]byte{der}}, nil
}

func handleCertSelfSign(c *call) (proto.Message, error) {
	in, err := decode[proto.CertSelfSign](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	s, err := subject(&in.Subject)
	if err != nil {
		return nil, err
	}
	p, err := profile(&in.Profile)
	if err != nil {
		return nil, err
	}
	return chainReply(c.daemon.engine.CertSelfSign(c.ctx, &c.session.who, ref, s, p))
}

func handleCertIssue(c *call) (proto.Message, error) {
	in, err := decode[proto.CertIssue](c)
	if err != nil {
		return nil, err
	}
	issuer, err := keyspec.ParseRef(in.Issuer)
	if err != nil {
		return nil, err
	}
	var key keyspec.Ref
	if in.Key != "" {
		if key, err = keyspec.ParseRef(in.Key); err != nil {
			return nil, err
		}
	}
	s := &pki.Subject{}
	if named(&in.Subject) || len(in.Request) == 0 { // else the subject of the request
		if s, err = subject(&in.Subject); err != nil {
			return nil, err
		}
	}
	p, err := profile(&in.Profile)
	if err != nil {
		return nil, err
	}
	return chainReply(c.daemon.engine.CertIssue(c.ctx, &c.session.who, issuer, in.Request, key, s, p))
}

func handleCertAttach(c *call) (proto.Message, error) {
	in, err := decode[proto.CertAttach](c)
	if err != nil {
		return nil, err
	}
	ref, err := keyspec.ParseRef(in.Key)
	if err != nil {
		return nil, err
	}
	if err := c.daemon.engine.CertAttach(c.ctx, &c.session.who, ref, in.Chain); err != nil {
		return nil, err
	}
	return &proto.Empty{}, nil
}

func handleCertGet(c *call) (proto.Message, error) {
	ref, err := keyRef(c)
	if err != nil {
		return nil, err
	}
	return chainReply(c.daemon.engine.CertGet(c.ctx, &c.session.who, ref))
}

func chainReply(chain [][]byte, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return &proto.CertChain{Chain: chain}, nil
}

func named(in *proto.Subject) bool {
	return in.DN != "" || len(in.DNS)+len(in.IP)+len(in.Email)+len(in.URI) > 0
}

func subject(in *proto.Subject) (*pki.Subject, error) {
	s, err := pki.ParseSubject(in.DN, in.DNS, in.IP, in.Email, in.URI)
	if err != nil {
		return nil, err
	}
	return &s, nil
}

func profile(in *proto.CertProfile) (*pki.Profile, error) {
	if in.NotBefore < 0 || in.NotBefore > maxTime || in.NotAfter < 0 || in.NotAfter > maxTime || in.PathLen < -1 || in.PathLen > pki.MaxChain {
		return nil, invalid("certificate profile out of range")
	}
	p := &pki.Profile{CA: in.CA, PathLen: int(in.PathLen), KeyUsage: in.KeyUsage, ExtKeyUsage: in.ExtKeyUse}
	if in.NotBefore > 0 {
		p.NotBefore = time.Unix(in.NotBefore, 0)
	}
	if in.NotAfter > 0 {
		p.NotAfter = time.Unix(in.NotAfter, 0)
	}
	return p, nil
}

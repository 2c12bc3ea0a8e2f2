package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/enclave"
	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
	"github.com/kmsd-project/kmsd/kmsd/mechanism"
)

// capabilityTime is what one device gets to say what it can do: a discrete TPM is asked a dozen questions.
const capabilityTime = 10 * time.Second

// handleCapabilities lists what can be done, by software and by the devices that are there: those are asked.
func handleCapabilities(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	reply := &proto.CapabilitiesReply{}
	for _, row := range mechanism.Table() {
		reply.Algorithms = append(reply.Algorithms, proto.Capability{
			Algorithm: string(row.Algorithm), Protection: string(keyspec.Software), Usages: words(row.Usages), Default: words(row.Default),
			Schemes: words(row.Schemes), Class: string(row.Class), Operations: operationsOf(row, row.Usages),
		})
	}
	for _, p := range []keyspec.Protection{keyspec.TPM, keyspec.HSM} {
		ctx, cancel := context.WithTimeout(c.ctx, capabilityTime)
		location, list, err := c.daemon.engine.Mechanisms(ctx, p)
		cancel()
		if err != nil {
			reply.Notes = append(reply.Notes, fmt.Sprintf("%s: %s", p, whyNot(err, c.session.who.Admin)))
			continue
		}
		for _, row := range mechanism.Table() {
			if row, ok := deviceRow(row, p, list); ok {
				reply.Algorithms = append(reply.Algorithms, row)
			}
		}
		if c.session.who.Admin {
			reply.Notes = append(reply.Notes, fmt.Sprintf("%s: new keys are made in %s", p, location))
		}
		if p == keyspec.TPM {
			reply.Notes = append(reply.Notes, "tpm: no AES keys, since no TPM has AES-GCM; a key in software below a module key in the TPM comes close to one")
		}
	}
	return reply, nil
}

// whyNot says why a device could not be asked. What an application is told does not say where it is.
func whyNot(err error, admin bool) string {
	var device *enclave.Error
	if errors.As(err, &device) && !admin {
		return device.Kind.Error()
	}
	return inWords(wireError(err))
}

// deviceRow describes what a device can do with an algorithm, if that is anything.
func deviceRow(row *mechanism.Row, p keyspec.Protection, list []enclave.Mechanism) (proto.Capability, bool) {
	var usages, usual []keyspec.Usage
	var schemes []keyspec.Scheme
	private := false
	for _, u := range row.Usages {
		one := []keyspec.Usage{u}
		needs := len(row.PrivateUsages(one)) > 0
		if needs && !engine.Can(list, row, one) {
			continue
		}
		private = private || needs
		usages = append(usages, u)
		if slices.Contains(row.Default, u) {
			usual = append(usual, u)
		}
	}
	for _, s := range row.Schemes {
		if slices.ContainsFunc(list, func(m enclave.Mechanism) bool {
			return m.Algorithm == row.Algorithm && (len(m.Schemes) == 0 || slices.Contains(m.Schemes, s))
		}) {
			schemes = append(schemes, s)
		}
	}
	return proto.Capability{
		Algorithm: string(row.Algorithm), Protection: string(p), Usages: words(usages), Default: words(usual), Schemes: words(schemes),
		Class: string(row.Class), Operations: operationsOf(row, usages),
	}, private
}

// usesOf says which operations a usage opens.
var usesOf = map[keyspec.Usage][]string{
	keyspec.Sign:    {proto.OpSign, proto.OpCertRequest, proto.OpCertSelfSign},
	keyspec.Verify:  {proto.OpVerify},
	keyspec.Encrypt: {proto.OpEncrypt},
	keyspec.Decrypt: {proto.OpDecrypt},
	keyspec.Wrap:    {proto.OpWrap},
	keyspec.Unwrap:  {proto.OpUnwrap},
	keyspec.MAC:     {proto.OpMAC},
	keyspec.Agree:   {proto.OpAgree},
	keyspec.Derive:  {proto.OpDerive},
	keyspec.Certify: {proto.OpCertRequest, proto.OpCertSelfSign, proto.OpCertIssue},
}

// operationsOf lists what can be done with keys of an algorithm that have these usages, beside what can be done with every key.
func operationsOf(row *mechanism.Row, usages []keyspec.Usage) []string {
	var out []string
	for _, u := range usages {
		for _, op := range usesOf[u] {
			switch {
			case op == proto.OpVerify && row.Kind == mechanism.KindHMAC:
				op = proto.OpMACVerify
			case row.Kind != mechanism.KindAEAD:
			case op == proto.OpEncrypt:
				out = append(out, proto.OpDataKey, proto.OpRewrap)
			}
			out = append(out, op)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

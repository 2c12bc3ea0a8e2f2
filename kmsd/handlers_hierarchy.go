package main

import (
	"maps"
	"slices"
	"time"

	"github.com/kmsd-project/kmsd/ipc/proto"
	"github.com/kmsd-project/kmsd/keystore/keyspec"
	"github.com/kmsd-project/kmsd/kmsd/engine"
)

// pageSpace is what of a frame the elements on one page may take, in bytes.
const pageSpace = 44 << 10

func handleAppList(c *call) (proto.Message, error) {
	in, err := decode[proto.AppList](c)
	if err != nil {
		return nil, err
	}
	all, err := c.daemon.engine.Applications(c.ctx, &c.session.who)
	if err != nil {
		return nil, err
	}
	limit := int(in.Limit)
	if limit == 0 || limit > proto.MaxApplications {
		limit = proto.MaxApplications
	}
	reply := &proto.AppListReply{}
	size := 0
	for i := range all {
		if all[i].Name <= in.After {
			continue
		}
		one := applicationReply(&all[i])
		n, err := encodedSize(one)
		if err != nil {
			return nil, err
		}
		if size += n; len(reply.Applications) > 0 && (size > pageSpace || len(reply.Applications) == limit) {
			reply.Next = reply.Applications[len(reply.Applications)-1].Name
			break
		}
		reply.Applications = append(reply.Applications, *one)
	}
	return reply, nil
}

func encodedSize(m proto.Message) (int, error) {
	b, err := proto.AppendParams(nil, m)
	return len(b), err
}

func handleAppGet(c *call) (proto.Message, error) {
	in, err := decode[proto.AppRef](c)
	if err != nil {
		return nil, err
	}
	get := c.daemon.engine.Application
	if in.Settings {
		get = c.daemon.engine.Settings
	}
	a, err := get(c.ctx, &c.session.who, in.Name)
	if err != nil {
		return nil, err
	}
	return applicationReply(a), nil
}

func handleAppSet(c *call) (proto.Message, error) {
	in, err := decode[proto.Application](c)
	if err != nil {
		return nil, err
	}
	if n, err := encodedSize(in); err != nil || n > proto.MaxApplication {
		return nil, invalid("the application takes too much space")
	}
	a, err := application(in)
	if err != nil {
		return nil, err
	}
	if a, err = c.daemon.engine.SetApplication(c.ctx, &c.session.who, a); err != nil {
		return nil, err
	}
	return applicationReply(a), nil
}

// maxPeriod is more days than any application may name, and fits an int everywhere.
const maxPeriod = 1 << 20

// application turns the message into words.
func application(in *proto.Application) (*engine.Application, error) {
	for _, n := range []uint32{in.Days, in.PreExpireDays, in.BaseDays, in.BasePreExpireDays} {
		if n > maxPeriod {
			return nil, invalid("number of days out of range")
		}
	}
	a := &engine.Application{
		Name: in.Name, Profile: in.Profile, Days: int(in.Days), PreExpireDays: int(in.PreExpireDays), BaseDays: int(in.BaseDays),
		BasePreExpireDays: int(in.BasePreExpireDays), Protection: keyspec.Protection(in.Protection), Subject: dn(&in.Subject), Inactive: in.Inactive,
	}
	var err error
	if in.Algorithm != "" {
		if a.Algorithm, err = keyspec.ParseAlgorithm(in.Algorithm); err != nil {
			return nil, err
		}
	}
	for _, n := range in.Names {
		if a.SANs == nil {
			a.SANs = make(map[string][]string)
		}
		if _, twice := a.SANs[n.Reference]; twice {
			return nil, invalid("names of one reference are there twice")
		}
		a.SANs[n.Reference] = n.Names
	}
	for _, r := range in.References {
		if r.Days > maxPeriod {
			return nil, invalid("number of days out of range")
		}
		one := engine.Reference{Name: r.Reference, Days: int(r.Days)}
		if r.Algorithm != "" {
			if one.Algorithm, err = keyspec.ParseAlgorithm(r.Algorithm); err != nil {
				return nil, err
			}
		}
		a.References = append(a.References, one)
	}
	return a, nil
}

func applicationReply(a *engine.Application) *proto.Application {
	out := &proto.Application{
		Name: a.Name, Profile: a.Profile, Days: uint32(a.Days), PreExpireDays: uint32(a.PreExpireDays), BaseDays: uint32(a.BaseDays),
		BasePreExpireDays: uint32(a.BasePreExpireDays), Algorithm: string(a.Algorithm), Protection: string(a.Protection),
		Subject:  proto.DN{Country: a.Subject.C, State: a.Subject.ST, Locality: a.Subject.L, Organization: a.Subject.O, OrganizationalUnit: a.Subject.OU, CommonName: a.Subject.CN},
		Inactive: a.Inactive, BuiltIn: !a.Stored,
	}
	for _, reference := range slices.Sorted(maps.Keys(a.SANs)) {
		out.Names = append(out.Names, proto.AltNames{Reference: reference, Names: a.SANs[reference]})
	}
	for _, r := range a.References {
		out.References = append(out.References, proto.AppReference{Reference: r.Name, Algorithm: string(r.Algorithm), Days: uint32(r.Days)})
	}
	return out
}

func dn(in *proto.DN) engine.DN {
	return engine.DN{C: in.Country, ST: in.State, L: in.Locality, O: in.Organization, OU: in.OrganizationalUnit, CN: in.CommonName}
}

// holder says whom a certificate is for, nil for the defaults.
func holder(in *proto.DN, names []string) *engine.Holder {
	if *in == (proto.DN{}) && len(names) == 0 {
		return nil
	}
	return &engine.Holder{DN: dn(in), SANs: names}
}

func handleMasterGenerate(c *call) (proto.Message, error) {
	in, err := decode[proto.MasterGenerate](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	m := &engine.Master{
		Name: name, Force: in.Force, CSR: in.CSR, Symmetric: in.Symmetric, Protection: keyspec.Protection(in.Protection), Subject: holder(&in.Subject, in.Names),
	}
	if in.Escrow != "" {
		if m.Escrow, err = keyspec.ParseEscrow(in.Escrow); err != nil {
			return nil, err
		}
	}
	return certifiedReply(c.daemon.engine.MasterGenerate(c.ctx, &c.session.who, m))
}

func handleCertCurrent(c *call) (proto.Message, error) {
	name, h, err := current(c)
	if err != nil {
		return nil, err
	}
	return certifiedReply(c.daemon.engine.CertCurrent(c.ctx, &c.session.who, name, h))
}

func handleCertCSR(c *call) (proto.Message, error) {
	name, h, err := current(c)
	if err != nil {
		return nil, err
	}
	return certifiedReply(c.daemon.engine.CertRequestFor(c.ctx, &c.session.who, name, h))
}

func current(c *call) (keyspec.Name, *engine.Holder, error) {
	in, err := decode[proto.CertCurrent](c)
	if err != nil {
		return "", nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	return name, holder(&in.Subject, in.Names), err
}

func certifiedReply(k *engine.Certified, err error) (proto.Message, error) {
	if err != nil {
		return nil, err
	}
	return &proto.Certified{
		Key: k.Ref.String(), Chain: k.Chain, Request: k.Request, KeyID: k.KeyID, NotBefore: seconds(k.NotBefore), Expires: seconds(k.Expires), Made: k.Made,
	}, nil
}

// certificatesAtOnce is how many certificates of versions are read for one page.
const certificatesAtOnce = 32

func handleCertList(c *call) (proto.Message, error) {
	in, err := decode[proto.CertList](c)
	if err != nil {
		return nil, err
	}
	name, err := keyspec.ParseName(in.Key)
	if err != nil {
		return nil, err
	}
	list, err := c.daemon.engine.Certificates(c.ctx, &c.session.who, name, keyspec.Version(in.After), certificatesAtOnce)
	if err != nil {
		return nil, err
	}
	reply := &proto.CertListReply{}
	size := 0
	for i, v := range list {
		if len(v.Chain) > 0 {
			if size += len(v.Chain[0]) + 256; size > pageSpace && i > 0 {
				reply.Next = uint32(list[i-1].Version)
				return reply, nil
			}
			reply.Certificates = append(reply.Certificates, proto.CertVersion{
				Version: uint32(v.Version), State: string(v.State), KeyID: v.KeyID, Created: seconds(v.Created), NotBefore: seconds(v.NotBefore), Expires: seconds(v.Expires),
				Revoked: seconds(v.Revoked), Reason: string(v.Reason), Certificate: v.Chain[0],
			})
		}
	}
	if len(list) == certificatesAtOnce {
		reply.Next = uint32(list[len(list)-1].Version)
	}
	return reply, nil
}

func handleClockAccept(c *call) (proto.Message, error) {
	if _, err := decode[proto.Empty](c); err != nil {
		return nil, err
	}
	before := c.daemon.engine.ClockSeen()
	if err := c.daemon.engine.ClockAccept(c.ctx, &c.session.who); err != nil {
		return nil, err
	}
	return &proto.Clock{Now: time.Now().Unix(), Seen: seconds(before)}, nil
}

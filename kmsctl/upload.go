package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/kmsd-project/kmsd/client"
	"github.com/kmsd-project/kmsd/ipc/proto"
)

// certUploads are the commands for certificates that come from outside.
func certUploads(a *app) []*cobra.Command {
	return []*cobra.Command{newCertUpload(a), newCertUploadCA(a), newCertVerifyTrust(a)}
}

func newCertUpload(a *app) *cobra.Command {
	var in, domain string
	var other bool
	c := uses(a.onKey(&cobra.Command{
		Use:   "upload NAME[@N] --in F [--domain D] [--other-domain]",
		Short: "Bring in a certificate that was issued outside",
		Long: `Bring in a certificate that an outside authority has issued for a key, such as for the request of "kmsctl master generate --csr" or "kmsctl cert csr". It goes to
the version that has its public key, which then expires with it; what was encrypted to the certificate before is found still. With its chain in
the file, "kmsctl cert chain" gives it out; with --domain it has to be trusted there, and what lacks of the chain comes from there.

With --other-domain it is the certificate of somebody else's key, and NAME that of a base key, APP/REF: kmsd then encrypts to it, and makes no key of its
own under that name. A newer certificate takes its place.`,
		Example: `  kmsctl cert upload PMS --in pms.p7b
  kmsctl cert upload PMS --in pms.pem --domain TRUST_CA
  kmsctl cert upload --other-domain IDA/mpartner-default-auth --in partner.pem --domain AUTH`,
		RunE: func(c *cobra.Command, args []string) error {
			data, err := a.readFile(in, proto.MaxData)
			if err != nil {
				return err
			}
			var k *client.CertifiedKey
			err = a.with(c.Context(), func(ctx context.Context, cl *client.Client) (err error) {
				if other {
					k, err = cl.UploadOtherCertificate(ctx, args[0], domain, data)
				} else {
					k, err = cl.UploadCertificate(ctx, args[0], domain, data)
				}
				return err
			})
			if err != nil {
				return err
			}
			return a.print(viewCertified(k), func(io.Writer) {
				a.say("%s has the certificate of %s, valid until %s", k.Ref, printable(nameText(k.Chain[0].RawSubject)), stamp(k.Expires.Unix()))
			})
		},
	}), proto.OpCertUpload)
	certificatesFlag(c, &in, certificateFile)
	c.Flags().StringVar(&domain, "domain", "", "domain of trust in which it has to be trusted (default: that is not asked)")
	c.Flags().BoolVar(&other, "other-domain", false, "the certificate of somebody else's key, to encrypt to")
	c.RegisterFlagCompletionFunc("domain", a.completeDomainFlag)
	return c
}

// completeDomainFlag completes the domain of a flag.
func (a *app) completeDomainFlag(c *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.completeDomains(c, nil, begun)
}

// domacertificatesFlag is the flag for the domain of a command.
func (a *app) domainFlag(c *cobra.Command, domain *string) {
	c.Flags().StringVar(domain, "domain", "", "domain of trust, such as AUTH, DEVICE, FTM, MISP or TRUST_CA")
	c.MarkFlagRequired("domain")
	c.RegisterFlagCompletionFunc("domain", a.completeDomainFlag)
}

func newCertUploadCA(a *app) *cobra.Command {
	var in, domain string
	c := uses(&cobra.Command{
		Use:   "upload-ca --domain D --in F",
		Short: "Add CAs to a domain of trust",
		Long:  addTrustLong,
		Args:  exactArgs(),
		RunE:  func(c *cobra.Command, _ []string) error { return a.addTrust(c.Context(), domain, in) },
	}, proto.OpTrustAdd)
	certificatesFlag(c, &in, certificateFile)
	a.domainFlag(c, &domain)
	return c
}

func newCertVerifyTrust(a *app) *cobra.Command {
	var in, domain, at string
	c := uses(&cobra.Command{
		Use:   "verify-trust --domain D --in F [--at T]",
		Short: "Ask whether a certificate is trusted in a domain",
		Long:  checkTrustLong,
		Args:  exactArgs(),
		RunE:  func(c *cobra.Command, _ []string) error { return a.checkTrust(c.Context(), domain, in, at) },
	}, proto.OpTrustVerify)
	certificatesFlag(c, &in, certificateFile)
	a.domainFlag(c, &domain)
	atFlag(c, &at)
	return c
}

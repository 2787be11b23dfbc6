package main

import (
	"fmt"

	"vacate/internal/link/certs"

	"github.com/spf13/cobra"
)

func certsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "certs",
		Short: "Make certificates for hosts that have none",
		Long: `Hosts know each other by certificates. Each host has a directory with
  ca.pem    the CA whose certificates it trusts
  host.pem  its own certificate, with its name
  host.key  its key, which only its owner may read
Any CA can issue them: the name is the certificate's first DNS name, and the
certificate must be valid for servers and clients of TLS. If you have no CA,
make one here.

Files may be replaced at any time: the next handshake uses them.`,
		Example: `  vacate certs init --dir ca
  vacate certs issue --dir ca --name hosta --out hosta
  vacate certs issue --dir ca --name hostb --out hostb
  # Copy each of hosta and hostb to its host. Keep ca where neither can read it.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(certsInitCommand(), certsIssueCommand())
	return c
}

func certsInitCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "init --dir CA",
		Short: "Make a CA",
		Long: `Makes a CA for ten years: its certificate ca.pem and its key ca.key. With the
key, anyone can pose as any host: keep it off the hosts. Nothing is overwritten.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := certs.Init(dir); err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(),
				"made a CA in %s; next: vacate certs issue --dir %s --name HOST --out DIR\n",
				clean(dir), clean(dir))
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "`CA`, the directory for it")
	c.MarkFlagRequired("dir")
	return c
}

func certsIssueCommand() *cobra.Command {
	var dir, name, out string
	var days int
	var renew bool
	c := &cobra.Command{
		Use:   "issue --dir CA --name HOST --out DIR",
		Short: "Make a host's certificate and key",
		Long: `Makes the directory of a host: ca.pem, host.pem and host.key. With --renew it
replaces the certificate and the key of one that is there.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := certs.Issue(dir, name, out, days, renew); err != nil {
				return err
			}
			info, err := certs.Inspect(out)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.OutOrStdout(), "made the certificate of %s in %s, good until %s; next: "+
				"copy the files to /etc/vacate/certs there\n", info.Name, clean(out),
				info.NotAfter.UTC().Format("2006-01-02 15:04 MST"))
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "", "`CA`, the directory that init made")
	c.Flags().StringVar(&name, "name", "", "`HOST`, its DNS name or IP address")
	c.Flags().StringVar(&out, "out", "", "`DIR` for the files")
	c.Flags().IntVar(&days, "days", certs.DefaultDays, "for how many days")
	c.Flags().BoolVar(&renew, "renew", false, "replace what is there")
	for _, f := range []string{"dir", "name", "out"} {
		c.MarkFlagRequired(f)
	}
	return c
}

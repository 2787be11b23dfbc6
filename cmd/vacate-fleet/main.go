// Command vacate-fleet is the brain of a fleet: it decides which VM runs on which host, and orders
// hosts to evict. `vacate-fleet --help` tells how.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"vacate/internal/cli"
	"vacate/internal/fleet/leader"
	"vacate/internal/fleet/member"
	"vacate/internal/fleet/store"
	"vacate/internal/link/certs"
	"vacate/internal/manpage"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func main() {
	if err := command().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "vacate-fleet:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var file, format, restore string
	var check, man bool
	c := &cobra.Command{
		Use:   "vacate-fleet",
		Short: "Decide which VM of a fleet runs on which host",
		Long: `Takes the reports of all hosts of a fleet, decides which VM is evicted and where
to, and orders hosts to do so. One runs for a trial; three or five go on when
one or two are lost. What the fleet remembers is in etcd, which runs within
vacate-fleet, or is your own. Hosts go on by themselves while none runs.

A host belongs to the fleet when [fleet] in its vacated.toml names the members.
Operators ask with vacate fleet. The fleet only watches until an operator says
vacate fleet mode ask, or auto.

The configuration (TOML):
  certs   = "/etc/vacate/certs"      # who this member is; see vacate certs
  listen  = ":7610"                  # hosts and operators ask there
  address = "brain1:7610"            # where others reach it; default: the name in
                                     # the certificate, and the port of listen
  data    = "/var/lib/vacate-fleet"  # etcd's files
  members = ["brain1:7611", "brain2:7611", "brain3:7611"]  # NAME:PORT of all, by
                                     # the names in their certificates; default: alone
  joins   = true                     # the others are there already; default: false
  brains  = ["brain1", "brain2"]     # names of all members, with [etcd]
  hosts   = ["host*"]                # names that hosts may have; default: any
  generation = 1                     # raise it when the store was lost; default: 0
  metrics = "127.0.0.1:9610"         # /metrics for Prometheus; default: nowhere
  [operators]                        # by the names in their certificates
  view  = ["monitor"]                # may look
  act   = ["night"]                  # may also drain, restore and approve
  admin = ["admin"]                  # may also change rules and the mode
  [hook]                             # told of drains by HTTP; default: none
  url  = "https://example.org/drains"
  time = "10s"                       # that a call may take
  [etcd]                             # your own; default: it runs in this process
  urls = ["https://etcd1:2379"]
  ca   = "/etc/etcd/ca.pem"
  cert = "/etc/etcd/client.pem"
  key  = "/etc/etcd/client.key"`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			if man {
				_, err := io.WriteString(c.OutOrStdout(), manpage.Page(c, 8))
				return err
			}
			config, err := readConfig(file)
			if err != nil {
				return err
			}
			if check {
				there, err := config.look()
				if err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				fmt.Fprintf(c.OutOrStdout(), "%s is good: %s\n", file, there)
				return nil
			}
			if restore != "" {
				return config.restore(restore)
			}
			return run(c.Context(), config, format)
		},
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Version:           cli.DaemonVersion(),
	}
	c.Flags().StringVar(&file, "config", "/etc/vacate/vacate-fleet.toml",
		"`FILE` with the configuration")
	c.Flags().StringVar(&format, "log-format", "text",
		"form of the log on standard error: text or json")
	c.Flags().BoolVar(&check, "check", false,
		"only check the configuration, and what it names on this host")
	c.Flags().StringVar(&restore, "restore", "",
		"make the store of a backup, `FILE` of vacate fleet backup, and end")
	c.Flags().BoolVar(&man, "man", false, "write the manual page")
	c.Flags().MarkHidden("man")
	return c
}

func run(ctx context.Context, c config, format string) error {
	log, err := cli.Log(os.Stderr, format)
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	identity, err := certs.Load(c.Certs, func(err error) {
		log.Error("the new certificate files cannot be used; the old ones stay in use", "error",
			err)
	})
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return err
	}
	defer ln.Close()
	var scrape net.Listener
	if c.Metrics != "" {
		if scrape, err = net.Listen("tcp", c.Metrics); err != nil {
			return err
		}
		defer scrape.Close()
	}
	client, closeStore, err := open(ctx, c, identity.Name(), log)
	if err != nil {
		return err
	}
	defer closeStore()
	s, err := store.New(client, c.Generation)
	if err != nil {
		return err
	}
	set := leader.Config{Me: c.me(identity.Name()), Version: cli.DaemonVersion(),
		View: c.Operators.View, Act: c.Operators.Act, Admin: c.Operators.Admin,
		Members: c.names(identity.Name()), Hosts: c.Hosts}
	if c.Hook != nil {
		set.Hooks = leader.Hooks{URL: c.Hook.URL, Time: c.Hook.Time}
	}
	b := leader.New(set, s, log)
	failed := make(chan error, 2)
	var tasks sync.WaitGroup
	tasks.Go(func() { b.Run(ctx) })
	serve := func(f func() error) {
		tasks.Go(func() {
			defer stop()
			failed <- f()
		})
	}
	serve(func() error { return b.Serve(ctx, ln, identity) })
	if scrape != nil {
		serve(func() error { return b.ServeMetrics(ctx, scrape) })
	}
	log.Info("serving", "member", c.me(identity.Name()), "listen", ln.Addr())
	tasks.Wait()
	return <-failed // the first says why the others ended
}

// open returns a client of the fleet's etcd, and what closes it.
func open(ctx context.Context, c config, name string, log *slog.Logger) (*clientv3.Client, func(),
	error) {
	if c.Etcd != nil {
		client, err := c.Etcd.dial()
		if err != nil {
			return nil, nil, err
		}
		return client, func() { client.Close() }, nil
	}
	m, err := member.Start(ctx, c.member(name), log)
	if err != nil {
		return nil, nil, err
	}
	return m.Client, m.Close, nil
}

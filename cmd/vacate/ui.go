package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"os/user"
	"strings"
	"sync"

	"vacate/internal/evict"
	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/internal/ui"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// hostsFlags are those of commands that ask several daemons.
type hostsFlags struct {
	socket string
	hosts  []string
	certs  string
	fleet  string
}

func (f *hostsFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.socket, "socket",
		cmp.Or(os.Getenv("VACATE_SOCKET"), defaultSocket),
		"`SOCKET` of this host's daemon; VACATE_SOCKET sets the default")
	c.Flags().StringArrayVar(&f.hosts, "host", nil,
		"a host whose daemon is asked, `NAME[@HOST:PORT]`, in place of this one's; may be given "+
			"several times")
	c.Flags().StringVar(&f.certs, "operator-certs", "/etc/vacate/certs",
		"directory of your certificate, for other hosts and a fleet")
	c.Flags().StringVar(&f.fleet, "fleet", os.Getenv("VACATE_FLEET"), fleetUsage)
	c.PreRun = func(c *cobra.Command, _ []string) {
		// What somebody types is meant more than what is set for all commands.
		if !c.Flags().Changed("fleet") &&
			(c.Flags().Changed("host") || c.Flags().Changed("socket")) {
			f.fleet = ""
		}
	}
}

// feed begins to keep a hub up to date about a fleet, or about hosts, until ctx is done. brain is
// nil for no fleet.
func (f *hostsFlags) feed(ctx context.Context, hub *ui.Hub, tasks *sync.WaitGroup) (
	list []ui.Remote, brain *ui.Brain, who string, err error) {
	if f.fleet != "" {
		if brain, who, err = f.brain(ctx); err != nil {
			return nil, nil, "", err
		}
		tasks.Go(func() { hub.PollFleet(ctx, brain, tellOf) })
		return nil, brain, who, nil
	}
	if list, who, err = f.remotes(ctx); err != nil {
		return nil, nil, "", err
	}
	for _, r := range list {
		hub.PutHost(&ui.Host{Key: r.Key, Name: r.Label, Error: "It was not asked yet",
			Peers: []string{}, VMs: []ui.VM{}})
		tasks.Go(func() { hub.Poll(ctx, r, tellOf) })
	}
	return list, nil, who, nil
}

// brain is that of the fleet. Daemons of its hosts are asked by their names, or where --host says.
func (f *hostsFlags) brain(ctx context.Context) (b *ui.Brain, who string, err error) {
	b = &ui.Brain{
		Find: func(ctx context.Context) (fleetv1.FleetClient, error) {
			ask := brain{members: f.fleet, certs: f.certs}
			err := ask.open(ctx)
			return ask.FleetClient, err
		},
		Daemon: func(host string) (ui.Remote, error) {
			at := host
			for _, h := range f.hosts {
				if name, _, _ := strings.Cut(h, "@"); name == host {
					at = h
				}
			}
			d := &daemon{host: at, certs: f.certs}
			err := d.open()
			return ui.Remote{HostClient: d, Key: host, Label: host, Explain: d.explain}, err
		},
	}
	if _, err := b.Find(ctx); err != nil {
		return nil, "", err
	}
	identity, err := certs.Load(f.certs, func(error) {})
	if err != nil {
		return nil, "", refused(err)
	}
	return b, identity.Info().Name, nil
}

// remotes are the daemons to ask, and who asks them. Without --host it is this host's and, where
// there is a certificate, those of its peers.
func (f *hostsFlags) remotes(ctx context.Context) (list []ui.Remote, who string, err error) {
	add := func(d *daemon, key, label string) error {
		if err := d.open(); err != nil {
			return err
		}
		list = append(list, ui.Remote{HostClient: d, Key: key, Label: label, Explain: d.explain})
		return nil
	}
	identity, noCerts := certs.Load(f.certs, func(error) {})
	if u, err := user.Current(); err == nil {
		who = "user " + u.Username
	}
	if len(f.hosts) == 0 {
		d := &daemon{socket: f.socket}
		if err := add(d, "here", "this host"); err != nil {
			return nil, "", err
		}
		r, err := d.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
		if err != nil {
			return nil, "", refused(d.explain(err))
		}
		list[0].Label = clean(r.Msg.Host)
		if noCerts != nil {
			return list, who, nil
		}
		for _, p := range r.Msg.Peers {
			host, _, err := net.SplitHostPort(p.Address)
			if err != nil {
				continue // no VM can go there
			}
			d := &daemon{host: p.Name + "@" + net.JoinHostPort(host, apiPort), certs: f.certs}
			if err := add(d, p.Name, clean(p.Name)); err != nil {
				return nil, "", err
			}
		}
		return list, fmt.Sprintf("%s here, %q elsewhere", who, identity.Info().Name), nil
	}
	if noCerts != nil {
		return nil, "", refused(fmt.Errorf("%w: --host needs an operator's certificate, see "+
			"--operator-certs", noCerts))
	}
	for _, h := range f.hosts {
		name, _, _ := strings.Cut(h, "@")
		if err := add(&daemon{host: h, certs: f.certs}, name, clean(name)); err != nil {
			return nil, "", err
		}
	}
	return list, identity.Info().Name, nil
}

// tellOf says where an eviction's VM is, as `vacate watch` does.
func tellOf(e *hostv1.Eviction) string {
	p, ok := progressOf(e)
	if !ok {
		p.State = evict.State(stateOf(e))
	}
	sentence, more := sceneOf(e, false).tell(p)
	for _, m := range more {
		sentence += m
	}
	return sentence
}

func uiCommand() *cobra.Command {
	var f hostsFlags
	var port uint16
	c := &cobra.Command{
		Use:   "ui",
		Short: "Serve a page that shows hosts, VMs and evictions, with buttons",
		Long: `Serves a page on 127.0.0.1 and prints its address. It shows this host and its
peers, or the hosts that --host names: the CPU and memory of their VMs, which VMs
starve, evictions as they go, and past ones with their reports. Its buttons do
what evict, abort, relieve, evacuate, decide, start and stop do; each shows first
what would come of it. The daemons' logs say that you asked.

With --fleet or VACATE_FLEET it shows a fleet, with its decisions and drains. Its
buttons then do what vacate fleet does. Daemons of hosts are asked only about
evictions under way, by the hosts' names, or where --host says.

The address opens the page once: then a new one is printed. Who has the page open
acts as you, so keep it to yourself. To see it from another machine:
  ssh -L 7680:127.0.0.1:7680 HOST vacate ui --port 7680

Daemons of other hosts need api.listen in their configuration, and your name
among api.operators. The page ends with the command.`,
		Example: `  vacate ui
  vacate ui --host hosta --host hostb --operator-certs ~/.vacate
  vacate ui --fleet brain1,brain2,brain3`,
		Args: cobra.NoArgs,
	}
	f.add(c)
	c.Flags().Uint16Var(&port, "port", 0, "`PORT` on 127.0.0.1 (default any that is free)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ctx, stop := signal.NotifyContext(c.Context(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
		defer stop()
		ln, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return err
		}
		defer ln.Close()
		var polling sync.WaitGroup
		defer polling.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		hub := ui.NewHub()
		list, brain, who, err := f.feed(ctx, hub, &polling)
		if err != nil {
			return err
		}
		first := true
		server := &ui.Server{Hub: hub, Remotes: list, Brain: brain, Who: who,
			Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
			Token: func(token string) {
				if !first {
					fmt.Fprint(c.OutOrStdout(), "For one more browser or tab: ")
				}
				first = false
				fmt.Fprintf(c.OutOrStdout(), "http://%s/#token=%s\n", ln.Addr(), token)
			}}
		return server.Serve(ctx, ln)
	}
	return c
}

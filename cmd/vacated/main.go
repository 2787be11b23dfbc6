// Command vacated is the daemon of a host from which VMs are evicted, or to which. `vacated --help`
// tells how.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"vacate/internal/cli"
	"vacate/internal/host"
	"vacate/internal/host/hypervisor"
	"vacate/internal/manpage"
	"vacate/internal/sys/sched"

	"github.com/spf13/cobra"
)

func main() {
	if err := command().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "vacated:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var file, format string
	var check, man bool
	c := &cobra.Command{
		Use:   "vacated",
		Short: "Evict VMs from this host, and take those of other hosts",
		Long: `Evicts VMs of this host when ` + "`vacate`" + ` asks, and takes VMs that other hosts
send. Both hosts of an eviction run it. It may be killed at any time and started
again: VMs live on, and it goes on with what was under way.

SIGTERM and SIGINT stop it. Evictions that can still be aborted are aborted; the
others wait for the next start, their VMs running or frozen as they are. SIGHUP
stops it when no eviction can be aborted any more; it begins none meanwhile.

The configuration (TOML):
  certs   = "/etc/vacate/certs"         # who this host is; see vacate certs
  listen  = ":7601"                     # other hosts send VMs there
  socket  = "/run/vacate/vacated.sock"  # vacate asks here; /metrics, too
  socket_group = "vacate"               # its members may ask there; they are as good as root
  journal = "/var/lib/vacate"           # evictions, on a disk that keeps them
  vms     = "/etc/vacate/vms"           # NAME.toml for each VM, see below
  metrics = "127.0.0.1:9601"            # /metrics for Prometheus
  give_back  = "30s"                    # free memory of a VM that has run elsewhere for so
                                        # long; it can then not be resumed here
  huge_pages = false                    # VMs that come stay in small pages; default: true
  [api]                                 # as the socket, over TLS
  listen    = ":7600"
  operators = ["admin"]                 # by the names in their certificates
  [peers.hostb]                         # by the name in its certificate
  address  = "hostb:7601"
  may_send = true                       # it may send VMs here
  rate     = 500                        # Mbit/s at most to it; default: any
  fence    = ["/usr/local/sbin/ipmi-off", "{host}"]  # see below; default: none
  fence_time = "2m"                     # how long that may take
  [libvirt]                             # know the domains of libvirt, too
  uri       = "qemu:///system"
  paths     = ["/srv/vms"]              # files that domains of other hosts may name
  networks  = ["default", "br0"]        # networks that they may be on; "user" is QEMU's own
  emulators = ["/usr/bin/qemu-system-x86_64"]  # QEMUs that they may have
  trust_disks = true                    # on your word other hosts have their disks; default: false
  migrations = "/run/vacate/migrations" # sockets here, for libvirt's own migrations; default: none
  [fleet]                               # belong to a fleet; see vacate-fleet
  brains   = ["brain1", "brain2@10.0.0.2:7610"]  # members of its brain, by their names
  labels   = { rack = "r1" }            # what rules may name this host by
  rate     = 10000                      # Mbit/s of its link; default: 1000
  link     = "rack-r1"                  # the link that it shares with others
  interval = "3s"                       # how often it reports
  [guard]                               # evict by itself when overloaded
  goal      = "cpu<111%"                # what this host shall reach
  max_load  = 0.8                       # most load of a host that takes a VM
  reserve   = 0.1                       # share of its memory that stays free there
  sustain   = "30s"                     # how long the goal is missed before
  settle    = "1m"                      # how long it rests after an eviction
  cool_down = "30m"                     # how long a VM then stays
  concurrent = 1                        # evictions at once
  interval  = "5s"                      # how long each measurement takes
listen, metrics, give_back, api, libvirt, fleet, guard and socket_group are off
by default. In place of certs there may be
  plain = true                          # no TLS, and peers are known by their
  name  = "hosta"                       # IP addresses

A VM (in vms, on both hosts, under one name; a host starts only what is here):
  command = ["/usr/bin/qemu-system-x86_64", "-machine", "pc-q35-7.2,accel=kvm",
             "-m", "4G", "-display", "none",
             "-qmp", "unix:{qmp},server=on,wait=off", "{incoming}"]
  qmp     = "/run/vacate/{name}.qmp"
  user    = "qemu"                      # that QEMU runs as; default: vacated's
  log     = "/var/log/vacate/{name}.log"  # QEMU's output; default: qmp with .log
  env     = { LANG = "C.UTF-8" }        # all of its environment, but for PATH
  start_timeout = "2m"                  # until QEMU answers; default: 30s
  trust_disks = ["data"]                # on your word the same on the other host
  pinned  = true                        # never chosen to leave; default: false
  priority = 1                          # the least are chosen first; default: 0
  labels  = { app = "db" }              # what rules of a fleet may name it by
{incoming} becomes the options with which a QEMU waits for the VM, or nothing.

fence is run for vacate decide --fence, without a shell; {host} becomes the
peer's name. It must end with code 0 only if no VM runs on that host any more.`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(c *cobra.Command, _ []string) error {
			if man {
				_, err := io.WriteString(c.OutOrStdout(), manpage.Page(c, 8))
				return err
			}
			config, err := host.ReadConfig(file)
			if err != nil {
				return err
			}
			if check {
				there, err := config.Check()
				if err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				fmt.Fprintf(c.OutOrStdout(), "%s is good: %s\n", file, there)
				return nil
			}
			return run(c.Context(), config, format)
		},
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Version:           cli.DaemonVersion(),
	}
	c.AddCommand(&cobra.Command{
		Use: hypervisor.HoldCommand + " NAME", Hidden: true, Args: cobra.ExactArgs(1),
		Run: func(*cobra.Command, []string) { hypervisor.StayHeld() },
	})
	c.Flags().StringVar(&file, "config", "/etc/vacate/vacated.toml",
		"`FILE` with the configuration")
	c.Flags().StringVar(&format, "log-format", "text",
		"form of the log on standard error: text or json")
	c.Flags().BoolVar(&check, "check", false,
		"only check the configuration, and what it names on this host")
	c.Flags().BoolVar(&man, "man", false, "write the manual page")
	c.Flags().MarkHidden("man")
	return c
}

func run(ctx context.Context, config host.Config, format string) error {
	log, err := cli.Log(os.Stderr, format)
	if err != nil {
		return err
	}
	sched.Process()
	// A log that nobody reads any more must not end the daemon.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	h, err := host.Open(config, cli.DaemonVersion(), log)
	if err != nil {
		return err
	}
	if err := ready(); err != nil {
		log.Warn("cannot tell systemd that this daemon serves", "error", err)
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	go func() {
		<-hangup
		log.Info("stopping as soon as that aborts no eviction")
		if h.Settle(ctx) == nil {
			stop()
		}
	}()
	if err := h.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// ready tells systemd, where that started the daemon, that others can connect from now on: they
// wait until they are served. Commands that follow `systemctl start` then find the daemon.
func ready() error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	conn, err := net.Dial("unixgram", path) // #nosec G704 -- systemd sets the variable
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte("READY=1"))
	return err
}

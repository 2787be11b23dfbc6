package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vacate/bench"
	"vacate/certs"
	"vacate/lab"
	"vacate/lab/memclient"

	"github.com/spf13/cobra"
)

func demoCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "demo",
		Short: "show an eviction, then measure it against QEMU's own post-copy",
		Long: `Boots a VM with a memcached on one host of a lab, and a daemon on each; evicts the
VM to the other host while a client uses it; and has it check all of its memory.
Then moves one more VM by this engine and one by QEMU's own post-copy, and compares
them. Takes about two minutes. vacated has to lie beside this program.`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.RunE = func(c *cobra.Command, _ []string) error {
		plain := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == "error" {
				return slog.Attr{}
			}
			return a
		}}
		d := demo{
			out:  os.Stdout,
			opts: lab.Options{Dir: dir, Rate: 1e9, Log: slog.New(slog.NewTextHandler(os.Stderr, plain))},
			spec: lab.Spec{MemoryMiB: 1024, Devices: lab.Full, Tap: true, Server: lab.Memcached, ServerMiB: 64, Load: lab.Load{HotMiB: 100, IdleMiB: 200, Seed: 1}},
		}
		if err := d.show(c.Context()); err != nil {
			return err
		}
		return d.compare(c.Context())
	}
	return c
}

type demo struct {
	out  io.Writer
	opts lab.Options
	spec lab.Spec
	step int
}

// say begins a step.
func (d *demo) say(format string, args ...any) {
	d.step++
	fmt.Fprintf(d.out, "\n%d. %s\n", d.step, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "\n   "))
}

// show evicts one VM as an operator would.
func (d *demo) show(ctx context.Context) (err error) {
	d.say(`Two hosts, a and b, on this machine: each is a network namespace of its own,
pinned to one core. A veth pair between them is shaped to 1 Gbit/s each way; a bridge
on each makes one Ethernet of both, in which a client is, too.`)
	l, err := lab.New(ctx, d.opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	vm, err := l.A.Boot(ctx, d.spec)
	if err != nil {
		return err
	}
	if err := vm.Guest.WaitOps(ctx, 100_000); err != nil {
		return err
	}
	client, err := memclient.Start(ctx, memclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial, Rate: 1000})
	if err != nil {
		return err
	}
	defer client.Stop()
	time.Sleep(time.Second) // of throughput, to tell it
	d.say(`On host a the VM web1 has booted: QEMU %s (%s), 1 GiB, Debian's own kernel. Its
program keeps 300 MiB in which every word has a known value, and works on 100 MiB of
it: it checks and rewrites %s pages a second. Beside it runs Debian's memcached,
and a client outside reads and writes values of it, checks each that it reads, and
keeps its 4 connections.`, vm.Spec.QEMU.Version, vm.Spec.Accel, pagesPerSecond(vm.Guest))
	twin, err := l.B.Expect(ctx, vm)
	if err != nil {
		return err
	}
	site, err := newDemoSite(l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.close()) }()
	d.say(`Each host gets a certificate (vacate certs init, vacate certs issue), a description
of web1, and a daemon, vacated, which has the other as its peer:`)
	for _, h := range []struct {
		host *lab.Host
		qmp  string
		args []string
	}{{l.A, vm.QMP, vm.Args}, {l.B, twin.QMP, twin.Args}} {
		if err := site.start(ctx, h.host, h.qmp, h.args); err != nil {
			return err
		}
	}
	config, err := os.ReadFile(site.config(l.A))
	if err != nil {
		return err
	}
	d.quote(string(config))
	d.say(`On host a the operator runs

     vacate evict web1 --to hostb

which looks whether anything stands against it, and follows what the daemons do:`)
	fmt.Fprintln(d.out)
	began := time.Now()
	evict := site.command(ctx, l.A, "evict", "web1", "--to", "hostb")
	evict.Stdout, evict.Stderr = d.out, os.Stderr
	if err := l.A.Run(evict); err != nil {
		return err
	}
	d.say("vacate ls, on host b:")
	ls := site.command(ctx, l.B, "ls")
	var listed strings.Builder
	ls.Stdout, ls.Stderr = &listed, os.Stderr
	if err := l.B.Run(ls); err != nil {
		return err
	}
	d.quote(listed.String())
	if err := vm.Wait(ctx); err != nil {
		return fmt.Errorf("the source's QEMU: %w", err)
	}
	arrived, err := twin.Started(ctx)
	if err != nil {
		return err
	}
	if err := vm.Guest.WaitOps(ctx, 10_000); err != nil {
		return err
	}
	stats := client.Stop()
	d.say(`The client has had %d answers, %d of them wrong, and %d of its connections broke.
Its longest silence was %d ms.`, stats.Requests, stats.Wrong, stats.Broken, stats.Silence.Milliseconds())
	if !stats.SilenceBegan.Before(began) {
		fmt.Fprintf(d.out, "   It began %.2f s after the operator's command.\n", stats.SilenceBegan.Sub(began).Seconds())
	}
	if stats.Wrong != 0 || stats.Broken != 0 {
		return errors.Join(append([]error{errors.New("the client noticed the eviction")}, stats.Errors...)...)
	}
	check, err := vm.Guest.Check(ctx, arrived)
	if err != nil {
		return err
	}
	d.say(`The QEMU on host a has ended. The VM, on host b, has worked on, and has now
checked each of its %d pages: %d bad pages.`, check.Pages, check.Bad)
	if check.Bad != 0 || check.Pages == 0 {
		return bench.ErrBadPages
	}
	return nil
}

// quote shows what a program or a file says.
func (d *demo) quote(s string) {
	fmt.Fprint(d.out, "\n     "+strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n     ")+"\n")
}

// demoSite is what the two daemons of a demo have on disk.
type demoSite struct {
	lab     *lab.Lab
	dir     string
	daemons []*exec.Cmd
}

func newDemoSite(l *lab.Lab) (*demoSite, error) {
	dir, err := os.MkdirTemp("", "vacate") // short, as paths of sockets have to be
	if err != nil {
		return nil, err
	}
	return &demoSite{lab: l, dir: dir}, certs.Init(filepath.Join(dir, "ca"))
}

func (s *demoSite) home(h *lab.Host) string   { return filepath.Join(s.dir, "host"+h.Name) }
func (s *demoSite) config(h *lab.Host) string { return filepath.Join(s.home(h), "vacated.toml") }

// start starts a host's daemon, with the description of web1.
func (s *demoSite) start(ctx context.Context, h *lab.Host, qmp string, args []string) error {
	peer := s.lab.A
	if h == peer {
		peer = s.lab.B
	}
	home := s.home(h)
	if err := certs.Issue(filepath.Join(s.dir, "ca"), "host"+h.Name, filepath.Join(home, "certs"), certs.DefaultDays, false); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(home, "vms"), 0o755); err != nil { // #nosec G301 -- descriptions have nothing secret
		return err
	}
	var vm strings.Builder
	fmt.Fprintf(&vm, "qmp = %q\nlog = %q\ncommand = [", qmp, filepath.Join(home, "web1.log"))
	for _, a := range args {
		fmt.Fprintf(&vm, "\n  %q,", a)
	}
	vm.WriteString("\n]\n")
	config := fmt.Sprintf(`certs   = "certs"
vms     = "vms"
journal = "journal"
socket  = "vacated.sock"
listen  = "%s:%d"

[peers.host%s]
address  = "%s:%d"
may_send = true
`, h.Addr, labPort, peer.Name, peer.Addr, labPort)
	for file, text := range map[string]string{filepath.Join(home, "vms", "web1.toml"): vm.String(), s.config(h): config} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil { // #nosec G306 -- no more than the demo shows
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(home, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	daemon := exec.Command(filepath.Join(filepath.Dir(self), "vacated"), "--config", s.config(h))
	daemon.Stderr = log
	if err := h.Start(daemon); err != nil {
		return fmt.Errorf("start vacated, which make build puts beside vacate: %w", err)
	}
	s.daemons = append(s.daemons, daemon)
	for {
		c, err := net.Dial("unix", filepath.Join(home, "vacated.sock"))
		if err == nil {
			return c.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
		if daemon.Process.Signal(syscall.Signal(0)) != nil {
			said, _ := os.ReadFile(log.Name())
			return fmt.Errorf("vacated on host %s ended: %s", h.Name, said)
		}
	}
}

// command is this program, as an operator on a host runs it.
func (s *demoSite) command(ctx context.Context, h *lab.Host, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, "/proc/self/exe", args...)
	c.Args[0] = "vacate"
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	c.Env = append(os.Environ(), "VACATE_SOCKET="+filepath.Join(s.home(h), "vacated.sock"))
	return c
}

// close stops the daemons, and removes what they had.
func (s *demoSite) close() error {
	var errs []error
	for _, d := range s.daemons {
		errs = append(errs, d.Process.Signal(syscall.SIGTERM), d.Wait())
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// pagesPerSecond is how fast the guest worked in the last second.
func pagesPerSecond(g *lab.Guest) string {
	now := time.Now()
	if r := g.Throughput(now.Add(-time.Second), now, time.Second); len(r) == 1 {
		return fmt.Sprintf("%.0f", r[0].PerSecond)
	}
	return "many"
}

// compare measures the engine against QEMU's post-copy.
func (d *demo) compare(ctx context.Context) error {
	d.say(`The same with a new VM, measured; then QEMU's own post-copy with another one:`)
	result, err := bench.Measure(ctx, bench.Options{
		Strategies: []string{"vacate", "qemu-postcopy"}, Load: "hot", Repeat: 1, PrecopyBound: time.Second,
		Spec: lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 200, IdleMiB: 200, Seed: 1}}, Lab: d.opts, Log: slog.New(slog.DiscardHandler),
		Done: func(r bench.Run) { fmt.Fprintf(d.out, "   %s: %s\n", r.Strategy, r.Outcome) },
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(d.out)
	if err := result.Table(d.out); err != nil {
		return err
	}
	fmt.Fprintln(d.out, `
transfer: from QEMU's order to migrate until the VM runs on host b; down: in which it runs
nowhere; total: until host a holds nothing of it; work lost: in seconds of its full speed.
One run each proves little: "vacate lab bench --repeat 5" tells more, docs/bench.md what
the figures mean.`)
	for _, r := range result.Runs {
		if r.Bad == nil || *r.Bad != 0 {
			return bench.ErrBadPages
		}
	}
	_, err = fmt.Fprintln(d.out, "\nEach VM has checked all of its memory after its move: 0 bad pages.")
	return err
}

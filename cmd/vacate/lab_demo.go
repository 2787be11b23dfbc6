package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"vacate/bench"
	"vacate/lab"

	"github.com/spf13/cobra"
)

func demoCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "demo",
		Short: "show an eviction, then measure it against QEMU's own post-copy",
		Long: `Boots a VM on one host of a lab, evicts it to the other, and has it check all of
its memory. Then does the same once more by this engine and once by QEMU's own
post-copy, and compares them. Takes about two minutes.`,
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
			spec: lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 200, IdleMiB: 200, Seed: 1}},
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
pinned to one core. A veth pair between them is shaped to 1 Gbit/s each way.`)
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
	time.Sleep(time.Second) // of throughput, to tell it
	d.say(`On host a a VM has booted: QEMU %s (%s), 1 GiB, Debian's own kernel. Its program
keeps 400 MiB in which every word has a known value, and works on 200 MiB of it:
it checks and rewrites %s pages a second.`, vm.Spec.QEMU.Version, vm.Spec.Accel, pagesPerSecond(vm.Guest))
	twin, err := l.B.Incoming(ctx, vm, lab.IncomingOptions{})
	if err != nil {
		return err
	}
	d.say(`On host b the same QEMU waits, started with -S -incoming defer. "vacate receive"
there and "vacate evict" on host a now move the VM while it works:`)
	fmt.Fprintln(d.out)
	said, err := d.evict(ctx, l, vm, twin)
	if err != nil {
		return err
	}
	d.say("Meanwhile \"vacate receive\" said on host b:")
	fmt.Fprint(d.out, "\n     "+strings.ReplaceAll(strings.TrimSpace(said), "\n", "\n     ")+"\n")
	if err := vm.Wait(ctx); err != nil {
		return fmt.Errorf("the source's QEMU: %w", err)
	}
	if err := vm.Guest.WaitOps(ctx, 10_000); err != nil {
		return err
	}
	check, err := vm.Guest.Check(ctx, twin)
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

// pagesPerSecond is how fast the guest worked in the last second.
func pagesPerSecond(g *lab.Guest) string {
	now := time.Now()
	if r := g.Throughput(now.Add(-time.Second), now, time.Second); len(r) == 1 {
		return fmt.Sprintf("%.0f", r[0].PerSecond)
	}
	return "many"
}

// evict runs both sides, that of the source in the foreground, and returns what the
// other said.
func (d *demo) evict(ctx context.Context, l *lab.Lab, vm, twin *lab.VM) (said string, err error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	command := func(args ...string) *exec.Cmd {
		c := exec.CommandContext(ctx, self, args...)
		c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
		c.WaitDelay = 10 * time.Second
		c.Stderr = os.Stderr
		return c
	}
	addr := fmt.Sprintf("%s:%d", l.B.Addr, labPort)
	receive := command("receive", "--qmp", twin.QMP, "--listen", addr)
	pipe, err := receive.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := l.B.Start(receive); err != nil {
		return "", err
	}
	lines := bufio.NewReader(pipe)
	said, err = lines.ReadString('\n') // it listens
	if err == nil {
		evict := command("evict", "--qmp", vm.QMP, "--to", addr)
		evict.Stdout = d.out
		err = l.A.Run(evict)
	}
	if err != nil {
		receive.Process.Kill()
		return "", errors.Join(err, receive.Wait())
	}
	rest, err := io.ReadAll(lines)
	return said + string(rest), errors.Join(err, receive.Wait())
}

// compare measures the engine against QEMU's post-copy.
func (d *demo) compare(ctx context.Context) error {
	d.say(`The same with a new VM, measured; then QEMU's own post-copy with another one:`)
	result, err := bench.Measure(ctx, bench.Options{
		Strategies: []string{"vacate", "qemu-postcopy"}, Load: "hot", Repeat: 1, PrecopyBound: time.Second,
		Spec: d.spec, Lab: d.opts, Log: slog.New(slog.DiscardHandler),
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

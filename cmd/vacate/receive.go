package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"vacate/internal/cli"
	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/internal/qemu/fit"
	"vacate/internal/sys/sched"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func receiveCommand() *cobra.Command {
	d := evict.Destination{Patient: true}
	var listen, identity string
	huge := true
	c := &cobra.Command{
		Use:   "receive --qmp SOCKET --listen HOST:PORT",
		Short: "Take a VM into a QEMU that waits on this host",
		Long: `Waits for ` + "`vacate evict`" + ` on another host and takes its VM into a QEMU here. It
ends when that QEMU has all of the VM's memory, or its guest has ended itself.

The QEMU here must be started with the command line of the one on the source
(machine type with its version, -m, -smp, -cpu, devices, memory back ends; the
same disks, shared between the hosts), and in addition
  -S                so that the VM does not run before both sides agreed
  -incoming defer   so that it waits for what vacate sends
and a -qmp socket of its own. Where QEMU does not run as root,
` + "`sysctl vm.unprivileged_userfaultfd=1`" + ` lets it fetch pages.

A source whose VM does not fit is refused, as is a peer that is not vacate, and
the wait goes on. Once QEMU has read a byte of the stream, it cannot be reused:
it ends up running the VM, or it is killed and never ran it.

The first line on standard output is "listening on HOST:PORT", with the chosen
port for :0. It comes once the QEMU has passed its checks. Without --certs,
anyone who reaches the address can send a VM, and the link can be read: listen
on a network that only the hosts can reach.

Ctrl-C (SIGINT), SIGTERM and SIGHUP end the wait, or abort the eviction as long
as the VM does not run here; it then goes on at the source. Later they change
nothing.

` + exitHelp,
		Example: `  On the source (10.0.0.1) the VM was started with
    qemu-system-x86_64 -machine pc-q35-7.2,accel=kvm -cpu host -smp 2 -m 4G \
      -drive file=/shared/vm7.raw,format=raw,if=virtio,cache=none \
      -display none -qmp unix:/run/vm7.qmp,server=on,wait=off

  On the destination (10.0.0.2):
    qemu-system-x86_64 -machine pc-q35-7.2,accel=kvm -cpu host -smp 2 -m 4G \
      -drive file=/shared/vm7.raw,format=raw,if=virtio,cache=none \
      -display none -qmp unix:/run/vm7.qmp,server=on,wait=off \
      -S -incoming defer &
    vacate receive --qmp /run/vm7.qmp --listen 10.0.0.2:7601

  On the source:
    vacate evict --qmp /run/vm7.qmp --to 10.0.0.2:7601`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkAddress("--listen", listen); err != nil {
				return err
			}
			return receive(c.Context(), d, listen, identity, huge)
		},
	}
	c.Flags().StringVar(&d.QMP, "qmp", "", "`SOCKET` (QMP) of the QEMU that waits for the VM")
	c.Flags().StringVar(&listen, "listen", ":7601", "`HOST:PORT` to listen on")
	c.Flags().StringVar(&identity, "certs", "",
		"`DIR` with certificates of this host (see vacate certs): the link uses TLS, and only "+
			"hosts with certificates may send a VM")
	c.Flags().BoolVar(&d.ThroughQEMU, "through-qemu", false,
		"have QEMU itself load all pages: slower, for comparison")
	c.Flags().BoolVar(&huge, "huge-pages", true,
		"at the end, make huge pages again of the memory that was in them at the source; "+
			"without them the VM is slower")
	c.MarkFlagRequired("qmp")
	return c
}

func receive(ctx context.Context, d evict.Destination, listen, identity string, huge bool) error {
	sched.Process()
	out := newScreen(&lines{w: os.Stdout})
	defer out.close()
	problems := newScreen(&lines{w: os.Stderr})
	defer problems.close()
	follow := &follower{out: out, state: evict.Waiting}
	ctx, stop := cli.OnSignal(ctx, func(sig syscall.Signal) error {
		name := unix.SignalName(sig)
		switch follow.now() {
		case evict.Running, evict.CutOff, evict.Completing:
			problems.note("%s: this cannot be aborted any more. The VM runs here and only here; "+
				"its memory is still arriving. Going on.", name)
			return nil
		case evict.Completed:
			problems.note("%s: the VM runs here, whole. The rest of its memory stays in small "+
				"pages.",
				name)
		case evict.Waiting:
			problems.note("%s: waiting no longer.", name)
		default:
			problems.note("%s: aborting; the VM stays on the source.", name)
		}
		return cli.Interrupted{Signal: sig}
	})
	defer stop()
	var options link.ListenOptions
	if identity != "" {
		id, err := certs.Load(identity, nil)
		if err != nil {
			return refused(err)
		}
		options.TLS = id.Server()
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return refused(err)
	}
	warnings := slog.NewTextHandler(notes{problems},
		&slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: withoutTime})
	follow.Handler = warnings
	d.Log = slog.New(follow)
	turnedAway := func(peer string, err error) {
		d.Log.Warn("peer turned away", "peer", peer, "error", err)
	}
	options.TurnedAway = turnedAway
	sessions := link.NewListener(ln, options)
	defer sessions.Close()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	requests, wait := evict.Requests(ctx, sessions.Accept, turnedAway, fail)
	defer wait()
	d.Show = func(p evict.Progress) {
		if p.State == evict.Waiting {
			out.note("listening on %s", ln.Addr())
		}
	}
	var task *evict.HugePages
	if huge {
		d.HugePages = func(h *evict.HugePages) { task = h }
	}
	received, err := d.Receive(ctx, requests)
	switch {
	case err != nil:
	case received.ShutDown != "":
		out.note("%s  the VM is shut down: %s", follow.elapsed(), clean(received.ShutDown))
	default:
		does := "runs here"
		if stands := follow.stood(); stands != "" {
			does = fmt.Sprintf("came standing, and was not run (it %s)", fit.Stands(stands))
		}
		out.note("%s  the VM %s, with all of its memory", follow.elapsed(), does)
		if task != nil {
			restoreHuge(ctx, task, out, follow)
		}
	}
	return err
}

// restoreHuge gives the VM its huge pages back. The eviction is over, however that ends.
func restoreHuge(ctx context.Context, task *evict.HugePages, out *screen, follow *follower) {
	r, err := task.Restore(ctx, slog.New(slog.DiscardHandler), func(evict.Restored) {})
	text := fmt.Sprintf("%d of its %d huge pages are there again", r.Restored, r.Huge)
	if r.Sparse > 0 {
		text += fmt.Sprintf(", %d are left out as the guest hardly uses them", r.Sparse)
	}
	if err != nil {
		r.Reason = err.Error()
	}
	if r.Reason != "" {
		text += "; the others are not: " + clean(r.Reason)
	}
	out.note("%s  %s", follow.elapsed(), text)
}

// follower tells what the destination's engine logs: its states and the offer it took.
// Warnings go to the embedded handler.
type follower struct {
	slog.Handler
	out *screen

	mu      sync.Mutex
	state   evict.State // guarded by mu
	started time.Time   // when the VM began to come; guarded by mu
	stands  string      // QEMU's word for the state that the VM stood in; guarded by mu
}

func (f *follower) stood() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stands
}

func (f *follower) now() evict.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state
}

func (f *follower) elapsed() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprintf("%6.1f s", time.Since(f.started).Seconds())
}

// stateText says what a state means to who waits here.
var stateText = map[evict.State]string{
	evict.Arming:   "the VM's description comes in",
	evict.Loading:  "the VM's devices are being loaded",
	evict.Prepared: "loaded and paused; the source decides",
	evict.Running:  "the VM runs here; its memory comes in",
	evict.CutOff: "the source cannot be reached; the VM runs here until it needs what is " +
		"missing",
	evict.Completing: "all memory is here",
}

// standingText is the same of a VM that stands.
var standingText = map[evict.State]string{
	evict.Running: "the VM stands here, and may be told to run; its memory comes in",
	evict.CutOff:  "the source cannot be reached; the VM stands here, and lacks memory",
}

// Enabled implements slog.Handler.
func (f *follower) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (f *follower) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		return f.Handler.Handle(ctx, r)
	}
	attrs := map[string]slog.Value{}
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value
		return true
	})
	switch r.Message {
	case "state":
		state, _ := attrs["state"].Any().(evict.State)
		f.mu.Lock()
		f.state = state
		if state == evict.Arming {
			f.started = time.Now()
		}
		f.stands = clean(attrs["stands"].String())
		stands := f.stands != ""
		f.mu.Unlock()
		text, ok := stateText[state]
		if stands {
			text = cmp.Or(standingText[state], text)
		}
		if ok {
			f.out.note("%s  %-10s  %s", f.elapsed(), state, text)
		}
	case "offer accepted":
		f.out.note("a VM of machine type %s comes from %s", clean(attrs["machine"].String()),
			clean(attrs["source"].String()))
	}
	return nil
}

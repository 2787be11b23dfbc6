package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"vacate/internal/cli"
	"vacate/internal/evict"
	"vacate/internal/evict/pushorder"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/internal/sys/sched"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func evictCommand() *cobra.Command {
	var o evictOptions
	c := &cobra.Command{
		Use:   "evict VM --to HOST",
		Short: "Move a VM of this host to another host",
		Long: `Moves a running VM to another host. At the end its QEMU here is killed.

With the name of a VM, this host's daemon does it, and HOST is the name of one
of its peers. It first checks what would block the eviction (vacate doctor). The
daemon goes on with an eviction if this command ends. Ctrl-C asks whether to
abort, and aborts if the VM has not been told to run on the destination. SIGTERM
and SIGHUP do the same without asking, as does Ctrl-C where standard input is no
terminal. The second signal ends this command alone.

Without a daemon, with --qmp, it moves the VM of that QEMU to where vacate
receive listens. Such an eviction survives the loss of the link, but not the
death of either command. Ctrl-C (SIGINT), SIGTERM and SIGHUP abort it as long as
the VM has not been told to run on the destination; the VM then runs on here.
Later they change nothing, as the VM runs on the destination. But while the
destination is out of reach, the second signal ends this command and leaves the
VM frozen here. An output that nobody reads does not stop an eviction.

Memory is pushed in the order in which the guest will need it, and free memory
is not moved at all. vacate reads both from the frozen guest's own page
descriptors. Where it cannot read the guest, it asks an agent in it
(vacate-guest, if it runs there); else pages go by address. In any case pages
that the guest waits for, and their neighbours, go first. --order, --enlighten
and --send-free change that; the report says what was known.

If the guest ends itself on the destination before all memory is there (it
powers itself off, say), the eviction is "shut down": nothing is lost, and both
QEMUs end. If QEMU's own options let it stay then (-no-shutdown), the eviction
goes on.

The disks of both QEMUs are compared before the VM is touched: the files or
addresses, formats, sizes, layers, and how they are cached. A disk that is not
proven to be the same, or that the destination might read stale, is refused by
name. Where you know better, use --trust-disk; with a daemon, trust_disks in the
VM's description on this host.

Progress goes to standard error: one line that is written over on a terminal,
otherwise one per state and at most one a second. A report of three lines goes
to standard output; with -v, all of it.

With --json, standard output has JSON lines, as docs/json.md describes:
  {"type":"progress","progress":{...}}   state, pages_sent, eta_s, ...
  {"type":"report","report":{...}}       once, at the end
  {"type":"error","error":{...}}         after all, if the exit code is not 0
--report FILE writes that report, too. Its space on the disk is reserved before
the VM is touched, and the file appears whole at the end. If that fails, a
warning says so; the exit code is the eviction's.

` + exitHelp,
		Example: `  vacate evict web1 --to hostb
  vacate evict --qmp /run/vm7.qmp --to 10.0.0.2:7601
  vacate evict --qmp /run/vm7.qmp --to 10.0.0.2:7601 --json --report vm7.json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := o.check(c, args); err != nil {
				return err
			}
			if len(args) == 1 {
				return o.runByName(c.Context(), args[0])
			}
			return o.run(c.Context())
		},
	}
	c.Flags().StringVar(&o.source.QMP, "qmp", "",
		"`SOCKET` (QMP) of the VM's QEMU, to do without a daemon")
	c.Flags().StringVar(&o.to, "to", "",
		"the other `HOST`; without a daemon, HOST:PORT where vacate receive listens")
	c.Flags().StringVar(&o.certs, "certs", "",
		"`DIR` with certificates of this host (see vacate certs): the link uses TLS; vacate "+
			"receive needs --certs, too")
	c.Flags().BoolVar(&o.json, "json", false, "JSON lines on standard output")
	c.Flags().BoolVarP(&o.verbose, "verbose", "v", false,
		"show pages, rates and fetches, and the whole report")
	c.Flags().StringVar(&o.report, "report", "", "`FILE` for the report in JSON")
	c.Flags().StringVar(&o.order, "order", pushorder.Default.String(),
		"`ORDER` of the push: "+orderNames())
	c.Flags().StringVar(&o.enlighten, "enlighten", string(evict.Auto),
		"`WHERE` to learn what the guest's pages are used for: "+enlightenNames())
	c.Flags().BoolVar(&o.source.SendFree, "send-free", false, "move the guest's free memory, too")
	c.Flags().BoolVar(&o.skipChecks, "skip-checks", false,
		"do not check first what would block it (with a daemon)")
	c.Flags().BoolVar(&o.force, "force", false,
		"also to a host that its fleet keeps VMs off, or this one (with a daemon)")
	c.Flags().BoolVar(&o.detach, "detach", false,
		"print the eviction's ID, and do not follow it (with a daemon)")
	c.Flags().BoolVar(&o.yield, "yield", false, "let the push yield to other traffic")
	c.Flags().StringArrayVar(&o.source.TrustDisks, "trust-disk", nil,
		"take your word that `DISK`'s image there is the same; repeat it for others (without a "+
			"daemon)")
	c.Flags().Var(&o.rate, "rate-limit",
		"push at most `RATE`, such as 500Mbit; pages that the VM waits for are not limited")
	socketFlag(c, &o.daemon)
	return c
}

func orderNames() string {
	var names []string
	for _, p := range pushorder.Policies() {
		if !p.Near {
			names = append(names, p.String())
		}
	}
	return strings.Join(names, ", ") + "; with +near, pages beside fetched ones go first"
}

func enlightenNames() string {
	var names []string
	for _, e := range evict.Enlightenments() {
		names = append(names, string(e))
	}
	return strings.Join(names, ", ")
}

type evictOptions struct {
	source    evict.Source
	to        string
	certs     string
	order     string
	enlighten string
	json      bool
	verbose   bool
	report    string

	daemon     daemon
	skipChecks bool
	force      bool
	detach     bool
	yield      bool
	rate       cli.Rate
	patience   time.Duration // with an eviction that does not get on; 0: any
}

// check tells the two ways to use the command apart.
func (o evictOptions) check(c *cobra.Command, args []string) error {
	var only []string // flags of the other way
	switch {
	case o.to == "": // not marked as required: shells would complete it ahead of the VM
		return fmt.Errorf("--to is missing: %s", usageOf(c))
	case len(args) == 1 && o.source.QMP != "":
		return errors.New("a name is for the daemon, --qmp does without it: give one of them")
	case len(args) == 1:
		only = []string{"certs", "trust-disk"}
	case o.source.QMP == "":
		return errors.New("which VM? Give its name, or --qmp; see `vacate evict --help`")
	default:
		only = []string{"skip-checks", "force", "detach", "socket"}
	}
	for _, name := range only {
		if c.Flags().Changed(name) {
			return fmt.Errorf("--%s does not go together with the other arguments; see `vacate "+
				"evict --help`", name)
		}
	}
	return nil
}

// reserve takes the room for the report, if one is wanted.
func (o evictOptions) reserve() (*reportFile, error) {
	if o.report == "" {
		return nil, nil
	}
	file, err := reserveReport(o.report)
	if err != nil {
		return nil, refused(err)
	}
	return file, nil
}

// screen is where progress is shown.
func (o evictOptions) screen(s scene) *screen {
	to := display(newLines(s, os.Stderr))
	if o.json {
		to = jsonLines{os.Stdout, newLines(s, os.Stderr)}
	}
	return newScreen(to)
}

// close tells what an eviction did.
func (o evictOptions) close(s scene, report evict.Report) {
	switch {
	case o.json:
		writeReport(os.Stdout, report)
	case o.verbose:
		io.WriteString(os.Stdout, s.summary(report)+"\n"+reportText(report))
	default:
		io.WriteString(os.Stdout, s.summary(report))
	}
}

func (o evictOptions) run(ctx context.Context) error {
	sched.Process()
	if err := o.configure(); err != nil {
		return err
	}
	file, err := o.reserve()
	if err != nil {
		return err
	}
	host, _, _ := net.SplitHostPort(o.to)
	of := scene{vm: "the VM", other: clean(host), verbose: o.verbose}
	s := o.screen(of)
	a := aborter{s: s, asked: make(chan struct{})}
	ctx, stop := cli.OnSignal(ctx, a.signal)
	defer stop()
	o.source.Log = slog.New(slog.NewTextHandler(notes{s},
		&slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: withoutTime}))
	o.source.Show = a.show
	report, err := o.source.Evict(ctx)
	// First what lasts: the outputs may block.
	if file != nil {
		if err := file.write(report); err != nil {
			s.note("vacate: warning: the report could not be written: %s", clean(err.Error()))
		}
	}
	stop() // an output that blocks is from here on no reason to stay
	s.close()
	o.close(of, report)
	return err
}

// configure sets up the engine as the command line says.
func (o *evictOptions) configure() (err error) {
	if err := checkAddress("--to", o.to); err != nil {
		return err
	}
	if o.source.Order, err = pushorder.ParsePolicy(o.order); err != nil {
		return fmt.Errorf("--order: %w", err)
	}
	o.source.Enlightenment = evict.Enlightenment(o.enlighten)
	if !slices.Contains(evict.Enlightenments(), o.source.Enlightenment) {
		return fmt.Errorf("--enlighten %q: there are %s", o.enlighten, enlightenNames())
	}
	o.source.Yield, o.source.Limit = o.yield, new(evict.Limit)
	o.source.Limit.Set(int64(o.rate) / 8)
	dialer := link.Dialer{Addr: o.to}
	if o.certs != "" {
		identity, err := certs.Load(o.certs, nil)
		if err != nil {
			return refused(err)
		}
		host, _, _ := net.SplitHostPort(o.to)
		dialer.TLS = identity.Client(host)
	}
	o.source.Connect = dialer.Session
	return nil
}

// An aborter aborts an eviction on a signal as long as that is possible, and says what it does.
type aborter struct {
	s     *screen
	asked chan struct{} // closed when an abort was asked for
	told  bool          // that a second signal ends the command; of signal alone
	late  bool          // the abort came too late, and show has said so; of show alone
}

// signal is for cli.OnSignal.
func (a *aborter) signal(sig syscall.Signal) error {
	name := unix.SignalName(sig)
	switch at := a.s.state(); {
	case at == evict.InDoubt || at == evict.Reconnecting:
		if a.told {
			return evict.ErrLeave
		}
		a.told = true
		a.s.note("%s: the destination is out of reach. The VM may run there, and waits for "+
			"pages that only\nthis host has. Going on. Interrupt once more to leave it frozen "+
			"here, with its memory.", name)
		return nil
	case rank[at] > rank[evict.Loading]:
		if rank[at] < rank[evict.RollingBack] {
			a.s.note("%s: the eviction cannot be aborted any more. The VM was told to run on "+
				"the destination,\nand runs only there. Its memory is still arriving. Going on.",
				name)
		}
		return nil
	}
	select {
	case <-a.asked:
		a.s.note("%s: aborting already; the VM stays on this host.", name)
	default:
		a.s.note("%s: aborting; the VM stays on this host.", name)
		close(a.asked)
	}
	return cli.Interrupted{Signal: sig}
}

// show shows progress, and says if an abort came too late.
func (a *aborter) show(p evict.Progress) {
	a.s.show(p)
	if p.State != evict.Committing && p.State != evict.Pushing || a.late {
		return
	}
	select {
	case <-a.asked:
		a.late = true
		a.s.note("The abort came too late: the VM was already told to run on the destination. " +
			"Going on.")
	default:
	}
}

// checkAddress tells a mistyped address from one that cannot be reached.
func checkAddress(flag, addr string) error {
	if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
		return fmt.Errorf("%s %q is not HOST:PORT, such as 10.0.0.2:7601", flag, addr)
	}
	return nil
}

// notes are the lines of a log as notes on a screen.
type notes struct{ s *screen }

func (n notes) Write(b []byte) (int, error) {
	n.s.note("vacate: %s", clean(string(b)))
	return len(b), nil
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/doctor"
	"vacate/internal/qemu/fit"
	"vacate/internal/ui"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/protobuf/proto"
)

// hostCommands are those that ask this host's daemon.
func hostCommands() []*cobra.Command {
	return []*cobra.Command{lsCommand(), startCommand(), stopCommand(), showCommand(),
		evictionsCommand(), watchCommand(), abortCommand(), decideCommand(), exportCommand(),
		doctorCommand(),
		pressureCommand(), relieveCommand(), evacuateCommand(), reportCommand(), uiCommand(),
		topCommand()}
}

// askCommand makes a command that asks the daemon. With --json, the answer goes out as the API's
// JSON.
func askCommand(c *cobra.Command, ask func(ctx context.Context, d *daemon, args []string,
	w io.Writer) (answer proto.Message, err error)) *cobra.Command {
	var d daemon
	var asJSON bool
	socketFlag(c, &d)
	c.Flags().BoolVar(&asJSON, "json", false,
		"JSON on standard output (docs/json.md)")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := d.open(); err != nil {
			return err
		}
		w := c.OutOrStdout()
		if asJSON {
			w = io.Discard
		}
		answer, err := ask(c.Context(), &d, args, w)
		if answer != nil && asJSON {
			err = errors.Join(err, writeJSON(c.OutOrStdout(), answer))
		}
		return d.explain(err)
	}
	return c
}

// writeJSON writes an answer as the API's JSON.
func writeJSON(w io.Writer, m proto.Message) error {
	b, err := json.MarshalIndent(json.RawMessage(hostv1.JSON(m)), "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", b)
	return err
}

func lsCommand() *cobra.Command {
	return askCommand(&cobra.Command{
		Use:   "ls",
		Short: "List the VMs of this host",
		Long: `Lists the VMs that this host has descriptions of, and libvirt's domains if its
daemon knows libvirt, with the state of each here:
  none      no QEMU: it is elsewhere, or is not started
  running   it runs here
  paused    it is stopped, and could be told to run
  incoming  its QEMU waits for it to arrive, or loads it
  frozen    it has left or is leaving, and its memory is still here
  silent    its monitor does not answer`,
		Args: cobra.NoArgs,
	}, func(ctx context.Context, d *daemon, _ []string, w io.Writer) (proto.Message, error) {
		r, err := d.ListVMs(ctx, connect.NewRequest(&hostv1.ListVMsRequest{}))
		if err != nil {
			return nil, err
		}
		t := table(w, "VM", "STATE", "MEMORY", "VCPUS", "QEMU", "EVICTION")
		for _, vm := range r.Msg.Vms {
			memory, vcpus := "-", "-"
			if vm.MemoryBytes > 0 {
				memory, vcpus = fmt.Sprintf("%d MiB", vm.MemoryBytes>>20), fmt.Sprint(vm.Vcpus)
			}
			of := vm.QemuVersion
			if vm.Libvirt {
				of = "libvirt"
			}
			row(t, vm.Name, vm.State, memory, vcpus, of, vm.EvictionId)
		}
		t.Flush()
		for _, vm := range r.Msg.Vms {
			if vm.Problem != "" {
				fmt.Fprintf(w, "%s: %s\n", clean(vm.Name), clean(vm.Problem))
			}
		}
		for _, p := range r.Msg.Problems {
			fmt.Fprintln(w, clean(p))
		}
		return r.Msg, nil
	})
}

// table starts a table with a head.
func table(w io.Writer, head ...string) *tabwriter.Writer {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row(t, head...)
	return t
}

func row(t *tabwriter.Writer, cells ...string) {
	for i, c := range cells {
		if cells[i] = clean(c); cells[i] == "" {
			cells[i] = "-"
		}
	}
	fmt.Fprintln(t, strings.Join(cells, "\t"))
}

// recent is how many evictions that have ended are listed.
const recent = 10

func evictionsCommand() *cobra.Command {
	var open bool
	c := askCommand(&cobra.Command{
		Use:   "status [VM|ID]",
		Short: "List evictions, or show one in full",
		Long: `Without an argument, lists evictions out of this host and into it: those under
way, those that need an operator, and the latest that have ended. With a VM or
an ID (its first digits will do), shows that eviction in full: its state, the
reason, and what an operator may do.`,
		Args: cobra.MaximumNArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		if len(args) == 1 {
			e, err := d.find(ctx, args[0])
			if err == nil {
				describe(w, e)
			}
			return e, err
		}
		r, err := d.ListEvictions(ctx,
			connect.NewRequest(&hostv1.ListEvictionsRequest{OpenOnly: open}))
		if err != nil {
			return nil, err
		}
		over := 0
		for _, e := range r.Msg.Evictions {
			if e.EndedAt != nil {
				over++
			}
		}
		t := table(w, "ID", "VM", "ROLE", "OTHER HOST", "STATE", "PAGES", "SINCE")
		for _, e := range r.Msg.Evictions {
			if e.EndedAt != nil {
				if over--; over >= recent {
					continue
				}
			}
			row(t, e.Id[:min(len(e.Id), 8)], e.Vm, e.Role, e.Peer, stateOf(e), pagesOf(e),
				e.StartedAt.AsTime().Local().Format(time.DateTime))
		}
		t.Flush()
		for _, e := range r.Msg.Evictions {
			if len(e.Remedy) > 0 || e.Damage != "" {
				fmt.Fprintf(w, "\n%s needs an operator: see vacate status %.8s\n",
					cmp.Or(clean(e.Vm), "an eviction"), clean(e.Id))
			}
		}
		if s, err := d.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{})); err == nil &&
			s.Msg.Guard != "" {
			fmt.Fprintf(w, "\nguard: %s\n", clean(s.Msg.Guard))
		}
		return r.Msg, nil
	})
	c.Flags().BoolVar(&open, "open", false, "without an argument: only those that have not ended")
	return c
}

func stateOf(e *hostv1.Eviction) string {
	switch {
	case e.Damage != "":
		return "damaged"
	case e.Outcome != "" && e.EndedAt == nil && e.State == "":
		return e.Outcome + ", undecided"
	case e.Outcome != "":
		return e.Outcome
	case e.GetProgress().GetAwaits() != "":
		return fmt.Sprintf("%s; %s: %d s", e.State, e.Progress.Awaits, int(e.Progress.AwaitedS))
	case e.State != "":
		return e.State
	}
	return "waiting"
}

func pagesOf(e *hostv1.Eviction) string {
	if p := e.GetProgress(); p != nil && p.PagesTotal > 0 {
		return fmt.Sprintf("%.1f %%", percent(int(p.PagesSent), int(p.PagesTotal)))
	}
	return ""
}

// hugePagesOf says how far a VM that came has its huge pages back.
func hugePagesOf(h *hostv1.HugePages) string {
	if h == nil {
		return ""
	}
	text := fmt.Sprintf("%d of %d are there again", h.Restored, h.Huge)
	if h.Sparse > 0 {
		text += fmt.Sprintf(", %d are left out as the guest hardly uses them", h.Sparse)
	}
	switch {
	case h.UnderWay:
		text += "; going on"
	case h.Reason != "":
		text += "; the others are not: " + h.Reason
	}
	return text
}

// describe tells all about an eviction.
func describe(w io.Writer, e *hostv1.Eviction) {
	line := func(name, format string, args ...any) {
		if text := clean(fmt.Sprintf(format, args...)); text != "" {
			fmt.Fprintf(w, "%-12s %s\n", name, text)
		}
	}
	line("eviction", "%s", e.Id)
	line("VM", "%s", e.Vm)
	if e.Damage == "" { // else it is not known
		line("this host", "is the %s", e.Role)
		line("other host", "%s (%s)", e.Peer, e.PeerAddress)
	}
	line("state", "%s", stateOf(e))
	line("journal", "%s", e.Mark)
	line("begun", "%s", e.StartedAt.AsTime().Local().Format(time.DateTime))
	if e.EndedAt != nil {
		line("ended", "%s", e.EndedAt.AsTime().Local().Format(time.DateTime))
	}
	if p := e.GetProgress(); p != nil {
		line("pages", "%d of %d", p.PagesSent, p.PagesTotal)
		line("fetches", "%d", p.Fetches)
		if p.Reconnects > 0 {
			line("link", "made anew %d times", p.Reconnects)
		}
		if p.SilentS > 0 {
			line("link", "nothing came for %.0f s", p.SilentS)
		}
	}
	if p := e.GetProgress(); p.GetStands() != "" {
		line("VM's state", "it %s, and moves so", fit.Stands(p.Stands))
	}
	line("reason", "%s", e.Reason)
	line("huge pages", "%s", hugePagesOf(e.HugePages))
	line("damage", "%s", e.Damage)
	if e.Abortable {
		line("may be", "aborted: vacate abort %.8s", e.Id)
	}
	if e.Advice != "" {
		fmt.Fprintf(w, "%s.\n", clean(e.Advice))
	}
	if len(e.Remedy) > 0 {
		fmt.Fprintln(w, "Choose one of:")
		for _, r := range e.Remedy {
			fmt.Fprintf(w, "  %s\n", clean(r))
		}
		fmt.Fprintln(w, "See vacate decide --help for what each means.")
	}
}

func watchCommand() *cobra.Command {
	var d daemon
	var asJSON, verbose bool
	c := &cobra.Command{
		Use:   "watch VM|ID",
		Short: "Follow an eviction to its end",
		Long: `Shows the progress of an eviction, out of this host or into it, until it has
ended. Ctrl-C ends the command alone: the eviction goes on. The exit code is
the eviction's. With --json, each line on standard output is
{"type":"eviction","eviction":{...}}: at once, then whenever the eviction
has changed, but at most ten times a second, and when it has ended.

` + exitHelp,
		Args: cobra.ExactArgs(1),
	}
	socketFlag(c, &d)
	c.Flags().BoolVar(&asJSON, "json", false, "JSON lines on standard output (docs/json.md)")
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "show pages, rates and fetches, too")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := d.open(); err != nil {
			return err
		}
		e, err := d.find(c.Context(), args[0])
		if err != nil {
			return err
		}
		if e.Damage != "" {
			return errors.New(e.Damage)
		}
		to := display(newLines(sceneOf(e, verbose), os.Stderr))
		var seen func(*hostv1.Eviction)
		if asJSON {
			to = notesOnly{to}
			seen = func(e *hostv1.Eviction) { writeLine(c.OutOrStdout(), "eviction", e) }
		}
		s := newScreen(to)
		defer s.close()
		last, err := d.follow(c.Context(), e.Id, s, seen)
		if err != nil {
			return err
		}
		if last.Outcome == string(evict.ShutDown) {
			s.note("%s: %s", clean(last.Vm), clean(last.Reason))
		}
		s.close()
		if !asJSON && last.Outcome == string(evict.Completed) {
			sentence, _ := sceneOf(last, false).tell(evict.Progress{State: evict.Completed})
			fmt.Fprintln(c.OutOrStdout(), sentence+".")
		}
		return failure(last)
	}
	return c
}

// notesOnly is a display without progress.
type notesOnly struct{ display }

func (notesOnly) progress(evict.Progress) {}

func abortCommand() *cobra.Command {
	return askCommand(&cobra.Command{
		Use:   "abort VM|ID",
		Short: "Abort an eviction, as long as that is possible",
		Long: `Aborts an eviction, from either host, and returns when the VM runs on where it
was. Once the VM was told to run on the destination, the eviction cannot be
aborted.`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		e, err := d.find(ctx, args[0])
		if err != nil {
			return nil, err
		}
		r, err := d.Abort(ctx, connect.NewRequest(&hostv1.AbortRequest{Id: e.Id}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "aborted: %s\n", clean(r.Msg.Reason))
		return r.Msg, nil
	})
}

// A decider is what `vacate decide` was told.
type decider struct {
	confirm string
	fenced  string
	fence   bool
	lose    string
	ask     func(question string) (string, error) // nil: nobody can be asked
}

// complete asks for what is missing of a decision about an eviction. Where there is nothing to
// decide it asks for nothing: the daemon will say why.
func (o *decider) complete(e *hostv1.Eviction, resume bool) error {
	if !e.Decidable {
		return nil
	}
	answers := map[string]*string{"fenced": &o.fenced, "lose": &o.lose, "confirm": &o.confirm}
	about := &hostv1.Eviction{Vm: clean(e.Vm), Peer: clean(e.Peer), NeedsFencing: e.NeedsFencing,
		CanFence: e.CanFence, LastCopy: e.LastCopy}
	for _, q := range ui.Questions(about, resume, o.fence) {
		to := answers[q.Field]
		if *to != "" {
			continue
		}
		if o.ask == nil {
			return fmt.Errorf("--%s %s is missing. %s", q.Field, q.Want, q.Text)
		}
		var err error
		if *to, err = o.ask(fmt.Sprintf("%s\nType %s if so: ", q.Text, q.Want)); err != nil {
			return err
		}
		if *to != q.Want {
			return errors.New("nothing was decided")
		}
	}
	return nil
}

func decideCommand() *cobra.Command {
	var o decider
	c := &cobra.Command{
		Use:   "decide VM|ID resume-here|discard",
		Short: "End an eviction that only an operator can end",
		Long: `When the other host has lost a VM that may have run there, or does not answer,
the VM stays frozen here, with all of its memory as it was at the freeze. This
host keeps asking: as soon as the other host answers, the eviction goes on by
itself. An operator who knows more may decide:

  resume-here  The VM goes on here from the freeze. What it did on the other
               host since is lost. What it wrote to its disks there stays, and
               the guest does not know of it.
  discard      Gives up the copy here: its QEMU is ended. If the VM does not run
               on the other host with all of its memory, it is lost. On the host
               that the VM came to, while the source does not answer, this ends
               the copy that runs.

Two copies of a VM spoil its disks. So unless the other host has said that the
VM's QEMU there has ended, resume-here needs one of

  --fenced HOST  You assert that HOST, the other one, is powered off, or cut off
                 from the VM's disks and from the network, or that the QEMU
                 process of the VM there has ended; and that the VM was not
                 moved on from there.
  --fence        vacated runs the command that its configuration has for HOST
                 (fence under [peers.HOST]), which must succeed.

If HOST answers all the same, or a third host has the VM, nothing is decided.
If HOST comes back later, this host tells it the decision, and it ends its copy
of the VM.

The copy here may be the last one. So unless it is of no use, discard needs

  --lose VM      You accept that the VM is lost, with its memory and what it had
                 not written to its disks, if HOST does not have all of it.

On a terminal, the command asks for what is missing; elsewhere all flags are
needed. To keep a copy before you decide: vacate export.`,
		Args: cobra.ExactArgs(2),
	}
	c.Flags().StringVar(&o.confirm, "confirm", "", "`NAME` of the VM, once more")
	c.Flags().StringVar(&o.fenced, "fenced", "",
		"assert that the other `HOST` is powered off or cut off, or that the VM's QEMU there "+
			"has ended")
	c.Flags().BoolVar(&o.fence, "fence", false,
		"let vacated fence the other host first, by its command")
	c.Flags().StringVar(&o.lose, "lose", "",
		"accept that the `VM` is lost, if the other host does not have all of it")
	return askCommand(c,
		func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
			decision, ok := map[string]hostv1.Decision{
				string(evict.ResumeHere): hostv1.Decision_DECISION_RESUME_HERE,
				string(evict.Discard):    hostv1.Decision_DECISION_DISCARD,
			}[args[1]]
			if !ok {
				return nil, fmt.Errorf("%q is no decision: the decisions are %s and %s", args[1],
					evict.ResumeHere, evict.Discard)
			}
			e, err := d.find(ctx, args[0])
			if err != nil {
				return nil, err
			}
			if term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stderr.Fd())) {
				o.ask = askTerminal
			}
			if err := o.complete(e, decision == hostv1.Decision_DECISION_RESUME_HERE); err != nil {
				return nil, err
			}
			r, err := d.Decide(ctx, connect.NewRequest(&hostv1.DecideRequest{
				Id: e.Id, Decision: decision, Confirm: o.confirm, Fenced: o.fenced, Fence: o.fence,
				Lose: o.lose}))
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(w, "%s: %s\n", clean(r.Msg.Vm), clean(r.Msg.Outcome))
			if r.Msg.Advice != "" {
				fmt.Fprintln(w, clean(r.Msg.Advice)+".")
			}
			return r.Msg, nil
		})
}

// askTerminal asks who sits at the terminal.
func askTerminal(question string) (string, error) {
	fmt.Fprint(os.Stderr, question)
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return strings.TrimSpace(line), nil
}

func exportCommand() *cobra.Command {
	return askCommand(&cobra.Command{
		Use:   "export VM|ID FILE",
		Short: "Write the memory and devices of a frozen VM to a file",
		Long: `Writes the memory and the device state of a VM that stands frozen here to a new
file. QEMU can start the VM from it, as it was at the freeze. The disks are not
in it. The VM stays as it is.`,
		Args: cobra.ExactArgs(2),
	}, func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
		e, err := d.find(ctx, args[0])
		if err != nil {
			return nil, err
		}
		file, err := filepath.Abs(args[1])
		if err != nil {
			return nil, err
		}
		r, err := d.Export(ctx, connect.NewRequest(&hostv1.ExportRequest{Id: e.Id, Path: file}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "%s: %d MiB\n", clean(r.Msg.Path), r.Msg.Bytes>>20)
		for _, u := range r.Msg.Usage {
			fmt.Fprintln(w, clean(u))
		}
		return r.Msg, nil
	})
}

// errFatal: the doctor found what would have an eviction fail.
var errFatal = fmt.Errorf("%w: an eviction would fail", evict.ErrRefused)

func doctorCommand() *cobra.Command {
	var to string
	c := &cobra.Command{
		Use:   "doctor [VM] [--to HOST]",
		Short: "Check what would block an eviction",
		Long: `Checks this host; a VM on it, if you name one; and the other host and the link
to it, if you name one: userfaultfd, versions of QEMU, machine type, page sizes,
devices and disks, space, clocks, link and certificates. Each finding has its
remedy. Nothing is touched. The exit code is 2 if an eviction would fail.`,
		Args: cobra.MaximumNArgs(1),
	}
	c.Flags().StringVar(&to, "to", "", "the other `HOST`, by its name")
	return askCommand(c,
		func(ctx context.Context, d *daemon, args []string, w io.Writer) (proto.Message, error) {
			q := &hostv1.DoctorRequest{To: to}
			if len(args) == 1 {
				q.Vm = args[0]
			}
			r, err := d.Doctor(ctx, connect.NewRequest(q))
			if err != nil {
				return nil, err
			}
			list := findings(r.Msg.Findings)
			if err := doctor.Text(w, list); err != nil {
				return nil, err
			}
			if doctor.Worst(list) == doctor.Fatal {
				return r.Msg, errFatal
			}
			return r.Msg, nil
		})
}

// findings are those of the daemon, fit for a terminal.
func findings(list []*hostv1.Finding) (out []doctor.Finding) {
	levels := map[hostv1.Level]doctor.Level{
		hostv1.Level_LEVEL_OK: doctor.OK, hostv1.Level_LEVEL_NOTE: doctor.Note,
		hostv1.Level_LEVEL_WARNING: doctor.Warning,
	}
	for _, f := range list {
		level, ok := levels[f.Level]
		if !ok {
			level = doctor.Fatal
		}
		out = append(out, doctor.Finding{Host: clean(f.Host), Check: clean(f.Check), Level: level,
			Text: clean(f.Text), Remedy: clean(f.Remedy)})
	}
	return out
}

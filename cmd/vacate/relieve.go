package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/relief"
	"vacate/internal/sys/units"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
)

func pressureCommand() *cobra.Command {
	var over time.Duration
	c := askCommand(&cobra.Command{
		Use:   "pressure",
		Short: "Show how short of CPU, memory and link this host and its VMs are",
		Long: `Measures over some time, from Linux's own accounting, how loaded this host is
and how each of its VMs fares. Neither QEMU nor the guest is asked.

  CPU       cores in use; of a VM those that its vCPUs had
  WAITING   cores that vCPUs waited for beyond that
  STEAL     the share of the CPU it wants that a VM does not get`,
		Args: cobra.NoArgs,
	}, func(ctx context.Context, d *daemon, _ []string, w io.Writer) (proto.Message, error) {
		r, err := d.Pressure(ctx,
			connect.NewRequest(&hostv1.PressureRequest{OverMs: uint32(over.Milliseconds())}))
		if err != nil {
			return nil, err
		}
		m := r.Msg
		fmt.Fprintf(w,
			"over %.1f s: %.2f of %d cores in use, VMs wait for %.2f more; %s of %s of memory "+
				"available\n", m.OverS, m.CpuCores, m.Cpus, m.WaitingCores,
			units.Size(m.AvailableBytes), units.Size(m.MemoryBytes))
		if m.SwapUsedBytes > 0 || m.RefaultsPerS > 0 {
			fmt.Fprintf(w,
				"%s in swap, %.0f pages/s come back from it; %.0f pages/s are read again that "+
					"were dropped too soon\n", units.Size(m.SwapUsedBytes), m.SwappedInPerS,
				m.RefaultsPerS)
		}
		for _, what := range slices.Sorted(maps.Keys(m.Stalls)) {
			fmt.Fprintf(w,
				"%s: some task of the machine stood still for it %.0f %% of the time, all %.0f "+
					"%%\n", clean(what), m.Stalls[what].Some*100, m.Stalls[what].Full*100)
		}
		for _, name := range slices.Sorted(maps.Keys(m.Links)) {
			fmt.Fprintf(w, "%s: %.1f Mbit/s\n", clean(name), m.Links[name]*8/1e6)
		}
		fmt.Fprintln(w)
		t := table(w, "VM", "CPU", "WAITING", "STEAL", "QEMU", "MEMORY", "SWAP", "FAULTS/S")
		for _, v := range m.Vms {
			if v.Problem != "" {
				row(t, v.Name, v.Problem)
				continue
			}
			row(t, v.Name, cores(v.CpuCores), cores(v.WaitingCores),
				fmt.Sprintf("%.0f %%", v.Steal*100), cores(v.OverheadCores),
				units.Size(v.ResidentBytes), units.Size(v.SwappedBytes),
				fmt.Sprintf("%.0f", v.MajorFaultsPerS))
		}
		return m, t.Flush()
	})
	c.Flags().DurationVar(&over, "over", 2*time.Second, "how long to measure")
	return c
}

func cores(n float64) string { return fmt.Sprintf("%.2f", n) }

// relieveOptions are those of relieve and evacuate.
type relieveOptions struct {
	daemon daemon
	goal   string
	all    bool
	to     string
	except []string
	force  bool
	dryRun bool
	json   bool

	patience time.Duration // as in evictOptions; for tests
}

func relieveCommand() *cobra.Command {
	o := relieveOptions{}
	c := &cobra.Command{
		Use:   "relieve",
		Short: "Evict VMs until this host is no longer overloaded",
		Long: `Measures the load of this host and the others, and predicts for each VM and each
other host what an eviction would gain and how long it would take. It shows
that, and evicts the VM that reaches the goal the soonest; then again, until the
goal is met or no eviction helps. No VM goes to a host where others would then
starve. Pinned VMs stay, and those that could not be evicted.

Goals: cpu<80% limits the CPU wanted for each core, which is more than 100 %
where VMs wait for each other; free 8GiB asks for memory. By default no VM shall
get less than nine tenths of the CPU it wants.`,
		Example: `  vacate relieve --dry-run
  vacate relieve --goal 'cpu<80%'
  vacate relieve --goal 'free 8GiB'`,
		Args: cobra.NoArgs,
	}
	o.flags(c)
	c.Flags().StringVar(&o.goal, "goal", "",
		"the load or memory that this host shall reach (default cpu<111%)")
	c.RunE = func(c *cobra.Command, _ []string) error { return o.relieve(c.Context()) }
	return c
}

func evacuateCommand() *cobra.Command {
	o := relieveOptions{all: true}
	c := &cobra.Command{
		Use:   "evacuate",
		Short: "Evict all VMs of this host",
		Long: `Evicts the VMs of this host one after the other, and those first whose memory
takes the least time, so that CPU and memory are free as soon as possible. Each
goes where there are room and CPU for it. VMs that stand still move, too: one
that is paused stays paused. If one fails, the others still go. So they do if
one makes no progress for 20 s, for instance as the other host does not answer:
the daemon goes on with that one. At the end vacate lists the VMs that stayed,
says why each did, and what to type.

No VM goes to a host where others would starve, or where too little memory would
be left. --force allows that where no host is better; it never takes memory that
is not there. VMs that are pinned in their descriptions stay.`,
		Example: `  vacate evacuate --dry-run
  vacate evacuate --to hostb --except db1 --except db2
  vacate evacuate --force`,
		Args: cobra.NoArgs,
	}
	o.flags(c)
	c.Flags().StringVar(&o.to, "to", "", "the only `HOST` that VMs go to (default any)")
	c.Flags().StringArrayVar(&o.except, "except", nil,
		"a `VM` that stays; may be given several times")
	c.Flags().BoolVar(&o.force, "force", false, "overload other hosts rather than leave a VM here")
	c.RunE = func(c *cobra.Command, _ []string) error { return o.evacuate(c.Context()) }
	return c
}

func (o *relieveOptions) flags(c *cobra.Command) {
	socketFlag(c, &o.daemon)
	c.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what would be done, and do nothing")
	c.Flags().BoolVar(&o.json, "json", false,
		"with --dry-run: JSON on standard output (docs/json.md)")
}

// plan asks for the choice, and shows it.
func (o *relieveOptions) plan(ctx context.Context) (*hostv1.PlanResponse, error) {
	if o.json && !o.dryRun {
		return nil, refused(errors.New("--json goes with --dry-run"))
	}
	r, err := o.daemon.Plan(ctx, connect.NewRequest(&hostv1.PlanRequest{
		Goal: o.goal, All: o.all, To: o.to, Except: o.except, Force: o.force,
	}))
	if err != nil {
		return nil, refused(o.daemon.explain(err))
	}
	if o.json {
		return r.Msg, writeJSON(os.Stdout, r.Msg)
	}
	return r.Msg, planText(os.Stdout, r.Msg)
}

// planText shows a choice and what it was made from.
func planText(w io.Writer, p *hostv1.PlanResponse) error {
	t := table(w, "HOST", "CPU", "WAITING", "OF", "AVAILABLE", "LINK", "NOTE")
	for i, h := range p.Hosts {
		if h.Barred != "" {
			row(t, h.Name, "", "", "", "", "", h.Barred)
			continue
		}
		link := "this host"
		if i > 0 {
			link = fmt.Sprintf("%.0f Mbit/s", h.Rate*8/1e6)
		}
		row(t, h.Name, cores(h.CpuCores), cores(h.WaitingCores), cores(h.Cpus),
			units.Size(h.AvailableBytes), link, "")
	}
	t.Flush()
	fmt.Fprintln(w)
	t = table(w, "VM", "TO", "GAIN", "LOAD HERE", "LOAD THERE", "FREES", "RUNS THERE", "ALL BACK",
		"DONE", "VERDICT")
	load := func(l float64) string { return fmt.Sprintf("%.0f %%", l*100) }
	took := func(s float64) string { return fmt.Sprintf("%.1f s", s) }
	for i, c := range p.Candidates {
		why := c.Refused
		switch {
		case why == "" && c.Beyond != "":
			why = "goes by force: " + c.Beyond
		case why == "" && c.Meets && i == 0:
			why = "best: it reaches the goal, and has all back the soonest"
		case why == "" && c.Meets:
			why = "reaches the goal"
		case why == "" && p.Goal != "" && i == 0:
			why = "best: it comes the nearest to the goal"
		case why == "" && p.Goal != "":
			why = "comes nearer to the goal"
		case why == "":
			why = "goes"
		}
		if c.To == "" {
			row(t, c.Vm, "", "", "", "", "", "", "", "", why)
			continue
		}
		row(t, c.Vm, c.To, fmt.Sprintf("%+.2f", c.GainCores), load(c.LoadHere), load(c.LoadThere),
			units.Size(c.FreedBytes), took(c.TransferS), took(c.BackS), took(c.TotalS), why)
	}
	return t.Flush()
}

func (o *relieveOptions) relieve(ctx context.Context) error {
	if err := o.daemon.open(); err != nil {
		return err
	}
	for round := 0; ; round++ {
		p, err := o.plan(ctx)
		switch {
		case err != nil:
			return err
		case o.json:
			return nil
		case p.Met:
			fmt.Printf("\nThe goal is met: %s.\n", clean(p.Goal))
			return nil
		case len(p.Candidates) == 0:
			return refused(errors.New("no VM can go, or there is no host to go to"))
		case p.Candidates[0].Refused != "" && round > 0:
			fmt.Printf("\nThe goal, %s, is not met, and no further eviction helps: the table "+
				"says why.\n", clean(p.Goal))
			return nil
		case p.Candidates[0].Refused != "":
			return refused(fmt.Errorf("no eviction helps to reach %s: the table says why", p.Goal))
		case o.dryRun:
			return nil
		case round > len(p.Hosts)+len(p.Candidates):
			return fmt.Errorf("%w: %d VMs have left, and the goal is not met: the load grows as "+
				"fast", evict.ErrAborted, round)
		}
		if err := o.evict(ctx, p.Candidates[0]); err != nil {
			return err
		}
		fmt.Println()
	}
}

func (o *relieveOptions) evacuate(ctx context.Context) error {
	if err := o.daemon.open(); err != nil {
		return err
	}
	p, err := o.plan(ctx)
	if err != nil || o.dryRun {
		return err
	}
	stayed := map[string]stay{} // by VM
	stuck := map[string]*stuckError{}
	for _, c := range p.Candidates {
		switch {
		case c.Refused == relief.Excepted:
			stayed[c.Vm] = stay{why: c.Refused}
			continue
		case c.Refused != "":
			stayed[c.Vm] = stay{c.Refused, refused(errors.New(c.Refused))}
			continue
		}
		err := o.evict(ctx, c)
		if errors.Is(err, errDetached) || ctx.Err() != nil {
			return err
		}
		var s *stuckError
		if errors.As(err, &s) {
			fmt.Printf("%s. Going on with the next.\n", clean(err.Error()))
			stuck[c.Vm] = s
		} else if err != nil {
			stayed[c.Vm] = staying(err)
		}
	}
	for vm, s := range stuck {
		if why, stays := o.revisit(ctx, s); stays {
			stayed[vm] = why
		}
	}
	return summary(os.Stdout, stayed)
}

// patience is how long an evacuation waits for an eviction that does not get on.
const patience = 20 * time.Second

// revisit says what became of an eviction that was followed no longer, and whether its VM stays for
// now.
func (o *relieveOptions) revisit(ctx context.Context, s *stuckError) (why stay, stays bool) {
	e := s.last
	if r, err := o.daemon.GetEviction(ctx,
		connect.NewRequest(&hostv1.GetEvictionRequest{Id: e.Id})); err == nil {
		e = r.Msg
	}
	if e.Outcome != "" && e.State == "" {
		err := failure(e)
		return staying(err), err != nil
	}
	text := fmt.Sprintf("its eviction to %s goes on in the daemon, and is %q", e.Peer, stateOf(e))
	if n := pagesOf(e); n != "" {
		text += fmt.Sprintf(", with %s of its memory done", n)
	}
	if p := e.GetProgress(); p.GetSilentS() > 0 {
		text += fmt.Sprintf("; nothing came from %s for %.0f s", e.Peer, p.SilentS)
	}
	text +=
		fmt.Sprintf(": `vacate watch %s` follows it, `vacate status %[1]s` says what you can do",
			e.Vm)
	if e.Abortable {
		text += fmt.Sprintf(", `vacate abort %s` keeps the VM here", e.Vm)
	}
	return stay{text, detached{text}}, true
}

// staying is the stay of a VM whose eviction failed.
func staying(err error) stay {
	if err == nil {
		return stay{}
	}
	return stay{strings.TrimPrefix(strings.ReplaceAll(explain(err), "\n", " "), "vacate: "), err}
}

// stay is why a VM was not moved.
type stay struct {
	why string
	err error // nil: it was not to be
}

// summary lists which VMs stayed, and why. The error is that of all that should have gone.
func summary(w io.Writer, stayed map[string]stay) error {
	if len(stayed) == 0 {
		fmt.Fprintln(w, "\nAll VMs have left.")
		return nil
	}
	fmt.Fprintln(w, "\nNot moved:")
	t := table(w, "VM", "WHY")
	var errs []error
	for _, vm := range slices.Sorted(maps.Keys(stayed)) {
		row(t, vm, stayed[vm].why)
		if err := stayed[vm].err; err != nil {
			errs = append(errs, err)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(errs) == 0 {
		return nil
	}
	return &notMoved{len(errs), errors.Join(errs...)}
}

// notMoved is that some VMs were not moved. It has been told why.
type notMoved struct {
	vms int
	why error
}

func (e *notMoved) Error() string {
	return fmt.Sprintf("%d of the VMs did not leave: see the list above", e.vms)
}

// Unwrap lets errors.Is find what came of the VMs.
func (e *notMoved) Unwrap() error { return e.why }

// evict does what was chosen, and follows it.
func (o *relieveOptions) evict(ctx context.Context, c *hostv1.Candidate) error {
	fmt.Printf("\nvacate evict %s --to %s\n", clean(c.Vm), clean(c.To))
	e := evictOptions{to: c.To, daemon: o.daemon}
	if o.all {
		e.patience = cmp.Or(o.patience, patience)
	}
	return e.runByName(ctx, c.Vm)
}

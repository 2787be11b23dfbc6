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
	"text/tabwriter"
	"time"

	"vacate/internal/cli"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/view"
	"vacate/internal/link/certs"
	"vacate/internal/sys/units"
	"vacate/internal/ui"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// fleetPort is where a member of a fleet's brain is asked, unless an operator says another.
const fleetPort = "7610"

// memberTime is how long a member may take to say who leads. One may be stopped, or its machine.
const memberTime = 10 * time.Second

// brain is a fleet's, as a command asks it.
type brain struct {
	fleetv1.FleetClient
	members string // NAME[@HOST:PORT], with commas between
	certs   string
	status  *fleetv1.StatusResponse // of the one that leads
}

// dial makes a client of one member.
func (b *brain) dial(identity *certs.Identity, member string) (fleetv1.FleetClient, error) {
	name, address, err := splitName("--fleet", member, fleetPort)
	if err != nil {
		return nil, err
	}
	return fleetv1.NewFleetClient(overTLS(identity, name), "https://"+address,
		connect.WithReadMaxBytes(ui.MaxAnswer)), nil
}

// open finds the member that leads.
func (b *brain) open(ctx context.Context) error {
	if b.members == "" {
		return refused(errors.New(
			"no fleet is named: --fleet BRAIN, or VACATE_FLEET, has the names " +
				"of members of its brain"))
	}
	identity, err := certs.Load(b.certs, func(error) {})
	if err != nil {
		return refused(
			fmt.Errorf("%w: vacate fleet needs an operator's certificate, see --operator-certs",
				err))
	}
	var errs []error
	denied := false
	todo := strings.Split(b.members, ",")
	for tried := map[string]bool{}; len(todo) > 0; todo = todo[1:] {
		if tried[todo[0]] {
			continue
		}
		tried[todo[0]] = true
		client, err := b.dial(identity, todo[0])
		if err != nil {
			return err
		}
		r, err := statusOf(ctx, client)
		denied = denied || connect.CodeOf(err) == connect.CodePermissionDenied
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", todo[0], err))
		case r.Leads:
			b.FleetClient, b.status = client, r
			return nil
		case r.Leader == "":
			errs = append(errs, fmt.Errorf("%s: no member leads the fleet at the moment", todo[0]))
		case tried[r.Leader]:
			errs = append(errs, fmt.Errorf("%s: %s leads, as far as it has heard", todo[0],
				r.Leader))
		default:
			todo = append(todo, r.Leader)
		}
	}
	if denied {
		return fmt.Errorf("the fleet's brain refuses that: %w", errors.Join(errs...))
	}
	return fmt.Errorf("the fleet's brain does not answer; hosts go on by themselves: %w",
		errors.Join(errs...))
}

// statusOf asks a member for its status, and waits for memberTime at most.
func statusOf(ctx context.Context, member fleetv1.FleetClient) (*fleetv1.StatusResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, memberTime,
		fmt.Errorf("it has not answered for %v", memberTime))
	defer cancel()
	r, err := member.Status(ctx, connect.NewRequest(&fleetv1.StatusRequest{}))
	if err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return r.Msg, nil
}

const fleetUsage = "members of the fleet's brain, `NAME[@HOST:PORT],...`; VACATE_FLEET sets the " +
	"default (default port 7610)"

// fleetAsk makes a command that asks the fleet's brain. With --json, the answer goes out as JSON.
func fleetAsk(c *cobra.Command, ask func(ctx context.Context, b *brain, args []string,
	w io.Writer) (proto.Message, error)) *cobra.Command {
	var b brain
	var asJSON bool
	c.Flags().StringVar(&b.members, "fleet", os.Getenv("VACATE_FLEET"), fleetUsage)
	c.Flags().StringVar(&b.certs, "operator-certs", "/etc/vacate/certs",
		"directory of your certificate")
	c.Flags().BoolVar(&asJSON, "json", false, "JSON on standard output (docs/json.md)")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := b.open(c.Context()); err != nil {
			return err
		}
		w := c.OutOrStdout()
		if asJSON {
			w = io.Discard
		}
		answer, err := ask(c.Context(), &b, args, w)
		if list, ok := answer.(*fleetv1.ListDecisionsResponse); ok && asJSON {
			for _, d := range list.Decisions {
				err = errors.Join(err, writeLine(c.OutOrStdout(), "decision", d))
			}
		} else if answer != nil && asJSON {
			err = errors.Join(err, writeJSON(c.OutOrStdout(), answer))
		}
		var said *connect.Error
		if errors.As(err, &said) {
			return errors.New(said.Message())
		}
		return err
	}
	return c
}

func fleetCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fleet",
		Short: "Look at a fleet of hosts, and empty hosts for maintenance",
		Long: `Asks the brain of a fleet, vacate-fleet. Your certificate must have a
role there: view, act or admin. docs/fleet-setup.md tells how to set one up.`,
	}
	c.AddCommand(fleetStatusCommand(), fleetHostsCommand(), fleetDrainCommand(),
		fleetRestoreCommand(), fleetDecisionsCommand(), fleetApproveCommand(),
		fleetPlaceCommand(), fleetRulesCommand(), fleetModeCommand(), fleetPolicyCommand(),
		fleetForgetCommand(), fleetBackupCommand())
	return c
}

func fleetStatusCommand() *cobra.Command {
	return fleetAsk(&cobra.Command{
		Use: "status", Short: "Show who leads the fleet, and how it is", Args: cobra.NoArgs,
	}, func(_ context.Context, b *brain, _ []string, w io.Writer) (proto.Message, error) {
		writeFleetStatus(w, b.status)
		return b.status, nil
	})
}

func writeFleetStatus(w io.Writer, s *fleetv1.StatusResponse) {
	fmt.Fprintf(w, "leader     %s, since %s\n", clean(s.Leader),
		s.Since.AsTime().Local().Format(time.DateTime))
	fmt.Fprintf(w, "mode       %s\n", clean(s.Mode))
	fmt.Fprintf(w, "hosts      %d, %d of them late\n", s.Hosts, s.Late)
	fmt.Fprintf(w, "VMs        %d, %d of them starve\n", s.Vms, s.Starving)
	fmt.Fprintf(w, "evictions  %d under way, %d wait for approval\n", s.Moving, s.Waiting)
	for _, t := range s.Troubles {
		fmt.Fprintf(w, "- %s\n", clean(t))
	}
}

func fleetHostsCommand() *cobra.Command {
	var vms bool
	c := fleetAsk(&cobra.Command{
		Use: "hosts", Short: "List the hosts of the fleet", Args: cobra.NoArgs,
		Long: `Lists the hosts of the fleet. A host is late if it has not reported for some
seconds. Nothing is concluded from that: its VMs run on, and its own guard goes
on.`,
	}, func(ctx context.Context, b *brain, _ []string, w io.Writer) (proto.Message, error) {
		r, err := b.ListHosts(ctx, connect.NewRequest(&fleetv1.ListHostsRequest{}))
		if err != nil {
			return nil, err
		}
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "HOST\tSTATE\tCPU\tWAITING\tMEMORY FREE\tVMS\tMAINTENANCE")
		for _, h := range r.Msg.Hosts {
			l := h.GetLoad()
			fmt.Fprintf(t, "%s\t%s\t%.1f of %.0f\t%.1f\t%s of %s\t%d\t%s\n", clean(h.Name),
				clean(h.State), l.GetUsed(), l.GetCpus(), l.GetWaiting(),
				units.Size(l.GetAvailable()), units.Size(l.GetTotal()), len(h.Vms),
				clean(h.Maintenance))
		}
		t.Flush()
		for _, h := range r.Msg.Hosts {
			for _, s := range h.Staying {
				fmt.Fprintf(w, "%s keeps %s\n", clean(h.Name), clean(s))
			}
			for _, v := range h.Vms {
				if vms {
					fmt.Fprintf(w, "%s: %s has %.2f cores and waits for %.2f, %s\n",
						clean(h.Name), clean(v.Name), v.Cpu, v.Waiting, units.Size(v.Memory))
				}
			}
		}
		return r.Msg, nil
	})
	c.Flags().BoolVar(&vms, "vms", false, "list their VMs, too")
	return c
}

func fleetDrainCommand() *cobra.Command {
	var at, by, reason string
	var dry bool
	var rate cli.Rate
	c := &cobra.Command{
		Use: "drain HOST", Short: "Empty a host, and keep it empty", Args: cobra.ExactArgs(1),
		Long: `Has all VMs of a host evicted to others, and keeps VMs off it until vacate fleet
restore. HOST is a name, or a selector such as rack=r1 for all hosts with these
labels: none of them takes a VM of another one. No VM is stopped: one that
cannot leave stays, and is named with the reason. That holds until it is
restored, also through restarts. With --dry-run, only says how long it will
take, and which VMs cannot leave.`,
		Example: `  vacate fleet drain hosta --dry-run
  vacate fleet drain rack=r1 --dry-run
  vacate fleet drain hosta --by 22:00 --reason "new memory"
  vacate fleet drain hosta --at 02:00`,
	}
	fleetAsk(c, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message,
		error) {
		q := &fleetv1.DrainRequest{Host: args[0], Reason: reason, DryRun: dry, Rate: uint64(rate)}
		begin := time.Now()
		if c.Flags().Changed("at") {
			when, err := ui.ClockTime("--at", at, begin)
			if err != nil {
				return nil, err
			}
			begin, q.At = when, timestamppb.New(when)
		}
		if c.Flags().Changed("by") {
			when, err := ui.ClockTime("--by", by, begin)
			if err != nil {
				return nil, err
			}
			q.By = timestamppb.New(when)
		}
		r, err := b.Drain(ctx, connect.NewRequest(q))
		if err != nil {
			return nil, err
		}
		writeDrain(w, q, r.Msg, begin)
		return r.Msg, nil
	})
	c.Flags().StringVar(&at, "at", "", "begin then, `HH:MM`; default: now")
	c.Flags().StringVar(&by, "by", "", "when it shall be empty, `HH:MM`; it is said if it will not")
	c.Flags().StringVar(&reason, "reason", "", "what others are told of it")
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing")
	c.Flags().Var(&rate, "rate-limit", "most `RATE` of each eviction, such as 50MB/s")
	return c
}

func writeDrain(w io.Writer, q *fleetv1.DrainRequest, r *fleetv1.DrainResponse, now time.Time) {
	if q.At != nil {
		fmt.Fprintf(w, "the drain begins %s; this is what it would come to now\n",
			now.Local().Format(time.DateTime))
	}
	for _, s := range r.Steps {
		fmt.Fprintf(w, "%s goes to %s, within %.0f s\n", clean(s.Vm), clean(s.To), s.DoneS)
	}
	for _, s := range r.Staying {
		fmt.Fprintf(w, "stays: %s\n", clean(s))
	}
	for _, s := range r.Warnings {
		fmt.Fprintf(w, "warning: %s\n", clean(s))
	}
	for _, s := range ui.DrainTakes(q, r, now) {
		fmt.Fprintln(w, clean(s))
	}
}

func fleetRestoreCommand() *cobra.Command {
	var dry bool
	c := fleetAsk(&cobra.Command{
		Use: "restore HOST", Short: "Have a host take VMs again after a drain",
		Long: `Ends the drain of a host, or of all that a selector names. VMs that were there
come back, each if that helps: its place there is better than where it is.`,
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message, error) {
		r, err := b.Restore(ctx,
			connect.NewRequest(&fleetv1.RestoreRequest{Host: args[0], DryRun: dry}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(w, clean(ui.Restored(r.Msg)))
		return r.Msg, nil
	})
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing")
	return c
}

func fleetDecisionsCommand() *cobra.Command {
	var most uint32
	c := fleetAsk(&cobra.Command{
		Use: "decisions", Short: "List what was decided, why, and what came of it",
		Long: `Lists what was decided, the latest first: why, what was predicted, and what
came of it. With --json, each decision is a line.`,
		Example: `  vacate fleet decisions --json | jq -r '.decision | [.vm, .total_s, .came_total_s]'`,
		Args:    cobra.NoArgs,
	}, func(ctx context.Context, b *brain, _ []string, w io.Writer) (proto.Message, error) {
		r, err := b.ListDecisions(ctx,
			connect.NewRequest(&fleetv1.ListDecisionsRequest{Most: most}))
		if err != nil {
			return nil, err
		}
		for _, d := range r.Msg.Decisions {
			fmt.Fprintf(w, "%s  %s  %s: %s to %s (%s): %s\n", clean(d.Id),
				d.At.AsTime().Local().Format(time.DateTime), clean(d.Vm), clean(d.From),
				clean(d.To), clean(d.Cause), clean(d.State))
			for _, why := range d.Reasons {
				fmt.Fprintf(w, "    %s\n", clean(why))
			}
			fmt.Fprintf(w, "    predicted: %.1f s until all is there", d.TotalS)
			if d.CameTotalS != nil {
				fmt.Fprintf(w, "; it took %.1f s", *d.CameTotalS)
			}
			fmt.Fprintln(w)
			if d.Reason != "" {
				fmt.Fprintf(w, "    %s\n", clean(d.Reason))
			}
		}
		return r.Msg, nil
	})
	c.Flags().Uint32Var(&most, "most", 50, "list so many at most, the latest first")
	return c
}

func fleetApproveCommand() *cobra.Command {
	var reject bool
	c := fleetAsk(&cobra.Command{
		Use: "approve ID", Short: "Say yes to a decision that waits, in mode ask",
		Args: cobra.ExactArgs(1),
	}, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message, error) {
		r, err := b.Approve(ctx,
			connect.NewRequest(&fleetv1.ApproveRequest{Id: args[0], Reject: reject}))
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "%s to %s: %s\n", clean(r.Msg.Vm), clean(r.Msg.To), clean(r.Msg.State))
		return r.Msg, nil
	})
	c.Flags().BoolVar(&reject, "reject", false, "say no")
	return c
}

func fleetPlaceCommand() *cobra.Command {
	var memory cli.MiB
	var cpu float64
	var name, labels string
	c := fleetAsk(&cobra.Command{
		Use: "place", Short: "Say where a new VM would best start",
		Example: "  vacate fleet place --memory 8G --cpu 2", Args: cobra.NoArgs,
	}, func(ctx context.Context, b *brain, _ []string, w io.Writer) (proto.Message, error) {
		l, err := view.ParseLabels(labels)
		if err != nil {
			return nil, err
		}
		r, err := b.Place(ctx,
			connect.NewRequest(&fleetv1.PlaceRequest{Memory: uint64(memory) << 20,
				Cpu: cpu, Name: name, Labels: l}))
		if err != nil {
			return nil, err
		}
		for _, x := range r.Msg.Choices {
			fmt.Fprintf(w, "%s: %s\n", clean(x.Host), clean(x.Why))
		}
		if len(r.Msg.Choices) == 0 {
			return r.Msg, fmt.Errorf("no host can have it: %s", r.Msg.Why)
		}
		return r.Msg, nil
	})
	c.Flags().Var(&memory, "memory", "`SIZE` of its memory, such as 8G")
	c.Flags().Float64Var(&cpu, "cpu", 1, "cores that it will want")
	c.Flags().StringVar(&name, "name", "", "its name, for rules that are about it")
	c.Flags().StringVar(&labels, "labels", "", "its `LABELS`, the same, such as app=db,tier=prod")
	return c
}

func fleetRulesCommand() *cobra.Command {
	var set, remove string
	var dry bool
	c := &cobra.Command{
		Use: "rules [RULE]", Short: "List rules, and what is in the way of them; set or remove one",
		Long: `Lists the rules of the fleet, and which are not kept and why. With --set NAME,
makes or replaces a rule; with --remove NAME, removes it. A rule is one of
  vms SELECTOR must|should run together|apart [by LABEL]
  vms SELECTOR must|should|never run on hosts SELECTOR
  vms SELECTOR must|should stay
A selector is LABEL=VALUE[|VALUE], LABEL!=VALUE, LABEL or !LABEL, with commas
between. The label name is a VM's or a host's name, and * stands for any text.`,
		Example: `  vacate fleet rules --set db "vms name=db* must run apart"
  vacate fleet rules --remove db`,
		Args: cobra.MaximumNArgs(1),
	}
	fleetAsk(c, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message,
		error) {
		var r *connect.Response[fleetv1.ListRulesResponse]
		var err error
		sets, removes := c.Flags().Changed("set"), c.Flags().Changed("remove")
		switch {
		case sets && removes || sets != (len(args) == 1):
			return nil, errors.New("--set NAME goes with a rule, --remove NAME stands alone")
		case dry && !sets:
			return nil, errors.New("--dry-run goes with --set NAME")
		case sets:
			r, err = b.PutRule(ctx,
				connect.NewRequest(&fleetv1.PutRuleRequest{Name: set, Rule: args[0],
					DryRun: dry}))
		case removes:
			r, err = b.RemoveRule(ctx,
				connect.NewRequest(&fleetv1.RemoveRuleRequest{Name: remove}))
		default:
			r, err = b.ListRules(ctx, connect.NewRequest(&fleetv1.ListRulesRequest{}))
		}
		if err != nil {
			return nil, err
		}
		for _, x := range r.Msg.Rules {
			fmt.Fprintf(w, "%s: %s\n", clean(x.Name), clean(x.Rule))
		}
		for _, t := range r.Msg.Troubles {
			fmt.Fprintf(w, "- %s\n", clean(t))
		}
		return r.Msg, nil
	})
	c.Flags().StringVar(&set, "set", "", "make or replace the rule `NAME`")
	c.Flags().StringVar(&remove, "remove", "", "remove the rule `NAME`")
	c.Flags().BoolVar(&dry, "dry-run", false,
		"change nothing; say what would be in the way of the rule")
	return c
}

func fleetModeCommand() *cobra.Command {
	return fleetAsk(&cobra.Command{
		Use: "mode watch|ask|auto", Short: "Set what becomes of decisions",
		Long: `Sets what becomes of decisions: watch logs them, ask has each wait for vacate
fleet approve, auto carries them out. Drains are carried out in each mode.`,
		Args: cobra.ExactArgs(1), ValidArgs: []string{"watch", "ask", "auto"},
	}, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message, error) {
		r, err := b.SetMode(ctx, connect.NewRequest(&fleetv1.SetModeRequest{Mode: args[0]}))
		if err != nil {
			return nil, err
		}
		writeFleetStatus(w, r.Msg)
		return r.Msg, nil
	})
}

func fleetPolicyCommand() *cobra.Command {
	var p fleetv1.Policy
	var sustain, settle, coolDown, late time.Duration
	fields := map[string]string{"starving": "starving", "free": "free", "sustain": "sustain_s",
		"settle": "settle_s", "cool-down": "cool_down_s", "min-gain": "min_gain",
		"max-load": "max_load", "reserve": "reserve", "overcommit": "overcommit",
		"per-host": "per_host", "per-link": "per_link", "in-all": "in_all", "late": "late_s",
		"quiet": "quiet"}
	c := &cobra.Command{
		Use: "policy", Short: "Show how the fleet decides, or change some of it",
		Long: `Shows by which policy the fleet decides, and changes what is given. What is not
given stays as it is. docs/fleet.md says what each setting does. Quiet hours are
by the clock of the member that leads; drains go on in them.`,
		Example: `  vacate fleet policy
  vacate fleet policy --min-gain 0.5 --cool-down 1h --in-all 20
  vacate fleet policy --quiet "mon-fri 08:00-18:00" --quiet "sat,sun 10:00-12:00"
  vacate fleet policy --quiet none`,
		Args: cobra.NoArgs,
	}
	fleetAsk(c, func(ctx context.Context, b *brain, _ []string, w io.Writer) (proto.Message,
		error) {
		p.SustainS, p.SettleS, p.CoolDownS, p.LateS = sustain.Seconds(), settle.Seconds(),
			coolDown.Seconds(), late.Seconds()
		if len(p.Quiet) == 1 && p.Quiet[0] == "none" {
			p.Quiet = nil
		}
		q := &fleetv1.SetPolicyRequest{Policy: &p}
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			if c.Flags().Changed(name) {
				q.Fields = append(q.Fields, fields[name])
			}
		}
		var r *connect.Response[fleetv1.Policy]
		var err error
		if len(q.Fields) > 0 {
			r, err = b.SetPolicy(ctx, connect.NewRequest(q))
		} else {
			r, err = b.GetPolicy(ctx, connect.NewRequest(&fleetv1.GetPolicyRequest{}))
		}
		if err != nil {
			return nil, err
		}
		writePolicy(w, r.Msg)
		return r.Msg, nil
	})
	f := c.Flags()
	f.Float64Var(&p.Starving, "starving", 0, "a VM starves below this `SHARE` of the CPU it wants")
	f.Float64Var(&p.Free, "free", 0, "`SHARE` of its memory that a host shall have available")
	f.DurationVar(&sustain, "sustain", 0, "how long VMs must have starved")
	f.DurationVar(&settle, "settle", 0, "how long a host is left alone after an eviction")
	f.DurationVar(&coolDown, "cool-down", 0, "how long a VM then stays")
	f.Float64Var(&p.MinGain, "min-gain", 0, "`CORES` that all VMs must get more by an eviction")
	f.Float64Var(&p.MaxLoad, "max-load", 0, "most CPU wanted for each core of a target")
	f.Float64Var(&p.Reserve, "reserve", 0, "`SHARE` of its memory that a target keeps free")
	f.Float64Var(&p.Overcommit, "overcommit", 0,
		"most size of all VMs of a host, as a `SHARE` of its memory")
	f.Uint32Var(&p.PerHost, "per-host", 0, "evictions at once from or to a host; 0: any number")
	f.Uint32Var(&p.PerLink, "per-link", 0, "evictions at once over a shared link; 0: any number")
	f.Uint32Var(&p.InAll, "in-all", 0, "evictions at once in the fleet; 0: any number")
	f.DurationVar(&late, "late", 0, "how old a host's report may be")
	f.StringArrayVar(&p.Quiet, "quiet", nil,
		"`HOURS` in which only drains move VMs; repeat it for others; none: there are none")
	return c
}

func writePolicy(w io.Writer, p *fleetv1.Policy) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer t.Flush()
	s := func(seconds float64) time.Duration {
		return time.Duration(seconds * float64(time.Second))
	}
	for _, l := range []struct {
		name  string
		value any
	}{
		{"mode", clean(p.Mode)}, {"starving", p.Starving}, {"free", p.Free},
		{"sustain", s(p.SustainS)}, {"settle", s(p.SettleS)}, {"cool-down", s(p.CoolDownS)},
		{"min-gain", p.MinGain}, {"max-load", p.MaxLoad}, {"reserve", p.Reserve},
		{"overcommit", p.Overcommit}, {"per-host", p.PerHost}, {"per-link", p.PerLink},
		{"in-all", p.InAll}, {"late", s(p.LateS)},
		{"quiet", clean(cmp.Or(strings.Join(p.Quiet, "; "), "none"))},
	} {
		fmt.Fprintf(t, "%s\t%v\n", l.name, l.value)
	}
}

func fleetForgetCommand() *cobra.Command {
	return fleetAsk(&cobra.Command{
		Use: "forget HOST", Short: "Remove a host that is gone for good", Args: cobra.ExactArgs(1),
		Long: `Removes a host from the fleet, with what the fleet has ordered it to do. It must
not be connected. One that joins again belongs to the fleet again.`,
	}, func(ctx context.Context, b *brain, args []string, _ io.Writer) (proto.Message, error) {
		r, err := b.Forget(ctx, connect.NewRequest(&fleetv1.ForgetRequest{Host: args[0]}))
		if err != nil {
			return nil, err
		}
		return r.Msg, nil
	})
}

func fleetBackupCommand() *cobra.Command {
	return fleetAsk(&cobra.Command{
		Use: "backup FILE", Short: "Copy what the fleet remembers to a file",
		Args: cobra.ExactArgs(1),
		Long: `Writes a snapshot of the fleet's etcd to a new file. vacate-fleet --restore makes
a store of it; docs/fleet-setup.md says how.`,
		Example: "  vacate fleet backup fleet-$(date +%F).snapshot",
	}, func(ctx context.Context, b *brain, args []string, w io.Writer) (proto.Message, error) {
		stream, err := b.Backup(ctx, connect.NewRequest(&fleetv1.BackupRequest{}))
		if err != nil {
			return nil, err
		}
		defer stream.Close()
		n, err := writeBackup(args[0], stream)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(w, "%s has the fleet's store: %s\n", clean(args[0]), units.Size(uint64(n)))
		return nil, nil
	})
}

// writeBackup writes a backup to a new file, which is there as a whole or not at all.
func writeBackup(name string, from *connect.ServerStreamForClient[fleetv1.BackupPart]) (n int,
	err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(name))
		}
	}()
	whole := false
	for from.Receive() {
		wrote, err := f.Write(from.Msg().Data)
		if err != nil {
			return 0, err
		}
		n, whole = n+wrote, from.Msg().Whole
	}
	if err := from.Err(); err != nil {
		return 0, err
	}
	if !whole {
		return 0, errors.New("the backup ended early: nothing was kept")
	}
	return n, f.Sync()
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/lab"
	"vacate/lab/daemons"

	"github.com/spf13/cobra"
)

func fleetdrainCommand() *cobra.Command {
	var dir string
	repeat := 3
	c := &cobra.Command{
		Use:   "fleetdrain",
		Short: "drain a host of six VMs, and compare what came with the forecast",
		Long: `Makes a fleet of three hosts. Drains host c, which has two VMs; these are the first
evictions of the fleet. c stays empty, so b is the only target then. Host a has six
VMs: one is paused, one has a rule against b, one cannot be migrated. Has the fleet
forecast the drain of a, drains it, and prints for each VM what was said beforehand
and what came. No VM may stop; each then checks all of its memory.`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.Flags().IntVar(&repeat, "repeat", repeat, "how often, each with a new fleet")
	c.RunE = func(c *cobra.Command, _ []string) error {
		for i := range repeat {
			fmt.Printf("## Fleet %d\n\n", i+1)
			if err := drainSix(c.Context(), lab.Options{Dir: dir, Rate: drainRate, NoPin: true,
				Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}, uint64(i)); err != nil {
				return err
			}
		}
		return nil
	}
	return c
}

// drainRate is the rate of links, in bits per second.
const drainRate = 2e8

// drainedVM is a VM of a host that is drained.
type drainedVM struct {
	name, what string
	idle       int // MiB
	extra      []string
}

// first are those of the fleet's first drain, and six of the one that counts.
var first = []drainedVM{{"old1", "runs", 60, nil}, {"old2", "runs", 120, nil}}

var six = []drainedVM{
	{"web1", "runs", 60, nil},
	{"web2", "runs", 120, nil},
	{"web3", "runs", 180, nil},
	{"web4", "is paused", 90, nil},
	{"web5", "has the rule `vms name=web5 never run on hosts name=hostb`", 60, nil},
	{"web6", "has a device that cannot be migrated (ivshmem)", 60,
		[]string{"-object", "memory-backend-ram,id=shared,size=1M,share=on",
			"-device", "ivshmem-plain,memdev=shared"}},
}

func drainSix(ctx context.Context, opts lab.Options, seed uint64) (err error) {
	f, err := newFleet(ctx, opts, 3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	// Whatever else keeps this machine busy must not matter.
	if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.SetPolicy, &fleetv1.SetPolicyRequest{
		Policy: &fleetv1.Policy{Starving: 0.01, MaxLoad: 10},
		Fields: []string{"starving", "max_load"}}); err != nil {
		return err
	}
	for name, rule := range map[string]string{
		"away": "vms name=web5 never run on hosts name=hostb",
		"old":  "vms name=old* must run on hosts name=hostb|hostc",
	} {
		if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.PutRule,
			&fleetv1.PutRuleRequest{Name: name, Rule: rule}); err != nil {
			return err
		}
	}
	vms := map[string]*daemons.VM{}
	boot := func(h *lab.Host, list []drainedVM) error {
		for _, x := range list {
			seed++
			v, err := f.Boot(ctx, h, x.name, lab.Spec{BareMetal: true, MemoryMiB: 256,
				Load:  lab.Load{HotMiB: 8, IdleMiB: x.idle, Slow: true, Seed: seed},
				Extra: x.extra})
			if err != nil {
				return err
			}
			vms[x.name] = v
		}
		return nil
	}
	if err := boot(f.Hosts[2], first); err != nil {
		return err
	}
	if err := drainHost(ctx, f, "hostc", first, 0); err != nil {
		return err
	}
	if err := boot(f.Hosts[0], six); err != nil {
		return err
	}
	paused, err := vms["web4"].Only(ctx)
	if err == nil {
		err = paused.Execute(ctx, "stop", nil, nil)
	}
	if err != nil {
		return err
	}
	if err := drainHost(ctx, f, "hosta", six, 2); err != nil {
		return err
	}
	return allRun(ctx, vms)
}

// drainHost has a host drained, of whose VMs so many stay, and tells of it.
func drainHost(ctx context.Context, f *daemons.Fleet, host string, vms []drainedVM,
	stay int) error {
	forecast, err := foresee(ctx, f, host, len(vms)-stay, stay)
	if err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	begun := time.Now()
	if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.Drain,
		&fleetv1.DrainRequest{Host: host}); err != nil {
		return err
	}
	came, told, err := followDrain(ctx, f, host, begun, stay == 0)
	if err != nil {
		return err
	}
	fmt.Printf("%s, with a load of %s (this machine's, over a minute). The forecast: %s.\n\n", host,
		strings.Fields(string(load))[0], strings.Join(forecast.Pace, "; "))
	writeDrained(vms, forecast, came, told)
	return nil
}

// foresee asks what would come of a drain, once the host has told all of its VMs, and what they use
// of their memory: the forecast is the same for some time then.
func foresee(ctx context.Context, f *daemons.Fleet, host string, leave, stay int) (
	*fleetv1.DrainResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	last := 0.0
	for {
		r, err := daemons.Ask(ctx, f, fleetv1.FleetClient.Drain,
			&fleetv1.DrainRequest{Host: host, DryRun: true})
		if err != nil {
			return nil, err
		}
		now := r.GetTakesS()
		if len(r.Steps) != leave || len(r.Staying) != stay {
			now = 0
		} else if now > 0 && math.Abs(now-last) < 0.05*now {
			return r, nil
		}
		last = now
		select {
		case <-time.After(10 * time.Second): // which looks at each VM anew
		case <-ctx.Done():
			return nil, fmt.Errorf("the forecast does not come to %d VMs that leave %s: %v: %w",
				leave, host, r, context.Cause(ctx))
		}
	}
}

// followDrain waits until all have left that can, or the host is drained, and returns the seconds
// after which each had, by the leader's word ("": after which the host was empty), and what that
// says of the host then.
func followDrain(ctx context.Context, f *daemons.Fleet, name string, begun time.Time, empty bool) (
	came map[string]float64, host *fleetv1.Host, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	came = map[string]float64{}
	for {
		// First the host: all that has left it by then is among the decisions.
		if host, err = f.Told(ctx, name); err != nil {
			return nil, nil, err
		}
		list, err := daemons.Ask(ctx, f, fleetv1.FleetClient.ListDecisions,
			&fleetv1.ListDecisionsRequest{})
		if err != nil {
			return nil, nil, err
		}
		for _, d := range list.Decisions {
			if d.State == "completed" && d.From == name && came[d.Vm] == 0 {
				came[d.Vm] = time.Since(begun).Seconds()
			}
		}
		if empty && host.Maintenance == "drained" {
			came[""] = time.Since(begun).Seconds()
			return came, host, nil
		}
		if !empty && len(host.Going) == 0 && len(came) > 0 {
			return came, host, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("%v are still to leave: %w", host.GetGoing(),
				context.Cause(ctx))
		}
	}
}

// writeDrained prints a table.
func writeDrained(vms []drainedVM, forecast *fleetv1.DrainResponse, came map[string]float64,
	host *fleetv1.Host) {
	fmt.Print("| VM | | forecast | came | |\n|---|---|---|---|---|\n")
	said := func(list []string, vm string) string {
		for _, s := range list {
			if rest, ok := strings.CutPrefix(s, vm+": "); ok {
				return "stays: " + rest
			}
		}
		return "–"
	}
	row := func(vm, what string, predicted, took float64) {
		fmt.Printf("| %s | %s | %.1f s | %.1f s | %+.0f %% |\n", vm, what, predicted, took,
			100*(took-predicted)/predicted)
	}
	last := 0.0
	for _, x := range vms {
		i := slices.IndexFunc(forecast.Steps, func(s *fleetv1.Step) bool { return s.Vm == x.name })
		if took, ok := came[x.name]; ok && i >= 0 {
			row(x.name, x.what, forecast.Steps[i].DoneS, took)
			last = math.Max(last, took)
			continue
		}
		fmt.Printf("| %s | %s | %s | %s | |\n", x.name, x.what, said(forecast.Staying, x.name),
			said(host.Staying, x.name))
	}
	row("all", "", forecast.GetTakesS(), last)
	if took, ok := came[""]; ok {
		row("the host", "is empty", forecast.Hosts[0].GetDoneS(), took)
	}
	fmt.Println()
}

// allRun says whether a VM was stopped, or lost anything.
func allRun(ctx context.Context, vms map[string]*daemons.VM) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	pages := uint64(0)
	for name, v := range vms {
		vm, err := v.Only(ctx)
		if err != nil {
			return err
		}
		status, err := vm.Status(ctx)
		if err != nil {
			return err
		}
		want := "running"
		if name == "web4" {
			want = "paused"
		}
		if status != want {
			return fmt.Errorf("%s is %s, not %s", name, status, want)
		}
		if want == "paused" {
			if err := vm.Execute(ctx, "cont", nil, nil); err != nil {
				return err
			}
		}
		n, err := v.Check(ctx)
		if err != nil {
			return err
		}
		pages += n
	}
	fmt.Printf(
		"None was stopped: all run, but for web4, which is paused as before. All checked their "+
			"memory\nthen: 0 bad pages of %d.\n\n", pages)
	return nil
}

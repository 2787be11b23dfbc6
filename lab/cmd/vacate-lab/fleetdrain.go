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
		Long: `Makes a fleet of three hosts. Host c is kept empty, so b is the only target. Host a
has six VMs: one is paused, one has a rule against b, one cannot be migrated. Has
the fleet forecast the drain of a, drains it, and prints for each VM what was said
beforehand and what came. No VM may stop; each then checks all of its memory.`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	c.Flags().IntVar(&repeat, "repeat", repeat, "how often, each with a new fleet")
	c.RunE = func(c *cobra.Command, _ []string) error {
		for i := range repeat {
			fmt.Printf("## Drain %d\n\n", i+1)
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

// six are the VMs that are drained.
var six = []struct {
	name, what string
	idle       int // MiB
	extra      []string
}{
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
	if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.PutRule, &fleetv1.PutRuleRequest{
		Name: "away", Rule: "vms name=web5 never run on hosts name=hostb"}); err != nil {
		return err
	}
	if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.Drain,
		&fleetv1.DrainRequest{Host: "hostc"}); err != nil {
		return err
	}
	vms := map[string]*daemons.VM{}
	for i, x := range six {
		v, err := f.Boot(ctx, f.Hosts[0], x.name, lab.Spec{BareMetal: true, MemoryMiB: 256,
			Load: lab.Load{HotMiB: 8, IdleMiB: x.idle, Slow: true,
				Seed: 10*seed + uint64(i)}, Extra: x.extra})
		if err != nil {
			return err
		}
		vms[x.name] = v
	}
	paused, err := vms["web4"].Only(ctx)
	if err == nil {
		err = paused.Execute(ctx, "stop", nil, nil)
	}
	if err != nil {
		return err
	}
	forecast, err := foresee(ctx, f)
	if err != nil {
		return err
	}
	begun := time.Now()
	if _, err := daemons.Ask(ctx, f, fleetv1.FleetClient.Drain,
		&fleetv1.DrainRequest{Host: "hosta"}); err != nil {
		return err
	}
	came, host, err := followDrain(ctx, f, begun)
	if err != nil {
		return err
	}
	writeDrained(forecast, came, host)
	return allRun(ctx, vms)
}

// foresee asks what would come of the drain, once host a has told all of its VMs.
func foresee(ctx context.Context, f *daemons.Fleet) (*fleetv1.DrainResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// What VMs use of their memory is looked up for one after the other.
	pause, known := time.Second, false
	for {
		r, err := daemons.Ask(ctx, f, fleetv1.FleetClient.Drain,
			&fleetv1.DrainRequest{Host: "hosta", DryRun: true})
		if err != nil {
			return nil, err
		}
		if all := len(r.Steps) == 4 && len(r.Staying) == 2; all && known {
			return r, nil
		} else if all {
			pause, known = 10*time.Second, true
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, fmt.Errorf("the forecast does not come to four VMs that leave: %v: %w", r,
				context.Cause(ctx))
		}
	}
}

// followDrain waits until all have left that can, and returns the seconds after which each had, by
// the leader's word, and what that says of the host then.
func followDrain(ctx context.Context, f *daemons.Fleet, begun time.Time) (
	came map[string]float64, host *fleetv1.Host, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	came = map[string]float64{}
	for {
		list, err := daemons.Ask(ctx, f, fleetv1.FleetClient.ListDecisions,
			&fleetv1.ListDecisionsRequest{})
		if err != nil {
			return nil, nil, err
		}
		if host, err = f.Told(ctx, "hosta"); err != nil {
			return nil, nil, err
		}
		for _, d := range list.Decisions {
			if d.State == "completed" && came[d.Vm] == 0 {
				came[d.Vm] = time.Since(begun).Seconds()
			}
		}
		if len(host.Going) == 0 && len(came) > 0 {
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
func writeDrained(forecast *fleetv1.DrainResponse, came map[string]float64, host *fleetv1.Host) {
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
	for _, x := range six {
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
	fmt.Println()
}

// allRun says whether a VM was stopped, or lost anything.
func allRun(ctx context.Context, vms map[string]*daemons.VM) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	pages := uint64(0)
	for _, x := range six {
		v := vms[x.name]
		vm, err := v.Only(ctx)
		if err != nil {
			return err
		}
		status, err := vm.Status(ctx)
		if err != nil {
			return err
		}
		want := "running"
		if x.name == "web4" {
			want = "paused"
		}
		if status != want {
			return fmt.Errorf("%s is %s, not %s", x.name, status, want)
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
		"None was stopped: five run, and web4 is paused as before. All checked their memory "+
			"then: 0 bad\npages of %d.\n\n", pages)
	return nil
}

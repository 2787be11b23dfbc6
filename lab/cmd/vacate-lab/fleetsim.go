package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"vacate/lab/fleetsim"

	"github.com/spf13/cobra"
)

func fleetsimCommand() *cobra.Command {
	o := fleetsim.Options{Hosts: 100, VMs: 20, Step: 10 * time.Second, Seed: 1, Load: 1.3}
	days, drains := 7.0, 6*time.Hour
	balancers := fleetsim.Balancers
	c := &cobra.Command{
		Use:   "fleetsim",
		Short: "simulate a fleet, and compare what keeps it in balance",
		Long: `Simulates a fleet in this process, without a VM: loads that swing by the day,
burst and are noisy; hosts that are late, lie, vanish and come back. Each
balancer gets the same loads: none; one by utilisation, with the rules of
Proxmox; a greedy one; and vacate's own. Prints how much CPU VMs lacked, how
many moved, how soon, and what the planner cost.`,
		Example: `  vacate-lab fleetsim --hosts 100 --days 7
  vacate-lab fleetsim --hosts 1000 --days 1 --step 30s --balancers none,vacate`,
		Args: cobra.NoArgs,
	}
	fl := c.Flags()
	fl.IntVar(&o.Hosts, "hosts", o.Hosts, "how many hosts, of 32 cores and 512 GiB")
	fl.IntVar(&o.VMs, "vms", o.VMs, "on each host, at first")
	fl.Float64Var(&days, "days", days, "to simulate")
	fl.DurationVar(&o.Step, "step", o.Step,
		"how often hosts report, and how often there is a round")
	fl.Float64Var(&o.Load, "load", o.Load,
		"how much VMs want: at 1, half of the cores on the average")
	fl.Uint64Var(&o.Seed, "seed", o.Seed, "of loads and faults")
	fl.DurationVar(&drains, "drains", drains,
		"how often vacate's planner drains a host, and restores it; 0 for never")
	fl.StringSliceVar(&balancers, "balancers", balancers,
		"of "+strings.Join(fleetsim.Balancers, ", "))
	c.RunE = func(c *cobra.Command, _ []string) error {
		if o.Hosts < 5 || o.Hosts > 100000 || o.VMs < 1 || o.VMs > 100 {
			return errors.New("--hosts: from 5 to 100000; --vms: from 1 to 100")
		}
		o.For = time.Duration(days * 24 * float64(time.Hour))
		if o.Step < time.Second || o.Step > 10*time.Minute || o.For < o.Step || !(o.Load > 0) ||
			drains < 0 || drains > 0 && drains < o.Step {
			return errors.New("--step: from 1s to 10m; --days and --load: more than 0; --drains: " +
				"not less than a step")
		}
		o.Faults = true
		var results []fleetsim.Result
		for _, b := range balancers {
			if !slices.Contains(fleetsim.Balancers, b) {
				return fmt.Errorf("--balancers: %q is none of %s", b,
					strings.Join(fleetsim.Balancers, ", "))
			}
			n := o
			n.Balancer = b
			if b == "vacate" {
				n.Drains = drains
			}
			r, err := fleetsim.Run(c.Context(), n)
			if err != nil {
				return err
			}
			results = append(results, r)
		}
		fmt.Printf("%d hosts with %d VMs each, %g days, a report and a round every %v, load %g, "+
			"seed %d:\n\n", o.Hosts, o.VMs, days, o.Step, o.Load, o.Seed)
		return fleetsim.Write(os.Stdout, results)
	}
	return c
}

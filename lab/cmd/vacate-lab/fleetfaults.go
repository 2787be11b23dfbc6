package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"vacate/lab"
	"vacate/lab/fleetfaults"

	"github.com/spf13/cobra"
)

func fleetfaultsCommand() *cobra.Command {
	o := fleetfaults.Options{Runs: 23, Workers: 2, Seed: uint64(time.Now().UnixNano())}
	var dir, log string
	var sum []string
	c := &cobra.Command{
		Use:   "fleetfaults",
		Short: "disturb fleets while they empty a host, and judge what came of it",
		Long: `Makes fleets of three hosts and three members of the brain, with real daemons and
a VM each. Again and again a fleet drains a host, and something happens in the midst
of it: a leader is killed, or cut off and goes on talking; members, or a majority,
are lost; clocks jump; etcd's disk is slow, or full; daemons of hosts die. Then
each VM must run, and run once; no two leaders may have moved it; and nobody may
have obeyed a leader that was deposed. Prints a table.`,
		Example: `  vacate-lab fleetfaults --runs 300 --workers 3
  vacate-lab fleetfaults --runs 5 --only clock
  vacate-lab fleetfaults --sum monday.json --sum tuesday.json`,
		Args: cobra.NoArgs,
	}
	dirFlag(c, &dir)
	fl := c.Flags()
	fl.IntVar(&o.Runs, "runs", o.Runs, "how many")
	fl.IntVar(&o.Workers, "workers", o.Workers, "fleets at a time")
	fl.Uint64Var(&o.Seed, "seed", o.Seed, "of all that is random (default another one each time)")
	fl.Lookup("seed").DefValue = ""
	fl.StringArrayVar(&o.Only, "only", nil, "only faults with this `TEXT` in their names")
	fl.StringVar(&log, "log", "", "`FILE` for a line of JSON about each run, as it ends")
	fl.StringVar(&o.Logs, "logs", "", "`DIR` for what daemons logged where a run went bad")
	fl.StringArrayVar(&sum, "sum", nil,
		"run nothing: print the table of all runs in this `FILE`, of --log, and others")
	c.RunE = func(c *cobra.Command, _ []string) (err error) {
		if len(sum) > 0 {
			return sumUp(sum)
		}
		o.Lab = lab.Options{Dir: dir}
		if o.Vacate, err = lab.Program("vacate"); err != nil {
			return err
		}
		var out *os.File
		if log != "" {
			if out, err = os.Create(log); err != nil {
				return err
			}
			defer out.Close()
		}
		bad, begun := 0, time.Now()
		o.Done = func(r fleetfaults.Result) {
			if out != nil {
				out.Write(r.Line())
			}
			fmt.Fprintf(os.Stderr, "%s, %s: %s, %.0f s %s %s\n", r.Fault, r.When, r.Outcome,
				r.Seconds, r.Bad, strings.Join(r.Notes, "; "))
			if r.Bad != "" {
				bad++
			}
		}
		results, err := fleetfaults.Run(c.Context(), o)
		fmt.Printf("%d runs in %.0f minutes, %d fleets at a time, seed %d. Bad: %d.\n\n",
			len(results), time.Since(begun).Minutes(), o.Workers, o.Seed, bad)
		if err := errors.Join(err, fleetfaults.Write(os.Stdout, results)); err != nil {
			return err
		}
		if bad > 0 {
			return fmt.Errorf("%d runs went bad", bad)
		}
		return nil
	}
	return c
}

// sumUp prints the table of the runs in several logs.
func sumUp(files []string) error {
	var all []fleetfaults.Result
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		results, err := fleetfaults.Read(f)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, results...)
	}
	fmt.Printf("%d runs.\n\n", len(all))
	return fleetfaults.Write(os.Stdout, all)
}

package fleetsim

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// Write writes results of one fleet as tables of Markdown.
func Write(w io.Writer, results []Result) error {
	var err error
	line := func(format string, args ...any) {
		_, e := fmt.Fprintf(w, format+"\n", args...)
		err = errors.Join(err, e)
	}
	line(
		"| balancer | starved, of VM time | steal | moves per VM and day | again within 30 min | " +
			"from overload to order: median, p99 | overfilled | rules broken |")
	line("|---|---|---|---|---|---|---|---|")
	for _, r := range results {
		vms, days := float64(r.Hosts*r.VMs), r.For.Hours()/24
		orders := "–"
		if len(r.Orders) > 0 {
			orders = fmt.Sprintf("%v, %v", at(r.Orders, 0.5), at(r.Orders, 0.99))
		}
		line("| %s | %.3f %% | %.3f %% | %.3f | %d | %s | %d | %d |", r.Balancer,
			100*r.Starved/(vms*r.For.Hours()), 100*r.Lacked/r.Wanted,
			float64(r.Moves-r.Maintained)/vms/days, r.Again, orders, r.Overfilled, r.Broken)
	}
	for _, r := range results {
		if r.Balancer != "vacate" {
			continue
		}
		line("\nThe planner: %v of CPU for a report, %v for a round (p99 %v, most %v), %.1f MiB. "+
			"%d of %d moves failed as a host vanished; hosts refused %d orders. VMs began to "+
			"starve on a host %d times; %d of these were over before there was an order.",
			brief(r.Report), brief(at(r.Rounds, 0.5)), brief(at(r.Rounds, 0.99)),
			brief(at(r.Rounds, 1)), float64(r.Memory)/(1<<20), r.Failed, r.Moves, r.Refused,
			r.Episodes,
			r.Passed)
		if len(r.Drained) == 0 {
			continue
		}
		var errs []float64
		for _, d := range r.Drained {
			if d.Forecast > 0 {
				errs = append(errs, 100*max(d.Was-d.Forecast, d.Forecast-d.Was).Seconds()/
					d.Forecast.Seconds())
			}
		}
		slices.Sort(errs)
		good := 0
		for _, e := range errs {
			if e <= 20 {
				good++
			}
		}
		if len(errs) > 0 {
			line("\n%d hosts were drained; the forecast was at most 20 %% off for %d of %d "+
				"(median %.0f %%).", len(r.Drained), good, len(errs), errs[len(errs)/2])
		}
	}
	return err
}

// at is the value at a share of a sorted list.
func at(list []time.Duration, share float64) time.Duration {
	if len(list) == 0 {
		return 0
	}
	return list[min(len(list)-1, int(share*float64(len(list))))]
}

func brief(d time.Duration) time.Duration {
	if d > time.Millisecond {
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(100 * time.Nanosecond)
}

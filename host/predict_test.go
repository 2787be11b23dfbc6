package host

import (
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"vacate/bench"
	"vacate/lab"
	"vacate/lab/answers"
	"vacate/lab/labtest"
	"vacate/lab/memclient"
	"vacate/lab/pgclient"
)

// ratesOf is a client of a guest's server.
type ratesOf interface {
	Rates(from, to time.Time, step time.Duration) []answers.Rate
	Stop() answers.Stats
}

// serving boots a VM with a server on host a, and starts a client.
func serving(b *testing.B, l *lab.Lab, kind lab.Server, mib int) (*lab.VM, ratesOf) {
	b.Helper()
	vm, err := l.A.Boot(labtest.Within(b, 5*time.Minute), lab.Spec{
		MemoryMiB: 768, Devices: lab.Full, Tap: true, Server: kind, ServerMiB: mib, Load: lab.Load{IdleMiB: 16, Sleep: true, Seed: 1},
	})
	if err != nil {
		b.Fatal(err)
	}
	var c ratesOf
	if ctx := labtest.Within(b, 3*time.Minute); kind == lab.PostgreSQL {
		c, err = pgclient.Start(ctx, pgclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial, Rows: mib << 20 / lab.ItemBytes})
	} else {
		c, err = memclient.Start(ctx, memclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial, Bytes: 4000, Items: mib << 20 / 5 * 4 / 4000, Redis: kind == lab.Redis})
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if s := c.Stop(); s.Wrong != 0 || s.Broken != 0 {
			b.Errorf("the client saw %+v", s)
		}
	})
	return vm, c
}

// BenchmarkPrediction compares what package relief predicts with what is measured, for VMs of several sizes over links of several rates. It
// writes a line for each eviction into the file VACATE_PREDICTIONS, or into prediction.csv of the lab's cache.
func BenchmarkPrediction(b *testing.B) {
	file := os.Getenv("VACATE_PREDICTIONS")
	if file == "" {
		file = labtest.Dir(b) + "/prediction.csv"
	}
	f, err := os.Create(file)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	out := csv.NewWriter(f)
	out.Write([]string{"server", "server_mib", "link_bits_per_s", "predicted_transfer_s", "transfer_s", "predicted_back_s", "back_s", "predicted_total_s", "total_s"})
	var back, total []float64 // relative errors
	for range b.N {
		for _, c := range []struct {
			kind lab.Server
			mib  int
		}{{lab.Memcached, 60}, {lab.Memcached, 200}, {lab.Redis, 120}, {lab.PostgreSQL, 200}} {
			predictions(b, c.kind, c.mib, func(line []float64) {
				text := []string{string(c.kind), fmt.Sprint(c.mib)}
				for _, v := range line {
					text = append(text, fmt.Sprintf("%.3f", v))
				}
				out.Write(text)
				out.Flush()
				back, total = append(back, math.Abs(line[3]-line[4])/line[4]), append(total, math.Abs(line[5]-line[6])/line[6])
			})
		}
	}
	slices.Sort(back)
	slices.Sort(total)
	b.ReportMetric(float64(len(back)), "evictions")
	b.ReportMetric(100*back[len(back)/2], "%-median-error-of-back")
	b.ReportMetric(100*total[len(total)/2], "%-median-error-of-total")
}

func predictions(b *testing.B, kind lab.Server, mib int, note func([]float64)) {
	l := labtest.New(b, lab.Options{})
	a, z := sites(b, l)
	mover, moves := serving(b, l, kind, mib)
	stayer, stays := serving(b, l, kind, 60)
	a.describe("moves", mover.QMP, mover.Args)
	a.describe("stays", stayer.QMP, stayer.Args)
	a.start()
	z.start()
	for _, rate := range []uint64{1e9, 4e8, 2e8} {
		for range 3 {
			there := z.expect("moves", mover)
			if err := l.SetRate(rate); err != nil {
				b.Fatal(err)
			}
			time.Sleep(2 * time.Second)
			plan := a.plan("", false)
			decided := time.Now()
			e, err := a.evict("moves", "hostb")
			if err != nil {
				b.Fatal(err)
			}
			if e, err = a.watch(e.Id, 5*time.Minute); err != nil {
				b.Fatal(err)
			}
			report := reportOf(b, e)
			time.Sleep(5 * time.Second)
			to := time.Now()
			var both []bench.Point
			other := stays.Rates(decided, to, 100*time.Millisecond)
			for i, r := range moves.Rates(decided, to, 100*time.Millisecond) {
				both = append(both, bench.Point{float64(i) / 10, r.PerSecond + other[i].PerSecond})
			}
			final := 0.0
			for _, p := range both[len(both)-30:] {
				final += p[1] / 30
			}
			back := bench.Recovery(both, final, 0)
			for _, c := range plan.Candidates {
				if c.Vm == "moves" && back != nil && *back > 0 {
					note([]float64{float64(rate), c.TransferS, *report.Prepare + *report.Transfer, c.BackS, *back, c.TotalS, *report.Prepare + *report.Total})
				}
			}
			b.Logf("%v; back after %v", plan.Candidates, back)
			// And back.
			if mover, err = there.Started(labtest.Within(b, time.Minute)); err != nil {
				b.Fatal(err)
			}
			if err := l.SetRate(0); err != nil {
				b.Fatal(err)
			}
			here := a.expect("moves", mover)
			if e, err = z.evict("moves", "hosta"); err != nil {
				b.Fatal(err)
			}
			if e, err = z.watch(e.Id, time.Minute); err != nil || e.Outcome != "completed" {
				b.Fatalf("%v, %v", e, err)
			}
			if mover, err = here.Started(labtest.Within(b, time.Minute)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

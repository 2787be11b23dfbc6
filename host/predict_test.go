package host

import (
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/bench"
	hostv1 "vacate/hostapi/v1"
	"vacate/lab"
	"vacate/lab/labtest"
)

// serving boots a VM with a server on host a, and starts a client.
func serving(b *testing.B, l *lab.Lab, kind lab.Server, mib int) (*lab.VM, bench.Loader) {
	b.Helper()
	vm, err := l.A.Boot(labtest.Within(b, 5*time.Minute), lab.Spec{
		MemoryMiB: 768, Devices: lab.Full, Tap: true, Server: kind, ServerMiB: mib, Load: lab.Load{IdleMiB: 16, Sleep: true, Seed: 1},
	})
	if err != nil {
		b.Fatal(err)
	}
	c, err := bench.Load(labtest.Within(b, 3*time.Minute), l, vm, bench.Clients{})
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
	out.Write([]string{"server", "server_mib", "link_bits_per_s", "wanted_cores", "predicted_transfer_s", "transfer_s", "predicted_back_s", "back_s", "predicted_total_s", "total_s"})
	var back, total []float64 // relative errors
	var points []predicted
	for _, c := range []struct {
		kind lab.Server
		mib  int
	}{{lab.Memcached, 60}, {lab.Redis, 160}, {lab.PostgreSQL, 160}} {
		for _, rate := range []uint64{1e9, 5e8, 25e7} {
			// As much of a core as leaves the engines some, and as much as does not.
			for _, wanted := range []float64{0.55, 0.6, 0.65, 0.75} {
				b.Run(fmt.Sprintf("%s/%v/%v", c.kind, rate, wanted), func(b *testing.B) {
					p := predictions(b, c.kind, c.mib, rate, wanted)
					if p == nil {
						b.Log("both VMs were not back at the end, or were at once")
						return
					}
					text := []string{string(c.kind), fmt.Sprint(c.mib), fmt.Sprint(rate)}
					for _, v := range []float64{wanted, p.expect.TransferS, p.transfer, p.expect.BackS, p.back, p.expect.TotalS, p.total} {
						text = append(text, fmt.Sprintf("%.3f", v))
					}
					out.Write(text)
					out.Flush()
					points = append(points, *p)
					back, total = append(back, math.Abs(p.expect.BackS-p.back)/p.back), append(total, math.Abs(p.expect.TotalS-p.total)/p.total)
				})
			}
		}
	}
	if len(points) == 0 {
		b.Fatal("nothing was measured")
	}
	if err := os.WriteFile(strings.TrimSuffix(file, ".csv")+".svg", plotPredictions(points), 0o644); err != nil {
		b.Fatal(err)
	}
	slices.Sort(back)
	slices.Sort(total)
	b.Logf("%d evictions; median errors: back %.0f %%, total %.0f %%", len(back), 100*back[len(back)/2], 100*total[len(total)/2])
}

// predictions evicts one of two VMs, fresh ones: nil if both were not back in the end, or were at once.
func predictions(b *testing.B, kind lab.Server, mib int, rate uint64, wanted float64) *predicted {
	l := labtest.New(b, lab.Options{})
	a, z := sites(b, l)
	mover, moves := serving(b, l, kind, mib)
	stayer, stays := serving(b, l, kind, 60)
	a.describe("moves", mover.QMP, mover.Args)
	a.describe("stays", stayer.QMP, stayer.Args)
	a.start()
	z.start()
	if _, err := bench.SetPace(b.Context(), []bench.Loader{moves, stays}, wanted); err != nil {
		b.Fatal(err)
	}
	z.expect("moves", mover)
	if err := l.SetRate(rate); err != nil {
		b.Fatal(err)
	}
	time.Sleep(4 * time.Second)
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
	b.Logf("%v; back after %v", plan.Candidates, back)
	if back == nil || *back == 0 {
		return nil
	}
	for _, c := range plan.Candidates {
		if c.Vm == "moves" {
			return &predicted{string(kind), c, *report.Prepare + *report.Transfer, *back, *report.Prepare + *report.Total}
		}
	}
	b.Fatalf("the plan: %v", plan)
	return nil
}

// predicted is an eviction: in seconds, what was predicted and what was measured.
type predicted struct {
	server                string
	expect                *hostv1.Candidate
	transfer, back, total float64
}

// plotPredictions draws what was measured over what was predicted, on logarithmic axes, between lines of 20 % more and less.
func plotPredictions(points []predicted) []byte {
	const size, margin, least, most = 420.0, 60.0, 0.1, 30.0
	at := func(v float64) float64 {
		return (math.Log(min(max(v, least), most)) - math.Log(least)) / (math.Log(most) - math.Log(least)) * size
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" fill=\"#222\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n", 2*(size+2*margin), size+2*margin)
	colours := map[string]string{"memcached": "#0072b2", "redis": "#d55e00", "postgresql": "#009e73"}
	for panel, title := range []string{"Both VMs back at 90 %", "Until the source holds nothing"} {
		left := float64(panel)*(size+2*margin) + margin
		x := func(v float64) float64 { return left + at(v) }
		y := func(v float64) float64 { return margin + size - at(v) }
		fmt.Fprintf(&b, "<text x=\"%.1f\" y=\"28\" font-size=\"16\" font-weight=\"bold\">%s</text>\n<text x=\"%.1f\" y=\"46\" fill=\"#555\">measured over predicted, in seconds; between the dotted lines: 20 %% off at most</text>\n", left, title, left)
		for _, v := range []float64{0.1, 0.3, 1, 3, 10, 30} {
			fmt.Fprintf(&b, "<path d=\"M%.1f %.1fV%.1fM%.1f %.1fH%.1f\" stroke=\"#e4e4e4\"/><text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g</text><text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
				x(v), y(least), y(most), x(least), y(v), x(most), x(v), y(least)+18, v, x(least)-6, y(v)+4, v)
		}
		for _, f := range []float64{0.8, 1, 1.2} {
			dash := "2 4"
			if f == 1 {
				dash = ""
			}
			fmt.Fprintf(&b, "<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"#999\" stroke-dasharray=\"%s\"/>\n", x(least/f*max(f, 1)), y(least*max(f, 1)), x(most/max(f, 1)), y(most*f/max(f, 1)), dash)
		}
		for _, p := range points {
			px, py := p.expect.BackS, p.back
			if panel == 1 {
				px, py = p.expect.TotalS, p.total
			}
			fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\" fill-opacity=\"0.6\"/>\n", x(px), y(py), colours[p.server])
		}
	}
	for i, name := range []string{"memcached", "redis", "postgresql"} {
		fmt.Fprintf(&b, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/><text x=\"%.1f\" y=\"%.1f\">%s</text>\n", margin+110*float64(i), size+2*margin-14, colours[name], margin+110*float64(i)+9, size+2*margin-10, name)
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

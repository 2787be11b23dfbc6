package host

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/bench"
	"vacate/lab/labtest"
)

// serving boots a VM with a server on host a, and starts a client.
func serving(b *testing.B, l *lab.Lab, kind lab.Server, mib int) (*lab.VM, bench.Loader) {
	b.Helper()
	vm, err := l.A.Boot(labtest.Within(b, 5*time.Minute), lab.Spec{
		MemoryMiB: 768, Devices: lab.Full, Tap: true, Server: kind, ServerMiB: mib,
		Load: lab.Load{IdleMiB: 16, Sleep: true, Seed: 1},
	})
	if err != nil {
		b.Fatal(err)
	}
	c, err := bench.Load(labtest.Within(b, 3*time.Minute), l, vm, bench.UsualClients)
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

// BenchmarkPrediction compares what package relief predicts with what is measured, for VMs of
// several sizes over links of several rates. It writes a line for each eviction into the file
// VACATE_PREDICTIONS, or into prediction.csv of the lab's cache, and a plot of all beside it. What
// the file has is not measured again: a run that was broken off can be gone on with.
func BenchmarkPrediction(b *testing.B) {
	file := os.Getenv("VACATE_PREDICTIONS")
	if file == "" {
		file = labtest.Dir(b) + "/prediction.csv"
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	var points []predicted
	lines, err := csv.NewReader(f).ReadAll()
	if err != nil {
		b.Fatal(err)
	}
	out := csv.NewWriter(f)
	if len(lines) == 0 {
		out.Write([]string{"server", "server_mib", "link_bits_per_s", "wanted_cores",
			"predicted_transfer_s", "transfer_s", "predicted_back_s", "back_s", "predicted_total_s",
			"total_s"})
	} else {
		for _, line := range lines[1:] {
			points = append(points, parsePredicted(b, line))
		}
	}
	for _, c := range []predicted{{server: lab.Memcached, mib: 60}, {server: lab.Redis, mib: 160},
		{server: lab.PostgreSQL, mib: 160}} {
		for _, c.rate = range []uint64{1e9, 5e8, 25e7} {
			// As much of a core as leaves the engines some, and as much as does not.
			for _, c.wanted = range []float64{0.55, 0.6, 0.65, 0.75} {
				if slices.ContainsFunc(points, func(p predicted) bool {
					return p.server == c.server && p.rate == c.rate && p.wanted == c.wanted
				}) {
					continue
				}
				b.Run(fmt.Sprintf("%s/%v/%v", c.server, c.rate, c.wanted), func(b *testing.B) {
					p := c
					if !p.measure(b) {
						b.Log("both VMs were not back at the end, or were at once")
						return
					}
					out.Write(p.line())
					out.Flush()
					points = append(points, p)
				})
			}
		}
	}
	if len(points) == 0 {
		b.Fatal("nothing was measured")
	}
	if err := os.WriteFile(strings.TrimSuffix(file, ".csv")+".svg", plotPredictions(points),
		0o644); err != nil {
		b.Fatal(err)
	}
	for _, server := range append([]lab.Server{""}, lab.Servers()...) {
		var back, total []float64 // relative errors
		for _, p := range points {
			if server == "" || p.server == server {
				back, total = append(back, math.Abs(p.predictedBack-p.back)/p.back), append(total,
					math.Abs(p.predictedTotal-p.total)/p.total)
			}
		}
		slices.Sort(back)
		slices.Sort(total)
		if n := len(back); n > 0 {
			b.Logf("%s: %d evictions; median errors: back %.0f %%, total %.0f %%",
				cmp.Or(string(server), "all"), n, 100*back[n/2], 100*total[n/2])
		}
	}
}

// predicted is an eviction: in seconds, what was predicted and what was measured.
type predicted struct {
	server                                           lab.Server
	mib                                              int
	rate                                             uint64  // bits per second
	wanted                                           float64 // cores, by each VM
	predictedTransfer, transfer, predictedBack, back float64
	predictedTotal, total                            float64
}

// measured are what a line has after the rate.
func (p *predicted) measured() []*float64 {
	return []*float64{&p.wanted, &p.predictedTransfer, &p.transfer, &p.predictedBack, &p.back,
		&p.predictedTotal, &p.total}
}

func (p *predicted) line() []string {
	line := []string{string(p.server), fmt.Sprint(p.mib), fmt.Sprint(p.rate)}
	for _, v := range p.measured() {
		line = append(line, fmt.Sprintf("%.3f", *v))
	}
	return line
}

func parsePredicted(b *testing.B, line []string) (p predicted) {
	b.Helper()
	p.server = lab.Server(line[0])
	into := []any{&p.mib, &p.rate}
	for _, v := range p.measured() {
		into = append(into, v)
	}
	if n, err := fmt.Sscan(strings.Join(line[1:], " "), into...); err != nil {
		b.Fatalf("%v: the %d. of its figures: %v", line, n+1, err)
	}
	return p
}

// measure evicts one of two VMs, fresh ones: false if both were not back in the end, or were at
// once.
func (p *predicted) measure(b *testing.B) bool {
	l := labtest.New(b, lab.Options{})
	a, z := sites(b, l)
	mover, moves := serving(b, l, p.server, p.mib)
	stayer, stays := serving(b, l, p.server, 60)
	a.describe("moves", mover.QMP, mover.Args)
	a.describe("stays", stayer.QMP, stayer.Args)
	a.start()
	z.start()
	if _, err := bench.SetPace(b.Context(), []bench.Loader{moves, stays}, p.wanted); err != nil {
		b.Fatal(err)
	}
	z.expect("moves", mover)
	if err := l.SetRate(p.rate); err != nil {
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
	for _, at := range both[len(both)-30:] {
		final += at[1] / 30
	}
	back := bench.Recovery(both, final, 0)
	if back == nil || *back == 0 {
		b.Log(plan.Candidates)
		return false
	}
	b.Logf("%v; back after %v s", plan.Candidates, *back)
	for _, c := range plan.Candidates {
		if c.Vm == "moves" {
			p.predictedTransfer, p.predictedBack, p.predictedTotal = c.TransferS, c.BackS, c.TotalS
			p.transfer, p.back, p.total = *report.Prepare+*report.Transfer, *back, *report.Prepare+
				*report.Total
			return true
		}
	}
	b.Fatalf("the plan: %v", plan)
	return false
}

// plotPredictions draws what was measured over what was predicted, on logarithmic axes, between
// lines of 20 % more and less.
func plotPredictions(points []predicted) []byte {
	const size, margin, least, most = 420.0, 60.0, 0.1, 30.0
	at := func(v float64) float64 {
		return (math.Log(min(max(v, least), most)) - math.Log(least)) /
			(math.Log(most) - math.Log(least)) * size
	}
	var b strings.Builder
	fmt.Fprintf(&b,
		"<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %g %g\" "+
			"font-family=\"Helvetica, Arial, sans-serif\" font-size=\"13\" "+
			"fill=\"#222\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
		2*(size+2*margin), size+2*margin)
	colours := map[lab.Server]string{lab.Memcached: "#0072b2", lab.Redis: "#d55e00",
		lab.PostgreSQL: "#009e73"}
	for panel, title := range []string{"Both VMs back at 90 %", "Until the source holds nothing"} {
		left := float64(panel)*(size+2*margin) + margin
		x := func(v float64) float64 { return left + at(v) }
		y := func(v float64) float64 { return margin + size - at(v) }
		fmt.Fprintf(&b,
			"<text x=\"%.1f\" y=\"28\" font-size=\"16\" font-weight=\"bold\">%s</text>\n<text "+
				"x=\"%.1f\" y=\"46\" fill=\"#555\">measured over predicted, in seconds; between "+
				"the dotted lines: 20 %% off at most</text>\n", left, title, left)
		for _, v := range []float64{0.1, 0.3, 1, 3, 10, 30} {
			fmt.Fprintf(&b,
				"<path d=\"M%.1f %.1fV%.1fM%.1f %.1fH%.1f\" stroke=\"#e4e4e4\"/><text "+
					"x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%g</text><text x=\"%.1f\" "+
					"y=\"%.1f\" text-anchor=\"end\">%g</text>\n",
				x(v), y(least), y(most), x(least), y(v), x(most), x(v), y(least)+18, v, x(least)-6,
				y(v)+4, v)
		}
		for _, f := range []float64{0.8, 1, 1.2} {
			dash := "2 4"
			if f == 1 {
				dash = ""
			}
			fmt.Fprintf(&b,
				"<path d=\"M%.1f %.1fL%.1f %.1f\" stroke=\"#999\" stroke-dasharray=\"%s\"/>\n",
				x(least/f*max(f, 1)), y(least*max(f, 1)), x(most/max(f, 1)), y(most*f/max(f, 1)),
				dash)
		}
		for _, p := range points {
			px, py := p.predictedBack, p.back
			if panel == 1 {
				px, py = p.predictedTotal, p.total
			}
			fmt.Fprintf(&b,
				"<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\" fill-opacity=\"0.6\"/>\n",
				x(px), y(py), colours[p.server])
		}
	}
	for i, name := range lab.Servers() {
		fmt.Fprintf(&b,
			"<circle cx=\"%.1f\" cy=\"%.1f\" r=\"4\" fill=\"%s\"/><text x=\"%.1f\" "+
				"y=\"%.1f\">%s</text>\n", margin+110*float64(i), size+2*margin-14, colours[name],
			margin+110*float64(i)+9, size+2*margin-10, name)
	}
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

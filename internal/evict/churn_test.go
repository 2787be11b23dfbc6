package evict_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/churn"
	"vacate/lab/labtest"
)

// By default TestChurn is short. A campaign is, for example:
//
//	go test ./internal/evict -run TestChurn -timeout 3h \
//		-kernel all -evictions 100 -out docs/results
var (
	kernelFlag = flag.String("kernel", "6.1",
		"TestChurn: kernels by their names in the lab, with commas between, or \"all\"")
	evictionsFlag = flag.Int("evictions", 3, "TestChurn: evictions per kernel")
	chainFlag     = flag.Int("chain", 10, "TestChurn: evictions per guest")
	outFlag       = flag.String("out", "", "TestChurn: directory that takes a table of the results")
)

// silence is how long a running guest on a busy machine may stay silent.
const silence = 30 * time.Second

// churned sums up the evictions of one kind of guest.
type churned struct {
	guest                          string
	evictions, blind               int // blind: nothing was skipped, and the notes say why
	pages, skipped, touched, waits int
	verified                       uint64 // pages, by the guest
	problems                       int
	down                           []float64
	notes                          map[string]int
}

// TestChurn evicts guests that allocate and free memory of every kind all the time, to and fro, and
// leaves free memory out. The guests verify every byte: nothing may ever be wrong.
func TestChurn(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 1e9})
	kernels, err := lab.FindKernels(*kernelFlag)
	if err != nil {
		t.Fatal(err)
	}
	variants := []churn.Config{{}, {VCPUs: 2}, {SlabChecks: true}, {VCPUs: 2, Reporting: true}}
	var table []*churned
	for _, k := range kernels {
		for done, n := 0, 0; done < *evictionsFlag && !t.Failed(); n++ {
			c := variants[n%len(variants)]
			c.Kernel, c.Movable, c.Seed = k, true, rand.Uint64()
			count := min(*chainFlag, *evictionsFlag-done)
			done += count
			t.Run(fmt.Sprintf("%s/%d", k.Name, n),
				func(t *testing.T) { table = chain(t, l, c, count, table) })
			writeChurned(t, table)
		}
	}
}

// chain evicts a guest so many times, and adds to the table.
func chain(t *testing.T, l *lab.Lab, c churn.Config, evictions int, table []*churned) []*churned {
	g, err := churn.Boot(labtest.Within(t, 5*time.Minute), l, c)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for _, what := range g.Hello.Lacks {
		t.Errorf("kernel %s lacks %s", g.Hello.Release, what)
	}
	name := g.Hello.Release + ", " + g.Config.String()
	i := slices.IndexFunc(table, func(r *churned) bool { return r.guest == name })
	if i < 0 {
		i, table = len(table), append(table, &churned{guest: name, notes: map[string]int{}})
	}
	r := table[i]
	// judge reports whether all is well.
	judge := func() bool {
		g.Silent(silence)
		found := g.Problems()
		for _, p := range found {
			t.Errorf("after %d evictions, seed %d: %s", r.evictions, c.Seed, p)
		}
		r.problems += len(found)
		return len(found) == 0
	}
	began := g.Beat().Pages
	defer func() { r.verified += g.Beat().Pages - began }()
	time.Sleep(2 * time.Second) // let the load fill memory
	for range evictions {
		time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond)
		if !judge() {
			return table
		}
		to := l.B
		if g.Host() == l.B {
			to = l.A
		}
		var res result
		ctx := labtest.Within(t, 3*time.Minute)
		err := g.Move(ctx, to, func(ctx context.Context, vm, twin *lab.VM) error {
			res = evictBetween(ctx, t, vm.Host, twin.Host, vm, twin)
			return errors.Join(res.source, res.destErr)
		})
		if err != nil {
			judge()
			t.Fatal(err)
		}
		res.mustComplete(t)
		r.take(t, &res.report)
	}
	for try := 1; ; try++ {
		// On a busy machine a worker takes long; one that is stuck reports that itself in time.
		_, err := g.Command(labtest.Within(t, 2*time.Minute), "check")
		if err == nil {
			break
		}
		t.Log(err, g.Beat())
		if try == 5 {
			t.Error(err)
		}
		if !judge() || try == 5 {
			return table
		}
	}
	if err := g.Hear(labtest.Within(t, time.Minute), 2); err != nil {
		t.Error(err)
	}
	judge()
	return table
}

func (r *churned) take(t *testing.T, report *evict.Report) {
	p, e := report.Pages, report.Enlightenment
	r.evictions++
	r.pages += p.Total
	r.skipped += p.Skipped
	r.touched += p.SkippedTouched
	r.waits += p.Fetched
	r.down = append(r.down, *report.Down)
	for _, n := range append(e.Notes, e.Doubts) {
		if n != "" {
			r.notes[n]++
		}
	}
	t.Logf("%d of %d pages left out, %d of them touched, %d fetched; %s; %q %q", p.Skipped, p.Total,
		p.SkippedTouched, p.Fetched, e.Source, e.Notes, e.Doubts)
	switch {
	case e.Source == evict.Host && p.Skipped > 0:
	case len(e.Notes) > 0 || e.Doubts != "":
		r.blind++
	default:
		t.Errorf("nothing is left out and nothing says why: %+v", e)
	}
}

// writeChurned logs the table, and writes it to a file if results are wanted.
func writeChurned(t *testing.T, table []*churned) {
	t.Helper()
	var b strings.Builder
	b.WriteString("| guest | evictions | of them without leaving out | pages left out | share " +
		"of memory | of them touched before the end | pages fetched | pages verified by the " +
		"guest | median down time | problems |\n")
	b.WriteString("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n")
	for _, r := range table {
		down := 0.0
		if slices.Sort(r.down); len(r.down) > 0 {
			down = r.down[len(r.down)/2]
		}
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %.1f %% | %d | %d | %d | %.0f ms | %d |\n", r.guest,
			r.evictions, r.blind,
			r.skipped, 100*float64(r.skipped)/float64(max(1, r.pages)), r.touched, r.waits,
			r.verified, down*1000, r.problems)
	}
	for _, r := range table {
		for n, count := range r.notes {
			fmt.Fprintf(&b, "\n%s, noted %d times: %s\n", r.guest, count, n)
		}
	}
	t.Logf("\n%s", b.String())
	if *outFlag == "" {
		return
	}
	if err := os.MkdirAll(*outFlag, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*outFlag, "evictions-churn.md"), []byte(b.String()),
		0o644); err != nil {
		t.Fatal(err)
	}
}

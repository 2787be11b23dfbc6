package churn

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// By default the tests are short. A campaign is, for example:
//
//	go test ./lab/churn -run TestOverwrite -kernel all -stops 1000 -out docs/results -timeout 5h
var (
	kernelFlag = flag.String("kernel", "6.1",
		"kernels by their names in the lab, with commas between, or \"all\"")
	stopsFlag = flag.Int("stops", 25, "TestOverwrite: stops per kernel")
	perFlag   = flag.Int("per", 250, "TestOverwrite: stops per guest")
	plainFlag = flag.Bool("plain", false,
		"TestOverwrite: all guests alike: one CPU, no slab checks, no single steps, no free "+
			"page reporting")
	snapsFlag   = flag.Int("snapshots", 2, "TestCompare: snapshots per kernel")
	trialsFlag  = flag.Int("trials", 1, "TestSensitivity: trials per target")
	pagesFlag   = flag.Int("pages", 8, "TestSensitivity: pages overwritten per trial")
	targetsFlag = flag.String("targets", "(none),anonymous,file,page table",
		"TestSensitivity: targets, with commas between, or \"all\"")
	waitFlag = flag.Duration("wait", 2*time.Second,
		"TestSensitivity: how long somebody may take to notice")
	outFlag = flag.String("out", "", "directory that takes tables of the results")
)

// shared is the lab of all tests, and parked is a guest that one has left there: another that wants
// one like it need not boot its own. It stands still meanwhile.
var (
	shared *lab.Lab
	parked *Guest
	asked  Config    // the parked guest's
	booted time.Time // when the last guest had
)

func TestMain(m *testing.M) {
	if os.Getenv("VACATE_SEED") == "" { // of all tests: they share guests
		os.Setenv("VACATE_SEED", fmt.Sprint(time.Now().UnixNano()))
	}
	code := m.Run()
	if parked != nil {
		parked.Close()
	}
	if shared != nil {
		if err := shared.Close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	labtest.Need(t, lab.Probe())
	if shared == nil {
		var err error
		if shared, err = lab.New(context.Background(), lab.Options{Dir: labtest.Dir(t), NoPin: true,
			Log: slog.New(slog.NewTextHandler(os.Stderr,
				&slog.HandlerOptions{Level: slog.LevelDebug}))}); err != nil {
			t.Fatal(err)
		}
	}
	return shared
}

// eachKernel runs f as a subtest for each kernel asked for.
func eachKernel(t *testing.T, f func(t *testing.T, k lab.Kernel)) {
	kernels, err := lab.FindKernels(*kernelFlag)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range kernels {
		t.Run(k.Name, func(t *testing.T) { f(t, k) })
	}
}

// start returns a guest that is attached, and whose load has filled memory.
func start(t *testing.T, l *lab.Lab, c Config) *Guest {
	t.Helper()
	g := parked
	parked = nil
	if g != nil && asked != c {
		g.Close()
		g = nil
	}
	if g != nil {
		t.Cleanup(func() { park(t, g, c) })
		if err := g.Cont(t.Context()); err != nil {
			t.Fatal(err)
		}
		g.forget() // how long it stood still
		return g
	}
	g, err := Boot(t.Context(), l, c)
	if err != nil {
		t.Fatal(err)
	}
	booted = time.Now()
	t.Cleanup(func() { park(t, g, c) })
	for _, what := range g.Hello.Lacks {
		t.Errorf("kernel %s lacks %s", g.Hello.Release, what)
	}
	// Let the load fill memory.
	select {
	case <-time.After(4 * time.Second):
	case <-t.Context().Done():
	}
	if err := g.Attach(t.Context()); err != nil {
		t.Fatal(err)
	}
	return g
}

// park leaves a guest that is well to other tests, and ends another.
func park(t *testing.T, g *Guest, c Config) {
	if t.Failed() || g.Stop(context.Background()) != nil || len(g.Problems()) > 0 {
		g.Close()
		return
	}
	parked, asked = g, c
}

// write has f write a table into the log, and into a file if results are wanted.
func write(t *testing.T, name string, f func(io.Writer)) {
	t.Helper()
	var b strings.Builder
	f(&b)
	t.Logf("\n%s", b.String())
	if *outFlag == "" {
		return
	}
	if err := os.MkdirAll(*outFlag, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*outFlag, name), []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestCompare: what the guest's kernel says is in use must not be skippable, what it says is
// free should be.
func TestCompare(t *testing.T) {
	l := newLab(t)
	eachKernel(t, func(t *testing.T, k lab.Kernel) {
		g := start(t, l, Config{Kernel: k, Seed: labtest.Seed(t)})
		var c Comparison
		for range *snapsFlag {
			if err := Compare(t.Context(), g, &c); err != nil {
				t.Fatal(err)
			}
			if p := g.Problems(); len(p) > 0 {
				t.Fatal(p)
			}
			time.Sleep(200 * time.Millisecond)
		}
		write(t, "compare-"+k.Name+".md",
			func(w io.Writer) { WriteComparison(w, g.Hello.Release, &c) })
		if len(c.Wrong) > 0 {
			t.Errorf("%d pages in use were called skippable, such as: %s", len(c.Wrong), c.Wrong[0])
		}
		if c.Found*100 < c.Free*98 {
			t.Errorf("only %d of %d free pages are skippable", c.Found, c.Free)
		}
		if a := c.Agreement(); a < 0.99 {
			t.Errorf("kinds agree on %.2f %% of the pages", a*100)
		}
	})
}

// TestSensitivity: what TestOverwrite relies on being noticed is noticed, and nothing is
// where nothing was done.
func TestSensitivity(t *testing.T) {
	l := newLab(t)
	var targets []Target
	for _, target := range Targets {
		if *targetsFlag == "all" || strings.Contains(","+*targetsFlag+",", ","+target.Name+",") {
			targets = append(targets, target)
		}
	}
	if len(targets) == 0 {
		t.Fatalf("no target %q", *targetsFlag)
	}
	eachKernel(t, func(t *testing.T, k lab.Kernel) {
		g := start(t, l, Config{Kernel: k, Seed: labtest.Seed(t)})
		defer g.vm.Kill() // what was overwritten may show later
		time.Sleep(time.Until(booted.Add(9 * time.Second)))
		var trials []Trial
		tables := func() {
			write(t, fmt.Sprintf("sensitivity-%s-%d.md", k.Name, *pagesFlag),
				func(w io.Writer) { WriteTrials(w, trials) })
		}
		err := Sensitivity(t.Context(), g, targets, *trialsFlag, *pagesFlag, *waitFlag,
			func(r Trial) {
				trials = append(trials, r)
				t.Logf("%s: %d pages, noticed by %q after %v: %s", r.Target, r.Pages, r.Noticed,
					r.After.Round(time.Millisecond), oneLine(r.Text))
				if r.Target == "(none)" && r.Noticed != "" {
					t.Errorf("noticed, though nothing was overwritten: %s", r.Text)
				}
				if r.Target == targets[len(targets)-1].Name {
					// a campaign that is cut short has shown something, too
					tables()
				}
			})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range trials {
			if r.Target == "anonymous" && r.Noticed == "" && *pagesFlag >= 8 {
				t.Error("overwritten anonymous memory was not noticed")
			}
		}
	})
}

// TestOverwrite: nothing must notice that what is skippable is overwritten, and the guest's own
// allocator must not contradict.
func TestOverwrite(t *testing.T) {
	l := newLab(t)
	variants := []Config{{}, {SlabChecks: true}, {VCPUs: 2}, {SingleStep: true},
		{VCPUs: 2, Reporting: true}}
	if *plainFlag {
		variants = variants[:1]
	}
	eachKernel(t, func(t *testing.T, k lab.Kernel) {
		var names []string
		var results []*OverwriteResult
		byName := map[string]*OverwriteResult{}
		for done, n := 0, 0; done < *stopsFlag && !t.Failed(); n++ {
			c := variants[n%len(variants)]
			c.Kernel, c.Seed = k, labtest.Seed(t)+uint64(n)
			stops := min(*perFlag, *stopsFlag-done)
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				g := start(t, l, c)
				r, err := Overwrite(t.Context(), g, stops)
				if r != nil {
					name := g.Hello.Release + ", " + g.Config.String()
					if byName[name] == nil {
						byName[name] = &OverwriteResult{}
						names, results = append(names, name), append(results, byName[name])
					}
					byName[name].add(r)
					done += r.Stops
				}
				if err != nil {
					t.Fatal(err)
				}
				if r.OracleStops < r.Stops*9/10 {
					t.Errorf("the oracle followed only %d of %d stops", r.OracleStops, r.Stops)
				}
				if r.Failed+r.Empty > r.Stops/2 {
					t.Errorf("%d of %d stops without a survey, %d with nothing skippable: %v",
						r.Failed, r.Stops, r.Empty, r.Notes)
				}
				for _, p := range r.Problems {
					t.Errorf("%s", p)
				}
				for _, c := range r.Contradictions {
					t.Errorf("%s", c)
				}
				if t.Failed() {
					t.Logf("%v\nconsole:\n%s", c, g.console.last())
				}
			})
			write(t, "overwrite-"+k.Name+".md",
				func(w io.Writer) { WriteOverwrites(w, names, results) })
		}
	})
}

// TestGarbage: words tell where they come from.
func TestGarbage(t *testing.T) {
	for stop := range 6 {
		pfn, s, ok := Overwritten(garbage(0x12345, stop))
		if !ok || pfn != 0x12345 || s != stop {
			t.Errorf("stop %d: %#x, %d, %v", stop, pfn, s, ok)
		}
	}
	for _, word := range []uint64{0, ^uint64(0), garbage(5, 6), garbage(5, 7), 1 << 40} {
		if _, _, ok := Overwritten(word); ok {
			t.Errorf("%#x does not come from here", word)
		}
	}
}

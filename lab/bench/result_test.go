package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write golden files anew")

// sample has every field set somewhere, and every one that may be null null
// somewhere.
func sample() *Result {
	quantiles := func(ms float64) *Quantiles {
		return &Quantiles{P50: ms / 1e3, P99: 4 * ms / 1e3, Max: 9 * ms / 1e3, Sum: ms / 2,
			Count: 400}
	}
	moved := func(name string, rep int, transfer, total, low float64) Run {
		n := int(total / stepS)
		s := series(300000, join(repeat(low, n), repeat(295000, 30))...)
		return Run{
			Strategy: name, Load: "hot", Rep: rep, Outcome: Completed,
			Transfer: &transfer, Down: ptr(0.02), Total: &total, LinkBytes: ptr(uint64(500e6)),
			Stall: quantiles(1.5), Recovery: recovery(s, 300000, transfer),
			WorkLost: seconds(workLost(s, 300000, total)),
			Bad:      ptr(uint64(0)), Before: ptr(300000.0), Throughput: s,
			Pages: &Pages{Pushed: ptr(uint64(260000)), Fetched: ptr(uint64(100)),
				Zero: ptr(uint64(130000)), Duplicate: ptr(uint64(0))},
		}
	}
	engine := moved("vacate", 1, 0.05, 4.4, 120000)
	engine.Prepare, engine.EngineCPU = ptr(0.016), &EngineCPU{0.42, 0.37}
	engine.Fetch, engine.Pages.Skipped = quantiles(1), ptr(uint64(7))
	engine.Engine = json.RawMessage(`{"outcome":"completed"}`)
	given := moved("qemu-precopy", 1, 0, 15, 250000)
	given.Transfer, given.Down, given.Recovery, given.Outcome, given.Reason = nil, nil, nil,
		NotConverged, "given up after 15s"
	again := moved("vacate", 2, 0.06, 4.6, 110000)
	again.EvictedBefore = 2
	return &Result{
		Version: Version,
		Machine: Machine{"CPU <of> A & B", 2, 24 << 30, "6.18.0", "7.2.22", "tcg",
			"6.1.0-56-cloud-amd64", ptr(uint64(1e9)), "cubic", true, nil},
		VM: VM{"pc", 1024, 1, "bare", false, 200, 200, 0, 0, "linux", "uniform", "together",
			false},
		Runs: []Run{
			engine, moved(baseline, 1, 0.01, 4.1, 60000), given,
			again, moved(baseline, 2, 0.012, 4.3, 50000),
			{Strategy: "qemu-postcopy-preempt", Load: "hot", Rep: 1, Outcome: Unsupported,
				Reason: "no such capability", Throughput: []Point{}},
		},
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("not as in %s (-update writes it anew):\n%s", file, diff)
	}
}

// The JSON is a stable interface: if this fails, raise Version or put the
// field back.
func TestJSON(t *testing.T) {
	got, err := json.MarshalIndent(sample(), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "result.json", append(got, '\n'))
	var back Result
	if err := json.Unmarshal(got, &back); err != nil {
		t.Fatal(err)
	}
	again, err := json.MarshalIndent(back, "", " ")
	if err != nil || !bytes.Equal(again, got) {
		t.Errorf("it does not survive a round trip: %v", err)
	}
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	if err := sample().Table(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "result.txt", b.Bytes())
}

func TestSVG(t *testing.T) {
	var b bytes.Buffer
	if err := sample().SVG(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "result.svg", b.Bytes())
	wellFormed(t, b.Bytes())
}

// What runs lack must not spoil the plot.
func TestSVGOfLittle(t *testing.T) {
	for name, r := range map[string]*Result{
		"nothing":   {},
		"no series": {Runs: []Run{{Strategy: "vacate", Outcome: Failed, Throughput: []Point{}}}},
		"idle": {Runs: []Run{{Strategy: "vacate", Outcome: Completed, Total: ptr(1.0),
			Transfer: ptr(0.1), Throughput: series(0, repeat(0, 30)...)}}},
		"instant": {Runs: []Run{{Strategy: "x<y>", Outcome: Completed, Total: ptr(0.0),
			Before: ptr(1.0), Throughput: series(1, 1)}}},
	} {
		var b bytes.Buffer
		if err := r.SVG(&b); err != nil {
			t.Fatal(err)
		}
		wellFormed(t, b.Bytes())
		if s := b.String(); strings.Contains(s, "NaN") || strings.Contains(s, "Inf") {
			t.Errorf("%s: a number is none:\n%s", name, s)
		}
		if err := r.Table(&b); err != nil {
			t.Fatal(err)
		}
	}
}

func wellFormed(t *testing.T, doc []byte) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader(doc))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, doc)
		}
	}
}

func TestNiceStep(t *testing.T) {
	for span, want := range map[float64]float64{1.2: 0.1, 6: 0.5, 7: 1, 12: 1, 13: 2, 30: 5,
		100: 10, 121: 20} {
		if got := niceStep(span); math.Abs(got-want) > 1e-12 {
			t.Errorf("step of %v is %v, want %v", span, got, want)
		}
	}
}

func FuzzReadReport(f *testing.F) {
	f.Add(
		[]byte("{\"type\":\"progress\",\"progress\":{}}\n{\"type\":\"report\",\"report\":{\"outcome\":\"completed\"}}\n"))
	f.Add([]byte("panic: no JSON\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		report, err := readReport(bufio.NewScanner(bytes.NewReader(data)))
		if err == nil && report != nil && !json.Valid(report) {
			t.Errorf("report %q is not JSON", report)
		}
	})
}

// Ways to move a domain are compared with virsh's post-copy, also by what their operator waits for.
func TestDomainTable(t *testing.T) {
	r := sample()
	r.Machine.Libvirt = ptr("9.0.0")
	for i := range r.Runs {
		run := &r.Runs[i]
		run.Prepare = ptr(0.5)
		if run.Strategy == baseline {
			run.Strategy, run.Prepare = domainBaseline, ptr(1.0)
		}
	}
	var b strings.Builder
	if err := r.Table(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"libvirt 9.0.0, QEMU 7.2.22", "from command [ms]",
		"Ratios to virsh-postcopy of", "555 (550–560)", "0.55 (0.54–0.55)"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, &b)
		}
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
)

// shown feeds progress to a screen, with the screen given time to show each, and returns
// what it wrote.
func shown(t *testing.T, l *lines, ps []evict.Progress) string {
	t.Helper()
	var b bytes.Buffer
	l.w = &b
	seen := make(chan struct{})
	s := newScreen(signalling{l, seen})
	for _, p := range ps {
		s.mu.Lock()
		passes := rank[p.State] >= rank[s.last.State]
		s.mu.Unlock()
		s.show(p)
		if passes {
			<-seen
		}
	}
	s.close()
	return b.String()
}

// signalling tells of each progress that was shown.
type signalling struct {
	display
	seen chan struct{}
}

func (s signalling) progress(p evict.Progress) {
	s.display.progress(p)
	s.seen <- struct{}{}
}

// unsteady is progress as a careless engine could report it: out of order here and there.
func unsteady() []evict.Progress {
	r := rand.New(rand.NewPCG(1, 2))
	states := []evict.State{evict.Preparing, evict.Arming, evict.Switching, evict.Loading,
		evict.Committing, evict.Pushing, evict.Retiring, evict.Completed}
	var list []evict.Progress
	for i := range 400 {
		p := evict.Progress{
			State: states[max(0, min(i*len(states)/400-r.IntN(2), len(states)-1))],
			Elapsed: time.Duration(i)*20*time.Millisecond - time.Duration(r.IntN(50))*
				time.Millisecond,
			Rate: float64(r.IntN(2e9)), ETA: time.Duration(r.Int64N(int64(200 * time.Hour))),
		}
		if i > 60 {
			p.Total, p.Pages, p.Fetches = 26214400, 26214400/340*(i-60)-r.IntN(300000), max(0,
				i*1000-r.IntN(5000))
		}
		list = append(list, p)
	}
	return append(list, evict.Progress{State: evict.Completed, Elapsed: 9 * time.Second,
		Pages: 26214400, Total: 26214400})
}

var lineForm = regexp.MustCompile(
	`^ *(\d+\.\d) s  ([a-z ]+?) *(?: (\d+\.\d)% (\d+)/(\d+) pages.*?)?$`)

// mustGrow checks that nothing in the lines runs backwards.
func mustGrow(t *testing.T, got []string) {
	t.Helper()
	var elapsed, percent, pages float64
	at := 0
	for _, line := range got {
		m := lineForm.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("line %q has an unknown form", line)
		}
		number := func(s string) float64 {
			f, _ := strconv.ParseFloat(s, 64)
			return f
		}
		if number(m[1]) < elapsed || rank[evict.State(m[2])] < at ||
			m[3] != "" && (number(m[3]) < percent || number(m[4]) < pages) {
			t.Errorf("%q runs backwards", line)
		}
		elapsed, at = number(m[1]), rank[evict.State(m[2])]
		if m[3] != "" {
			percent, pages = number(m[3]), number(m[4])
		}
		if percent == 100 && pages != 26214400 {
			t.Errorf("%q rounds up", line)
		}
	}
	if last := got[len(got)-1]; !strings.Contains(last, "completed") ||
		!strings.Contains(last, "100.0% 26214400/26214400 pages") {
		t.Errorf("the last line is %q", last)
	}
}

func TestTerminal(t *testing.T) {
	for _, width := range []int{80, 120} {
		out := shown(t, &lines{width: func() int { return width }}, unsteady())
		if strings.Count(out, "\n") != 1 || !strings.HasSuffix(out, "\n") {
			t.Errorf("more than one line: %q", out)
		}
		got := strings.Split(strings.TrimSuffix(out, "\n"), eraseLine)[1:]
		for _, line := range got {
			if len(line) >= width {
				t.Errorf("%q has %d columns of %d", line, len(line), width)
			}
		}
		mustGrow(t, got)
	}
	for width := range 81 {
		p := evict.Progress{State: evict.Pushing, Pages: 1, Total: 2}
		if line := progressLine(p, width); len(line) > width {
			t.Errorf("%q has more than %d columns", line, width)
		}
	}
}

func TestPlain(t *testing.T) {
	got := strings.Split(strings.TrimSuffix(shown(t, &lines{}, unsteady()), "\n"), "\n")
	// 8 states in 8 seconds, and no more than one line a second in between.
	if len(got) < 8 || len(got) > 16 {
		t.Errorf("%d lines", len(got))
	}
	mustGrow(t, append(got, "   9.0 s  completed    100.0% 26214400/26214400 pages"))
}

func TestNote(t *testing.T) {
	var b bytes.Buffer
	s := newScreen(&lines{w: &b, width: func() int { return 80 }})
	s.show(evict.Progress{State: evict.Arming})
	s.note("%s", "a note")
	s.show(evict.Progress{State: evict.Loading})
	s.close()
	s.note("too late")
	want := eraseLine + "   0.0 s  arming" + eraseLine + "a note\n" + eraseLine +
		"   0.0 s  loading\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}

// blocked is an output that nobody reads until told so.
type blocked struct{ until chan struct{} }

func (b blocked) Write(p []byte) (int, error) {
	<-b.until
	return len(p), nil
}

// Nobody who shows something waits for an output that blocks, and what waits is bounded.
func TestBlockedOutput(t *testing.T) {
	out := blocked{make(chan struct{})}
	s := newScreen(&lines{w: out})
	for i := range 100_000 {
		s.show(evict.Progress{State: evict.Pushing, Pages: i})
		s.note("%d", i)
	}
	s.mu.Lock()
	if len(s.events) > 2*maxEvents+1 {
		t.Errorf("%d events wait", len(s.events))
	}
	s.mu.Unlock()
	close(out.until)
	s.close()
}

func TestReportText(t *testing.T) {
	f := func(s float64) *float64 { return &s }
	full := evict.Report{
		Outcome: "completed", Machine: "pc-i440fx-7.2\x1b[2J", QEMU: "7.2.22",
		Transfer: f(0.4), Down: f(0.1), Total: f(12.5),
		Pages: evict.PageCounts{Total: 1 << 25, Early: 70, Pushed: 1<<25 - 1070, Fetched: 1000,
			Zero: 1 << 24},
		LinkBytes: 1 << 37, Rate: 1.1e9, RoundTrip: 0.0003,
		Fetch: &evict.Quantiles{P50: 0.0008, P99: 0.0031, Max: 0.2, Count: 1000},
		Phases: []evict.Phase{{State: evict.Preparing, At: 0, For: 0.25},
			{State: evict.RollingBack, At: 0.25}},
		Gaps: []evict.Gap{{At: 3, For: 6, Again: 20, Why: "reset"},
			{At: 10, For: 0.5, Again: 1, Why: "later"}},
	}
	text := reportText(full)
	for _, want := range []string{
		"outcome             completed\n",
		"machine             pc-i440fx-7.2\uFFFD[2J, QEMU 7.2.22\n",
		"down time               0.100 s", "  fetched                1000   0.0%",
		"p50 0.8 ms, p99 3.1 ms, max 200 ms, 1000 fetches",
		"preparing     for 0.250 s\n",
		"link lost               6.500 s  2 times, 21 pages sent again\n",
		"delivery rate          1.1 GB/s, round trip 0.3 ms\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for line := range strings.Lines(text) {
		if len(line) > 81 {
			t.Errorf("%q is too long", line)
		}
	}
	if text := reportText(evict.Report{Outcome: "refused"}); text !=
		"outcome             refused\n" {
		t.Errorf("an empty report is %q", text)
	}
}

func TestReportFile(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "report.json")
	old := []byte("old")
	if err := os.WriteFile(name, old, 0o644); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(name, link); err != nil {
		t.Fatal(err)
	}
	r, err := reserveReport(link)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(name); !bytes.Equal(b, old) {
		t.Errorf("the old report is gone before there is a new one: %q", b)
	}
	if fi, err := r.temp.Stat(); err != nil || fi.Size() != reportRoom {
		t.Errorf("no room was taken: %v %v", fi, err)
	}
	if err := r.write(evict.Report{Outcome: "completed"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	var back evict.Report
	if err != nil || json.Unmarshal(b, &back) != nil || back.Outcome != "completed" {
		t.Errorf("the report is %q, %v", b, err)
	}
	if r, err = reserveReport(name); err != nil {
		t.Fatal(err)
	}
	r.discard()
	list, _ := os.ReadDir(dir)
	if len(list) != 2 {
		t.Errorf("files were left: %v", list)
	}
}

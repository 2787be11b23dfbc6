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
	states := []evict.State{evict.Preparing, evict.Switching, evict.Loading,
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
			p.Down = 27 * time.Millisecond
			p.Total, p.Pages, p.Fetches = 26214400, 26214400/340*(i-60)-r.IntN(300000), max(0,
				i*1000-r.IntN(5000))
		}
		list = append(list, p)
	}
	return append(list, evict.Progress{State: evict.Completed, Elapsed: 9 * time.Second,
		Pages: 26214400, Total: 26214400})
}

// aScene is who takes part in the evictions of these tests.
var aScene = scene{vm: "web1", other: "hostb"}

var lineForm = regexp.MustCompile(`^ *(\d+\.\d) s  (.+?)$`)

var shareForm = regexp.MustCompile(`(\d+) % of its memory`)

// steps are how lines begin, in order.
var steps = []string{"web1 runs here", "web1 stands still; vacate saves",
	"web1 stands still; its twin loads", "web1 stands still; hostb is told",
	"web1 runs on hostb (down", "web1 runs on hostb with all of its memory; its QEMU here ends",
	"web1 runs on hostb with all of its memory"}

// mustGrow checks that nothing in the lines runs backwards.
func mustGrow(t *testing.T, got []string) {
	t.Helper()
	var elapsed, share float64
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
		for at < len(steps) && (!strings.HasPrefix(m[2], steps[at]) ||
			at == len(steps)-2 && !strings.HasSuffix(m[2], "here ends")) {
			at++
		}
		if at == len(steps) {
			t.Fatalf("%q runs backwards, or has an unknown sentence", line)
		}
		if number(m[1]) < elapsed {
			t.Errorf("%q runs backwards", line)
		}
		elapsed = number(m[1])
		if m := shareForm.FindStringSubmatch(m[2]); m != nil {
			if number(m[1]) < share || number(m[1]) == 100 {
				t.Errorf("%q runs backwards, or rounds up", line)
			}
			share = number(m[1])
		}
	}
	if last := got[len(got)-1]; !strings.HasSuffix(last, steps[len(steps)-1]) {
		t.Errorf("the last line is %q", last)
	}
}

func TestTerminal(t *testing.T) {
	for _, width := range []int{80, 120} {
		out := shown(t, &lines{scene: aScene, width: func() int { return width }}, unsteady())
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
		if line := aScene.progressLine(p, width); len(line) > width {
			t.Errorf("%q has more than %d columns", line, width)
		}
	}
}

func TestPlain(t *testing.T) {
	got := strings.Split(strings.TrimSuffix(shown(t, &lines{scene: aScene}, unsteady()), "\n"),
		"\n")
	// 7 states in 8 seconds, and no more than one line a second in between.
	if len(got) < 7 || len(got) > 16 {
		t.Errorf("%d lines", len(got))
	}
	mustGrow(t, append(got, "   9.0 s  web1 runs on hostb with all of its memory"))
}

func TestNote(t *testing.T) {
	var b bytes.Buffer
	s := newScreen(&lines{scene: aScene, w: &b, width: func() int { return 80 }})
	s.show(evict.Progress{State: evict.Switching})
	s.note("%s", "a note")
	s.show(evict.Progress{State: evict.Loading})
	s.close()
	s.note("too late")
	want := eraseLine + "   0.0 s  web1 stands still; vacate saves its devices" +
		eraseLine + "a note\n" + eraseLine +
		"   0.0 s  web1 stands still; its twin loads its devices\n"
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
	if text := reportText(evict.Report{Outcome: "refused", Reason: "it's\afull"}); text !=
		"outcome             refused\n                    it's\uFFFDfull\n" {
		t.Errorf("an empty report is %q", text)
	}
	for _, test := range []struct {
		of   evict.Report
		want string
	}{
		{full, "web1 runs on hostb with all of its memory.\n" +
			"It stood still for 100 ms; it ran there after 400 ms; the eviction took 12.5 s.\n" +
			"137 GB crossed the link for 128 GiB of memory; it waited for 1000 pages, 99 % of " +
			"them at most 3.1 ms.\n"},
		{evict.Report{Outcome: "refused"}, "web1 stays here.\n"},
		{evict.Report{Outcome: "completed", Stood: "paused", Transfer: f(0.4), Total: f(2)},
			"web1 stands on hostb with all of its memory.\n" +
				"It could run there after 400 ms; the eviction took 2.0 s.\n"},
		{evict.Report{Outcome: "shut down", Reason: "its guest ended itself\x1b", Down: f(0.1)},
			"web1 has shut itself down on hostb: its guest ended itself\uFFFD.\n" +
				"It stood still for 100 ms.\n"},
	} {
		if text := aScene.summary(test.of); text != test.want {
			t.Errorf("got  %q\nwant %q", text, test.want)
		}
	}
}

// What people read of an eviction on its way, at either end.
func TestProgressLine(t *testing.T) {
	pushing := evict.Progress{State: evict.Pushing, Down: 27 * time.Millisecond, Pages: 41,
		Total: 100, ETA: 3 * time.Second, Rate: 1e8, Fetches: 7}
	paused, short := pushing, pushing
	paused.Stands, paused.Down = "paused", 0
	short.Short = "no memory"
	arrives, verbose := scene{vm: "web1", other: "hosta", arrives: true}, aScene
	verbose.verbose = true
	for _, test := range []struct {
		scene scene
		p     evict.Progress
		want  string
	}{
		{aScene, pushing,
			"web1 runs on hostb (down 27 ms); 41 % of its memory has followed, 3 s left"},
		{verbose, pushing,
			"web1 runs on hostb (down 27 ms); 41 % of its memory has followed, 3 s left " +
				"[pushing, 41/100 pages, 100 MB/s, 7 fetches]"},
		{aScene, paused,
			"web1 stands on hostb; 41 % of its memory has followed, 3 s left (it is paused)"},
		{aScene, short, "web1 runs on hostb (down 27 ms); 41 % of its memory has followed, and " +
			"it waits for memory there"},
		{aScene, evict.Progress{State: evict.Preparing, Awaits: "hostb starts a QEMU",
			AwaitedFor: 4 * time.Second}, "web1 runs here; hostb starts a QEMU: 4 s"},
		{aScene, evict.Progress{State: evict.InDoubt},
			"hostb does not answer; web1 may run there"},
		{arrives, evict.Progress{State: evict.Running, Pages: 9, Total: 10},
			"web1 runs here; 90 % of its memory has come"},
		{arrives, evict.Progress{State: evict.CutOff, Pages: 9, Total: 10},
			"the link to hosta is lost; web1 runs here with 90 % of its memory"},
		{arrives, evict.Progress{State: evict.Aborted}, "web1 stays on hosta"},
	} {
		if got := test.scene.progressLine(test.p, 200); got != "   0.0 s  "+test.want {
			t.Errorf("got  %q\nwant %q", got, test.want)
		}
	}
	for _, s := range append(evict.SourceStates(), evict.DestinationStates()...) {
		if sentence, _ := aScene.tell(evict.Progress{State: s}); sentence == string(s) ||
			rank[s] == 0 {
			t.Errorf("the state %s has no sentence, or no rank", s)
		}
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

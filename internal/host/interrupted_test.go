package host

import (
	"bufio"
	"context"
	"fmt"
	"math"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/htmlreport"
	"vacate/lab"
	"vacate/lab/labtest"
)

// scrape returns what a daemon tells Prometheus, by name and labels.
func (s *site) scrape() map[string]float64 {
	s.t.Helper()
	transport := &http.Transport{DialContext: func(ctx context.Context,
		_, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(s.dir, "sock"))
	}}
	defer transport.CloseIdleConnections()
	r, err := (&http.Client{Transport: transport,
		Timeout: 10 * time.Second}).Get("http://host/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Body.Close()
	all := map[string]float64{}
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		name, value := lines.Text(), ""
		if i := strings.LastIndexByte(name, ' '); i >= 0 { // labels may have blanks
			name, value = name[:i], name[i+1:]
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil &&
			strings.HasPrefix(name, "vacate_") {
			all[name] = v
		}
	}
	return all
}

// metrics makes sure that what Prometheus is told has some values. Those of -1 are not to be told.
func (r *run) metrics(s *site, when string, want map[string]float64) map[string]float64 {
	r.t.Helper()
	got := s.scrape()
	for name, v := range want {
		if g, ok := got[name]; ok != (v >= 0) || ok && g != v {
			r.t.Errorf("%s, %s: %s is %v (%v), want %v", s.name, when, name, g, ok, v)
		}
	}
	return got
}

// What the metrics and the page of an eviction tell of it is so while its link is lost in mid-push,
// and after it.
func TestInterrupted(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 320, Load: lab.Load{HotMiB: 32, IdleMiB: 128}})
	r.a.start()
	r.b.start()
	r.begin()
	state := func(role, state string) string {
		return fmt.Sprintf(`vacate_evictions_open{role=%q,state=%q}`, role, state)
	}
	ended := func(role string) string {
		return fmt.Sprintf(`vacate_evictions_ended_total{outcome="completed",role=%q}`, role)
	}
	of := func(name string) string {
		return fmt.Sprintf(`vacate_eviction_%s{role="source",vm="web1"}`, name)
	}
	const undecided = "vacate_evictions_undecided"
	before := r.metrics(r.a, "pushing",
		map[string]float64{state("source", "pushing"): 1, undecided: 0, ended("source"): -1})
	if err := l.SetLinkUp(false); err != nil {
		t.Fatal(err)
	}
	r.wait(r.a, "reconnecting",
		func(e *hostv1.Eviction) bool { return e.State == string(evict.Reconnecting) })
	r.wait(r.b, "cut off", func(e *hostv1.Eviction) bool { return e.State == string(evict.CutOff) })
	cut := r.metrics(r.a, "without a link",
		map[string]float64{state("source", "reconnecting"): 1, state("source", "pushing"): -1,
			undecided: 1, ended("source"): -1})
	r.metrics(r.b, "without a link",
		map[string]float64{state("destination", "cut off"): 1, undecided: 1})
	if n := cut[of("pages")]; n < before[of("pages")] || n <= 0 || n >= cut[of("vm_pages")] ||
		cut[of("vm_pages")] != before[of("vm_pages")] {
		t.Errorf("%v of %v pages, and before %v of %v", n, cut[of("vm_pages")], before[of("pages")],
			before[of("vm_pages")])
	}
	const lost = 3 * time.Second
	time.Sleep(lost)
	if again := r.a.scrape(); again[of("pages")] != cut[of("pages")] {
		t.Errorf("without a link %v pages became %v", cut[of("pages")], again[of("pages")])
	}
	if err := l.SetLinkUp(true); err != nil {
		t.Fatal(err)
	}
	if err := l.SetRate(4e8); err != nil {
		t.Fatal(err)
	}
	e, err := r.a.watch(r.eviction, time.Minute)
	if err != nil || e.Outcome != "completed" {
		t.Fatalf("%v, %v", e, err)
	}
	r.over(r.b, "completed")
	over := map[string]float64{undecided: 0, of("pages"): -1, of("vm_pages"): -1, of("fetches"): -1}
	over[ended("source")] = 1
	r.metrics(r.a, "after it", over)
	over = map[string]float64{undecided: 0, ended("destination"): 1}
	r.metrics(r.b, "after it", over)

	p, err := htmlreport.Gather(labtest.Within(t, 10*time.Second), r.a.api, r.look(r.a))
	if err != nil || p.VM != "web1" || p.From != "hosta" || p.To != "hostb" || p.Trace == nil {
		t.Fatalf("%+v, %v", p, err)
	}
	interruptedPage(t, p, lost.Seconds(), before[of("vm_pages")])
	vms := r.expected.VMs()
	labtest.MustCheck(t, vms[len(vms)-1])
}

func interruptedPage(t *testing.T, p htmlreport.Eviction, lost, total float64) {
	rep := p.Report
	var phases []evict.State
	at := map[evict.State]float64{} // first entered
	for _, ph := range rep.Phases {
		phases = append(phases, ph.State)
		if _, ok := at[ph.State]; !ok {
			at[ph.State] = ph.At
		}
	}
	want := []evict.State{evict.Preparing, evict.Switching, evict.Loading, evict.Committing,
		evict.Pushing, evict.Reconnecting, evict.Pushing, evict.Retiring, evict.Completed}
	if !slices.Equal(phases, want) {
		t.Fatalf("phases %q, want %q", phases, want)
	}
	const near = 1 // seconds between events that follow one another, on a busy machine
	for what, c := range map[string]struct {
		got  *float64
		want float64
	}{
		"preparation":        {rep.Prepare, at[evict.Switching]},
		"execution transfer": {rep.Transfer, at[evict.Pushing] - at[evict.Switching]},
		"total":              {rep.Total, at[evict.Completed] - at[evict.Switching]},
	} {
		if c.got == nil || math.Abs(*c.got-c.want) > near {
			t.Errorf("%s is %v, by the phases %.3f", what, c.got, c.want)
		}
	}
	if rep.Down == nil || *rep.Down <= 0 || *rep.Down > *rep.Transfer {
		t.Errorf("down time %v, execution transfer %v", rep.Down, rep.Transfer)
	}
	if gone := rep.Phases[5]; len(rep.Gaps) != 1 || math.Abs(rep.Gaps[0].For-gone.For) > near ||
		rep.Gaps[0].For < lost {
		t.Errorf("gaps %+v, without a link %+v, for %.0f s at least", rep.Gaps, gone, lost)
	}
	n := rep.Pages
	if sum := n.Early + n.Pushed + n.Near + n.Fetched + n.Skipped + n.Unused; sum != n.Total ||
		float64(sum) != total || n.Before != 0 {
		t.Errorf("%d pages in sum: %+v, and %v by the metrics", sum, n, total)
	}
	// What was on its way when the link was lost was sent twice, and the graph has it twice.
	by := map[string]int{}
	for _, step := range p.Trace.Pages {
		for why, count := range step {
			by[p.Trace.Reasons[why]] += int(count)
		}
	}
	again := rep.Gaps[0].Again
	for why, count := range map[string]int{"early": n.Early, "planned": n.Pushed, "near": n.Near,
		"fetched": n.Fetched, "skipped": n.Skipped, "unused": n.Unused} {
		if by[why] < count || by[why] > count+again {
			t.Errorf("the page draws %d pages as %s, and %d were, and at most %d twice", by[why],
				why, count, again)
		}
	}
	for _, ms := range p.Trace.When {
		if seconds := float64(ms) / 1000; ms < 0 || seconds > *rep.Total+near {
			t.Errorf("a page came after %.3f s, and all was over after %.3f", seconds, *rep.Total)
			break
		}
	}
}

package evict_test

import (
	"errors"
	"log/slog"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"
)

// The engines find out before they touch the VM that a path loses large packets, either way. Every
// figure of the report is right for the eviction that follows, which loses its link for a while in
// mid-push.
func TestPathsThatFail(t *testing.T) {
	t.Parallel()
	const limit, lostFor = 30e6, 2 * time.Second // bytes per second
	l := labtest.New(t, lab.Options{})
	vm := boot(t, l, lab.Spec{MemoryMiB: 384, Load: lab.Load{HotMiB: 60, IdleMiB: 120}})
	twin := incoming(t, l, vm)
	ln := listen(t, l.B)
	path, err := l.B.Relay(ln.Addr().String(), 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(path.Close)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx := labtest.Within(t, 3*time.Minute)
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(ctx,
			evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()

	source := evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, path.Addr()),
		Log: log.With("side", "source")}
	before := settingsOf(t, vm)
	for name, lose := range map[string][2]bool{"to the destination": {true, false},
		"to the source": {false, true}} {
		if err := l.LoseLarge(lose[0], lose[1]); err != nil {
			t.Fatal(err)
		}
		report, err := source.Evict(ctx)
		if !errors.Is(err, evict.ErrRefused) ||
			!strings.Contains(err.Error(), "the path to "+l.B.Addr+" loses large packets") ||
			!strings.Contains(err.Error(), "The VM runs on, untouched") {
			t.Errorf("large packets %s are lost: %v", name, err)
		}
		if report.Begun != nil || settingsOf(t, vm) != before {
			t.Errorf("large packets %s are lost: the VM was touched: %+v", name, report)
		}
		if err := l.LoseLarge(false, false); err != nil {
			t.Fatal(err)
		}
	}
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}

	rate := new(evict.Limit)
	rate.Set(limit)
	var r result
	show := r.show(t)
	var states []evict.State
	cut, lost := false, make(chan struct{})
	source.Limit, source.SendFree = rate, true
	source.Show = func(p evict.Progress) {
		show(p)
		if n := len(states); n == 0 || states[n-1] != p.State {
			states = append(states, p.State)
		}
		if p.State != evict.Pushing && (p.Rate != 0 || p.ETA != 0) {
			t.Errorf("while %s it tells of a rate of %.0f B/s and an ETA of %v", p.State, p.Rate,
				p.ETA)
		}
		if p.Rate > 1.5*limit {
			t.Errorf("while %s the rate is %.0f B/s, and the limit %.0f", p.State, p.Rate, limit)
		}
		if !cut && p.Total > 0 && p.Pages > p.Total*2/3 {
			cut = true
			go func() {
				defer close(lost)
				path.Cut()
				time.Sleep(lostFor)
				path.Mend()
			}()
		}
	}
	r.report, r.source = source.Evict(ctx)
	if !cut {
		t.Fatal("the link was not cut")
	}
	<-lost
	r.destErr = <-received
	if r.source != nil || r.destErr != nil {
		t.Fatalf("source: %v; destination: %v", r.source, r.destErr)
	}
	checkLostLink(t, r, states, limit, lostFor.Seconds())
	labtest.MustCheck(t, twin)
}

func checkLostLink(t *testing.T, r result, states []evict.State, limit, lostFor float64) {
	rep := r.report
	t.Logf("%+v", rep)
	const near = 0.25 // seconds between successive events, on a busy machine
	same := func(what string, got *float64, want float64) {
		t.Helper()
		if got == nil || math.Abs(*got-want) > near {
			t.Errorf("%s is %v, by the phases %.3f", what, got, want)
		}
	}
	var phases []evict.State
	at := map[evict.State]float64{} // first entered
	pushing := 0.0
	for i, p := range rep.Phases {
		phases = append(phases, p.State)
		if _, ok := at[p.State]; !ok {
			at[p.State] = p.At
		}
		if i+1 < len(rep.Phases) && math.Abs(p.At+p.For-rep.Phases[i+1].At) > 1e-6 {
			t.Errorf("the phase after %+v began at %f", p, rep.Phases[i+1].At)
		}
		if p.State == evict.Pushing {
			pushing += p.For
		}
	}
	want := []evict.State{evict.Preparing, evict.Switching, evict.Loading, evict.Committing,
		evict.Pushing, evict.Reconnecting, evict.Pushing, evict.Retiring, evict.Completed}
	if !slices.Equal(phases, want) {
		t.Fatalf("phases %q, want %q", phases, want)
	}
	if !slices.Equal(states, want) {
		t.Errorf("it showed %q, want %q", states, want)
	}
	same("preparation", rep.Prepare, at[evict.Switching])
	same("execution transfer", rep.Transfer, at[evict.Pushing]-at[evict.Switching])
	same("total", rep.Total, at[evict.Completed]-at[evict.Switching])
	if rep.Down == nil || *rep.Down <= 0 || *rep.Down > *rep.Transfer+1e-3 {
		t.Errorf("down time %v, execution transfer %v", rep.Down, *rep.Transfer)
	}
	if len(rep.Gaps) != 1 {
		t.Fatalf("gaps %+v", rep.Gaps)
	}
	g, gone := rep.Gaps[0], rep.Phases[5]
	same("the gap's begin", &g.At, gone.At)
	same("the gap's length", &g.For, gone.For)
	if g.For < lostFor/2 || g.Why == "" {
		t.Errorf("the gap is %+v, and the link was lost for %.1f s", g, lostFor)
	}

	p := rep.Pages
	if sum := p.Early + p.Pushed + p.Near + p.Fetched + p.Skipped + p.Unused +
		p.Before; sum != p.Total {
		t.Errorf("%d pages in sum: %+v", sum, p)
	}
	classes, zero := 0, 0
	for _, c := range rep.Enlightenment.Classes {
		classes += c.Pages
		zero += c.Zero
	}
	if len(rep.Enlightenment.Classes) > 0 && (classes != p.Total || zero != p.Zero) {
		t.Errorf("the classes have %d pages, %d zero; in all there are %d, %d zero", classes, zero,
			p.Total, p.Zero)
	}
	content := float64(p.Total-p.Zero-p.Skipped-p.Unused) * 4096
	if again := float64(g.Again) * 4096; float64(rep.LinkBytes) < content ||
		float64(rep.LinkBytes) > 1.1*(content+again)+16<<20 {
		t.Errorf("%d bytes crossed the link for %.0f bytes of pages, %.0f of them twice",
			rep.LinkBytes, content, again)
	}
	if rep.Rate > 1.5*limit || rep.Rate*pushing > float64(rep.LinkBytes) ||
		rep.Rate*pushing < 0.9*content {
		t.Errorf("%.0f B/s in %.2f s of pushing, %d bytes in all, limit %.0f", rep.Rate, pushing,
			rep.LinkBytes, limit)
	}
	if f := rep.Fetch; f == nil || r.last.Fetches > f.Count+p.SkippedTouched {
		t.Errorf("the source counts %d fetches, the destination %+v and %d of free pages",
			r.last.Fetches, f, p.SkippedTouched)
	}
	if rep.RoundTrip <= 0 {
		t.Error("no round trip")
	}
	if errors.Is(r.source, evict.ErrLost) || rep.Outcome != "completed" {
		t.Errorf("outcome %q", rep.Outcome)
	}
}

package latency

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestLog(t *testing.T) {
	l := New()
	// As if it had begun a second ago, with an answer each 10 ms from then on, but for a silence of
	// 300 ms.
	l.begun = time.Now().Add(-time.Second)
	l.last = l.begun
	for at := 10 * time.Millisecond; at <= time.Second; at += 10 * time.Millisecond {
		if at > 300*time.Millisecond && at < 600*time.Millisecond {
			continue
		}
		l.recent = append(l.recent, answer{at, at / 100})
	}
	rates := l.Rates(l.begun, l.begun.Add(1050*time.Millisecond), 100*time.Millisecond)
	if len(rates) != 10 {
		t.Fatalf("%d steps", len(rates))
	}
	for i, r := range rates {
		want := 100.0
		switch i {
		case 3, 4:
			want = 0
		case 5: // up to 600 ms, which is its last moment
			want = 10
		}
		if r.PerSecond != want ||
			!r.From.Equal(l.begun.Add(time.Duration(i)*100*time.Millisecond)) ||
			(r.P50 == 0) != (want == 0) || r.P90 < r.P50 {
			t.Errorf("step %d: %+v, want %v", i, r, want)
		}
	}
	if n := len(l.Latencies(l.begun.Add(time.Hour), l.begun)); n != 0 {
		t.Errorf("%d latencies of no time", n)
	}

	asked := time.Now()
	l.Note(asked, nil)
	l.Note(asked, errors.New("wrong"))
	l.Broke(errors.New("broke"))
	if s := l.Stats(); s.Requests != 2 || s.Wrong != 1 || s.Broken != 1 || len(s.Errors) != 2 ||
		s.Silence < 900*time.Millisecond || !s.SilenceBegan.Equal(l.begun) {
		t.Errorf("%+v", s)
	}
	l.End()
	l.Note(asked, errors.New("late"))
	l.Broke(errors.New("closed"))
	if s := l.Stats(); s.Requests != 2 || s.Wrong != 1 || s.Broken != 1 {
		t.Errorf("after the end: %+v", s)
	}
}

func TestPace(t *testing.T) {
	var p Pace
	next := time.Now()
	for range 100_000 { // as often as can be
		if !p.Wait(t.Context(), 1, &next) {
			t.Fatal("it ended")
		}
	}
	p.Set(1000)
	begun := time.Now()
	next = begun
	for range 20 {
		p.Wait(t.Context(), 2, &next) // one of two
	}
	if took := time.Since(begun); took < 38*time.Millisecond {
		t.Errorf("20 turns of 2 ms in %v", took)
	}
	// After silence the turns do not come all at once.
	next = time.Now().Add(-time.Hour)
	p.Wait(t.Context(), 2, &next)
	if next.Before(begun) {
		t.Errorf("the next turn was %v ago", time.Since(next))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	next = time.Now().Add(time.Hour)
	if p.Wait(ctx, 1, &next) {
		t.Error("it went on")
	}
}

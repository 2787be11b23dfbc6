package evict

import (
	"testing"
	"time"

	"pgregory.net/rapid"
)

// simulation is a path with one narrow place and a window that feeds it, in virtual time.
type simulation struct {
	w       *window
	now     time.Time
	rate    float64       // of the narrow place, bytes per second
	trip    time.Duration // of an empty path, both ways
	bunch   time.Duration // reports wait for the next multiple of it, if it is not 0
	free    time.Time     // when the narrow place has done all it was given
	reports []arrival     // under way to the source, in order
	sent    uint64
	got     uint64 // placed, as the source knows
	frame   int    // bytes of the largest frame of late
}

type arrival struct {
	at     time.Time
	placed uint64
}

func newSimulation(rate float64, trip time.Duration) *simulation {
	s := &simulation{w: newWindow(4096), now: time.Unix(1e9, 0), rate: rate, trip: trip}
	s.w.now = func() time.Time { return s.now }
	return s
}

// run goes on for d. It returns how many bytes were placed per second, and the mean and
// the most bytes that were in flight.
func (s *simulation) run(t *rapid.T, d time.Duration) (throughput, mean, most float64) {
	s.frame = 0
	begin, end, before := s.now, s.now.Add(d), s.got
	var area float64
	for s.now.Before(end) {
		for s.w.room() == nil {
			s.send(t)
		}
		inFlight := float64(s.sent - s.got)
		most = max(most, inFlight)
		if len(s.reports) == 0 {
			t.Fatal("nothing may be sent, and nothing is on its way")
		}
		next := s.reports[0]
		area += inFlight * next.at.Sub(s.now).Seconds()
		s.now = next.at
		s.reports = s.reports[1:]
		s.got = next.placed
		if !s.w.report(next.placed) {
			t.Fatalf("a true report of %d bytes was refused", next.placed)
		}
	}
	took := s.now.Sub(begin).Seconds()
	return float64(s.got-before) / took, area / took, most
}

func (s *simulation) send(t *rapid.T) {
	n := s.w.batch()
	s.frame = max(s.frame, n)
	s.w.mu.Lock()
	size := s.w.size()
	s.w.mu.Unlock()
	if inFlight := s.sent - s.got; inFlight > 0 && inFlight >= uint64(size) {
		t.Fatalf("room for more, with %d bytes in flight and a window of %d", inFlight, size)
	}
	s.w.send(n)
	s.sent += uint64(n)
	if s.free.Before(s.now) {
		s.free = s.now
	}
	s.free = s.free.Add(time.Duration(float64(n) / s.rate * 1e9))
	at := s.free.Add(s.trip)
	if s.bunch > 0 {
		at = at.Truncate(s.bunch).Add(s.bunch)
	}
	s.reports = append(s.reports, arrival{at, s.sent})
}

// settled runs until the window knows the path and makes sure that it is kept busy then,
// with little more in flight than that takes.
func (s *simulation) settled(t *rapid.T) {
	// What was let onto a wider path first has to come through.
	drain := time.Duration(float64(s.sent-s.got) / s.rate * 1e9)
	s.run(t, 3*time.Second+2*drain)
	throughput, mean, most := s.run(t, time.Second)
	if throughput < 0.9*s.rate {
		t.Errorf("%.1f of %.1f MB/s", throughput/1e6, s.rate/1e6)
	}
	// The last frame sent stands out of the window, and the page by which the round trip is
	// measured is a part of that.
	page := float64(s.w.page)
	ideal, frame := s.rate*(s.trip+s.bunch+allowedQueue).Seconds()+page, float64(s.frame)
	if mean > 1.1*ideal+frame+page || most > 1.2*ideal+frame+page {
		t.Errorf("%.0f bytes in flight, at most %.0f; %.0f are ideal, a frame has %.0f", mean, most, ideal, frame)
	}
}

func drawRate(t *rapid.T, label string) float64 { // 16 Mbit/s to 10 Gbit/s
	return float64(rapid.IntRange(2, 1250).Draw(t, label)) * 1e6
}

// The window keeps the narrowest place on a path busy, and what a fetch waits behind there
// stays near allowedQueue: on any path, if reports come in bunches, when it has forgotten
// what it measured first, and when the path has become wider or narrower.
func TestWindowFindsThePath(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSimulation(drawRate(t, "MB/s"), time.Duration(rapid.IntRange(20, 10_000).Draw(t, "trip in µs"))*time.Microsecond)
		s.bunch = time.Duration(rapid.IntRange(0, 200).Draw(t, "bunch in µs")) * time.Microsecond
		s.settled(t)
		s.run(t, tripMemory)
		s.settled(t)
		s.rate = drawRate(t, "MB/s later")
		s.settled(t)
	})
}

// Whatever the peer reports, the window lets no more pass than its size and one frame, and
// refuses what cannot be.
func TestWindowHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSimulation(1e6, time.Millisecond)
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) {
				s.now = s.now.Add(time.Duration(rapid.Int64Range(0, 3e9).Draw(t, "ns")))
			},
			"send": func(t *rapid.T) {
				if s.w.room() == nil {
					s.send(t)
				} else if s.sent == s.got {
					t.Fatal("nothing in flight, and no room")
				}
			},
			"report": func(t *rapid.T) {
				placed := rapid.OneOf(rapid.Uint64Range(s.got, s.sent), rapid.Uint64()).Draw(t, "placed")
				changed := s.w.room()
				possible := placed >= s.got && placed <= s.sent
				if s.w.report(placed) != possible {
					t.Fatalf("report of %d with %d placed and %d sent: possible is %v", placed, s.got, s.sent, possible)
				}
				if !possible {
					return
				}
				s.got = placed
				if changed != nil {
					<-changed // or the sender would wait for ever
				}
			},
			"": func(t *rapid.T) {
				if n := s.w.batch(); n < s.w.page || n > maxBatch {
					t.Fatalf("a frame of %d bytes", n)
				}
			},
		})
	})
}

package evict

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// simulation is a path with one narrow place and the windows that feed it, in virtual time.
type simulation struct {
	path   *Path
	now    time.Time
	rate   float64       // of the narrow place, bytes per second
	bunch  time.Duration // reports wait for the next multiple of it, if it is not 0
	free   time.Time     // when the narrow place has done all it was given
	peers  []*peer
	others []traffic
	queues []time.Duration // of the narrow place, every millisecond of the run
}

// peer is a destination and the window that feeds it.
type peer struct {
	w       *window
	trip    time.Duration // to it on an empty path, both ways
	rate    float64       // the rate at which it places pages; 0: as fast as they come
	free    time.Time     // when it has placed all it was given
	stalled bool          // it reports nothing
	idle    bool          // there is nothing to send
	reports []arrival     // under way to the source, in order
	sent    uint64
	got     uint64 // placed, as the source knows
	frame   int    // bytes of the largest frame of late
}

type arrival struct {
	at     time.Time
	placed uint64
}

// traffic is what others send on the path.
type traffic interface {
	// next returns when something happens.
	next() time.Time
	// step does what happens then.
	step(*simulation)
	// done returns how many bytes came through.
	done() float64
}

// failer is a test.
type failer interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
	Errorf(string, ...any)
}

const testPage = 4096

func newSimulation(rate float64, trips ...time.Duration) *simulation {
	s := &simulation{path: NewPath(0), now: time.Unix(1e9, 0), rate: rate}
	s.path.now = func() time.Time { return s.now }
	for _, trip := range trips {
		s.join(trip, nil, false)
	}
	return s
}

func (s *simulation) join(trip time.Duration, limit *Limit, yields bool) *peer {
	p := &peer{w: s.path.join(testPage, limit, yields), trip: trip}
	s.peers = append(s.peers, p)
	return p
}

// through sends n bytes through the narrow place and returns when the last is out.
func (s *simulation) through(n int) time.Time {
	s.free = later(s.free, s.now).Add(seconds(float64(n) / s.rate))
	return s.free
}

// queue returns how long what is sent now waits at the narrow place.
func (s *simulation) queue() time.Duration { return max(0, s.free.Sub(s.now)) }

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// run goes on for d. It returns how many bytes were placed per second, and the mean and the most
// bytes in flight.
func (s *simulation) run(t failer, d time.Duration) (throughput, mean, most float64) {
	t.Helper()
	before := 0.0
	for _, p := range s.peers {
		p.frame = 0
		before += float64(p.got)
	}
	s.queues = nil
	begin, end, look := s.now, s.now.Add(d), s.now
	var area float64
	for {
		next := look
		for range s.peers { // one that was served may have let another one be
			for _, p := range s.peers {
				for !p.idle {
					n, again := p.w.room()
					if n == 0 {
						if at := s.now.Add(again); at.Before(next) {
							next = at
						}
						break
					}
					s.send(t, p, n)
				}
			}
		}
		inFlight := 0.0
		for _, p := range s.peers {
			inFlight += float64(p.sent - p.got)
			if len(p.reports) > 0 && !p.stalled && p.reports[0].at.Before(next) {
				next = p.reports[0].at
			}
		}
		for _, o := range s.others {
			if at := o.next(); at.Before(next) {
				next = at
			}
		}
		if next.After(end) {
			next = end
		}
		most = max(most, inFlight)
		area += inFlight * next.Sub(s.now).Seconds()
		s.now = next
		if !s.now.Before(end) {
			break
		}
		for _, o := range s.others {
			for !o.next().After(s.now) {
				o.step(s)
			}
		}
		if !look.After(s.now) {
			s.queues = append(s.queues, s.queue())
			look = look.Add(time.Millisecond)
		}
		for _, p := range s.peers {
			for len(p.reports) > 0 && !p.stalled && !p.reports[0].at.After(s.now) {
				p.got = p.reports[0].placed
				p.reports = p.reports[1:]
				if !p.w.report(p.got) {
					t.Fatalf("a true report of %d bytes was refused", p.got)
				}
			}
		}
	}
	after := 0.0
	for _, p := range s.peers {
		after += float64(p.got)
	}
	took := s.now.Sub(begin).Seconds()
	return (after - before) / took, area / took, most
}

func (s *simulation) send(t failer, p *peer, n int) {
	p.frame = max(p.frame, n)
	s.path.mu.Lock()
	size := p.w.size()
	s.path.mu.Unlock()
	if inFlight := p.sent - p.got; inFlight > 0 && inFlight >= uint64(size) {
		t.Fatalf("room for more, with %d bytes in flight and a window of %d", inFlight, size)
	}
	p.w.send(n)
	p.sent += uint64(n)
	at := s.through(n)
	if p.rate > 0 {
		p.free = later(p.free, at).Add(seconds(float64(n) / p.rate))
		at = p.free
	}
	at = at.Add(p.trip)
	if s.bunch > 0 {
		at = at.Truncate(s.bunch).Add(s.bunch)
	}
	p.reports = append(p.reports, arrival{at, p.sent})
}

// wait99 returns how long the narrow place kept a fetch waiting, in all cases but one in a hundred.
func (s *simulation) wait99() time.Duration {
	slices.Sort(s.queues)
	return s.queues[len(s.queues)*99/100]
}

// settled runs until the window knows the path. It makes sure that the path is then busy, with
// little more in flight than that takes.
func (s *simulation) settled(t *rapid.T) {
	p := s.peers[0]
	// What was let onto a wider path must first come through.
	drain := seconds(float64(p.sent-p.got) / s.rate)
	s.run(t, 3*time.Second+2*drain)
	throughput, mean, most := s.run(t, time.Second)
	if throughput < 0.9*s.rate {
		t.Errorf("%.1f of %.1f MB/s", throughput/1e6, s.rate/1e6)
	}
	// The last frame sent may exceed the window, and includes the page that measures the round
	// trip.
	page := float64(p.w.page)
	ideal, frame := s.rate*(p.trip+s.bunch+allowedQueue).Seconds()+page, float64(p.frame)
	if mean > 1.1*ideal+frame+page || most > 1.2*ideal+frame+page {
		t.Errorf("%.0f bytes in flight, at most %.0f; %.0f are ideal, a frame has %.0f", mean, most,
			ideal, frame)
	}
}

func drawRate(t *rapid.T, label string, least int) float64 { // at most 10 Gbit/s
	return float64(rapid.IntRange(least, 1250).Draw(t, label)) * 1e6
}

// The window keeps the narrowest place on a path busy, and a fetch waits there for about
// allowedQueue. This holds on any path: if reports come in bunches, after the window forgot what it
// measured first, and after the path became wider or narrower. Where there is no other traffic,
// yielding costs nothing of that.
func TestWindowFindsThePath(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		yields := rapid.Bool().Draw(t, "yields")
		least := 2 // MB/s
		if yields {
			least = 5 // else a page of our own looks like others' queue
		}
		s := newSimulation(drawRate(t, "MB/s", least))
		s.join(time.Duration(rapid.IntRange(20, 10_000).Draw(t, "trip in µs"))*time.Microsecond,
			nil, yields)
		s.bunch = time.Duration(rapid.IntRange(0, 200).Draw(t, "bunch in µs")) * time.Microsecond
		s.settled(t)
		s.run(t, tripMemory)
		s.settled(t)
		s.rate = drawRate(t, "MB/s later", least)
		s.settled(t)
	})
}

// Whatever the peer reports, the window lets no more pass than its size and one frame, and refuses
// impossible reports.
func TestWindowHolds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSimulation(1e6, time.Millisecond)
		p := s.peers[0]
		t.Repeat(map[string]func(*rapid.T){
			"wait": func(t *rapid.T) {
				s.now = s.now.Add(time.Duration(rapid.Int64Range(0, 3e9).Draw(t, "ns")))
			},
			"send": func(t *rapid.T) {
				n, again := p.w.room()
				switch {
				case n > 0 && (n < p.w.page || n > maxBatch):
					t.Fatalf("a frame of %d bytes", n)
				case n > 0 && rapid.Bool().Draw(t, "something to send"):
					s.send(t, p, n)
				case n > 0:
					p.w.pass()
				case p.sent == p.got:
					t.Fatal("nothing in flight, and no room")
				case again <= 0:
					t.Fatal("no room, and nothing to wait for")
				}
			},
			"report": func(t *rapid.T) {
				placed := rapid.OneOf(rapid.Uint64Range(p.got, p.sent), rapid.Uint64()).Draw(t,
					"placed")
				possible := placed >= p.got && placed <= p.sent
				if p.w.report(placed) != possible {
					t.Fatalf("report of %d with %d placed and %d sent: possible is %v", placed,
						p.got, p.sent, possible)
				}
				if possible {
					p.got = placed
				}
			},
		})
	})
}

// A grant does not outlast its window: a later report may find the path to be slower, or longer.
func TestGrantIsWithdrawn(t *testing.T) {
	s := newSimulation(1e6, time.Millisecond)
	p := s.peers[0]
	send := func() {
		t.Helper()
		n, _ := p.w.room()
		if n == 0 {
			t.Fatal("no room")
		}
		s.send(t, p, n)
	}
	report := func(placed uint64) {
		t.Helper()
		if p.got = placed; !p.w.report(placed) {
			t.Fatalf("a report of %d was refused", placed)
		}
	}
	send()
	report(3723)
	report(3874)
	s.now = s.now.Add(100*time.Millisecond + 1)
	send()
	send()
	s.now = s.now.Add(1)
	send()
	if n, _ := p.w.room(); n > 0 {
		t.Fatalf("room for %d bytes", n)
	}
	report(7212) // there is room in the present window
	report(8192) // there is none any more, as the window shrank
	s.path.mu.Lock()
	size := p.w.size()
	s.path.mu.Unlock()
	if n, _ := p.w.room(); n > 0 && p.sent-p.got >= uint64(size) {
		t.Errorf("room for %d bytes, with %d in flight and a window of %d", n, p.sent-p.got, size)
	}
}

// A window finds the rate of any path in some round trips, as TCP does. The queue is bounded
// meanwhile, and then as long as allowed. On a wide path the window goes on to find more when the
// path became wider.
func TestWindowOpens(t *testing.T) {
	t.Parallel()
	const ms = time.Millisecond
	for _, c := range []struct {
		trip   time.Duration
		within time.Duration // until 80 % of 10 Gbit/s
	}{{ms / 5, 200 * ms}, {ms, 200 * ms}, {10 * ms, 400 * ms}, {50 * ms, time.Second},
		{200 * ms, 4 * time.Second}} {
		for _, rate := range []float64{1250e6, 125e6, 2e6} {
			t.Run(fmt.Sprintf("%v %.0f MB/s", c.trip, rate/1e6), func(t *testing.T) {
				s := newSimulation(rate, c.trip)
				found, worst := time.Duration(0), time.Duration(0)
				var rates []string
				step := max(c.within/10, c.trip)
				for at := step; at <= 3*c.within; at += step {
					got, _, _ := s.run(t, step)
					rates = append(rates, fmt.Sprintf("%.0f", got/1e6))
					worst = max(worst, slices.Max(s.queues))
					if found == 0 && got >= 0.8*rate {
						found = at
					}
				}
				s.run(t, time.Second+4*c.trip)
				steady, _, _ := s.run(t, 20*time.Second)
				wait := s.wait99()
				t.Logf("80 %% within %v (MB/s every %v: %s); queue %v at most; then %.0f MB/s, "+
					"wait %v", found, step, strings.Join(rates, " "), worst, steady/1e6, wait)
				if found == 0 || found > c.within {
					t.Errorf("the path was found within %v, not %v", found, c.within)
				}
				if most := 2*c.trip + 12*ms + seconds(8*testPage/rate); worst > most {
					t.Errorf("a fetch had to wait for up to %v, not %v", worst, most)
				}
				if most := 2*ms + c.trip/4 + seconds(2*testPage/rate); wait > most {
					t.Errorf("then it waits for %v, not %v", wait, most)
				}
				if least := 0.95 - 3*c.trip.Seconds()/emptyEvery.Seconds(); steady < least*rate {
					t.Errorf("%.0f of %.0f MB/s then", steady/1e6, rate/1e6)
				}
				s.rate *= 4
				s.run(t, tripMemory+20*c.trip+time.Second)
				if wider, _, _ := s.run(t, 5*time.Second); wider < 0.75*s.rate {
					t.Errorf("%.0f MB/s of %.0f when the path had become wider", wider/1e6,
						s.rate/1e6)
				}
			})
		}
	}
}

// four is four evictions over one path of 1 Gbit/s, after they have found it. alone is what a fetch
// waits for there if there is only one of them.
func four(t *testing.T, trips ...time.Duration) (s *simulation, alone time.Duration) {
	s = newSimulation(125e6, trips[0])
	s.run(t, 3*time.Second)
	for range 3 { // it varies with when the path is measured
		s.run(t, 6*time.Second)
		alone = max(alone, s.wait99())
	}
	s = newSimulation(125e6, trips...)
	s.run(t, 3*time.Second)
	return s, alone
}

// rates runs for a while and returns how many bytes per second each peer placed.
func (s *simulation) rates(t *testing.T, d time.Duration) (rates []float64, sum float64) {
	t.Helper()
	for _, p := range s.peers {
		rates = append(rates, -float64(p.got))
	}
	s.run(t, d)
	for i, p := range s.peers {
		rates[i] = (rates[i] + float64(p.got)) / d.Seconds()
		sum += rates[i]
	}
	return rates, sum
}

// fairness is Jain's index: 1 if all are the same, 1/n if one has everything.
func fairness(rates []float64) float64 {
	sum, squares := 0.0, 0.0
	for _, r := range rates {
		sum += r
		squares += r * r
	}
	return sum * sum / (float64(len(rates)) * squares)
}

// Evictions that share a path share its rate, too. A fetch waits for all of them together not much
// longer than for one. This holds wherever their destinations are, and if one comes late.
func TestPathIsShared(t *testing.T) {
	t.Parallel()
	const us = time.Microsecond
	for name, c := range map[string]struct {
		trips []time.Duration
		more  time.Duration // than for one
	}{
		"near": {[]time.Duration{200 * us, 200 * us, 200 * us, 200 * us}, 300 * us},
		"far":  {[]time.Duration{10_000 * us, 10_000 * us, 10_000 * us, 10_000 * us}, 600 * us},
		// Bytes that were placed at the same time were not sent at the same time.
		"anywhere": {[]time.Duration{100 * us, 300 * us, 2000 * us, 10_000 * us}, 1700 * us},
	} {
		t.Run(name, func(t *testing.T) {
			s, alone := four(t, c.trips...)
			check := func() {
				t.Helper()
				rates, sum := s.rates(t, 6*time.Second)
				t.Logf("%.0f %% of the rate, fairness %.3f, wait %v, %v for one", 100*sum/s.rate,
					fairness(rates), s.wait99(), alone)
				if sum < 0.95*s.rate || fairness(rates) < 0.95 || s.wait99() > alone+c.more {
					t.Errorf("%.1f MB/s in all (%.1f), fairness %.3f, wait %v, %v for one", sum/1e6,
						rates, fairness(rates), s.wait99(), alone)
				}
			}
			check()
			s.join(c.trips[3], nil, false)
			s.run(t, time.Second)
			check()
			s.peers[0].w.leave()
			s.peers = s.peers[1:]
			s.run(t, time.Second)
			check()
		})
	}
}

// What one destination cannot take, the others get: if it is slow, if it stops, or if its session
// ends.
func TestPathIsNotHeldUp(t *testing.T) {
	t.Parallel()
	s, alone := four(t, 200*time.Microsecond, 200*time.Microsecond, 200*time.Microsecond,
		200*time.Microsecond)
	check := func(what string, rest float64) {
		t.Helper()
		rates, sum := s.rates(t, 6*time.Second)
		t.Logf("%s: %.1f MB/s, wait %v, %v for one", what, rates, s.wait99(), alone)
		if others := rates[1:]; sum < 0.95*s.rate || fairness(others) < 0.95 ||
			math.Abs(rates[0]-rest) > 0.1*rest+100e3 {
			t.Errorf("%s: %.1f MB/s", what, rates)
		}
		if s.wait99() > alone*6/5 {
			t.Errorf("%s: wait %v, %v for one", what, s.wait99(), alone)
		}
	}
	slow := s.peers[0]
	slow.rate = 10e6
	s.run(t, 3*time.Second)
	check("slow", slow.rate)

	slow.rate, slow.stalled = 0, true
	s.run(t, 2*stallTime)
	check("stalled", 0)
	slow.stalled = false
	s.run(t, 3*time.Second)
	check("back", s.rate/4)

	slow.w.pass()
	slow.idle = true
	s.run(t, time.Second)
	check("idle", 0)
	slow.idle = false
	s.run(t, time.Second)
	check("back", s.rate/4)

	slow.w.leave()
	slow.w.leave()
	slow.idle = true
	check("gone", 0)
}

// Limits hold for one and for all together, even if they are changed, and fetches count.
func TestLimit(t *testing.T) {
	s := newSimulation(125e6)
	var one Limit
	s.join(200*time.Microsecond, &one, false)
	s.join(200*time.Microsecond, nil, false)
	check := func(first, second float64) {
		t.Helper()
		s.run(t, 2*time.Second)
		rates, _ := s.rates(t, 2*time.Second)
		for i, want := range []float64{first, second} {
			if frame := float64(32 << 10); math.Abs(rates[i]-want) > 0.05*want+frame {
				t.Errorf("rate %.2f MB/s, not %.2f", rates[i]/1e6, want/1e6)
			}
		}
	}
	check(62.5e6, 62.5e6)
	one.Set(20e6)
	check(20e6, 105e6)
	s.path.Limit.Set(100e6)
	check(20e6, 80e6)
	one.Set(200e3)
	check(200e3, 99.8e6)
	one.Set(0)
	check(50e6, 50e6)
	s.path.Limit.Set(0)
	check(62.5e6, 62.5e6)

	s.path.Limit.Set(50e6)
	s.others = append(s.others, &fetches{w: s.peers[0].w, at: s.now})
	check(20e6, 20e6)
}

// fetches are 10 MB/s of them.
type fetches struct {
	w  *window
	at time.Time
	n  float64
}

func (f *fetches) next() time.Time { return f.at }
func (f *fetches) done() float64   { return f.n }
func (f *fetches) step(s *simulation) {
	const size = 10_000
	f.w.fetched(size)
	s.through(size)
	f.at, f.n = f.at.Add(time.Millisecond), f.n+size
}

// steady is traffic that ignores the path's state: so many bytes per second, in packets.
type steady struct {
	rate   float64
	buffer time.Duration // of the narrow place; what would wait longer is lost
	at     time.Time
	n      float64
}

func (c *steady) next() time.Time { return c.at }
func (c *steady) done() float64   { return c.n }
func (c *steady) step(s *simulation) {
	if s.queue() <= c.buffer {
		s.through(packet)
		c.n += packet
	}
	c.at = c.at.Add(seconds(packet / c.rate))
}

const packet = 1500

// greedy is a TCP connection that always has more to send (as in RFC 5681). It fills the buffer of
// the narrow place until something is lost.
type greedy struct {
	trip   time.Duration
	buffer time.Duration
	window float64   // packets
	acks   []ack     // under way, in order
	halved time.Time // losses of what was sent before that belong to the same congestion
	slow   bool      // no longer in slow start
	n      float64
}

type ack struct {
	at, sent time.Time
	lost     bool
}

func (c *greedy) done() float64   { return c.n }
func (c *greedy) next() time.Time { return c.acks[0].at }

func (c *greedy) step(s *simulation) {
	switch a := c.acks[0]; {
	case a.lost && a.sent.After(c.halved):
		c.window, c.halved, c.slow = max(c.window/2, 2), s.now, true
	case !a.lost && c.slow:
		c.window += 1 / c.window
		c.n += packet
	case !a.lost:
		c.window++
		c.n += packet
	}
	c.acks = c.acks[1:]
	c.fill(s)
}

func (c *greedy) fill(s *simulation) {
	for float64(len(c.acks)) < c.window {
		a := ack{sent: s.now, lost: s.queue() > c.buffer}
		if a.lost {
			a.at = s.free
		} else {
			a.at = s.through(packet)
		}
		a.at = a.at.Add(c.trip)
		c.acks = append(c.acks, a)
	}
}

// startGreedy lets a connection start now.
func (s *simulation) startGreedy(trip, buffer time.Duration) *greedy {
	c := &greedy{trip: trip, buffer: buffer, window: 10}
	c.fill(s)
	s.others = append(s.others, c)
	return c
}

// A window that yields leaves others nearly all that they would have had without it, and uses what
// they leave. Soon after they are gone it has the path for itself again.
func TestYield(t *testing.T) {
	t.Parallel()
	const rate = 125e6
	for _, buffer := range []time.Duration{5 * time.Millisecond, 20 * time.Millisecond} {
		for _, trip := range []time.Duration{200 * time.Microsecond, 5 * time.Millisecond} {
			for name, start := range map[string]func(s *simulation) traffic{
				"greedy": func(s *simulation) traffic { return s.startGreedy(trip, buffer) },
				"half": func(s *simulation) traffic {
					c := &steady{rate: rate / 2, buffer: buffer, at: s.now}
					s.others = append(s.others, c)
					return c
				},
				"all": func(s *simulation) traffic {
					c := &steady{rate: rate, buffer: buffer, at: s.now}
					s.others = append(s.others, c)
					return c
				},
			} {
				t.Run(name+" "+trip.String()+" "+buffer.String(), func(t *testing.T) {
					const d = 8 * time.Second
					measure := func(s *simulation, c traffic) (theirs, ours float64) {
						s.run(t, time.Second)
						theirs = -c.done()
						ours, _, _ = s.run(t, d)
						return (theirs + c.done()) / d.Seconds(), ours
					}
					s := newSimulation(rate)
					without, _ := measure(s, start(s))

					s = newSimulation(rate, trip)
					s.run(t, 3*time.Second)
					beside, _ := measure(s, start(s))

					s = newSimulation(rate)
					s.join(trip, nil, true)
					s.run(t, 3*time.Second)
					with, ours := measure(s, start(s))
					s.others = nil
					s.run(t, time.Second)
					after, _, _ := s.run(t, 3*time.Second)
					t.Logf("they have %.1f MB/s alone, %.1f beside one that yields, which has "+
						"%.1f, and %.1f beside one that does not", without/1e6, with/1e6, ours/1e6,
						beside/1e6)
					if with < 0.9*without {
						t.Errorf("they have %.1f MB/s, %.1f alone", with/1e6, without/1e6)
					}
					if ours < 0.001*rate || without+ours < 0.9*rate {
						t.Errorf("%.1f MB/s for the push, beside %.1f", ours/1e6, with/1e6)
					}
					if after < 0.9*rate {
						t.Errorf("%.1f MB/s when they were gone", after/1e6)
					}
				})
			}
		}
	}
}

// On a fast path frames are whole pieces of what the kernel sends at once. They become smaller when
// the guest fetches, and larger again soon after.
func TestFrames(t *testing.T) {
	s := newSimulation(2e9, 200*time.Microsecond)
	p := s.peers[0]
	s.run(t, time.Second)
	check := func(when string, want int) {
		t.Helper()
		s.run(t, 100*time.Millisecond)
		if p.frame != want {
			t.Errorf("%s: the largest frame has %d bytes, want %d", when, p.frame, want)
		}
	}
	check("without fetches", 8*burst)
	s.others = append(s.others, &fetches{w: p.w, at: s.now})
	s.run(t, 10*time.Millisecond)
	check("with fetches", 4*burst)
	s.others = nil
	s.run(t, quietTime)
	check("after fetches", 8*burst)

	s.rate = 125e6 // 0.6 ms of it are 73 KiB
	s.run(t, 3*time.Second)
	check("on a slower path", burst)
}

// Package latency keeps when a server's answers came, and how long each took: what its clients feel
// while its guest moves.
package latency

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Log is what clients of one server saw. Its methods may be called from any goroutine.
type Log struct {
	begun time.Time

	mu     sync.Mutex // guards all that follows
	ended  time.Time  // zero until End
	count  uint64
	last   time.Time
	silent time.Duration // the longest time without an answer
	since  time.Time     // when that began
	recent []answer      // the youngest, in order
	wrong  uint64
	broken int
	errors []error
}

// Stats are what clients saw. Those all of whose connections work and all of whose values are right
// have Wrong and Broken 0.
type Stats struct {
	Requests uint64 // answered
	Wrong    uint64 // values that were not as last written, or gone
	Broken   int    // connections that did not last, or got an answer that is none
	// Silence is the longest time in which no answer came, the one that lasts still included.
	// Pauses that a rate makes count.
	Silence      time.Duration
	SilenceBegan time.Time
	Errors       []error // the first of wrong values and broken connections, at most 20
}

const maxErrors = 20

type answer struct{ at, took time.Duration } // at: since begun

// most bounds what is kept of answers; when they are too many, the older half goes.
const most = 4 << 20

// New returns a log that begins now.
func New() *Log {
	now := time.Now()
	return &Log{begun: now, last: now}
}

// Note takes note of an answer that comes now, to what was asked at a time; wrong tells what was
// wrong with it, or is nil.
func (l *Log) Note(asked time.Time, wrong error) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.ended.IsZero() {
		return
	}
	l.quiet(now)
	l.last = now
	l.count++
	if len(l.recent) == most {
		l.recent = slices.Delete(l.recent, 0, most/2)
	}
	l.recent = append(l.recent, answer{now.Sub(l.begun), now.Sub(asked)})
	if wrong != nil {
		l.wrong++
		l.keep(wrong)
	}
}

// Broke takes note of a connection that broke.
func (l *Log) Broke(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended.IsZero() {
		l.broken++
		l.keep(err)
	}
}

func (l *Log) keep(err error) {
	if len(l.errors) < maxErrors {
		l.errors = append(l.errors, fmt.Errorf("%s: %w", time.Now().Format("15:04:05.000"), err))
	}
}

func (l *Log) quiet(now time.Time) {
	if d := now.Sub(l.last); d > l.silent {
		l.silent, l.since = d, l.last
	}
}

// End ends the log: nothing is noted any more.
func (l *Log) End() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended.IsZero() {
		l.ended = time.Now()
		l.quiet(l.ended)
	}
}

// Stats returns what was seen so far.
func (l *Log) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := Stats{l.count, l.wrong, l.broken, l.silent, l.since, slices.Clone(l.errors)}
	if now := time.Now(); l.ended.IsZero() && now.Sub(l.last) > l.silent {
		s.Silence, s.SilenceBegan = now.Sub(l.last), l.last
	}
	return s
}

// between are the answers after one time, up to another.
func (l *Log) between(from, to time.Time) []answer {
	before := func(t time.Time) int {
		n, _ := slices.BinarySearchFunc(l.recent, t.Sub(l.begun),
			func(a answer, d time.Duration) int {
				if a.at <= d {
					return -1
				}
				return 1
			})
		return n
	}
	return l.recent[before(from):max(before(from), before(to))]
}

// Latencies returns how long the answers took that came after one time, up to another, in order of
// their coming. Of a log that has gone on for long the oldest may be forgotten.
func (l *Log) Latencies(from, to time.Time) []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var took []time.Duration
	for _, a := range l.between(from, to) {
		took = append(took, a.took)
	}
	return took
}

// Rate is what came in a step of time.
type Rate struct {
	From      time.Time
	PerSecond float64
	P50, P90  time.Duration // of how long the answers took; 0 if none came
}

// Rates returns what came in each whole step between two times.
func (l *Log) Rates(from, to time.Time, step time.Duration) []Rate {
	var rates []Rate
	for ; !from.Add(step).After(to); from = from.Add(step) {
		took := l.Latencies(from, from.Add(step))
		slices.Sort(took)
		r := Rate{From: from, PerSecond: float64(len(took)) / step.Seconds()}
		if n := len(took); n > 0 {
			r.P50, r.P90 = took[n/2], took[n*9/10]
		}
		rates = append(rates, r)
	}
	return rates
}

// Pace is how often clients ask. The zero value is as often as they are answered. Its methods may
// be called from any goroutine.
type Pace struct{ perSecond atomic.Uint64 } // bits of a float64

// Set has all clients together ask so often a second; 0 is as often as they are answered.
func (p *Pace) Set(perSecond float64) { p.perSecond.Store(math.Float64bits(perSecond)) }

// Wait waits until it is the turn of one of so many clients, which it takes in next, and notes when
// that is again. What silence cost is not made up for. It returns false when ctx is done.
func (p *Pace) Wait(ctx context.Context, clients int, next *time.Time) bool {
	rate := math.Float64frombits(p.perSecond.Load())
	if rate <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(time.Until(*next)):
	case <-ctx.Done():
		return false
	}
	*next = next.Add(time.Duration(float64(clients) / rate * float64(time.Second)))
	if now := time.Now(); next.Before(now) {
		*next = now
	}
	return true
}

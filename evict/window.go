package evict

import (
	"sync"
	"time"
)

// window bounds how many pushed bytes are on their way to the destination, so that a
// fetched page, which shares the path with them, does not queue behind many.
//
// It is measured, not chosen: the destination reports what it has placed, and from those
// reports come the rate of delivery (over spans of 10 ms, the greatest of the last second)
// and the round trip of an uncongested path (the least of the last ten seconds). What is allowed in flight
// is that rate times (that round trip plus allowedQueue): enough to keep the narrowest
// place on the path busy, and to find out if it has become wider, and no more. This is the
// model of BBR (Cardwell et al., 2016) with a fixed bound on the queue. As there, the path
// is let run empty now and then, and a single page measures it: else the queue that is
// always there would in time be taken for a part of the path.
type window struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced when bytes were placed
	page    int           // bytes that are always allowed

	sent, placed uint64    // bytes
	flights      []flight  // not yet known to be placed, oldest first
	since        time.Time // begin of the span over which the rate is taken
	before       uint64    // value of placed then
	rate         extremum  // bytes per second, greatest
	trip         extremum  // seconds, least
	empty        time.Time // when nothing was in flight last
	now          func() time.Time
}

// flight is a frame on its way.
type flight struct {
	end uint64 // value of sent behind it
	at  time.Time
}

const (
	// allowedQueue is how long a fetch may wait behind pushed bytes.
	allowedQueue = 1500 * time.Microsecond
	// rateSpan is long enough that reports which arrive in a bunch, or a burst that the
	// path lets through, do not look like a fast path.
	rateSpan   = 10 * time.Millisecond
	rateMemory = time.Second
	tripMemory = 10 * time.Second
	// emptyEvery is how often the path is let run empty.
	emptyEvery = tripMemory / 4
	// startRate is assumed until the first report: a slow link's, 100 Mbit/s.
	startRate = 12.5e6
)

func newWindow(page int) *window {
	return &window{
		changed: make(chan struct{}), page: page, now: time.Now,
		rate: extremum{keep: rateMemory, better: func(a, b float64) bool { return a > b }},
		trip: extremum{keep: tripMemory, better: func(a, b float64) bool { return a < b }},
	}
}

// size returns how many bytes may be in flight. The caller holds mu.
func (w *window) size() int {
	rate, trip := w.rate.value(startRate), w.trip.value(0)
	// With one page a slow path would stand idle while that page is reported.
	return max(2*w.page, int(rate*(trip+allowedQueue.Seconds())))
}

// batch returns how many bytes one frame should hold: somewhat more than half of what may
// queue, so that two frames fill a short path. While one is placed and reported, the other goes
// through the narrowest place. Smaller ones would cost both hosts more CPU time.
func (w *window) batch() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sent == w.placed {
		return w.page
	}
	queued := int(w.rate.value(startRate) * allowedQueue.Seconds() * 3 / 5)
	return min(max(queued, w.page), max(maxBatch, w.page))
}

// room returns a channel that is closed when more may be sent, nil if it may be now.
func (w *window) room() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	inFlight := w.sent - w.placed
	if inFlight == 0 || inFlight < uint64(w.size()) && w.now().Sub(w.empty) < emptyEvery {
		return nil
	}
	return w.changed
}

// send notes that a frame of n bytes is about to be sent.
func (w *window) send(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.now()
	if len(w.flights) == 0 && now.Sub(w.since) > rateSpan {
		w.since, w.before = now, w.placed // the path stood idle
	}
	if w.sent == w.placed {
		w.empty = now
	}
	w.sent += uint64(n)
	w.flights = append(w.flights, flight{w.sent, now})
}

// report notes that the destination has placed all frames up to placed bytes. It tells
// whether that can be true.
func (w *window) report(placed uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if placed < w.placed || placed > w.sent {
		return false
	}
	now := w.now()
	w.placed = placed
	n := 0
	for n < len(w.flights) && w.flights[n].end <= placed {
		n++
	}
	if n > 0 {
		w.trip.add(now, now.Sub(w.flights[n-1].at).Seconds())
		w.flights = append(w.flights[:0], w.flights[n:]...)
	}
	if span := now.Sub(w.since); span >= rateSpan {
		w.rate.add(now, float64(placed-w.before)/span.Seconds())
		w.since, w.before = now, placed
	}
	close(w.changed)
	w.changed = make(chan struct{})
	return true
}

// roundTrip returns the least round trip measured, in seconds; 0 if there was none.
func (w *window) roundTrip() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.trip.value(0)
}

// extremum is the best value of the last while: between keep and half of it.
type extremum struct {
	keep   time.Duration
	better func(a, b float64) bool

	since         time.Time // when the current half began; zero before the first value
	current, last *float64
}

func (e *extremum) add(now time.Time, v float64) {
	if e.since.IsZero() {
		e.since = now
	}
	if now.Sub(e.since) > e.keep/2 {
		e.last, e.current, e.since = e.current, nil, now
	}
	if e.current == nil || e.better(v, *e.current) {
		e.current = &v
	}
}

// value returns the best value, otherwise if there is none yet.
func (e *extremum) value(otherwise float64) float64 {
	switch {
	case e.current == nil && e.last == nil:
		return otherwise
	case e.last == nil, e.current != nil && e.better(*e.current, *e.last):
		return *e.current
	}
	return *e.last
}

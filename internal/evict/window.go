package evict

import (
	"slices"
	"sync"
	"time"
)

// Path is what leads out of a host, for the evictions that share it. It bounds how many
// pushed bytes of all of them are on their way to their destinations, so that a fetched
// page, which shares the path with them, does not queue behind many; and it lets the
// evictions send in turn. Fetched pages never wait here.
//
// The bound is measured, not chosen: destinations report what they have placed, and from those
// reports come the rate of delivery (over spans of 10 ms, the greatest of the last second) and the
// round trip of an uncongested path (the least of the last ten seconds). What is allowed in flight
// is that rate times (that round trip plus allowedQueue): enough to keep the narrowest place on the
// path busy, and to find out if it has become wider, and no more. This is the model of BBR
// (Cardwell et al., 2016) with a fixed bound on the queue. As there, the path is let run empty now
// and then, and a single page of each eviction measures it: else the queue that is always there
// would in time be taken for a part of the path.
//
// Several goroutines may use a Path.
type Path struct {
	// Limit is that of all evictions together.
	Limit Limit

	mu      sync.Mutex // guards what follows, and the windows
	windows []*window
	turn    uint64    // of the window that sent last
	rate    meter     // of delivery to all
	empty   time.Time // when nothing was in flight last
	now     func() time.Time
}

// NewPath returns a path on which at most limit bytes per second are sent, of all evictions
// together; as many as go through if that is 0.
func NewPath(limit int64) *Path {
	p := &Path{rate: newMeter(), now: time.Now}
	p.Limit.Set(limit)
	return p
}

// window is what one session has in flight on a path. Besides the bound on all, it has one of
// its own, after its own rate and round trip: a destination that is slow to place pages
// takes no more of what all may have in flight than its rate is worth.
type window struct {
	path  *Path
	page  int           // bytes that are always allowed
	limit *Limit        // may be nil
	wake  chan struct{} // capacity 1: something was granted by what another window did

	waits        bool
	granted      int       // bytes that may be sent now and are not yet
	turn         uint64    // bytes; among those that wait the least one is next
	sent, placed uint64    // bytes
	flights      []flight  // not yet known to be placed, oldest first
	begun        time.Time // value of the path's empty when something was sent last
	progress     time.Time // when something was placed last, or sent with nothing in flight
	rate         meter     // of delivery
	trip         extremum  // seconds, least
	yield        *yield    // nil: other traffic is not heeded
	opening      *opening  // nil: the path is known
	opened       time.Time // when that ended, or began anew
	paid         time.Time // when what was sent would have been, at the window's pace
}

// flight is a frame on its way.
type flight struct {
	end uint64 // value of sent behind it
	at  time.Time
}

const (
	// allowedQueue is how long a fetch, and whatever else is on the path, may wait behind pushed
	// bytes. Less would mean smaller frames, which cost both hosts CPU time that VMs want.
	allowedQueue = time.Millisecond
	// rateSpan is long enough that reports which arrive in a bunch, or a burst that the
	// path lets through, do not look like a fast path.
	rateSpan   = 10 * time.Millisecond
	rateMemory = time.Second
	tripMemory = 10 * time.Second
	// emptyEvery is how often the path is let run empty.
	emptyEvery = tripMemory / 4
	// startRate is assumed until the first report: a slow link's, 100 Mbit/s.
	startRate = 12.5e6
	// stallTime is how long nothing may be placed, beyond the round trip, until what is in
	// flight no longer counts for others: it waits for something else than the path.
	stallTime = 100 * time.Millisecond
	// growth is by how much a window may exceed what its rate needs, as long as all together do
	// not: else it could not take over what another one leaves.
	growth = 2
)

// join adds a session, whose pages have that many bytes. limit, which may be nil, is that of
// its eviction; yields tells whether it gives way to other traffic.
func (p *Path) join(page int, limit *Limit, yields bool) *window {
	w := &window{
		path: p, page: page, limit: limit, wake: make(chan struct{}, 1), rate: newMeter(),
		trip: newLeast(tripMemory),
	}
	if yields {
		w.yield = newYield()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.windows) == 0 {
		w.opening = &opening{size: firstWindow * page, grows: true}
	}
	p.windows = append(p.windows, w)
	p.empty = time.Time{} // it has to measure its round trip
	return w
}

// leave ends the session's part: what it had in flight counts no more. It may be called
// more than once.
func (w *window) leave() {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	p.windows = slices.DeleteFunc(p.windows, func(v *window) bool { return v == w })
	w.waits, w.granted = false, 0
	p.serve(w)
}

// room returns how many bytes of pages the next frame should hold, which count as in flight until
// send or pass is called. If nothing may be sent, that is 0, and room is to be called again after a
// report, when wake says so, and not later than after a while.
func (w *window) room() (n int, again time.Duration) {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := w.granted; n > 0 {
		// The window may have become smaller since.
		if w.granted = 0; w.may(p.now()) {
			w.granted = n
		} else {
			w.waits = true
		}
	}
	if w.granted == 0 {
		if !w.waits {
			// Who did not wait until now has saved no turns up.
			w.waits, w.turn = true, max(w.turn, p.turn)
		}
		p.serve(w)
	}
	if w.granted > 0 {
		return w.granted, 0
	}
	now := p.now()
	// Limits may be changed, and others may stall, without anybody being woken.
	again = stallTime
	if due := max(p.Limit.due(now), w.limit.due(now), w.due(now)); due > 0 {
		again = min(again, due)
	}
	return 0, again
}

// pass gives up what was granted, as there is nothing to send.
func (w *window) pass() {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	w.granted = 0
	p.serve(w)
}

// serve lets windows that wait send, while there is room: the one whose turn it is, of those that
// may. As turns are counted in bytes, each gets as many as the others, as far as it can use them
// (start-time fair queueing; Goyal et al., 1996). The caller, who looks by itself, is not woken; it
// holds mu.
func (p *Path) serve(caller *window) {
	now := p.now()
	for p.Limit.due(now) <= 0 {
		inFlight, rate, measuring := 0, 0.0, false
		var next *window
		for _, w := range p.windows {
			if n := w.inFlight(); n > 0 && now.Sub(w.progress) <= w.stall() {
				inFlight += n
				rate += float64(n) / w.delay() // at which they are delivered, if the queue is full
				measuring = measuring || w.granted > 0 && !w.measured()
			}
			if w.waits && w.may(now) && (next == nil || w.ahead(next)) {
				next = w
			}
		}
		switch {
		case next == nil:
			return
		case inFlight == 0:
			p.empty = now
			p.rate.idle(now)
		case next.opening == nil && now.Sub(p.empty) >= emptyEvery, measuring && next.measured():
			return
		// With one page a slow path would stand idle while that page is reported.
		case next.opening == nil && inFlight >= 2*next.page && rate >= p.rate.value():
			return
		}
		next.grant(now)
		if next != caller {
			select {
			case next.wake <- struct{}{}:
			default:
			}
		}
	}
}

// ahead tells whether it is rather w's turn than v's: who has yet to measure the empty path comes
// before what the others fill it with. The caller holds mu.
func (w *window) ahead(v *window) bool {
	if w.measured() != v.measured() {
		return v.measured()
	}
	return w.turn < v.turn
}

// grant lets the window send a frame. The caller holds mu.
func (w *window) grant(now time.Time) {
	w.granted = w.batch()
	if w.sent == w.placed {
		w.progress = now
		w.rate.idle(now)
	}
	w.path.turn = w.turn
	w.waits = false
}

// may tells whether the window's own bounds let it send. The caller holds mu.
func (w *window) may(now time.Time) bool {
	n := w.inFlight()
	return (n == 0 || n < w.size() && w.due(now) <= 0) && w.limit.due(now) <= 0
}

// The following are called with mu held.

// inFlight returns how many bytes are on their way or about to be sent.
func (w *window) inFlight() int { return int(w.sent-w.placed) + w.granted }

// delay is how long a byte may be on its way, in seconds, there and back.
func (w *window) delay() float64 { return w.trip.value(0) + allowedQueue.Seconds() }

// stall is after how long without a report the window no longer counts.
func (w *window) stall() time.Duration {
	return stallTime + seconds(w.trip.value(0))
}

// measured tells whether the window has sent something since the path was empty.
func (w *window) measured() bool { return w.begun == w.path.empty }

// target is the rate that the window may reach, in bytes per second.
func (w *window) target() float64 {
	return w.yield.share() * min(w.path.rate.value(), growth*w.rate.value())
}

// size returns how many bytes the window may have in flight.
func (w *window) size() int {
	return max(w.opening.window(), w.steady())
}

// steady is the size that the measured rate is worth.
func (w *window) steady() int {
	// On a slow path a window of little less than two pages would let pass no third one while the
	// second is placed.
	return max(int(w.yield.share()*2*float64(w.page)), int(w.target()*w.delay())+w.page/2)
}

// due returns after how long the window may send: on a long path that has run empty, all of it at
// once would be a queue of a round trip. What it may have in flight is spread over one instead.
func (w *window) due(now time.Time) time.Duration { return w.paid.Sub(now) }

// unpaced is how many pages are few enough to be sent at once.
const unpaced = 8

// pay notes that n bytes are sent.
func (w *window) pay(now time.Time, n int) {
	over := w.trip.value(0)
	switch {
	case w.size() <= unpaced*w.page:
		return
	case w.opening != nil && w.opening.grows:
		over /= 2 // as it doubles in one
	}
	takes := seconds(over * min(1, float64(n)/float64(w.size())))
	if saved := now.Add(-allowedQueue); w.paid.Before(saved) {
		w.paid = saved
	}
	// With nothing in flight it did not wait: no more than one round trip is ever owed.
	if w.paid = w.paid.Add(takes); w.paid.After(now.Add(seconds(over))) {
		w.paid = now.Add(seconds(over))
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// batch returns how many bytes one frame should hold: somewhat more than half of what may
// queue, so that two frames fill a short path. While one is placed and reported, the other goes
// through the narrowest place. Smaller ones would cost both hosts more CPU time. A window's first
// frame on an empty path is a page, which measures it.
func (w *window) batch() int {
	if !w.measured() {
		return w.page
	}
	queued := int(w.target() * allowedQueue.Seconds() * 3 / 5)
	return min(max(queued, w.page), max(maxBatch, w.page))
}

// send notes that a frame of n bytes is about to be sent.
func (w *window) send(n int) {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	p.Limit.take(now, n)
	w.limit.take(now, n)
	if !w.measured() {
		w.probe(now)
	}
	w.pay(now, n)
	w.granted, w.begun = 0, p.empty
	w.turn += uint64(n)
	w.sent += uint64(n)
	w.opening.send(now, w)
	w.flights = append(w.flights, flight{w.sent, now})
	p.serve(w) // the frame may be smaller than what was granted
}

// fetched notes that n bytes are sent at once, because the VM waits for them: they count
// for the limits, so that pushed ones wait longer.
func (w *window) fetched(n int) {
	now := w.path.now()
	w.path.Limit.take(now, n)
	w.limit.take(now, n)
}

// report notes that the destination has placed all frames up to placed bytes. It tells
// whether that can be true.
func (w *window) report(placed uint64) bool {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	if placed < w.placed || placed > w.sent {
		return false
	}
	now := p.now()
	more := placed - w.placed
	p.rate.add(now, more)
	w.rate.add(now, more)
	w.placed, w.progress = placed, now
	n := 0
	for n < len(w.flights) && w.flights[n].end <= placed {
		n++
	}
	if n > 0 {
		last := w.flights[n-1].at
		w.trip.add(now, now.Sub(last).Seconds())
		w.yield.add(now, last)
		if w.opening.report(now, w, more, now.Sub(last)) {
			w.opening, w.opened = nil, now
		}
		w.flights = append(w.flights[:0], w.flights[n:]...)
	}
	p.serve(w)
	return true
}

// roundTrip returns the least round trip measured, in seconds; 0 if there was none.
func (w *window) roundTrip() float64 {
	w.path.mu.Lock()
	defer w.path.mu.Unlock()
	return w.trip.value(0)
}

// opening is how a window finds the rate of its path: as TCP's slow start does (RFC 5681), it
// doubles in each round trip. On a long path the rate alone would take it far too long, as that
// lets the window exceed what it has measured by no more than allowedQueue.
//
// It grows by what is placed without having waited for long, and ends when the rate of a round trip
// has grown no more and there is a queue, or three times in a row where there is none: something
// else than the path is the limit then. A path that has become wider is found in the same way. For
// that a window exceeds its rate by a quarter for a moment every tripMemory, and doubles again if
// more came through.
//
// The caller of its methods holds the path's mu; nil is not opening.
type opening struct {
	size  int  // bytes that may be in flight
	grows bool // else it only looks whether more comes through

	mark  bool      // the next frame begins a round, which ends when it is placed
	end   uint64    // value of the window's sent behind that frame; 0 before the first round
	from  uint64    // value of placed when it was sent
	began time.Time // when it was
	best  float64   // rate of the fastest round, bytes per second
	flat  int       // rounds since that were no faster
}

const (
	// firstWindow is in pages; TCP's (RFC 6928) are ten packets.
	firstWindow = 3
	// faster is by how much a round must beat the best one to count: as in BBR.
	faster = 1.25
	// flatRounds is how many in a row end it in any case, as in BBR.
	flatRounds = 3
	// probeGain is by how much a window exceeds its rate to see whether the path has become wider.
	probeGain = 1.25
	// probeFaster is what the rate must come to then.
	probeFaster = 1.1
)

func (o *opening) window() int {
	if o == nil {
		return 0
	}
	return o.size
}

// queued reports whether a frame that was on its way for so long has waited in a queue.
func (w *window) queued(took time.Duration) bool {
	least := w.trip.value(0)
	queue := max(allowedQueue.Seconds(), least/4)
	if w.yield != nil {
		queue = allowedQueue.Seconds() // others come first
	}
	return took.Seconds() > least+queue
}

// probe begins to look for more now and then, where the rate alone would take long to find it.
func (w *window) probe(now time.Time) {
	far := w.trip.value(0)*(probeGain-1) > allowedQueue.Seconds()
	if w.opening == nil && w.yield == nil && far && now.Sub(w.opened) >= tripMemory {
		w.opened = now
		w.opening = &opening{size: int(probeGain * float64(w.steady())), best: w.target()}
	}
}

// send notes that a frame was sent.
func (o *opening) send(now time.Time, w *window) {
	if o != nil && (o.mark || o.end == 0) {
		o.mark, o.end, o.from, o.began = false, w.sent, w.placed, now
	}
}

// report notes that more bytes are placed, the last of which were on their way for some time. It
// reports whether the path is known.
func (o *opening) report(now time.Time, w *window, more uint64, took time.Duration) (done bool) {
	if o == nil {
		return false
	}
	queued := w.queued(took)
	if o.grows && !queued {
		o.size += int(more)
	}
	if o.mark || w.placed < o.end {
		return false
	}
	o.mark = true
	rate := float64(w.placed-o.from) / now.Sub(o.began).Seconds()
	gain := probeFaster
	if o.grows {
		gain = faster
	}
	if rate >= gain*o.best {
		o.best, o.flat, o.grows = rate, 0, o.grows || o.best > 0
		return false
	}
	o.flat++
	return queued || o.flat == flatRounds
}

// yield makes the push give way to what else is on the path: a scavenger after LEDBAT
// (RFC 6817). A queue that is longer than our own is somebody else's, so the
// window shrinks by half for every round trip in which it was there all the time, and
// grows back step by step when it was not. As there, it cannot see who keeps no queue, or has kept
// one from before the eviction began. The caller of its methods holds the path's mu; nil
// never yields.
type yield struct {
	part  float64       // of the window that is used
	quiet extremum      // round trip of the path without others, seconds
	round time.Time     // when the current round trip began
	least time.Duration // of the round trips in it
}

const (
	// foreignQueue is how much longer than the path alone a round trip is if others
	// queue. Our own queue with a frame or two beyond it stays below that.
	foreignQueue = 2 * allowedQueue
	// quietMemory is RFC 6817's BASE_HISTORY. It is not tripMemory: who yields for long would take
	// the others' queue for a part of the path.
	quietMemory = 10 * time.Minute
	// leastPart of the window is used whatever others do, so that the eviction ends some day.
	leastPart = 1. / 64
	yieldStep = 1. / 16
)

func newYield() *yield { return &yield{part: 1, quiet: newLeast(quietMemory)} }

func (y *yield) share() float64 {
	if y == nil {
		return 1
	}
	return y.part
}

// add notes that what was sent at some time is placed now.
func (y *yield) add(now, sent time.Time) {
	if y == nil {
		return
	}
	took := now.Sub(sent)
	y.quiet.add(now, took.Seconds())
	if y.least == 0 || took < y.least {
		y.least = took
	}
	if sent.Before(y.round) || now.Sub(y.round) < rateSpan {
		return
	}
	if y.least.Seconds() > y.quiet.value(0)+foreignQueue.Seconds() {
		y.part = max(y.part/2, leastPart)
	} else {
		y.part = min(y.part+yieldStep, 1)
	}
	y.round, y.least = now, 0
}

// Limit is a number of bytes per second that may be changed at any time. What was not used of
// it is lost after 10 ms. The zero value, and nil, is no limit. Several goroutines may use it.
type Limit struct {
	mu   sync.Mutex
	rate float64   // bytes per second; 0 for none
	paid time.Time // when what was sent would have been, at that rate
}

// Set changes the limit; 0 or less is none.
func (l *Limit) Set(rate int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate, l.paid = float64(max(rate, 0)), time.Time{}
}

// due returns after how long something may be sent, at once if it is not positive.
func (l *Limit) due(now time.Time) time.Duration {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.paid.Sub(now)
}

// take notes that n bytes are sent.
func (l *Limit) take(now time.Time, n int) {
	if l == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rate == 0 {
		return
	}
	if saved := now.Add(-rateSpan); l.paid.Before(saved) {
		l.paid = saved
	}
	l.paid = l.paid.Add(seconds(float64(n) / l.rate))
}

// meter measures a rate, in bytes per second.
type meter struct {
	sum      uint64    // bytes
	last     time.Time // when it grew
	since    time.Time // begin of the span over which the rate is taken
	before   uint64    // value of sum then
	greatest extremum
}

func newMeter() meter {
	return meter{greatest: extremum{keep: rateMemory,
		better: func(a, b float64) bool { return a > b }}}
}

// idle notes that nothing was in flight until now. If that was for long, the path is not to blame.
func (m *meter) idle(now time.Time) {
	if now.Sub(m.last) > rateSpan {
		m.since, m.before = now, m.sum
	}
}

func (m *meter) add(now time.Time, n uint64) {
	m.sum, m.last = m.sum+n, now
	if span := now.Sub(m.since); span >= rateSpan {
		m.greatest.add(now, float64(m.sum-m.before)/span.Seconds())
		m.since, m.before = now, m.sum
	}
}

func (m *meter) value() float64 { return m.greatest.value(startRate) }

// extremum is the best value of the last while: between keep and half of it.
type extremum struct {
	keep   time.Duration
	better func(a, b float64) bool

	since         time.Time // when the current half began; zero before the first value
	current, last *float64
}

func newLeast(keep time.Duration) extremum {
	return extremum{keep: keep, better: func(a, b float64) bool { return a < b }}
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

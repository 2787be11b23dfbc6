package evict

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Path is what leads out of a host, for the evictions that share it. It bounds how many pushed
// bytes of all of them are on their way. A fetched page shares the path with them, so it must not
// queue behind many. The Path also lets the evictions send in turn. Fetched pages never wait here.
//
// The bound is measured, not chosen, from the destinations' reports of what they have placed. They
// give the rate of delivery: the greatest of the last second, over spans of 10 ms. They also give
// the round trip of an uncongested path: the least of the last ten seconds. The bound is that rate
// times (that round trip plus allowedQueue). That keeps the narrowest place on the path busy, and
// shows if it has become wider.
//
// This is the model of BBR (Cardwell et al., 2016) with a fixed bound on the queue. As in BBR, the
// path runs empty now and then, and a single page of each eviction measures it. Otherwise the queue
// that is always there would in time count as a part of the path.
//
// Several goroutines may use a Path.
type Path struct {
	// Limit is the limit of all evictions together.
	Limit Limit

	fetched atomic.Int64 // when a fetch of any was answered last, as UnixNano

	mu      sync.Mutex // guards what follows, and the windows
	windows []*window
	turn    uint64    // of the window that sent last
	rate    meter     // of delivery to all
	empty   time.Time // when nothing was in flight last
	now     func() time.Time
}

// NewPath returns a path on which all evictions together send at most limit bytes per second; 0 is
// no limit.
func NewPath(limit int64) *Path {
	p := &Path{rate: newMeter(), now: time.Now}
	p.Limit.Set(limit)
	return p
}

// window is what one session has in flight on a path. Besides the bound on all, it has one of its
// own, from its own rate and round trip. So a destination that is slow to place pages takes no more
// of the common bound than its rate is worth.
type window struct {
	path  *Path
	page  int           // bytes that are always allowed
	limit *Limit        // may be nil
	wake  chan struct{} // capacity 1: another window's action allowed this one to send

	waits        bool
	granted      int       // bytes that may be sent now and are not yet
	turn         uint64    // bytes; among windows that wait, the one with the least is next
	sent, placed uint64    // bytes
	flights      []flight  // not yet known to be placed, oldest first
	begun        time.Time // value of the path's empty when something was sent last
	progress     time.Time // when something was placed last, or sent with nothing in flight
	rate         meter     // of delivery
	trip         extremum  // seconds, least
	yield        *yield    // nil: it ignores other traffic
	opening      *opening  // nil: the path's rate is known
	opened       time.Time // when that ended, or began anew
	paid         time.Time // when, at the window's pace, all that was sent would have been sent
}

// flight is a frame on its way.
type flight struct {
	end uint64 // value of sent behind it
	at  time.Time
}

const (
	// allowedQueue is how long a fetch, and other traffic on the path, may wait behind pushed
	// bytes. Less would mean smaller frames, which cost both hosts CPU time that VMs want.
	allowedQueue = time.Millisecond
	// rateSpan is long enough for a true rate. In a shorter span, reports that arrive together, or
	// a burst that the path lets through, would look like a fast path.
	rateSpan   = 10 * time.Millisecond
	rateMemory = time.Second
	tripMemory = 10 * time.Second
	// emptyEvery is how often the path runs empty.
	emptyEvery = tripMemory / 4
	// startRate is the rate until the first report: a slow link's, 100 Mbit/s.
	startRate = 12.5e6
	// stallTime is how long, beyond the round trip, nothing may be placed before a window's bytes
	// in flight no longer count for others. They wait for something other than the path.
	stallTime = 100 * time.Millisecond
	// growth is by how much a window may exceed what its rate needs, while all together do not.
	// Without it, it could not use what another window leaves.
	growth = 2
)

// join adds a session, whose pages have page bytes. limit, which may be nil, is its eviction's.
// yields says that it gives way to other traffic.
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
	p.empty = time.Time{} // the new window must measure its round trip
	return w
}

// leave removes the session: its bytes in flight no longer count. It may be called more than once.
func (w *window) leave() {
	p := w.path
	p.mu.Lock()
	defer p.mu.Unlock()
	p.windows = slices.DeleteFunc(p.windows, func(v *window) bool { return v == w })
	w.waits, w.granted = false, 0
	p.serve(w)
}

// room returns how many bytes of pages the next frame should hold. They count as in flight until
// send or pass is called. If nothing may be sent, room returns 0. The caller must then call it
// again after a report, when wake says so, and after the time again at the latest.
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
			// A window that did not wait until now has saved no turns up.
			w.waits, w.turn = true, max(w.turn, p.turn)
		}
		p.serve(w)
	}
	if w.granted > 0 {
		return w.granted, 0
	}
	now := p.now()
	// Limits may change, and other windows may stall, and nobody wakes this one.
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

// serve lets waiting windows send while there is room: among those that may send, the one whose
// turn it is. Turns are counted in bytes. So each window gets as many as the others, as far as it
// can use them (start-time fair queueing; Goyal et al., 1996). serve does not wake the caller,
// which checks by itself. The caller holds mu.
func (p *Path) serve(caller *window) {
	now := p.now()
	for p.Limit.due(now) <= 0 {
		inFlight, rate, measuring := 0, 0.0, false
		var next *window
		for _, w := range p.windows {
			if n := w.inFlight(); n > 0 && now.Sub(w.progress) <= w.stall() {
				inFlight += n
				rate += float64(n) / w.delay() // the rate of their delivery, if the queue is full
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
		// With one page in flight, a slow path would be idle while that page is reported.
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

// ahead reports whether w goes before v: a window that must still measure the empty path goes
// before others fill it. The caller holds mu.
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

// may reports whether the window's own bounds let it send. The caller holds mu.
func (w *window) may(now time.Time) bool {
	n := w.inFlight()
	return (n == 0 || n < w.size() && w.due(now) <= 0) && w.limit.due(now) <= 0
}

// The caller of the following holds mu.

// inFlight returns how many bytes are on their way or about to be sent.
func (w *window) inFlight() int { return int(w.sent-w.placed) + w.granted }

// delay returns how long a byte may be on its way, in seconds, there and back.
func (w *window) delay() float64 { return w.trip.value(0) + allowedQueue.Seconds() }

// stall returns after how long without a report the window no longer counts.
func (w *window) stall() time.Duration {
	return stallTime + seconds(w.trip.value(0))
}

// measured reports whether the window has sent something since the path was empty.
func (w *window) measured() bool { return w.begun == w.path.empty }

// target returns the rate that the window may reach, in bytes per second.
func (w *window) target() float64 {
	return w.yield.share() * min(w.path.rate.value(), growth*w.rate.value())
}

// size returns how many bytes the window may have in flight.
func (w *window) size() int {
	return max(w.opening.window(), w.steady())
}

// steady returns the size that matches the measured rate.
func (w *window) steady() int {
	// On a slow path, a window of slightly less than two pages would not let a third page start
	// while the second is placed.
	return max(int(w.yield.share()*2*float64(w.page)), int(w.target()*w.delay())+w.page/2)
}

// due returns after how long the window may send. On a long path that has run empty, sending all at
// once would make a queue of a round trip. So what it may have in flight is spread over one round
// trip.
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
	// With nothing in flight it has not waited, so it owes at most one round trip.
	if w.paid = w.paid.Add(takes); w.paid.After(now.Add(seconds(over))) {
		w.paid = now.Add(seconds(over))
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// burst is how many bytes of pages the kernel hands to the network in one piece: 64 KiB, less the
// headers, in whole segments of any usual size. A frame that is a little longer costs both hosts
// one more packet, one more acknowledgement, and the destination one more wake-up.
const burst = 60 << 10

// quietTime is how long after a fetch frames may become larger than half of maxBatch.
const quietTime = 50 * time.Millisecond

// batch returns how many bytes one frame should hold: about half of what may queue, so that two
// frames fill a short path. While one is placed and reported, the other goes through the narrowest
// place. Smaller ones would cost both hosts more CPU time. A window's first frame on an empty path
// is one page, which measures it.
func (w *window) batch() int {
	if !w.measured() {
		return w.page
	}
	queued, most := int(w.target()*allowedQueue.Seconds()*3/5), maxBatch
	if w.path.now().UnixNano()-w.path.fetched.Load() < int64(quietTime) {
		most /= 2
	}
	if queued = min(queued, most); queued > burst {
		queued -= queued % burst
	}
	return max(queued, w.page)
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

// fetched notes that n bytes are sent at once, because the VM waits for them. They count for the
// limits, so pushed bytes wait longer.
func (w *window) fetched(n int) {
	now := w.path.now()
	w.path.fetched.Store(now.UnixNano())
	w.path.Limit.take(now, n)
	w.limit.take(now, n)
}

// report notes that the destination has placed all frames up to placed bytes. It reports whether
// that can be true.
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

// opening is how a window finds the rate of its path. As in TCP's slow start (RFC 5681), the window
// doubles in each round trip. On a long path the measured rate alone would take far too long. It
// lets the window exceed what it has measured by allowedQueue only.
//
// The window grows by what is placed without a long wait. The opening ends when the rate of a round
// trip has stopped growing and there is a queue. Without a queue it ends after three such round
// trips in a row: the limit then is something other than the path.
//
// The window finds a path that has become wider in the same way. Every tripMemory it exceeds its
// rate by a quarter for a moment, and doubles again if more came through.
//
// The caller of its methods holds the path's mu; nil is not opening.
type opening struct {
	size  int  // bytes that may be in flight
	grows bool // if false, it only checks whether more comes through

	mark  bool      // the next frame begins a round, which ends when that frame is placed
	end   uint64    // value of the window's sent behind that frame; 0 before the first round
	from  uint64    // value of placed when that frame was sent
	began time.Time // when it was sent
	best  float64   // rate of the fastest round, bytes per second
	flat  int       // rounds since then that were no faster
}

const (
	// firstWindow is in pages; TCP's (RFC 6928) are ten packets.
	firstWindow = 3
	// faster is by how much a round must exceed the best one to count, as in BBR.
	faster = 1.25
	// flatRounds is how many flat rounds in a row end it in any case, as in BBR.
	flatRounds = 3
	// probeGain is by how much a window exceeds its rate to see whether the path has become wider.
	probeGain = 1.25
	// probeFaster is the gain in rate that shows a wider path.
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
		queue = allowedQueue.Seconds() // others' traffic comes first
	}
	return took.Seconds() > least+queue
}

// probe begins to look for more now and then, if the rate alone would take long to find it.
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

// report notes that more bytes are placed, the last of them after the time took on their way. It
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

// yield makes the push give way to other traffic on the path: a scavenger after LEDBAT (RFC 6817).
// A queue that is longer than our own is somebody else's. So the window halves for every round trip
// that had such a queue all the time, and otherwise grows back step by step.
//
// Like LEDBAT, it cannot see traffic that keeps no queue, or a queue that was there before the
// eviction began. The caller of its methods holds the path's mu; nil never yields.
type yield struct {
	part  float64       // the part of the window that is used
	quiet extremum      // round trip of the path without others, seconds
	round time.Time     // when the current round trip began
	least time.Duration // the least round trip in it
}

const (
	// foreignQueue is by how much a round trip exceeds the empty path's if others queue. Our own
	// queue with a frame or two beyond it stays below that.
	foreignQueue = 2 * allowedQueue
	// quietMemory is RFC 6817's BASE_HISTORY. It exceeds tripMemory: a window that yields for long
	// would otherwise take the others' queue for a part of the path.
	quietMemory = 10 * time.Minute
	// leastPart is the part of the window that is used whatever others do, so that the eviction
	// ends some day.
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

// add notes that what was sent at a time is placed now.
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

// Limit is a number of bytes per second that may change at any time. Unused bytes are lost after 10
// ms. The zero value, and nil, is no limit. Several goroutines may use it.
type Limit struct {
	mu   sync.Mutex
	rate float64   // bytes per second; 0 for none
	paid time.Time // when, at that rate, all that was sent would have been sent
}

// Set changes the limit; 0 or less is none.
func (l *Limit) Set(rate int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate, l.paid = float64(max(rate, 0)), time.Time{}
}

// due returns after how long something may be sent; at once if it is not positive.
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
	since    time.Time // when the span of the measurement began
	before   uint64    // value of sum then
	greatest extremum
}

func newMeter() meter {
	return meter{greatest: extremum{keep: rateMemory,
		better: func(a, b float64) bool { return a > b }}}
}

// idle notes that nothing was in flight until now. After a long time, the path is not to blame.
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

// extremum is the best value of the recent past: between keep and half of it.
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

// value returns the best value, or otherwise if there is none yet.
func (e *extremum) value(otherwise float64) float64 {
	switch {
	case e.current == nil && e.last == nil:
		return otherwise
	case e.last == nil, e.current != nil && e.better(*e.current, *e.last):
		return *e.current
	}
	return *e.last
}

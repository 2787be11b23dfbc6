package evict

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// sessions are those of a source with its destination, one after the other: what crossed the link
// in them, and when there was none. A session may end at any moment, even while a report adds up
// what they carried. One lock makes sure that each counts once.
type sessions struct {
	now *atomic.Pointer[attachment] // the present one; nil between two

	mu             sync.Mutex // guards all below
	sent, received uint64     // bytes, in sessions that ended
	gaps           []Gap      // between two sessions, after the commit
	roundTrip      float64    // seconds, of the last session that ended
	push           pushBegun  // in the present session
	atPush         *uint64    // bytes sent before the first push; nil before it
}

// pushBegun is where the push of a session began.
type pushBegun struct {
	at    time.Time // zero before it began
	bytes uint64    // sent before, in its session
	pages int       // sent before
}

// bytes returns what was sent and received in all sessions.
func (t *sessions) bytes() (sent, received uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.now.Load(); a != nil {
		sent, received = a.Bytes()
	}
	return sent + t.sent, received + t.received
}

// end notes that a session has ended.
func (t *sessions) end(a *attachment) {
	sent, received := a.Bytes()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sent += sent
	t.received += received
	if a.window != nil {
		t.roundTrip, t.push = a.window.roundTrip(), pushBegun{}
	}
	t.now.CompareAndSwap(a, nil)
}

// maxGaps bounds how many gaps a report has.
const maxGaps = 64

// gap notes that there is a link again. If there are many gaps, it drops those in the middle.
func (t *sessions) gap(g Gap) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.gaps) == maxGaps {
		t.gaps = slices.Delete(t.gaps, maxGaps/2, maxGaps/2+1)
	}
	t.gaps = append(t.gaps, g)
}

// beginPush notes that the push of a session begins, after so many pages.
func (t *sessions) beginPush(a *attachment, pages int) {
	sent, _ := a.Bytes()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.push = pushBegun{time.Now(), sent, pages}
	if t.atPush == nil {
		t.atPush = new(t.sent + sent)
	}
}

// pace returns how fast the push of the present session is, in bytes per second, and how long the
// remaining pages take at that rate. Both are 0 as long as that is not known. sentPages were sent
// so far.
func (t *sessions) pace(sentPages, left int) (rate float64, eta time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a, p := t.now.Load(), t.push
	took := time.Since(p.at)
	if a == nil || p.at.IsZero() || took < settleTime {
		return 0, 0
	}
	sent, _ := a.Bytes()
	pages := sentPages - p.pages
	if sent < p.bytes || pages <= 0 {
		return 0, 0 // the push was another session's
	}
	return float64(sent-p.bytes) / took.Seconds(),
		time.Duration(float64(took) * float64(left) / float64(pages))
}

// account fills in what a report says about the link. pushing is how long memory was pushed.
func (t *sessions) account(r *Report, pushing time.Duration) {
	sent, received := t.bytes()
	r.LinkBytes = sent + received
	t.mu.Lock()
	defer t.mu.Unlock()
	r.Gaps, r.RoundTrip = t.gaps, t.roundTrip
	if a := t.now.Load(); a != nil && a.window != nil {
		r.RoundTrip = a.window.roundTrip()
	}
	if pushing > 0 && t.atPush != nil {
		r.Rate = float64(sent-*t.atPush) / pushing.Seconds()
	}
}

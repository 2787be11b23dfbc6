package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"vacate/internal/evict"

	"golang.org/x/term"
)

// A display shows an eviction. Errors of its output are nobody's business: an eviction
// goes on without anyone looking.
type display interface {
	progress(evict.Progress)
	note(line string)
	end() // no more progress will come
}

// screen shows an eviction from a goroutine of its own, as an output that nobody reads
// may block for ever, and the eviction must not. It lets no progress run backwards.
type screen struct {
	to   display
	wake chan struct{} // holds one value when there is something to show
	done chan struct{}

	mu     sync.Mutex
	last   evict.Progress // guarded by mu, as all below
	ended  bool
	events []event
}

// event is a note if that is not empty, else progress.
type event struct {
	progress evict.Progress
	note     string
}

// maxEvents is how many wait for a blocked output; notes beyond it are dropped.
const maxEvents = 256

func newScreen(to display) *screen {
	s := &screen{to: to, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go s.run()
	return s
}

// rank orders the states of either side. The final ones come last.
var rank = map[evict.State]int{
	evict.Preparing: 1, evict.Switching: 3, evict.Loading: 4, evict.Committing: 5,
	evict.InDoubt: 5,
	evict.Pushing: 6, evict.Reconnecting: 6, evict.Retiring: 7, evict.RollingBack: 8,
	evict.Waiting: 1, evict.Arming: 2, evict.Prepared: 5, evict.Running: 6, evict.CutOff: 6,
	evict.Completing: 7,
	evict.Refused:    9, evict.Aborted: 9, evict.Completed: 9, evict.ShutDown: 9, evict.Lost: 9,
}

// show takes progress and returns at once.
func (s *screen) show(p evict.Progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || rank[p.State] < rank[s.last.State] {
		return
	}
	p.Elapsed = max(p.Elapsed, s.last.Elapsed)
	p.Total = max(p.Total, s.last.Total)
	p.Pages = max(p.Pages, s.last.Pages)
	p.Bytes = max(p.Bytes, s.last.Bytes)
	p.Fetches = max(p.Fetches, s.last.Fetches)
	s.last = p
	if n := len(s.events); n > 0 && s.events[n-1].note == "" &&
		s.events[n-1].progress.State == p.State {
		s.events[n-1].progress = p
		return
	}
	s.add(event{progress: p})
}

// note takes a line of text and returns at once.
func (s *screen) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended && len(s.events) < maxEvents {
		s.add(event{note: fmt.Sprintf(format, args...)})
	}
}

// add is called with mu held.
func (s *screen) add(e event) {
	s.events = append(s.events, e)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// state is the last state shown.
func (s *screen) state() evict.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last.State
}

// close waits until all was shown.
func (s *screen) close() {
	s.mu.Lock()
	if !s.ended {
		s.ended = true
		close(s.wake)
	}
	s.mu.Unlock()
	<-s.done
}

func (s *screen) run() {
	defer close(s.done)
	for open := true; open; {
		_, open = <-s.wake
		s.mu.Lock()
		events := s.events
		s.events = nil
		s.mu.Unlock()
		for _, e := range events {
			if e.note != "" {
				s.to.note(e.note)
			} else {
				s.to.progress(e.progress)
			}
		}
	}
	s.to.end()
}

// lines shows an eviction to people. On a terminal it writes over one line. Elsewhere it writes a
// line for each change of state, and at most one a second in between.
type lines struct {
	scene scene
	w     io.Writer
	width func() int // of the terminal; nil if it is none

	open  bool // a line on the terminal is not ended
	state evict.State
	shown time.Duration // when the last line was written
}

// newLines returns lines about a scene to f, which may be a terminal.
func newLines(s scene, f *os.File) *lines {
	l := &lines{scene: s, w: f}
	if term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		l.width = func() int {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
				return w
			}
			return 80
		}
	}
	return l
}

// eraseLine goes to the start of the line and erases it (ECMA-48: CR, EL).
const eraseLine = "\r\x1b[K"

func (l *lines) progress(p evict.Progress) {
	if l.width != nil {
		// One column is left free, as some terminals wrap when the last one is written.
		io.WriteString(l.w, eraseLine+l.scene.progressLine(p, l.width()-1))
		l.open = true
		return
	}
	if p.State == l.state && p.Elapsed < l.shown+time.Second {
		return
	}
	l.state, l.shown = p.State, p.Elapsed
	io.WriteString(l.w, l.scene.progressLine(p, 1000)+"\n")
}

func (l *lines) note(line string) {
	if l.open {
		io.WriteString(l.w, eraseLine)
		l.open = false
	}
	io.WriteString(l.w, line+"\n")
}

func (l *lines) end() {
	if l.open {
		io.WriteString(l.w, "\n")
		l.open = false
	}
}

// percent is rounded down: 100 is all.
func percent(part, whole int) float64 {
	return float64(int(1000*float64(min(part, whole))/float64(whole))) / 10
}

func etaText(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%d s", (d+time.Second-1)/time.Second)
	}
	d = d.Round(time.Second)
	if d < time.Hour {
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	}
	if d > 100*time.Hour {
		return "days"
	}
	return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
}

// bytesText writes a number of bytes with a decimal prefix, as rates of networks are.
func bytesText(n float64) string {
	for _, unit := range []string{"B", "kB", "MB", "GB"} {
		if n < 999.5 {
			if unit == "B" {
				return fmt.Sprintf("%.0f B", n)
			}
			return fmt.Sprintf("%.3g %s", n, unit)
		}
		n /= 1000
	}
	return fmt.Sprintf("%.3g TB", n)
}

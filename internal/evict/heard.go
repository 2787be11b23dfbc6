package evict

import (
	"strings"
	"time"
	"unicode"
)

// heard is what the destination has said of the VM. The task that runs the eviction writes it;
// progress reads what is atomic.
type heard struct {
	ran      bool      // the VM runs there
	ranSince time.Time // when it said so first
	summary  Received
	shutDown string // why the VM ended there; empty if it did not
	// why pages find no memory there; empty if they do
	short text
	apart text // Progress.Apart
}

// noteApart notes why the destination could not be asked, for people who follow. A reason that
// differs in numbers alone, such as the port of a connection, is still the same.
func (h *heard) noteApart(why string) {
	letters := func(s string) string {
		return strings.Map(func(r rune) rune {
			if unicode.IsDigit(r) {
				return -1
			}
			return r
		}, s)
	}
	if was := h.apart.get(); was == "" || letters(was) != letters(why) {
		h.apart.set(why)
	}
}

// noteRan notes for how long the VM has run, by the destination's own word. The VM cannot have run
// before it was told to.
func (h *heard) noteRan(ran time.Duration, m *machine) {
	if !h.ranSince.IsZero() {
		return
	}
	now := time.Now()
	h.ranSince = now.Add(-ran)
	if told := m.at(Committing); told.IsZero() {
		h.ranSince = now // another engine told it to run
	} else if h.ranSince.Before(told) {
		h.ranSince = told
	}
}

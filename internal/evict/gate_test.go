package evict

import (
	"errors"
	"testing"
	"time"
)

// A host that ran short of memory places pages again when there is memory for many, or for all that
// the VM lacks. It places a page that the guest waits for as soon as there is any.
func TestGate(t *testing.T) {
	const none, little, much = 0, 1 << 20, reopen
	left, rest := uint64(much), uint64(1<<30)
	g := &gate{rest: func() uint64 { return rest }, look: func() (uint64, string) {
		if left == none {
			return 0, "the host has no room"
		}
		return left, ""
	}}
	passes := func(what string, urgent, want bool) {
		t.Helper()
		g.next = time.Time{} // time has passed
		if err := g.pass(4096, urgent); (err == nil) != want ||
			err != nil && !errors.Is(err, errNoMemory) {
			t.Errorf("%s, urgent: %v: %v", what, urgent, err)
		}
	}
	left = little
	passes("a little room on a host that was not short", false, true)
	left = none
	passes("no room", false, false)
	passes("no room", true, false)
	left = little
	passes("a little room, and much to come", false, false)
	passes("a little room, and much to come", true, true)
	if err := g.pass(4096, false); err == nil {
		t.Error("what was left to a page that the guest waits for went to others")
	}
	if err := g.pass(2*little, true); err == nil {
		t.Error("more was placed than there is room for")
	}
	rest = little
	passes("room for all that is to come", false, true)
	left = none
	passes("no room again", false, false)
	left, rest = much, 1<<30
	passes("room for many pages", false, true)
	left = little
	passes("a little room after that", false, true)
}

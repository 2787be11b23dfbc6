package main

import (
	"math/rand/v2"
	"testing"

	lp "vacate/lab/loadproto"
)

// noted is a set that notes when it grew.
type noted struct {
	pages, grown, last int
	turns              []int
	clock              *int
}

func (n *noted) size() int { return n.pages }

func (n *noted) grow(by int) error {
	n.grown += by
	n.turns = append(n.turns, by)
	*n.clock += by
	n.last = *n.clock
	return nil
}

func (n *noted) check(*badSink) (lp.SetResult, error) { return lp.SetResult{}, nil }

func TestSetsGrowTogether(t *testing.T) {
	clock := 0
	sizes := []int{50_000, 40_000, 40_000, 0, 50_000}
	var sets []set
	for _, n := range sizes {
		sets = append(sets, &noted{pages: n, clock: &clock})
	}
	if err := inTurns(sets, rand.New(rand.NewPCG(1, 1))); err != nil {
		t.Fatal(err)
	}
	for i, s := range sets {
		n := s.(*noted)
		if n.grown != sizes[i] {
			t.Errorf("set %d has %d pages, want %d", i, n.grown, sizes[i])
		}
		for _, by := range n.turns {
			if by < 1 || by > longestTurn {
				t.Errorf("set %d grew by %d", i, by)
			}
		}
		if sizes[i] > 0 && (n.last < clock*8/10 || len(n.turns) < 20) {
			t.Errorf("set %d was whole after %d of %d pages, in %d turns", i, n.last, clock,
				len(n.turns))
		}
	}
}

// What another process is told may be anything.
func TestOtherIsTold(t *testing.T) {
	s, err := newStill(lp.SetOther, 1, 7, 4)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"", "5", "-1", "x"} {
		if s.obey(line) == nil {
			t.Errorf("%q was obeyed", line)
		}
	}
	if err := s.obey("4"); err != nil {
		t.Fatal(err)
	}
	bad := &badSink{words: make(chan lp.BadWord, reportedBad)}
	if r, err := s.check(bad); err != nil || r.Pages != 4 || r.Bad != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	s.pages[2][5]++
	if r, _ := s.check(bad); r.Bad != 1 {
		t.Errorf("a page was changed: %+v", r)
	} else if w := <-bad.words; w.Page != 7+2 || w.Word != 5 {
		t.Errorf("page 9, word 5 was changed: %+v", w)
	}
}

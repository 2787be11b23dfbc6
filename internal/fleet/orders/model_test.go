package orders

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// This is a model of F1 to F5 in docs/protocol.md: two leaders, one after the other, a host, its
// VM, and the store. It tries every order of their steps, with any number of faults. Messages may
// be late, lost, or come twice. What an eviction does is R1 to R13's matter, and evict's model has
// it: here it begins, and ends.

const (
	leaders   = 2
	mostPlans = 2 // that are written, at most
)

// modelRules are the rules; each mutant breaks one.
type modelRules struct {
	unfenced   bool // the host heeds lower epochs
	unspent    bool // the host heeds an order again
	volatile   bool // the host keeps its mark in memory
	incautious bool // the host hears a leader while it carries out an order
	careless   bool // the host does not compare the VM's incarnation
	unguarded  bool // a plan is written by one who leads no longer
	hasty      bool // an order is sent before its plan is written
	blind      bool // a new leader does not read the plans of the one before
	trusting   bool // a leader believes that a host which has not heard it begins nothing
	stubborn   bool // a leader that does not know whether a plan was written goes on
	crowding   bool // a leader makes a plan for a VM that has one
}

// plan is one that was made. Its number is its place, from 1.
type modelPlan struct {
	leader      byte // 0: not made
	incarnation byte
	open        bool // in the store
	sent        bool // and may come at any time, any number of times
}

// told is a report of the host.
type told struct {
	there       bool // there is one
	mark        Mark
	present     bool
	incarnation byte
	evicting    byte                // the plan whose eviction is under way; 0: none
	ended       [mostPlans + 1]bool // plans whose evictions have ended
}

type modelLeader struct {
	leads bool // by what it knows
	view  told
	under told                // a report that is under way to it
	book  [mostPlans + 1]bool // plans that have not ended, as far as it knows
}

type modelWorld struct {
	term    byte // who leads, by the store; 0: nobody
	was     byte // who has led so far
	plans   [mostPlans + 1]modelPlan
	leaders [leaders + 1]modelLeader

	// The host's.
	mark        Mark // on its disk
	working     byte // the plan whose order it carries out
	present     bool // the VM is here, and runs
	incarnation byte
	evicting    byte
	ended       [mostPlans + 1]bool
	returned    bool

	bad string
}

func (w *modelWorld) made() (n byte) {
	for p := range w.plans {
		if w.plans[p].leader != 0 {
			n = byte(p)
		}
	}
	return n
}

// next returns what may happen, by its name.
func (r modelRules) next(w modelWorld) map[string]modelWorld {
	to := map[string]modelWorld{}
	add := func(what string, do func(w *modelWorld)) {
		next := w
		do(&next)
		for i, l := range next.leaders {
			if !l.leads { // what it knows makes no difference any more
				next.leaders[i] = modelLeader{}
			}
		}
		if next != w {
			to[what] = next
		}
	}
	// The store.
	if w.term != 0 {
		add("the lease runs out", func(w *modelWorld) { w.term = 0 })
	}
	if w.term == 0 && w.was < leaders {
		add("the next leader is elected", func(w *modelWorld) {
			w.was++
			w.term = w.was
			l := &w.leaders[w.term]
			l.leads = true
			for p := range w.plans {
				l.book[p] = w.plans[p].open && !r.blind
			}
		})
	}
	for i := byte(1); i <= leaders; i++ {
		r.leader(w, i, add)
	}
	r.host(w, add)
	return to
}

func (r modelRules) leader(w modelWorld, i byte, add func(string, func(*modelWorld))) {
	l := &w.leaders[i]
	if !l.leads {
		return
	}
	name := fmt.Sprintf("leader %d ", i)
	busy := slices.Contains(l.book[:], true) && !r.crowding
	v := l.view
	if p := w.made() + 1; p <= mostPlans && v.there && v.present && v.evicting == 0 && !busy &&
		(v.mark.Epoch == uint64(i) || r.trusting) {
		written := func(w *modelWorld) bool {
			w.plans[p] = modelPlan{leader: i, incarnation: v.incarnation}
			w.plans[p].open = w.term == i || r.unguarded
			return w.plans[p].open
		}
		add(name+"writes a plan", func(w *modelWorld) {
			if !written(w) {
				w.plans[p] = modelPlan{}
				w.leaders[i].leads = false
				return
			}
			w.leaders[i].book[p] = true
		})
		add(name+"writes a plan, and does not hear that", func(w *modelWorld) {
			if !written(w) {
				w.plans[p] = modelPlan{}
			}
			w.leaders[i].leads = r.stubborn && w.plans[p].open
		})
		if r.hasty {
			add(name+"sends the order of a plan that is not written yet", func(w *modelWorld) {
				w.plans[p] = modelPlan{leader: i, incarnation: v.incarnation, sent: true}
			})
		}
	}
	for p := range l.book {
		if l.book[p] && w.plans[p].leader == i {
			add(fmt.Sprintf("%ssends order %d", name, p), func(w *modelWorld) {
				w.plans[p].sent = true
			})
		}
	}
	if l.under.there {
		add(name+"reads a report", func(w *modelWorld) { r.reads(w, i) })
	}
}

// reads has a leader settle its plans by a report.
func (r modelRules) reads(w *modelWorld, i byte) {
	l := &w.leaders[i]
	l.view, l.under = l.under, told{}
	v := l.view
	for p := range l.book {
		if !l.book[p] {
			continue
		}
		mark := v.mark
		if r.trusting {
			mark.Epoch = uint64(i)
		}
		over := v.ended[p]
		switch FateOf(uint64(i), uint64(w.plans[p].leader), uint64(p), mark,
			v.ended[p] || v.evicting == byte(p)) {
		case Over:
			over = true
			if w.evicting == byte(p) {
				w.bad = "a leader takes an eviction that goes on for one that never began"
			}
		}
		if !over {
			continue
		}
		if w.term != i {
			l.leads = false // it cannot write that
			return
		}
		l.book[p], w.plans[p].open = false, false
	}
}

func (r modelRules) host(w modelWorld, add func(string, func(*modelWorld))) {
	settled := w.working == 0
	for i := byte(1); i <= leaders; i++ {
		if !w.leaders[i].leads {
			continue
		}
		if settled || r.incautious {
			add(fmt.Sprintf("the host hears leader %d", i), func(w *modelWorld) {
				m, err := w.mark.Hear(uint64(i))
				if err != nil {
					w.leaders[i].leads = false
				}
				w.mark = m
			})
			add(fmt.Sprintf("the host reports to leader %d", i), func(w *modelWorld) {
				w.leaders[i].under = told{true, w.mark, w.present, w.incarnation, w.evicting,
					w.ended}
			})
		}
	}
	for p := byte(1); p <= mostPlans; p++ {
		if !w.plans[p].sent || !settled {
			continue
		}
		add(fmt.Sprintf("the host takes order %d", p), func(w *modelWorld) {
			epoch := uint64(w.plans[p].leader)
			m, err := w.mark.Spend(epoch, uint64(p))
			if errors.Is(err, ErrDeposed) && r.unfenced || errors.Is(err, ErrSpent) && r.unspent {
				err = nil
			}
			if err == nil {
				w.mark, w.working = m, p
			}
		})
	}
	if p := w.working; p != 0 {
		add("the host refuses what it is ordered", func(w *modelWorld) { w.working = 0 })
		if w.present && w.evicting == 0 &&
			(w.incarnation == w.plans[p].incarnation || r.careless) {
			add("the host begins what it is ordered", func(w *modelWorld) { r.begins(w, p) })
		}
	}
	add("the host's daemon dies, and starts again", func(w *modelWorld) {
		w.working = 0
		if r.volatile {
			w.mark = Mark{}
		}
	})
	if w.evicting != 0 {
		end := func(w *modelWorld) {
			w.ended[w.evicting], w.evicting = true, 0
		}
		add("the eviction is aborted", end)
		add("the eviction is complete", func(w *modelWorld) {
			end(w)
			w.present = false
		})
	}
	if w.present && w.evicting == 0 && !w.returned {
		add("somebody else moves the VM away", func(w *modelWorld) { w.present = false })
	}
	if !w.present && !w.returned {
		add("the VM comes back", func(w *modelWorld) {
			w.present, w.returned = true, true
			w.incarnation++
		})
	}
}

// begins begins an eviction, and says what may not be so.
func (r modelRules) begins(w *modelWorld, p byte) {
	switch {
	case w.ended[p]:
		w.bad = "an order is carried out twice"
	case w.incarnation != w.plans[p].incarnation:
		w.bad = "a VM is evicted that is not the one that was decided upon"
	}
	if l := &w.leaders[w.term]; l.leads {
		if !l.book[p] {
			w.bad = "an eviction begins that the leader does not know of"
		}
		for q := range l.book {
			if l.book[q] && byte(q) != p {
				w.bad = "a VM is moved by two plans"
			}
		}
	}
	w.working, w.evicting = 0, p
	w.incarnation++
}

// explore tries everything, and returns what leads to something bad, if anything does.
func (r modelRules) explore() (states int, trace []string) {
	worlds := []modelWorld{{present: true}}
	known := map[modelWorld]int{worlds[0]: 0}
	from, how := []int{0}, []string{""}
	var before [][]int
	back := func(i int, end string) []string {
		trace = []string{end}
		for ; i != 0; i = from[i] {
			trace = append(trace, how[i])
		}
		slices.Reverse(trace)
		return trace
	}
	before = append(before, nil)
	for i := 0; i < len(worlds); i++ {
		for what, w := range r.next(worlds[i]) {
			k, ok := known[w]
			if !ok {
				k = len(worlds)
				known[w] = k
				worlds, from, how, before = append(worlds, w), append(from, i),
					append(how, what), append(before, nil)
			}
			before[k] = append(before[k], i)
			if w.bad != "" {
				return len(worlds), back(k, w.bad)
			}
		}
	}
	// As long as somebody leads, or may, it comes to know what became of all plans.
	reach := make([]bool, len(worlds))
	var todo []int
	for i, w := range worlds {
		if l := w.leaders[leaders]; w.term == leaders && l.leads &&
			!slices.Contains(l.book[:], true) {
			todo = append(todo, i)
		}
	}
	for ; len(todo) > 0; todo = todo[1:] {
		if i := todo[0]; !reach[i] {
			reach[i] = true
			todo = append(todo, before[i]...)
		}
	}
	for i, w := range worlds {
		if (w.term == leaders && w.leaders[leaders].leads || w.was < leaders) && !reach[i] {
			return len(worlds), back(i, "nobody ever knows what became of a plan")
		}
	}
	return len(worlds), nil
}

func TestModel(t *testing.T) {
	states, trace := modelRules{}.explore()
	t.Logf("%d states", states)
	if trace != nil {
		t.Errorf("bad:\n  %s", strings.Join(trace, "\n  "))
	}
	if states < 5_000 {
		t.Errorf("only %d states", states)
	}
}

func TestModelMutants(t *testing.T) {
	for _, mutant := range []struct {
		name string
		modelRules
	}{
		{"the host heeds a leader of before", modelRules{unfenced: true}},
		{"the host heeds an order again", modelRules{unspent: true}},
		{"the host forgets when its daemon dies", modelRules{volatile: true}},
		{"the host hears a leader while it carries out an order", modelRules{incautious: true}},
		{"the host does not compare incarnations", modelRules{careless: true}},
		{"a plan is written by one who leads no longer", modelRules{unguarded: true}},
		{"an order is sent before its plan is written", modelRules{hasty: true}},
		{"a leader does not read the plans of the one before", modelRules{blind: true}},
		{"a leader believes a host that has not heard it", modelRules{trusting: true}},
		{"a leader goes on that does not know whether a plan was written",
			modelRules{stubborn: true}},
		{"a leader makes two plans for a VM", modelRules{crowding: true}},
	} {
		t.Run(mutant.name, func(t *testing.T) {
			states, trace := mutant.explore()
			if trace == nil {
				t.Fatalf("%d states, and nothing bad was found", states)
			}
			t.Logf("%d states:\n  %s", states, strings.Join(trace, "\n  "))
		})
	}
}

package evict

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// This is a model of R12 with three hosts. Two of them start the VM anew. In it asking takes time,
// unlike in TestModel's: the VM may be evicted while the answers come, more than once. It leaves
// out how an eviction fails, as TestModel has that.

// startHosts is how many hosts there are; the first two start the VM.
const (
	startHosts   = 3
	startMoves   = 3 // evictions of the VM that there may be, at most
	startAnswers = 2 * (startHosts - 1)
)

// startRules are the rules of the model of R12.
type startRules struct {
	absent func(first, second Presence) bool
	once   bool // the other hosts are asked once
	early  bool // one host is asked for the second time before the others answer the first
}

// startHost is a host of the model.
type startHost struct {
	lives bool // a QEMU of the VM is there
	open  bool // so is an eviction of it, in its journal
	last  byte // the last one there
	taken bool // the host is about to start the VM
	// If it is: which answers it has, and each host's first one.
	heard [startAnswers]bool
	first [startHosts]Presence
}

// startWorld is a state of everything.
type startWorld struct {
	hosts    [startHosts]startHost
	from, to byte // of the eviction under way, if any
	moving   bool // an eviction is under way, and the VM still runs at its source
	moves    byte
	runs     [startHosts]bool
}

func (w *startWorld) presence(i int) Presence {
	h := &w.hosts[i]
	m := MarkCompleted
	if h.open {
		m = MarkMayRun
	}
	return Presence{Clear: Clear(m, h.lives, h.taken), Last: string(rune('0' + h.last))}
}

// next returns what may happen, by its name.
func (r startRules) next(w startWorld) map[string]startWorld {
	to := map[string]startWorld{}
	add := func(what string, do func(w *startWorld)) {
		w := w
		do(&w)
		to[what] = w
	}
	for i := range startHosts {
		for j := range startHosts {
			a, b := &w.hosts[i], &w.hosts[j]
			if i == j || !w.runs[i] || a.open || a.taken || b.open || b.taken || b.lives ||
				w.moves == startMoves {
				continue
			}
			add(fmt.Sprintf("an eviction begins from %d to %d", i, j), func(w *startWorld) {
				w.moves++
				w.moving, w.from, w.to = true, byte(i), byte(j)
				for _, k := range []int{i, j} {
					w.hosts[k].open, w.hosts[k].last, w.hosts[k].lives = true, w.moves, true
				}
			})
		}
		if w.moving && int(w.to) == i {
			add(fmt.Sprintf("the VM runs on %d", i), func(w *startWorld) {
				w.moving = false
				w.runs[w.from], w.runs[i] = false, true
			})
		}
		if h := &w.hosts[i]; h.open && !w.moving {
			add(fmt.Sprintf("the eviction is over on %d", i), func(w *startWorld) {
				w.hosts[i].open = false
				w.hosts[i].lives = w.runs[i]
			})
		}
		if h := &w.hosts[i]; w.runs[i] && !h.open {
			add(fmt.Sprintf("the VM on %d ends", i), func(w *startWorld) {
				w.runs[i], w.hosts[i].lives = false, false
			})
		}
		if i < 2 {
			r.starts(w, i, add)
		}
	}
	return to
}

// starts adds the steps of a host that starts the VM.
func (r startRules) starts(w startWorld, i int, add func(string, func(*startWorld))) {
	h := &w.hosts[i]
	if !h.taken {
		if w.presence(i).Clear {
			add(fmt.Sprintf("%d takes the VM", i), func(w *startWorld) { w.hosts[i].taken = true })
		}
		return
	}
	free := func(w *startWorld) {
		h := &w.hosts[i]
		h.taken, h.heard, h.first = false, [startAnswers]bool{}, [startHosts]Presence{}
	}
	add(fmt.Sprintf("%d gives up", i), free)
	others := []int{0, 1, 2}
	others = slices.Delete(others, i, i+1)
	asked := func(round, k int) bool { return h.heard[round*len(others)+k] }
	all := func(round int) bool { return asked(round, 0) && asked(round, 1) }
	for k, j := range others {
		switch {
		case !asked(0, k):
			add(fmt.Sprintf("%d hears %d", i, j), func(w *startWorld) {
				if p := w.presence(j); p.Clear {
					w.hosts[i].heard[k], w.hosts[i].first[j] = true, p
				} else {
					free(w)
				}
			})
		case !r.once && !asked(1, k) && (all(0) || r.early):
			add(fmt.Sprintf("%d hears %d again", i, j), func(w *startWorld) {
				if r.absent(h.first[j], w.presence(j)) {
					w.hosts[i].heard[len(others)+k] = true
				} else {
					free(w)
				}
			})
		}
	}
	if all(0) && (all(1) || r.once) {
		add(fmt.Sprintf("%d starts the VM", i), func(w *startWorld) {
			free(w)
			w.runs[i], w.hosts[i].lives = true, true
		})
	}
}

// explore tries everything, and returns what leads to two copies, if anything does.
func (r startRules) explore() (states int, trace []string) {
	type origin struct {
		from startWorld
		what string
	}
	var first startWorld
	first.hosts[2].lives, first.runs[2] = true, true
	known := map[startWorld]origin{first: {}}
	for todo := []startWorld{first}; len(todo) > 0; todo = todo[1:] {
		for what, w := range r.next(todo[0]) {
			if _, ok := known[w]; ok {
				continue
			}
			known[w] = origin{todo[0], what}
			todo = append(todo, w)
			copies := 0
			for _, runs := range w.runs {
				if runs {
					copies++
				}
			}
			if copies > 1 {
				for ; w != first; w = known[w].from {
					trace = append(trace, known[w].what)
				}
				slices.Reverse(trace)
				return len(known), trace
			}
		}
	}
	return len(known), nil
}

func TestStartModel(t *testing.T) {
	states, trace := startRules{absent: Absent}.explore()
	t.Logf("%d states", states)
	if trace != nil {
		t.Errorf("two copies run:\n  %s", strings.Join(trace, "\n  "))
	}
}

func TestStartModelMutants(t *testing.T) {
	for _, mutant := range []struct {
		name string
		startRules
	}{
		{"the other hosts are asked once", startRules{absent: Absent, once: true}},
		{"a host is asked again before all have answered", startRules{absent: Absent, early: true}},
		{"a host may have had the VM between its answers",
			startRules{absent: func(a, b Presence) bool { return a.Clear && b.Clear }}},
		{"a host may have the VM when it is asked again",
			startRules{absent: func(a, _ Presence) bool { return a.Clear }}},
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

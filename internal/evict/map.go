package evict

import (
	"sync/atomic"

	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/pageclass"
)

// Map can be asked what has become of a VM's memory, while an engine at its source works on it.
type Map struct{ of atomic.Pointer[tracer] }

// Squares is a VM's memory in few equal parts, in order of address. Came, Why and Class have a
// value for each part.
type Squares struct {
	// Pages is how many pages a part has; the last one of a RAM block may have fewer.
	Pages int
	// Came is the share of the part that was sent or left out, 0 to 255.
	Came []uint8
	// Why is the reason for most of that, as an index in Reasons. Class is what most of the part
	// is used for, as an index in Classes.
	Why, Class       []uint8
	Reasons, Classes []string
}

// Squares returns the memory in at most n parts. It is false while nothing is known of the memory,
// and once the engine has ended.
func (m *Map) Squares(n int) (Squares, bool) {
	t := m.of.Load()
	if t == nil || n <= 0 {
		return Squares{}, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tr := &t.trace
	cells := len(tr.When)
	if cells == 0 {
		return Squares{}, false
	}
	per := (cells + n - 1) / n
	s := Squares{Pages: per * tr.PagesPerCell}
	for why := range pushorder.Reasons {
		s.Reasons = append(s.Reasons, why.String())
	}
	for c := range pageclass.Classes {
		s.Classes = append(s.Classes, c.String())
	}
	for first := 0; first < cells; first += per {
		var whys [pushorder.Reasons]int
		var classes [pageclass.Classes]int
		came, why, class := 0, 0, 0
		end := min(first+per, cells)
		for c := first; c < end; c++ {
			if k := int(tr.Class[c]); k < len(classes) {
				if classes[k]++; classes[k] > classes[class] {
					class = k
				}
			}
			if tr.When[c] < 0 {
				continue
			}
			came++
			if w := int(tr.Why[c]); w < len(whys) {
				if whys[w]++; whys[w] > whys[why] {
					why = w
				}
			}
		}
		s.Came = append(s.Came, uint8(255*came/(end-first)))
		s.Why, s.Class = append(s.Why, uint8(why)), append(s.Class, uint8(class))
	}
	return s, true
}

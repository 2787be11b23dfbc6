// Package fit reports whether a VM can become the one that another QEMU was started as, and whether
// it can move at all. QEMU's migration stream does not carry everything that a guest sees: not the
// CPU's features, for one. What both ends must share is gathered at each, goes to the destination
// with the offer, and is compared there while the VM is untouched.
//
//	a QEMU ─ CPUsOf, DevicesOf, DisksOf ─► facts ─ JSON ─► facts.Against(the other's) ─► Reasons
//	a QEMU ─ Held, WorkOf ────────────────────────────────────────────────────────────► Reasons
//
// Gathering facts asks QEMU only, and looks at the files that it has open. Comparing them has no
// side effects. Facts of a peer may lie or be hostile. Check bounds them, and they can do no more
// than get a VM refused.
package fit

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// A Reason is one thing for which a VM cannot move to where it was to go.
type Reason struct {
	Text   string `json:"text"`   // what is so, or what differs
	Remedy string `json:"remedy"` // what to do, with commands in backquotes
}

// Reasons are those that were found, the weightiest first.
type Reasons []Reason

// Err is all of them as one error, or nil if there are none.
func (r Reasons) Err() error {
	if len(r) == 0 {
		return nil
	}
	var all []string
	for i, x := range r[:min(len(r), mostNamed)] {
		if i+1 == len(r) || r[i+1].Remedy != x.Remedy {
			x.Text += ": " + x.Remedy
		}
		all = append(all, x.Text)
	}
	if n := len(r) - mostNamed; n > 0 {
		all = append(all, fmt.Sprintf("and %d differences more", n))
	}
	return errors.New(strings.Join(all, "; "))
}

func (r *Reasons) add(remedy, format string, args ...any) {
	*r = append(*r, Reason{fmt.Sprintf(format, args...), remedy})
}

// mostNamed is how many of many things a message names.
const mostNamed = 8

// list names some of them.
func list(names []string) string {
	if n := len(names) - mostNamed; n > 1 {
		return strings.Join(names[:mostNamed], ", ") + fmt.Sprintf(" and %d more", n)
	}
	return strings.Join(names, ", ")
}

// atOnce is how many commands wait in a QEMU's monitor at the same time. On a busy host QEMU
// answers many as late as one.
const atOnce = 64

// each calls f for 0 to n-1, several at the same time, and returns the first error by number.
func each(n int, f func(i int) error) error {
	errs := make([]error, n)
	var next int
	var mu sync.Mutex // guards next
	var all sync.WaitGroup
	for range min(n, atOnce) {
		all.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= n {
					return
				}
				errs[i] = f(i)
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// ErrFacts is wrapped by the errors of Check.
var ErrFacts = errors.New("facts out of bounds")

// maxText bounds each string in facts, in bytes.
const maxText = 1024

func text(all ...string) error {
	for _, s := range all {
		if len(s) > maxText {
			return fmt.Errorf("%w: a text of %d bytes", ErrFacts, len(s))
		}
	}
	return nil
}

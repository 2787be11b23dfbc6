package evict_test

import (
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// Twenty evictions in a row, with the guest at work in between: each page comes once, none is bad.
// The guest moves to and fro between the hosts. It checks all of its memory at the end of every
// journey.
func TestTwenty(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 1e9})
	const journeys, legs = 4, 5
	for range journeys {
		vm := boot(t, l, lab.Spec{
			Load: lab.Load{HotMiB: 80, IdleMiB: 80, OtherMiB: 20, FileMiB: 4}})
		from, to := l.A, l.B
		for range legs {
			twin, err := to.Incoming(labtest.Within(t, time.Minute), vm, lab.IncomingOptions{})
			if err != nil {
				t.Fatal(err)
			}
			evictBetween(labtest.Within(t, time.Minute), t, from, to, vm, twin).mustComplete(t)
			if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 10_000); err != nil {
				t.Fatal(err)
			}
			vm, from, to = twin, to, from
		}
		labtest.MustCheck(t, vm)
		vm.Kill()
	}
}

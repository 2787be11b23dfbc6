package evict_test

import (
	"flag"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

var journeysFlag = flag.Int("journeys", 1, "TestTwenty: guests, one after the other")

// Evictions in a row, with the guest at work in between: each page comes once, none is bad. The
// guest moves to and fro between the hosts. It checks all of its memory at the end of its journey.
// `make nightly` has twenty evictions.
func TestTwenty(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 1e9})
	const legs = 5
	for range *journeysFlag {
		vm := bootBusy(t, l, lab.Spec{
			Load: lab.Load{HotMiB: 50, IdleMiB: 50, OtherMiB: 20, FileMiB: 4}})
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

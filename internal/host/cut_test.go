package host

import (
	"slices"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// A source whose QEMU ends while the link is cut, and nobody has noticed that yet, tells the
// destination that no more pages come as soon as there is a link again.
func TestSourceDiesWhileCut(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e8})
	saved, err := boot(t, l.A, lab.Spec{MemoryMiB: 192, Load: load}).Save(labtest.Within(t,
		time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(every(), func(c cell) bool {
		return c.String() == "source/pushing: link cut"+string(inRecovery)+sourceKilled
	})
	if o := disturb(t, l, saved, every()[i], 50*time.Millisecond); o != halved {
		t.Errorf("the VM %s", o)
	}
}

package evict_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"
)

// whenIn does something once the guest runs on a VM.
func whenIn(t *testing.T, twin *lab.VM, do func()) (wait func()) {
	done := make(chan struct{})
	ctx := labtest.Within(t, time.Minute)
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if s := twin.Guest.Samples(); len(s) > 0 && s[len(s)-1].VM == twin.Name {
				do()
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Error("the guest does not run on the destination")
	}()
	return func() { <-done }
}

// A guest that ends itself while its memory comes in is shut down. The copy on the source goes, and
// no message offers to resume it.
func TestShutDown(t *testing.T) {
	t.Parallel()
	// On this link the memory takes a minute.
	l := labtest.New(t, lab.Options{Rate: 2e7})
	for _, c := range []struct {
		name   string
		extra  []string
		atOnce bool // the QEMU ends at once, like one that cannot be told to stay
		do     func(vm, twin *lab.VM) error
		lost   bool
		says   string
	}{
		{name: "an operator's quit", lost: true, says: "its monitor said host-qmp-quit",
			do: func(vm, twin *lab.VM) error {
				return twin.Execute(t.Context(), "quit", nil, nil)
			}},
		{name: "panic", extra: []string{"-device", "pvpanic"}, says: "guest-panic",
			do: func(vm, twin *lab.VM) error { return vm.Guest.Panic(twin) }},
		{name: "reset, and QEMU ends at once", extra: []string{"-no-reboot"}, atOnce: true,
			says: "guest-reset",
			do: func(vm, twin *lab.VM) error {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				vm.Guest.Reboot(ctx, twin) // which never comes
				return nil
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			vm := boot(t, l, lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 16, IdleMiB: 48},
				Extra: c.extra})
			defer vm.Kill()
			twin := incoming(t, l, vm)
			defer twin.Kill()
			wait := whenIn(t, twin, func() {
				if c.atOnce {
					if err := twin.Execute(t.Context(), "set-action",
						map[string]any{"shutdown": "poweroff"}, nil); err != nil {
						t.Error(err)
					}
				}
				if err := c.do(vm, twin); err != nil {
					t.Error(err)
				}
			})
			r := evictVM(labtest.Within(t, time.Minute), t, l, vm, twin)
			wait()
			if c.lost {
				for side, err := range map[string]error{"source": r.source,
					"destination": r.destErr} {
					if !errors.Is(err, evict.ErrLost) || !strings.Contains(err.Error(), c.says) {
						t.Errorf("%s: %v", side, err)
					}
				}
				return
			}
			if r.source != nil || r.destErr != nil {
				t.Fatalf("source: %v; destination: %v", r.source, r.destErr)
			}
			if r.report.Outcome != string(evict.ShutDown) ||
				!strings.Contains(r.report.Reason, c.says) {
				t.Errorf("the report says %q, %q", r.report.Outcome, r.report.Reason)
			}
			if p := r.report.Pages; p.Early+p.Pushed+p.Near+p.Fetched+p.Skipped >= p.Total {
				t.Errorf("all pages were sent before: %+v", p)
			}
			for _, q := range []*lab.VM{vm, twin} {
				if err := q.Ended(labtest.Within(t, 10*time.Second)); err != nil {
					t.Errorf("the QEMU on host %s: %v", q.Host.Name, err)
				}
			}
		})
	}
}

// A QEMU that stays by its own setting when its guest ends itself gets all of the memory, and
// stays.
func TestShutDownStays(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 1e8})
	vm := boot(t, l, lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 16, IdleMiB: 48}})
	twin, err := l.B.Incoming(labtest.Within(t, time.Minute), vm,
		lab.IncomingOptions{Extra: []string{"-no-shutdown"}})
	if err != nil {
		t.Fatal(err)
	}
	wait := whenIn(t, twin, func() {
		if err := vm.Guest.PowerOff(twin); err != nil {
			t.Error(err)
		}
	})
	r := evictVM(labtest.Within(t, time.Minute), t, l, vm, twin)
	wait()
	r.mustComplete(t)
	if status, err := twin.Status(labtest.Within(t, 10*time.Second)); err != nil ||
		status != "shutdown" {
		t.Errorf("the VM is %q, %v", status, err)
	}
}

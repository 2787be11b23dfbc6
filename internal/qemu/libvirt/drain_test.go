package libvirt

import (
	"context"
	"testing"
	"time"

	"vacate/lab/libvirtlab"
)

// Whatever a QEMU said before its process was stopped is heard, however late libvirt is with it.
func TestDrain(t *testing.T) {
	r := newRig(t, libvirtlab.Spec{VM: small})
	other := r.dial(r.h.A)
	p, err := r.a.Process(r.domain)
	r.check(err)
	t.Cleanup(func() { p.Continue() })
	heard := func(s *Subscription) (names []string) {
		for {
			select {
			case ev := <-s.C:
				if ev.QEMU != "" {
					names = append(names, ev.QEMU)
				}
			default:
				return names
			}
		}
	}
	const flags = MigrateLive | Postcopy | ChangeProtection
	_, _, err = r.a.Begin(r.ctx, r.domain, flags)
	r.check(err)
	s, err := r.a.Subscribe(r.ctx, &r.domain, 64)
	r.check(err)
	for round := range 30 {
		r.check(r.a.Suspend(r.ctx, r.domain))
		strayed := round%3 > 0
		if strayed {
			_, err := other.MonitorCommand(r.ctx, r.domain, `{"execute":"cont"}`)
			r.check(err)
			if round%3 == 2 {
				_, err := other.MonitorCommand(r.ctx, r.domain, `{"execute":"stop"}`)
				r.check(err)
			}
		}
		r.check(p.Stop(r.ctx))
		r.check(r.a.Drain(r.ctx, r.domain, p))
		names := heard(s)
		want := []string{"STOP", "RESUME", "STOP"}[:round%3+1]
		if len(names) != len(want) {
			t.Errorf("round %d: %q; want %q", round, names, want)
		}
		r.check(p.Continue())
		if round%3 != 1 {
			_, err := other.MonitorCommand(r.ctx, r.domain, `{"execute":"cont"}`)
			r.check(err)
		}
		for len(heard(s)) == 0 && round%3 != 1 {
			time.Sleep(time.Millisecond)
		}
	}
	short, cancel := context.WithTimeout(r.ctx, time.Millisecond)
	defer cancel()
	<-short.Done()
	if err := r.a.Drain(short, r.domain, p); err == nil {
		t.Error("it heard all in no time")
	}
	r.check(r.a.Confirm(r.ctx, r.domain, nil, flags, true))
}

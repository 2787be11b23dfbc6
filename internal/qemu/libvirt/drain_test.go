package libvirt

import (
	"context"
	"slices"
	"testing"
	"time"

	"vacate/internal/sys/process"
	"vacate/lab/libvirtlab"

	"golang.org/x/sys/unix"
)

// Whatever a QEMU said before its process was stopped is heard, however late libvirt is with it:
// here its daemon is stopped, too, when somebody has the guest run.
func TestDrain(t *testing.T) {
	r := newRig(t, libvirtlab.Spec{VM: small})
	other := r.dial(r.h.A)
	p, err := r.a.Process(r.domain)
	r.check(err)
	t.Cleanup(func() { p.Continue() })
	daemon, err := process.Find(r.a.peer)
	r.check(err)
	t.Cleanup(func() { daemon.Continue() })
	const flags = MigrateLive | Postcopy | ChangeProtection
	_, _, err = r.a.Begin(r.ctx, r.domain, flags)
	r.check(err)
	s, err := r.a.Subscribe(r.ctx, &r.domain, 64)
	r.check(err)
	monitor, err := monitorOf(p.PID)
	r.check(err)
	defer unix.Close(monitor)
	// until waits for something in QEMU's monitor: unread by QEMU, or by libvirt.
	until := func(what uint) {
		t.Helper()
		for {
			n, err := unix.IoctlGetInt(monitor, what)
			r.check(err)
			if n > 0 {
				return
			}
			r.check(r.ctx.Err())
			time.Sleep(time.Millisecond)
		}
	}
	for round := range 5 {
		r.check(r.a.Suspend(r.ctx, r.domain))
		r.check(p.Stop(r.ctx))
		ran := make(chan error, 1)
		go func() {
			_, err := other.MonitorCommand(r.ctx, r.domain, `{"execute":"cont"}`)
			ran <- err
		}()
		until(unix.SIOCINQ)
		r.check(daemon.Stop(r.ctx))
		r.check(p.Continue())
		until(unix.SIOCOUTQ)
		r.check(p.Stop(r.ctx))
		time.AfterFunc(50*time.Millisecond, func() { daemon.Continue() })
		r.check(r.a.Drain(r.ctx, r.domain, p))
		var heard []string
		for len(s.C) > 0 {
			if ev := <-s.C; ev.QEMU != "" {
				heard = append(heard, ev.QEMU)
			}
		}
		if !slices.Equal(heard, []string{"STOP", "RESUME"}) {
			t.Errorf("round %d: heard %q", round, heard)
		}
		r.check(p.Continue())
		r.check(<-ran)
	}
	ended, cancel := context.WithCancel(r.ctx)
	cancel()
	if err := r.a.Drain(ended, r.domain, p); err == nil {
		t.Error("it heard all in no time")
	}
	r.check(r.a.Confirm(r.ctx, r.domain, nil, flags, true))
}

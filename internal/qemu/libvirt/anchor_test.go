package libvirt

import (
	"os"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// keepAnchors closes the connections that began and prepared. It returns descriptors that keep them
// open.
func (m *mover) keepAnchors() (held []*os.File) {
	m.Helper()
	for _, c := range []*Conn{m.anchorA, m.anchorB} {
		f, err := c.File()
		m.check(err)
		held = append(held, f)
		m.check(c.Close())
	}
	return held
}

// What an eviction relies on when a daemon dies. Another process holds descriptors of the
// connections that began at A and prepared at B. Then libvirt goes on, other connections confirm
// and finish, and the end of the one that finishes changes nothing.
func TestAnchor(t *testing.T) {
	spec := small
	spec.Devices = lab.Full
	r := newRig(t, libvirtlab.Spec{VM: spec, Domain: tagged})
	const flags = MigrateLive | Postcopy | PersistDest | UndefineSource | Unsafe
	m := r.prepare(flags)
	held := m.keepAnchors()
	m.rollBack()
	for _, f := range held {
		f.Close()
	}

	m = r.prepare(flags)
	held = m.keepAnchors()
	m.freeze()
	dead := r.dial(r.h.B)
	told := make(chan error, 1)
	go func() {
		_, err := dead.Finish(r.ctx, "web1", nil, flags, false)
		told <- err
	}()
	vm := r.firstReport()
	r.check(dead.Close())
	t.Logf("%v", <-told)
	time.Sleep(3 * time.Second)
	t.Logf("b: %v", r.virsh(r.h.B, "domstate", "--reason", "web1"))
	m.push()
	if err := <-m.ended; err != nil {
		t.Fatal("the twin's return path:", err)
	}
	for range 20 {
		s := r.virsh(r.h.B, "domstate", "--reason", "web1")
		t.Log(s)
		if s == "running (migrated)" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	held[1].Close()
	time.Sleep(time.Second)
	if s := r.virsh(r.h.B, "domstate", "--reason", "web1"); !strings.HasPrefix(s, "running") {
		t.Error(s)
	}
	r.check(r.a.Confirm(r.ctx, r.domain, nil, flags|ChangeProtection, false))
	held[0].Close()
	if out := r.virsh(r.h.A, "list", "--all", "--name"); out != "" {
		t.Errorf("a still has %q", out)
	}
	r.check(vm.Guest.WaitOps(r.ctx, 100))
	labtest.MustCheck(t, vm)
}

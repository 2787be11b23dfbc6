package libvirt

import (
	"os"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"

	"vacate/internal/qemu/migstream"
)

// What an eviction relies on when a daemon dies. Another process holds descriptors of the
// connections that began at A and prepared at B. Then libvirt goes on, other connections confirm
// and finish, and a domain that was told to run twice runs once.
func TestAnchor(t *testing.T) {
	spec := small
	spec.Devices = lab.Full
	r := newRig(t, libvirtlab.Spec{VM: spec, Domain: tagged})
	const flags = MigrateLive | Postcopy | PersistDest | UndefineSource | Unsafe
	m := r.prepare(flags)
	var held []*os.File
	for _, c := range []*Conn{m.anchorA, m.anchorB} {
		f, err := c.File()
		r.check(err)
		held = append(held, f)
		r.check(c.Close())
	}
	m.rollBack()
	for _, f := range held {
		f.Close()
	}

	m = r.prepare(flags)
	held = nil
	for _, c := range []*Conn{m.anchorA, m.anchorB} {
		f, err := c.File()
		r.check(err)
		held = append(held, f)
		r.check(c.Close())
	}
	m.freeze()
	dead := r.dial(r.h.B)
	told := make(chan error, 1)
	go func() {
		_, err := dead.Finish(r.ctx, "web1", nil, flags, false)
		told <- err
	}()
	vm, err := r.lab.Came(r.ctx)
	r.check(err)
	before := len(vm.Guest.Samples())
	for len(vm.Guest.Samples()) == before {
		time.Sleep(10 * time.Millisecond)
	}
	r.check(dead.Close())
	t.Logf("%v", <-told)
	again := make(chan error, 1)
	go func() {
		_, err := r.b.Finish(r.ctx, "web1", nil, flags, false)
		again <- err
	}()
	time.Sleep(3 * time.Second)
	t.Logf("b: %v", r.virsh(r.h.B, "domstate", "--reason", "web1"))
	select {
	case err := <-again:
		t.Logf("finished again: %v", err)
		again <- err
	default:
	}
	for _, b := range m.mem.Blocks() {
		for offset := uint64(0); offset < b.Size; offset += 4096 {
			m.page(b.Name, offset)
		}
	}
	m.send(
		migstream.SectionEnd{ID: section},
		migstream.EOS{},
		migstream.Footer{ID: section},
		migstream.EOF{},
	)
	if err := <-m.ended; err != nil {
		t.Fatal("the twin's return path:", err)
	}
	t.Logf("finished again: %v", <-again)
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

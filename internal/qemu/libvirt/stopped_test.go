package libvirt

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"vacate/internal/sys/process"
	"vacate/lab/libvirtlab"
)

// hold freezes the domain, and stops its QEMU's process.
func (r *rig) hold(c *Conn, flags Flags) process.Process {
	r.Helper()
	_, _, err := c.Begin(r.ctx, r.domain, flags)
	r.check(err)
	r.check(c.Suspend(r.ctx, r.domain))
	p, err := c.Process(r.domain)
	r.check(err)
	theirs, ours, err := Directory(p.PID)
	r.check(err)
	_, err = c.MonitorCommand(r.ctx, r.domain, `{"execute":"xen-save-devices-state","arguments":`+
		`{"filename":"`+theirs+`/vacate","live":true}}`)
	r.check(err)
	r.check(os.Remove(ours + "/vacate"))
	r.check(p.Stop(r.ctx))
	r.Cleanup(func() { p.Continue() })
	return p
}

// What an eviction relies on while the process of a QEMU is stopped, whatever operators do.
func TestStopped(t *testing.T) {
	r := newRig(t, libvirtlab.Spec{VM: small})
	const flags = MigrateLive | Postcopy | ChangeProtection | UndefineSource
	c := r.dial(r.h.A)
	p := r.hold(c, flags)
	if s := r.virsh(r.h.A, "domstate", "--reason", "web1"); s != "paused (migrating)" {
		t.Error(s)
	}
	// The job ends with the connection, and the domain stands. An operator's resume then waits in
	// QEMU's monitor, for the process to go on.
	r.check(c.Close())
	s, err := r.a.Subscribe(r.ctx, &r.domain, 64)
	r.check(err)
	resume, cancel := context.WithTimeout(r.ctx, 2*time.Second)
	defer cancel()
	if err := r.a.Resume(resume, r.domain); err == nil {
		t.Error("a QEMU whose process is stopped ran its guest")
	}
	if s := r.virsh(r.h.A, "domstate", "--reason", "web1"); s != "paused (migrating)" {
		t.Error(s)
	}
	r.check(p.Continue())
	for ev := range s.C {
		if ev.QEMU == "RESUME" {
			break
		}
	}
	r.check(r.lab.VM.Guest.WaitOps(r.ctx, 50))

	// The domain has gone when it is confirmed, though its QEMU can only be killed.
	p = r.hold(r.a, flags)
	confirmed := make(chan error, 1)
	go func() { confirmed <- r.a.Confirm(r.ctx, r.domain, nil, flags, false) }()
	for !terminated(t, p.PID) {
		time.Sleep(10 * time.Millisecond)
	}
	r.check(p.Kill(r.ctx))
	r.check(<-confirmed)
	if out := r.virsh(r.h.A, "list", "--all", "--name"); out != "" {
		t.Errorf("a still has %q", out)
	}
}

// terminated reports whether a SIGTERM waits for a process that is stopped.
func terminated(t *testing.T, pid int) bool {
	b, err := os.ReadFile(procFile(pid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if mask, ok := strings.CutPrefix(line, "ShdPnd:"); ok {
			return strings.HasSuffix(strings.TrimSpace(mask), "4000") // 1<<(SIGTERM-1)
		}
	}
	return false
}

package host

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"
)

// The other host is taken out of the configuration, and the daemon starts anew, while evictions to
// it are open. What needs only this host is done: a VM that was not committed comes back, and an
// operator may decide about one that was.
func TestUnpeered(t *testing.T) {
	const loading = "source/loading"
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 32, IdleMiB: 64}})
	file := filepath.Join(r.a.dir, "vacated.toml")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	alone, _, _ := strings.Cut(string(whole), "[peers")
	configure := func(text string) {
		t.Helper()
		r.a.kill()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		r.a.start()
	}

	r.a.start(loading)
	r.b.start()
	e, err := r.a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	if !r.a.reach(loading, time.Minute) {
		t.Fatal("the eviction did not come to load the devices")
	}
	r.eviction = e.Id
	if s := status(r.vm); s == "running" {
		t.Fatal("the VM is not frozen")
	}
	configure(alone)
	r.over(r.a, "aborted")
	if s := status(r.vm); s != "running" {
		t.Fatalf("the VM is %q", s)
	}

	configure(string(whole))
	r.begin()
	r.b.kill()
	// The engine says why it cannot ask.
	r.wait(r.a, "refused", func(e *hostv1.Eviction) bool {
		return e.State == string(evict.Reconnecting) && strings.Contains(e.Reason, "refused")
	})
	configure(alone)
	e = r.wait(r.a, "without a peer", func(e *hostv1.Eviction) bool {
		return e.Decidable && strings.Contains(e.Reason, `host "hostb" is no peer of this one`)
	})
	if !strings.Contains(e.Advice, "put [peers.hostb] back into the configuration") {
		t.Errorf("the advice: %q", e.Advice)
	}
	if err := r.say(r.a, hostv1.Decision_DECISION_RESUME_HERE, "hostb", false); err != nil {
		t.Fatal(err)
	}
	r.over(r.a, "resumed here")
	if s := status(r.vm); s != "running" {
		t.Fatalf("the VM is %q", s)
	}
	configure(string(whole))
	r.b.start()
	r.wait(r.a, "heard", func(e *hostv1.Eviction) bool { return !e.Untold })
	labtest.MustCheck(t, r.vm)
}

// An operator may give up the copy of a VM whose other host is out of the configuration.
func TestUnpeeredDiscard(t *testing.T) {
	qemu := exec.Command("sleep", "600") // which stands for a stopped one
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); qemu.Wait() }()
	t.Cleanup(func() { qemu.Process.Kill(); <-ended })
	p, err := process.Find(qemu.Process.Pid)
	if err == nil {
		err = qemu.Process.Signal(syscall.SIGSTOP)
	}
	if err != nil {
		t.Fatal(err)
	}
	h, _ := measured(t)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
		VM: "db1", Peer: "hostb", QMP: filepath.Join(t.TempDir(), "none"), PID: p.PID,
		StartTime: p.StartTime, Mark: string(evict.MarkMayRun)})
	if err != nil {
		t.Fatal(err)
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log, h.config = slog.New(slog.DiscardHandler), Config{Name: "hosta"}
	life, leave := context.WithCancelCause(context.Background())
	h.life = life
	t.Cleanup(h.tasks.Wait)
	t.Cleanup(func() { leave(evict.ErrLeave) })
	err = v.decide(labtest.Within(t, time.Minute),
		word{decision: evict.Discard, lose: "db1", by: "an operator"})
	if err != nil || v.mark() != evict.MarkDiscarded {
		t.Fatalf("%v; the mark is %q", err, v.mark())
	}
	<-ended
}

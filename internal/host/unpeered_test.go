package host

import (
	"context"
	"log/slog"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/sys/process"
	"vacate/lab/labtest"
)

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

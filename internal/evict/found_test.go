package evict

import (
	"context"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// An engine finds out that the guest ended itself while no engine listened: QEMU is paused with it.
// A QEMU that pauses by its own setting counts as any other.
func TestFoundShutDown(t *testing.T) {
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	socket := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(bin, "-machine", "none", "-nodefaults", "-display", "none", "-no-reboot",
		"-qmp", "unix:"+socket+",server=on,wait=off")
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	q, err := qmp.Dial(ctx, socket)
	for ; err != nil && ctx.Err() == nil; q, err = qmp.Dial(ctx, socket) {
		time.Sleep(20 * time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	e := Destination{QMP: socket}.engine(Waiting)
	defer e.close()
	twin := e.owner.(*qemuTwin)
	twin.q = q
	if e.process, err = process.Find(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	args, err := commandLine(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	twin.own = actionsOf(args)
	if err := twin.hold(ctx); err != nil || !twin.held {
		t.Fatalf("hold: %v", err)
	}
	if err := q.Run(ctx, "system_reset", nil, nil); err != nil {
		t.Fatal(err)
	}
	for {
		st, err := q.QueryStatus(ctx)
		if err != nil {
			t.Fatalf("QEMU did not stay: %v", err)
		}
		if st.Status == "shutdown" {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if m := e.recovery.recover(e.life, nil); m.err != nil || m.over == "" {
		t.Errorf("it was found as %+v", m)
	}
	own := twin.own
	twin.own.shutdown = "pause"
	if m := e.recovery.recover(e.life, nil); m.over != "" {
		t.Errorf("one that is to stay was found as %+v", m)
	}
	twin.own = own
	// With its own setting back, QEMU quits.
	e.letGo(false)
	if err := e.process.Wait(ctx); err != nil {
		t.Errorf("QEMU did not quit: %v", err)
	}
}

package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// testDir is one cache for all tests; the repository ignores it.
const testDir = "../.lab"

// needLab skips a test where no lab can be made, or fails it if the
// environment says that all must run.
func needLab(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	if err := Probe(); err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func newTestLab(t testing.TB, opts Options) *Lab {
	t.Helper()
	needLab(t)
	opts.Dir = testDir
	opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	l, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(l.RunDir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the run directory is still there: %v", err)
		}
	})
	return l
}

func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func mustCheck(t *testing.T, g *Guest, vm *VM, pages uint64) {
	t.Helper()
	check, err := g.Check(deadline(t, time.Minute), vm)
	if err != nil {
		t.Fatal(err)
	}
	if check.Pages != pages || check.Bad != 0 {
		t.Errorf("the guest checked %d pages, %d bad; want %d, 0 bad: %+v", check.Pages, check.Bad, pages, check)
	}
}

const pagesPerMiB = 256

func TestBootAndCheck(t *testing.T) {
	l := newTestLab(t, Options{})
	start := time.Now()
	vm, err := l.A.Boot(deadline(t, 2*time.Minute), Spec{Load: Load{HotMiB: 64, IdleMiB: 64, OtherMiB: 16, FileMiB: 4}})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("booted in %v under %s", time.Since(start), vm.Spec.Accel)
	if err := vm.Guest.WaitOps(deadline(t, time.Minute), 100_000); err != nil {
		t.Fatal(err)
	}
	s := vm.Guest.Samples()
	last := s[len(s)-1].At
	t.Logf("rate %v, stalls %+v", vm.Guest.Throughput(s[0].At, last, time.Second/2), vm.Guest.Stalls(s[0].At, last))
	mustCheck(t, vm.Guest, vm, (64+64+16+4)*pagesPerMiB)
	if n := vm.Guest.Torn(); n != 0 {
		t.Errorf("%d torn lines without an eviction", n)
	}
	if err := vm.Guest.Reboot(deadline(t, 2*time.Minute), vm); err != nil {
		t.Fatal(err)
	}
	if err := vm.Guest.WaitOps(deadline(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}
	pid := vm.PID()
	vm.Kill()
	if vm.Alive() {
		t.Error("the VM is alive after Kill")
	}
	if _, err := os.Stat(filepath.Join("/proc", fmt.Sprint(pid))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
}

package evict_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"
)

// The guest's speed is measured over speedSpan, from speedAfter after the eviction on.
const (
	speedSpan  = 4 * time.Second
	speedAfter = 5 * time.Second
)

// A speedRun is how fast one VM was before and after it moved.
type speedRun struct {
	// before and after are pages verified and rewritten for each second of CPU that QEMU got. So
	// other users of the core do not count.
	before, after         float64
	hugeBefore, hugeAfter int     // MiB in huge pages
	sparse                int     // units left out
	took                  float64 // seconds for the huge pages
	stalls                lab.Stalls
}

// TestKVMSpeed is the benchmark of `make kvmspeed`, of VACATE_KVM_SPEED rounds. A VM moves by
// vacate with and without its huge pages, and by QEMU's post-copy, and another one stays. The test
// writes a table to the file VACATE_KVM_SPEED_RESULT.
func TestKVMSpeed(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("VACATE_KVM_SPEED"))
	if err != nil || rounds < 1 {
		t.Skip("make kvmspeed runs it")
	}
	needHuge(t)
	l := labtest.New(t, lab.Options{})
	ways := []struct {
		name string
		move func(t *testing.T, l *lab.Lab, vm *lab.VM, r *speedRun) (twin *lab.VM)
	}{
		{"none: the VM stays", nil},
		{"vacate, without its huge pages", moveOnly},
		{"vacate", moveAndRestore},
		{"QEMU's post-copy", movePostcopy},
	}
	runs := make([][]speedRun, len(ways))
	for range rounds {
		for i, w := range ways { // in turns, as others use the machine, too
			runs[i] = append(runs[i], measureSpeed(t, l, w.move))
			t.Logf("%s: %+v", w.name, runs[i][len(runs[i])-1])
		}
	}
	var table strings.Builder
	table.WriteString(
		"| way | pages per s of CPU before | ratio 5 s after | huge pages [MiB] before, after | " +
			"huge again after [s] | stalls meanwhile: number, longest " +
			"|\n|---|---|---|---|---|---|\n")
	for i, w := range ways {
		of := func(f func(speedRun) float64) (list []float64) {
			for _, r := range runs[i] {
				list = append(list, f(r))
			}
			slices.Sort(list)
			return list
		}
		before := of(func(r speedRun) float64 { return r.before })
		ratio := of(func(r speedRun) float64 { return r.after / r.before })
		took := of(func(r speedRun) float64 { return r.took })
		longest := of(func(r speedRun) float64 { return r.stalls.Max.Seconds() * 1000 })
		last := runs[i][len(runs[i])-1]
		n := len(ratio)
		fmt.Fprintf(&table, "| %s | %.0f (%.0f–%.0f) | **%.2f** (%.2f–%.2f) | %d, %d | %.1f | "+
			"%d, %.0f ms |\n", w.name, before[n/2], before[0], before[n-1], ratio[n/2],
			ratio[0], ratio[n-1], last.hugeBefore, last.hugeAfter, took[n/2], last.stalls.Count,
			longest[n/2])
	}
	t.Log("\n" + table.String())
	if name := os.Getenv("VACATE_KVM_SPEED_RESULT"); name != "" {
		if err := os.WriteFile(name, []byte(table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// measureSpeed measures a VM that moves in some way; nil for none.
func measureSpeed(t *testing.T, l *lab.Lab,
	move func(t *testing.T, l *lab.Lab, vm *lab.VM, r *speedRun) *lab.VM) (r speedRun) {
	t.Helper()
	vm := bootBusy(t, l, lab.Spec{BareMetal: true, MemoryMiB: 544,
		Load: lab.Load{HotMiB: 200, IdleMiB: 300}})
	defer vm.Kill()
	speed := func(on *lab.VM) float64 {
		from, cpu := time.Now(), cpuTime(t, on.PID())
		time.Sleep(speedSpan)
		to, used := time.Now(), cpuTime(t, on.PID())-cpu
		time.Sleep(500 * time.Millisecond) // until the next report is here
		span := to.Sub(from)
		rate := vm.Guest.Throughput(from, to, span)[0].PerSecond
		if used == 0 {
			t.Errorf("%s had no CPU for %v", on.Name, span)
			return 0
		}
		return rate * span.Seconds() / used.Seconds()
	}
	r.before = speed(vm)
	r.hugeBefore = hugeMiB(t, vm.PID())
	end := vm
	if move != nil {
		twin := move(t, l, vm, &r)
		defer twin.Kill()
		vm.Kill()
		end = twin
	}
	time.Sleep(speedAfter)
	r.after = speed(end)
	r.hugeAfter = hugeMiB(t, end.PID())
	labtest.MustCheck(t, end)
	return r
}

// cpuTime returns how much CPU all threads of a process had.
func cpuTime(t *testing.T, pid int) (sum time.Duration) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // the thread ended
		}
		var ran time.Duration
		if _, err := fmt.Sscan(string(b), &ran); err != nil {
			t.Fatal(err)
		}
		sum += ran
	}
	return sum
}

func moveOnly(t *testing.T, l *lab.Lab, vm *lab.VM, _ *speedRun) *lab.VM {
	twin := incoming(t, l, vm)
	evictHuge(t, l, vm, twin)
	return twin
}

func moveAndRestore(t *testing.T, l *lab.Lab, vm *lab.VM, r *speedRun) *lab.VM {
	twin := incoming(t, l, vm)
	task := evictHuge(t, l, vm, twin)
	from := time.Now()
	done, err := task.Restore(t.Context(), slog.New(slog.DiscardHandler), func(evict.Restored) {})
	if err != nil {
		t.Fatal(err)
	}
	r.took, r.sparse = done.Elapsed, done.Sparse
	time.Sleep(200 * time.Millisecond) // until the last report is here
	r.stalls = vm.Guest.Stalls(from, time.Now())
	return twin
}

func movePostcopy(t *testing.T, l *lab.Lab, vm *lab.VM, _ *speedRun) *lab.VM {
	ctx := labtest.Within(t, time.Minute)
	twin, err := l.B.Incoming(ctx, vm, lab.IncomingOptions{Running: true})
	if err != nil {
		t.Fatal(err)
	}
	do := func(vm *lab.VM, command string, args any) {
		t.Helper()
		if err := vm.Execute(ctx, command, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	caps := map[string]any{"capabilities": []any{map[string]any{"capability": "postcopy-ram",
		"state": true}}}
	do(vm, "migrate-set-capabilities", caps)
	do(twin, "migrate-set-capabilities", caps)
	uri := "tcp:" + net.JoinHostPort(l.B.Addr, "4444")
	do(twin, "migrate-incoming", map[string]any{"uri": uri})
	do(vm, "migrate", map[string]any{"uri": uri})
	do(vm, "migrate-start-postcopy", nil)
	untilMigrated(ctx, t, vm)
	return twin
}

// untilMigrated waits for the end of QEMU's own migration.
func untilMigrated(ctx context.Context, t *testing.T, vm *lab.VM) {
	t.Helper()
	for {
		var m struct{ Status string }
		if err := vm.Execute(ctx, "query-migrate", nil, &m); err != nil {
			t.Fatal(err)
		}
		switch m.Status {
		case "completed":
			return
		case "failed", "cancelled":
			t.Fatalf("QEMU's migration: %s", m.Status)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

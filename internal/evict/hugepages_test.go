package evict_test

import (
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
)

// hugeMiB returns how much memory of a process is in huge pages, private or shared, as the kernel
// counts it.
func hugeMiB(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	counts := regexp.MustCompile(`(?m)^(?:AnonHugePages|ShmemPmdMapped): *(\d+) kB`)
	for _, m := range counts.FindAllSubmatch(b, -1) {
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum >> 10
}

// needHuge skips a test if the kernel has no huge pages for QEMU's memory.
func needHuge(t testing.TB) {
	t.Helper()
	b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err == nil && strings.Contains(string(b), "[never]") {
		err = fmt.Errorf("this host has no transparent huge pages")
	}
	labtest.Need(t, err)
}

// collapseAll turns all of a VM's memory into huge pages, as a memfd has none by itself.
func collapseAll(t testing.TB, vm *lab.VM) {
	t.Helper()
	q, err := qmp.Dial(t.Context(), vm.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	mem, err := guestmem.Attach(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for i := range mem.Blocks() {
		for u := range mem.Units(i) {
			mem.Collapse(i, u, 1) // units that have no page yet, or are busy, stay as they are
		}
	}
}

// evictHuge evicts a VM, and returns its task.
func evictHuge(t *testing.T, l *lab.Lab, vm, twin *lab.VM) *evict.HugePages {
	t.Helper()
	ln := listen(t, l.B)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx := labtest.Within(t, time.Minute)
	received := make(chan error, 1)
	var task *evict.HugePages
	go func() {
		received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP, Log: log,
			HugePages: func(h *evict.HugePages) { task = h }}, ln)
	}()
	var r result
	r.report, r.source = evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, ln.Addr().String()),
		Log: log}.Evict(ctx)
	if r.source != nil {
		ln.Close()
	}
	r.destErr = <-received
	r.mustComplete(t)
	if task == nil {
		t.Fatal("the source told of no huge pages")
	}
	return task
}

// A VM whose memory was in huge pages has them again after its eviction. Its memory stays as it
// was.
func TestHugePages(t *testing.T) {
	needHuge(t)
	l := labtest.New(t, lab.Options{Rate: 10e9})
	anonymous := bareCase{machine: "pc", vcpus: 2}.spec(lab.QEMU{})
	// QEMU 7.2 places a memfd at an unaligned address, so none of it can be in huge pages.
	shared := bareCase{machine: "q35,memory-backend=ram", vcpus: 1, async: true}.spec(lab.QEMU{})
	shared.Extra = []string{"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,"+
		"share=on,mem-path=/dev/shm,align=2M", shared.MemoryMiB)}
	for name, spec := range map[string]lab.Spec{"anonymous": anonymous, "shared": shared} {
		t.Run(name, func(t *testing.T) {
			vm := boot(t, l, spec)
			defer vm.Kill()
			if name == "shared" {
				collapseAll(t, vm)
			}
			before := hugeMiB(t, vm.PID())
			if load := vm.Spec.Load; before < load.HotMiB+load.IdleMiB/2 {
				t.Fatalf("before, %d MiB are in huge pages: the test shows nothing", before)
			}
			twin := incoming(t, l, vm)
			defer twin.Kill()
			task := evictHuge(t, l, vm, twin)
			came := hugeMiB(t, twin.PID())
			shown := 0
			log := slog.New(slog.NewTextHandler(t.Output(), nil))
			r, err := task.Restore(t.Context(), log, func(r evict.Restored) {
				if r.Restored < shown || r.Restored > r.Huge {
					t.Errorf("after %d units: %+v", shown, r)
				}
				shown = r.Restored
			})
			if err != nil {
				t.Fatal(err)
			}
			after := hugeMiB(t, twin.PID())
			t.Logf("in huge pages %d MiB before, %d when it had come, %d after: %+v", before, came,
				after, r)
			if r.Reason != "" || r.Restored == 0 || r.Restored+r.Sparse != r.Huge {
				t.Errorf("not all huge pages are there again: %+v", r)
			}
			if after < 2*r.Restored*9/10 || after < before*9/10-2*r.Sparse {
				t.Errorf("%d MiB were in huge pages before, and %d are now: %+v", before, after, r)
			}
			if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 10_000); err != nil {
				t.Error(err)
			}
			labtest.MustCheck(t, twin)
		})
	}
}

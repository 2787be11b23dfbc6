package evict_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// memoryFiles returns how much memory a QEMU's files without a name take.
func memoryFiles(t *testing.T, pid int) int64 {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[uint64]int64{}
	for _, e := range entries {
		path := dir + "/" + e.Name()
		var st unix.Stat_t
		if to, err := os.Readlink(path); err == nil && strings.HasPrefix(to, "/memfd:") &&
			unix.Stat(path, &st) == nil {
			files[st.Ino] = st.Blocks * 512
		}
	}
	sum := int64(0)
	for _, n := range files {
		sum += n
	}
	return sum
}

// A guest may give memory back to its host by its balloon, or never use it. The destination must
// not make such memory. A memory file there would have memory for each placed page, even a zero
// page. The check for such memory must make none at the source either.
func TestUnused(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{Memfd: true, MemoryMiB: 768, Devices: lab.Full,
		Load: lab.Load{HotMiB: 40, IdleMiB: 40, OtherMiB: 10, Stale: true}})
	const left = 320 << 20
	inUse := memoryFiles(t, vm.PID())
	if err := vm.Execute(t.Context(), "balloon", map[string]any{"value": left}, nil); err != nil {
		t.Fatal(err)
	}
	for ctx := labtest.Within(t, 2*time.Minute); ; time.Sleep(200 * time.Millisecond) {
		var b struct{ Actual int64 }
		if err := vm.Execute(ctx, "query-balloon", nil, &b); err != nil {
			t.Fatal(err)
		}
		if b.Actual <= left {
			break
		}
	}
	before := memoryFiles(t, vm.PID())
	if before > left+64<<20 || before > inUse*3/4 {
		t.Fatalf("the guest's memory takes %d MiB and took %d: this tests little", before>>20,
			inUse>>20)
	}
	twin := incoming(t, l, vm)
	r := evictVM(labtest.Within(t, 2*time.Minute), t, l, vm, twin)
	r.mustComplete(t)
	after := memoryFiles(t, twin.PID())
	t.Logf("%d MiB in use, %d at the source when it left, %d at the destination; %+v", inUse>>20,
		before>>20, after>>20, r.report.Pages)
	if after > before*5/4 {
		t.Errorf("the memory of the VM takes %d MiB at the destination, and took %d at the source",
			after>>20, before>>20)
	}
	if r.report.Pages.Unused < 300<<20/4096 {
		t.Errorf("%d pages were left out as unused", r.report.Pages.Unused)
	}
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}
	labtest.MustCheck(t, twin)
}

// Memory that could be plugged in, and is not, is not made at the destination either.
func TestUnplugged(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	q, err := lab.StockQEMU(t.Context())
	labtest.Need(t, err)
	v := standingCase{state: "running", code: counterROM,
		args: "-m 64,slots=1,maxmem=4G -object memory-backend-memfd,id=m,size=1G,share=on " +
			"-device virtio-mem-pci,memdev=m,requested-size=512M"}.begin(t, q)
	v.counts("source")
	pid, _, err := v.source.Process(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	made := memoryFiles(t, pid)
	if pid, _, err = v.twin.Process(t.Context()); err != nil {
		t.Fatal(err)
	}
	report, err, destErr := v.evict(true)
	if err != nil || destErr != nil {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if n := memoryFiles(t, pid); n > made {
		t.Errorf("memory that is not plugged in takes %d KiB, and took %d at the source", n>>10,
			made>>10)
	}
	if report.Pages.Unused < 1<<30/4096 {
		t.Errorf("%d pages were left out as unused", report.Pages.Unused)
	}
	v.counts("twin")
}

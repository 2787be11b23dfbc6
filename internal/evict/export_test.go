package evict_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/export"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/lab"
	"vacate/lab/labtest"
)

// A VM that was frozen, and whose QEMU is gone, runs on from its exported file.
func TestExport(t *testing.T) {
	t.Parallel()
	load := lab.Load{HotMiB: 40, IdleMiB: 60, OtherMiB: 20, FileMiB: 4}
	stock, trixie, bookworm := lab.StockQEMU, cached(t, lab.BackportsQEMU), cached(t,
		lab.Backports12QEMU)
	const exec, file = "exec:cat 'FILE'", "file:FILE"
	for _, c := range []struct {
		name string
		find func(context.Context) (lab.QEMU, error)
		from string
		spec lab.Spec
	}{
		{"bare", stock, exec, lab.Spec{Load: load}},
		{"full", stock, exec, lab.Spec{Devices: lab.Full, Load: load}},
		{"full q35, memfd", stock, exec,
			lab.Spec{Devices: lab.Full, Machine: "q35", VCPUs: 2, Memfd: true, Load: load}},
		{"huge pages", stock, exec, lab.Spec{Load: load}},
		{"debian 12 bare", bookworm, exec, lab.Spec{Load: load}},
		{"debian 12 full", bookworm, file, lab.Spec{Devices: lab.Full, Load: load}},
		{"newest bare", trixie, file, lab.Spec{Load: load}},
		{"newest full", trixie, exec, lab.Spec{Devices: lab.Full, Load: load}},
		{"newest, huge pages", trixie, file, lab.Spec{Load: load}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := labtest.New(t, lab.Options{})
			var err error
			c.spec.QEMU, err = c.find(labtest.Within(t, 5*time.Minute))
			labtest.Need(t, err)
			if strings.Contains(c.name, "huge pages") {
				reserveHugePages(t, 128)
				c.spec.Machine, c.spec.MemoryMiB = "pc,memory-backend=huge", 256
				c.spec.Extra = []string{"-object",
					"memory-backend-memfd,id=huge,hugetlb=on,hugetlbsize=2M,size=256M"}
			}
			exportVM(t, l, c.spec, c.from)
		})
	}
}

// cached makes a function that finds a QEMU use the tests' cache.
func cached(t testing.TB, find func(context.Context,
	string) (lab.QEMU, error)) func(context.Context) (lab.QEMU, error) {
	return func(ctx context.Context) (lab.QEMU, error) { return find(ctx, labtest.Dir(t)) }
}

func exportVM(t *testing.T, l *lab.Lab, spec lab.Spec, from string) {
	vm := boot(t, l, spec)
	head, load, facts, err := evict.Freeze(labtest.Within(t, time.Minute), vm.QMP)
	if err != nil {
		t.Fatal(err)
	}
	// This is how a restarted engine finds it: it cannot ask QEMU.
	mem, err := guestmem.Reopen(facts.Process.PID, facts.Blocks)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "a VM.state")
	began := time.Now()
	frozen := export.VM{Memory: mem, Head: head, Load: load}
	if err := frozen.WriteFile(labtest.Within(t, time.Minute), name, nil); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MiB written in %v", fi.Size()>>20, time.Since(began))
	compare(t, name, mem)
	vm.Kill()
	mem.Close() // and with it, huge pages
	ops := len(vm.Guest.Samples())

	again, err := l.B.Incoming(labtest.Within(t, time.Minute), vm,
		lab.IncomingOptions{From: strings.ReplaceAll(from, "FILE", name)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		said, err := os.ReadFile(filepath.Join(l.RunDir(), again.Name+"-stderr.log"))
		t.Logf("QEMU said %q, %v", said, err)
		if bytes.Contains(said, []byte("vmdesc")) {
			t.Error("QEMU misses something in the file")
		}
	}()
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(10 * time.Millisecond) {
		status, err := again.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if status == "paused" {
			break
		}
		if status != "inmigrate" {
			t.Fatalf("the VM is %q", status)
		}
	}
	if n := len(vm.Guest.Samples()); n != ops {
		t.Errorf("%d reports of a guest that is not to run", n-ops)
	}
	if err := again.Execute(labtest.Within(t, time.Minute), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 10_000); err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, again)
}

// compare makes sure that the file holds the frozen memory, page by page.
func compare(t *testing.T, name string, mem *guestmem.Memory) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := map[string]func(dst []byte, offset uint64) error{}
	for i, b := range mem.Blocks() {
		want[b.Name] = func(dst []byte, offset uint64) error { return mem.Read(dst, i, offset) }
	}
	left := 0
	var page, zero [4096]byte
	r := migstream.NewReader(f)
	for {
		item, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch it := item.(type) {
		case migstream.MemSize:
			for _, b := range it.Blocks {
				left += int(b.Length / 4096)
			}
		case migstream.Page:
			left--
			if err := want[it.Block](page[:], it.Offset); err != nil {
				t.Fatal(err)
			}
			if it.Data == nil {
				it.Data = zero[:]
			}
			if !bytes.Equal(it.Data, page[:]) {
				t.Fatalf("page %#x of %s is not that of the frozen VM", it.Offset, it.Block)
			}
		}
	}
	if left != 0 {
		t.Errorf("%d pages are not in the file", left)
	}
}

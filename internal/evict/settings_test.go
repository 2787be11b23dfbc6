package evict_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// After an eviction both QEMUs are like any other. The one that has the VM has its own settings,
// can migrate, saves a snapshot, and can be evicted.
func TestAfterwards(t *testing.T) {
	t.Parallel()
	stock, newest := lab.StockQEMU, cached(t, lab.BackportsQEMU)
	for name, find := range map[string]func(context.Context) (lab.QEMU, error){"stock": stock,
		"newest": newest} {
		t.Run(name, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Rate: 2e9})
			q, err := find(labtest.Within(t, 5*time.Minute))
			labtest.Need(t, err)
			disk := filepath.Join(t.TempDir(), "disk.qcow2")
			if err := os.WriteFile(disk, emptyQcow2(64<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			vm := boot(t, l, lab.Spec{QEMU: q, MemoryMiB: 192,
				Load: lab.Load{HotMiB: 16, IdleMiB: 48},
				Extra: []string{"-blockdev",
					"driver=qcow2,node-name=disk,file.driver=file,file.filename=" + disk, "-device",
					"virtio-blk-pci,drive=disk"}})
			twin := incoming(t, l, vm)
			before := settingsOf(t, twin)
			evictVM(labtest.Within(t, time.Minute), t, l, vm, twin).mustComplete(t)
			if after := settingsOf(t, twin); after != before {
				t.Errorf("migration settings before %s, after %s", before, after)
			}
			ctx := labtest.Within(t, 2*time.Minute)
			var answer string
			for _, line := range []string{"savevm after", "delvm after"} {
				if err := twin.Execute(ctx, "human-monitor-command",
					map[string]string{"command-line": line}, &answer); err != nil || answer != "" {
					t.Errorf("%s: %q, %v", line, answer, err)
				}
			}
			// This comes last, as the VM stands when it is complete.
			migrate(ctx, t, twin)
			if err := twin.Execute(ctx, "cont", nil, nil); err != nil {
				t.Error(err)
			}
			before = settingsOf(t, twin)
			back, err := l.A.Incoming(labtest.Within(t, time.Minute), twin, lab.IncomingOptions{})
			if err != nil {
				t.Fatal(err)
			}
			evictBetween(labtest.Within(t, time.Minute), t, l.B, l.A, twin, back).mustComplete(t)
			if after := settingsOf(t, back); after != before {
				t.Errorf("migration settings before %s, after %s", before, after)
			}
			labtest.MustCheck(t, back)
		})
	}
}

// emptyQcow2 is an image of at most 512 MiB that reads as zero. It has the header, the refcount
// table, its block, and the L1 table, in a cluster each (docs/interop/qcow2 of QEMU).
func emptyQcow2(size uint64) []byte {
	const bits, cluster = 16, 1 << 16
	b := make([]byte, 4*cluster)
	header := []any{uint32(0x514649fb), uint32(2), uint64(0), uint32(0), uint32(bits), size,
		uint32(0),
		uint32(1), uint64(3 * cluster), uint64(cluster), uint32(1), uint32(0), uint64(0)}
	at := 0
	for _, v := range header {
		n, _ := binary.Encode(b[at:], binary.BigEndian, v)
		at += n
	}
	binary.BigEndian.PutUint64(b[cluster:], 2*cluster)
	for i := range 4 {
		binary.BigEndian.PutUint16(b[2*cluster+2*i:], 1)
	}
	return b
}

// migrate makes a VM's QEMU migrate it to nowhere.
func migrate(ctx context.Context, t *testing.T, vm *lab.VM) {
	t.Helper()
	if err := vm.Execute(ctx, "migrate", map[string]string{"uri": "exec:cat >/dev/null"},
		nil); err != nil {
		t.Error(err)
		return
	}
	for {
		var m struct {
			Status string          `json:"status"`
			Error  string          `json:"error-desc"`
			RAM    json.RawMessage `json:"ram"`
		}
		if err := vm.Execute(ctx, "query-migrate", nil, &m); err != nil {
			t.Error(err)
			return
		}
		switch m.Status {
		case "completed":
			return
		case "failed", "cancelled":
			t.Errorf("the migration %s: %s", m.Status, m.Error)
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Errorf("the migration is %q: %s", m.Status, m.RAM)
			return
		}
	}
}

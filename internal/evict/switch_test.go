package evict_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
)

// switches are evictions in which the source's QEMU does not freeze the VM, or somebody else
// interferes, after all was prepared. As the last frame before the freeze comes, something happens
// at the source.
var switches = []attempt{
	{name: "a backup job begins", here: beginBackup, says: "job bk (backup"},
	{name: "a mirror is ready", here: beginMirror, says: "job mi (mirror"},
	{name: "the file to save to is taken away", here: takeFile, says: "xen-save-devices-state"},
	{name: "the file to save to is full", here: fillFile, says: "xen-save-devices-state"},
	{name: "the VM is dumped", here: dump, says: "dump"},
	{name: "another migration begins", here: migrateForever, says: "being migrated already"},
	{name: "an operator pauses the VM", here: pauseIt, stays: "paused", cancelAt: evict.Loading,
		says: "canceled"},
}

func init() {
	for i := range switches {
		a := &switches[i]
		a.upstream, a.kind, a.do, a.want = true, armed, pass, evict.ErrAborted
	}
}

// does makes a QEMU run a command. At a random moment of an eviction QEMU may refuse.
func does(t *testing.T, vm *lab.VM, command string, args any) bool {
	t.Helper()
	err := vm.Execute(labtest.Within(t, 10*time.Second), command, args, nil)
	if err != nil {
		t.Logf("%s: %v", command, err)
	}
	return err == nil
}

// undo undoes a command when the test ends.
func undo(t *testing.T, vm *lab.VM, command string, args any) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := vm.Execute(ctx, command, args, nil); err != nil {
			t.Logf("%s: %v", command, err)
		}
	})
}

type m map[string]any // arguments

func beginBackup(t *testing.T, vm *lab.VM) {
	begin(t, vm, "bk", "blockdev-backup", m{"sync": "full", "speed": 1000})
}

func beginMirror(t *testing.T, vm *lab.VM) {
	begin(t, vm, "mi", "blockdev-mirror", m{"sync": "none"})
}

// begin begins a block job with the VM's disk.
func begin(t *testing.T, vm *lab.VM, id, command string, args m) {
	does(t, vm, "blockdev-add",
		m{"driver": "null-co", "node-name": "nowhere", "size": 20 << 20, "read-zeroes": true})
	undo(t, vm, "blockdev-del", m{"node-name": "nowhere"})
	args["job-id"], args["device"], args["target"] = id, "disk", "nowhere"
	if !does(t, vm, command, args) {
		return
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := vm.Execute(ctx, "block-job-cancel", m{"device": id, "force": true},
			nil); err != nil {
			t.Log(err)
		}
		for jobs := []any{nil}; len(jobs) > 0 &&
			ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
			if err := vm.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
				t.Error(err)
				return
			}
		}
	})
}

func takeFile(t *testing.T, vm *lab.VM) {
	var sets []struct {
		ID int `json:"fdset-id"`
	}
	if err := vm.Execute(labtest.Within(t, 10*time.Second), "query-fdsets", nil,
		&sets); err != nil {
		t.Error(err)
	}
	for _, set := range sets { // none, if QEMU has closed it by then
		vm.Execute(labtest.Within(t, 10*time.Second), "remove-fd", m{"fdset-id": set.ID}, nil)
	}
}

// fillFile makes QEMU save to a file that is always full.
func fillFile(t *testing.T, vm *lab.VM) {
	var sets []struct {
		ID int `json:"fdset-id"`
	}
	if err := vm.Execute(labtest.Within(t, 10*time.Second), "query-fdsets", nil,
		&sets); err != nil {
		t.Error(err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, set := range sets { // none, if QEMU has closed it by then
		ctx := labtest.Within(t, 10*time.Second)
		q, err := qmp.Dial(ctx, vm.LabQMP)
		if err != nil {
			t.Log(err) // its process is stopped already
			return
		}
		defer q.Close()
		if q.Run(ctx, "remove-fd", m{"fdset-id": set.ID}, nil) == nil {
			if err := q.RunFD(ctx, "add-fd", m{"fdset-id": set.ID}, nil,
				int(full.Fd())); err != nil {
				t.Error(err)
			}
		}
	}
}

func dump(t *testing.T, vm *lab.VM) {
	does(t, vm, "dump-guest-memory",
		m{"paging": false, "protocol": "file:/dev/null", "detach": true})
}

func migrateForever(t *testing.T, vm *lab.VM) {
	path := t.TempDir() + "/nowhere"
	ln, err := net.Listen("unix", path) // nobody accepts a connection from it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	does(t, vm, "migrate", m{"uri": "unix:" + path})
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := vm.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
			t.Error(err)
		}
		for state := "cancelling"; state == "cancelling" ||
			state == "active"; time.Sleep(10 * time.Millisecond) {
			var s struct{ Status string }
			if err := vm.Execute(ctx, "query-migrate", nil, &s); err != nil {
				t.Error(err)
				return
			}
			state = s.Status
		}
	})
}

func pauseIt(t *testing.T, vm *lab.VM) {
	does(t, vm, "stop", nil)
	undo(t, vm, "cont", nil)
}

// disturbed disturbs evictions in one of these ways at a random moment while the VM is being
// frozen, or soon after. It does so as often as VACATE_REFUSALS says. Evictions that were not
// aborted by then are aborted when the twin is loaded.
func disturbed(t *testing.T, l *lab.Lab, vm *lab.VM) {
	rounds, err := strconv.Atoi(os.Getenv("VACATE_REFUSALS"))
	if err != nil {
		rounds = 3
	}
	ranOn, refused := 0, 0
	defer func() {
		t.Logf("QEMU %s: %d of %d ran on at the source; %d of them were aborted before the twin "+
			"was loaded", vm.Spec.QEMU.Version, ranOn, rounds, refused)
	}()
	for round := range rounds {
		a := switches[rand.N(len(switches))]
		wait := rand.N(15 * time.Millisecond)
		name := fmt.Sprintf("%d: %s after %v", round, a.name, wait)
		t.Run(name, func(t *testing.T) {
			done := make(chan struct{})
			disturb := sync.OnceFunc(func() {
				go func() {
					defer close(done)
					time.Sleep(wait)
					a.here(t, vm)
				}()
			})
			b := attempt{upstream: true, kind: loaded, do: cut, want: evict.ErrAborted,
				disturbed: true, show: func(p evict.Progress) {
					if p.State == evict.Switching {
						disturb()
					}
				}}
			if early := b.run(t, l, vm); early {
				refused++
			}
			<-done
		})
		// The effect on the VM is undone.
		if err := vm.Guest.WaitOps(labtest.Within(t, 20*time.Second), 1000); err != nil {
			t.Fatalf("after %s the guest does not work on: %v", name, err)
		}
		if t.Failed() {
			return
		}
		ranOn++
	}
}

// migrateToNowhere makes sure that QEMU's own migration of the VM works, and that the VM runs on
// after it.
func migrateToNowhere(t *testing.T, vm *lab.VM) {
	t.Helper()
	// The guest writes to its memory faster than a pass over it takes: the rest moves while the
	// guest stands.
	does(t, vm, "migrate-set-parameters", m{"downtime-limit": 60_000})
	defer does(t, vm, "migrate-set-parameters", m{"downtime-limit": 300})
	does(t, vm, "migrate", m{"uri": "exec:cat >/dev/null"})
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var s struct {
			Status string `json:"status"`
		}
		if err := vm.Execute(ctx, "query-migrate", nil, &s); err != nil && ctx.Err() != nil {
			t.Fatalf("QEMU's own migration does not end: %v", err)
		}
		if s.Status == "completed" {
			break
		}
		if s.Status == "failed" || s.Status == "cancelled" {
			t.Fatalf("QEMU's own migration %s", s.Status)
		}
	}
	does(t, vm, "cont", nil)
	if err := vm.Guest.WaitOps(labtest.Within(t, 20*time.Second), 1000); err != nil {
		t.Fatalf("the guest does not work on: %v", err)
	}
}

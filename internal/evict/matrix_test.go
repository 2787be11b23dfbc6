package evict_test

import (
	"context"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// Every kind of VM that must work moves, runs on, and finds all of its memory as it was.
func TestMatrix(t *testing.T) {
	t.Parallel()
	load := lab.Load{HotMiB: 40, IdleMiB: 40, OtherMiB: 20, FileMiB: 4}
	disk := lab.Load{HotMiB: 40, IdleMiB: 40, OtherMiB: 20, FileMiB: 4, CacheMiB: 20}
	for name, c := range map[string]struct {
		spec   lab.Spec
		reboot bool
	}{
		"bare pc": {spec: lab.Spec{Load: load}},
		"full pc": {spec: lab.Spec{Devices: lab.Full, Load: disk}},
		"full q35, 2 CPUs": {spec: lab.Spec{Devices: lab.Full, Machine: "q35", VCPUs: 2,
			Load: disk}},
		"memory above 4 GiB": {spec: lab.Spec{Machine: "pc,max-ram-below-4g=256M", MemoryMiB: 512,
			Load: lab.Load{HotMiB: 40, IdleMiB: 240, OtherMiB: 20}}},
		// QEMU has 2 GiB of it above 4 GiB, where Linux begins. The load needs some of the rest.
		"5 GB": {spec: lab.Spec{MemoryMiB: 5120, VCPUs: 2,
			Load: lab.Load{HotMiB: 100, IdleMiB: 2200, OtherMiB: 20}}},
		"memfd": {spec: lab.Spec{Memfd: true, Devices: lab.Full, Load: disk}},
		"idle": {spec: lab.Spec{Devices: lab.Full,
			Load: lab.Load{HotMiB: 10, IdleMiB: 50, Sleep: true}}},
		"rebooted": {spec: lab.Spec{Load: load}, reboot: true},
	} {
		t.Run(name, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Rate: 2e9})
			matrix(t, l, c.spec, c.reboot)
		})
	}
}

func matrix(t *testing.T, l *lab.Lab, spec lab.Spec, reboot bool) {
	vm := boot(t, l, spec)
	if reboot {
		if err := vm.Guest.Reboot(labtest.Within(t, 2*time.Minute), vm); err != nil {
			t.Fatal(err)
		}
	}
	twin := incoming(t, l, vm)
	r := evictVM(labtest.Within(t, 2*time.Minute), t, l, vm, twin)
	t.Logf("%+v", r.report)
	r.mustComplete(t)
	if !spec.Load.Sleep {
		if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
			t.Error(err)
		}
	}
	labtest.MustCheck(t, twin)
}

// The newest QEMU of Debian's backports works like the stock one.
func TestBackports(t *testing.T) {
	t.Parallel()
	for name, find := range map[string]func(context.Context, string) (lab.QEMU, error){
		"newest": lab.BackportsQEMU, "debian 12": lab.Backports12QEMU,
	} {
		t.Run(name, func(t *testing.T) {
			l := labtest.New(t, lab.Options{Rate: 2e9})
			q, err := find(labtest.Within(t, 5*time.Minute), labtest.Dir(t))
			labtest.Need(t, err)
			t.Log(q)
			for _, d := range []lab.Devices{lab.Bare, lab.Full} {
				matrix(t, l, lab.Spec{QEMU: q, Devices: d,
					Load: lab.Load{HotMiB: 40, IdleMiB: 40, OtherMiB: 20}}, false)
			}
		})
	}
}

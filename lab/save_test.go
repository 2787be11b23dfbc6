package lab

import (
	"testing"
	"time"
)

// A saved VM starts on either host, each time with the memory that it had, and works on by itself.
func TestSave(t *testing.T) {
	l := newTestLab(t, Options{BootOnce: true})
	ctx := deadline(t, 3*time.Minute)
	vm, err := l.A.Boot(ctx, Spec{MemoryMiB: 256, Load: Load{HotMiB: 8, IdleMiB: 8, Slow: true}})
	if err != nil {
		t.Fatal(err)
	}
	saved, err := vm.Save(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if vm.Alive() {
		t.Error("the VM that was saved is alive")
	}
	var both []*VM
	for _, h := range []*Host{l.A, l.B} {
		vm, err := saved.Start(ctx, h)
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, vm)
	}
	for _, vm := range both {
		if err := vm.Guest.WaitOps(ctx, 1000); err != nil {
			t.Error(err)
		}
		check, err := vm.Guest.Check(ctx, vm)
		if err != nil || check.Bad != 0 || check.Pages < 16<<8 {
			t.Errorf("%d bad pages of %d, %v", check.Bad, check.Pages, err)
		}
	}
	full := &VM{Name: "full", Spec: Spec{Devices: Full}}
	if _, err := full.Save(ctx); err == nil {
		t.Error("a VM with a disk was saved")
	}
}

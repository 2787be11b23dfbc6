package lab

import (
	"context"
	"fmt"
	"time"
)

// Saved is a VM in a file, from which it starts any number of times, each with a guest of its own.
// That takes a fraction of the time of a boot.
type Saved struct {
	spec  Spec
	file  string
	guest *Guest // as it was
}

// Save writes a VM to a file of the lab's run directory, and ends it. It has no disk, as that would
// be shared by all that start from the file.
func (vm *VM) Save(ctx context.Context) (*Saved, error) {
	if vm.Spec.Devices != Bare {
		return nil, fmt.Errorf("save VM %s: its devices are %q, want %q", vm.Name, vm.Spec.Devices,
			Bare)
	}
	s := &Saved{spec: vm.Spec, file: vm.Host.lab.run + "/" + vm.Name + "-saved", guest: newGuest()}
	if err := vm.saveTo(ctx, s.file); err != nil {
		return nil, vm.explain(err)
	}
	vm.Kill()
	vm.Guest.mu.Lock()
	defer vm.Guest.mu.Unlock()
	s.guest.hello, s.guest.hellos, s.guest.lastSeq = vm.Guest.hello, vm.Guest.hellos,
		vm.Guest.lastSeq
	return s, nil
}

// saveTo writes a VM to a file. It does not run after that.
func (vm *VM) saveTo(ctx context.Context, file string) error {
	// It is not stopped before, as it would be stopped where it starts, too. What it writes to its
	// memory comes while it stands.
	err := vm.Execute(ctx, "migrate-set-parameters",
		map[string]any{"downtime-limit": 60_000, "max-bandwidth": int64(1) << 40}, nil)
	if err == nil {
		err = vm.Execute(ctx, "migrate", map[string]any{"uri": "exec:cat >" + file}, nil)
	}
	for err == nil {
		var m struct{ Status string }
		if err = vm.Execute(ctx, "query-migrate", nil, &m); err != nil {
			break
		}
		if m.Status == "completed" {
			return nil
		}
		if m.Status == "failed" {
			err = fmt.Errorf("its migration %s", m.Status)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("save VM %s: %w", vm.Name, err)
}

// Start starts the VM on a host. It returns when the guest runs there.
func (s *Saved) Start(ctx context.Context, h *Host) (*VM, error) {
	g := newGuest()
	g.hello, g.hellos, g.lastSeq = s.guest.hello, s.guest.hellos, s.guest.lastSeq
	vm, err := h.Incoming(ctx, &VM{Spec: s.spec, Guest: g},
		IncomingOptions{From: "exec:cat " + s.file, Running: true})
	if err != nil {
		return nil, err
	}
	if err := g.wait(ctx, "the saved guest to report", vm.done,
		func() bool { return len(g.samples) > 0 }); err != nil {
		err = vm.explain(fmt.Errorf("start saved VM on host %s: %w", h.Name, err))
		vm.Kill()
		return nil, err
	}
	return vm, nil
}

package daemons

import (
	"context"
	"fmt"
	"slices"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"

	"connectrpc.com/connect"
)

// VM is one that each host of a fleet has a description of, and that moves among them. Its QEMUs
// are started by daemons alone.
type VM struct {
	Name  string
	Guest *lab.Guest
	there map[*lab.Host]*lab.Expected
}

// Boot describes a VM to all hosts, and starts it on one. Descriptions have more lines, too.
func (f *Fleet) Boot(ctx context.Context, on *lab.Host, name string, spec lab.Spec,
	more ...string) (*VM, error) {
	first, err := on.ExpectBoot(ctx, spec)
	if err != nil {
		return nil, err
	}
	v := &VM{Name: name, Guest: first.Guest(), there: map[*lab.Host]*lab.Expected{on: first}}
	for _, h := range f.Hosts {
		if h != on {
			v.there[h], err = h.Expect(ctx, &lab.VM{Spec: first.Spec(), Guest: v.Guest})
			if err != nil {
				return nil, err
			}
		}
		// On a busy machine a QEMU may get no core for long.
		if err := f.Describe(h, name, v.there[h].QMP, v.there[h].Args,
			append(slices.Clone(more), `start_timeout = "3m"`)...); err != nil {
			return nil, err
		}
	}
	if _, err := f.Host(on).Start(ctx, connect.NewRequest(&hostv1.StartRequest{
		Vm: name})); err != nil {
		return nil, fmt.Errorf("start %s on host %s: %w", name, on.Name, err)
	}
	vm, err := first.Came(ctx)
	if err != nil {
		return nil, err
	}
	return v, vm.Booted(ctx)
}

// Alive returns all QEMUs of the VM that there are now.
func (v *VM) Alive() (all []*lab.VM) {
	for _, e := range v.there {
		for _, vm := range e.VMs() {
			if vm.Alive() {
				all = append(all, vm)
			}
		}
	}
	return all
}

// Only waits until there is one QEMU of the VM alone, and returns it.
func (v *VM) Only(ctx context.Context) (*lab.VM, error) {
	for {
		all := v.Alive()
		if len(all) == 1 {
			return all[0], nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			var names []string
			for _, vm := range all {
				status, err := vm.Status(context.WithoutCancel(ctx))
				names = append(names, fmt.Sprintf("%s (%s, %v)", vm.Name, status, err))
			}
			return nil, fmt.Errorf("VM %s has %d QEMUs: %v", v.Name, len(all), names)
		}
	}
}

// Check lets the guest check all of its memory, and returns how many pages that is. A bad page is
// an error.
func (v *VM) Check(ctx context.Context) (pages uint64, err error) {
	vm, err := v.Only(ctx)
	if err != nil {
		return 0, err
	}
	c, err := v.Guest.Check(ctx, vm)
	if err == nil && (c.Bad != 0 || c.Pages == 0) {
		err = fmt.Errorf("%s has %d bad pages of %d", v.Name, c.Bad, c.Pages)
	}
	return c.Pages, err
}

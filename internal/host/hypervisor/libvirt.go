package hypervisor

import (
	"context"
	"errors"
	"fmt"

	"vacate/internal/fleet/view"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/qmp"
)

// A Host is where a host's VMs are.
type Host struct {
	Dir string // of their descriptions
	URI string // of the libvirt whose domains belong to them; empty: none
}

// ErrTwice is wrapped by a domain's Unfit if a description has its name, too.
var ErrTwice = errors.New("libvirt has a domain of the name of a described VM: rename one")

// All returns all VMs: as Load does, and then libvirt's domains in libvirt's order. Domains are not
// looked at yet. A libvirt that does not run has none.
func (h Host) All(ctx context.Context) ([]VM, error) {
	list, err := Load(h.Dir)
	described := map[string]bool{}
	for _, vm := range list {
		described[vm.Name] = true
	}
	domains, failed := h.domains(ctx)
	for _, d := range domains {
		if described[d.Name] {
			d.Unfit = ErrTwice
		}
		list = append(list, d)
	}
	if failed == nil {
		return list, err
	}
	var errs []error // Unread takes them one by one
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		errs = all.Unwrap()
	} else if err != nil {
		errs = []error{err}
	}
	return list, errors.Join(append(errs, failed)...)
}

// Find returns one VM: the one that is described, or else the domain of that name. The error wraps
// ErrUnknown if there is neither.
func (h Host) Find(ctx context.Context, name string) (VM, error) {
	vm, err := Find(h.Dir, name)
	if !errors.Is(err, ErrUnknown) {
		return vm, err
	}
	unknown := err
	err = h.ask(ctx, func(ctx context.Context, conn *libvirt.Conn) error {
		d, err := conn.Find(ctx, name)
		if err == nil {
			vm, err = h.domain(ctx, conn, d)
		}
		return err
	})
	if errors.Is(err, libvirt.ErrNone) || errors.Is(err, libvirt.ErrNoDomain) {
		err = unknown
	}
	return vm, err
}

// ask does something with libvirt. The error wraps ErrNone if there is none.
func (h Host) ask(ctx context.Context, f func(context.Context, *libvirt.Conn) error) error {
	if h.URI == "" {
		return libvirt.ErrNone
	}
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	conn, err := libvirt.Dial(ctx, h.URI)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(ctx, conn)
}

func (h Host) domains(ctx context.Context) (all []VM, err error) {
	err = h.ask(ctx, func(ctx context.Context, conn *libvirt.Conn) error {
		list, err := conn.List(ctx)
		if err != nil {
			return err
		}
		for _, d := range list {
			vm, err := h.domain(ctx, conn, d)
			if errors.Is(err, libvirt.ErrNoDomain) {
				continue // it has gone meanwhile
			} else if err != nil {
				return err
			}
			all = append(all, vm)
		}
		return nil
	})
	if errors.Is(err, libvirt.ErrNone) {
		err = nil
	}
	return all, err
}

// domain is what libvirt's own description of a domain says that matters here.
func (h Host) domain(ctx context.Context, conn *libvirt.Conn, d libvirt.Domain) (VM, error) {
	vm := VM{Name: d.Name, Libvirt: h.URI}
	m, err := conn.Metadata(ctx, d)
	switch {
	case errors.Is(err, libvirt.ErrMetadata):
		vm.Unfit = fmt.Errorf("%w: see `virsh metadata %s %s`", err, d.Name, libvirt.Namespace)
	case err != nil:
		return vm, err
	}
	if err := CheckName(d.Name); err != nil {
		vm.Unfit = fmt.Errorf("%w: `virsh domrename`", err)
	}
	vm.Pinned, vm.Priority = m.Pinned, m.Priority
	if vm.Labels, err = view.ParseLabels(m.Labels); err != nil {
		vm.Unfit = fmt.Errorf("%w: %w: see `virsh metadata %s %s`", libvirt.ErrMetadata, err,
			d.Name, libvirt.Namespace)
	}
	return vm, nil
}

// domainStates are libvirt's.
var domainStates = map[libvirt.RunState]State{
	libvirt.Running: Running, libvirt.Blocked: Running, libvirt.ShuttingDown: Running,
	libvirt.Paused: Paused, libvirt.IsPMSuspended: Paused,
	libvirt.ShutOff: None, libvirt.HasCrashed: None,
}

// lookAtDomain is Look for a domain. Status has libvirt's words, as `virsh domstate --reason`
// prints them. QEMU is not asked, and libvirt has it name its threads.
func lookAtDomain(ctx context.Context, vm VM) (s Seen, err error) {
	err = Host{URI: vm.Libvirt}.ask(ctx, func(ctx context.Context, conn *libvirt.Conn) error {
		d, err := conn.Find(ctx, vm.Name)
		if err != nil {
			return err
		}
		info, err := conn.Info(ctx, d)
		if err != nil {
			return err
		}
		s.State, s.Status = domainStates[info.State.State], info.State.String()
		if s.State == "" {
			s.State = Silent
		}
		s.Memory, s.VCPUs = info.Memory, info.VCPUs
		if d.ID < 0 {
			return nil
		}
		// It may have ended just now.
		if s.Process, err = conn.Process(d); err == nil {
			if stopped, err := s.Process.Stopped(); err == nil && stopped {
				s.State = Frozen
			}
		}
		return nil
	})
	if errors.Is(err, libvirt.ErrNone) || errors.Is(err, libvirt.ErrNoDomain) {
		return Seen{State: None}, fmt.Errorf("domain %s: %w", vm.Name, ErrUnknown)
	}
	return s, err
}

// Ask connects to the monitor of a VM's QEMU for as long as f runs. It asks a domain's through
// libvirt, which marks the domain as tainted (custom-monitor).
func Ask(ctx context.Context, vm VM, f func(*qmp.Client) error) error {
	if vm.Libvirt == "" {
		q, err := qmp.Dial(ctx, vm.QMP)
		if err != nil {
			return err
		}
		defer q.Close()
		return f(q)
	}
	conn, err := libvirt.Dial(ctx, vm.Libvirt)
	if err != nil {
		return err
	}
	defer conn.Close()
	d, err := conn.Find(ctx, vm.Name)
	if err != nil {
		return err
	}
	monitor, err := conn.Monitor(ctx, d)
	if err != nil {
		return err
	}
	q, err := qmp.NewClient(ctx, monitor)
	if err != nil {
		return err
	}
	defer q.Close()
	return f(q)
}

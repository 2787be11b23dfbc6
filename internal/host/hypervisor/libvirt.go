package hypervisor

import (
	"context"
	"errors"

	"vacate/internal/qemu/libvirt"
)

// A Domain is a VM of this host's libvirt, which needs no description here. Seen.Status has
// libvirt's words, as "virsh domstate --reason" prints them.
type Domain struct {
	Seen
	Name     string
	Pinned   bool // from its metadata, as all that follows; see libvirt.Metadata
	Priority int
}

// domainStates are libvirt's.
var domainStates = map[libvirt.RunState]State{
	libvirt.Running: Running, libvirt.Blocked: Running, libvirt.ShuttingDown: Running,
	libvirt.Paused: Paused, libvirt.IsPMSuspended: Paused,
	libvirt.ShutOff: None, libvirt.HasCrashed: None,
}

// Domains returns the VMs of the libvirt that a URI names; none where no libvirt is.
func Domains(ctx context.Context, uri string) ([]Domain, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	conn, err := libvirt.Dial(ctx, uri)
	if errors.Is(err, libvirt.ErrNone) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer conn.Close()
	infos, err := conn.List(ctx)
	if err != nil {
		return nil, err
	}
	var list []Domain
	for _, i := range infos {
		d := Domain{Name: i.Name, Pinned: i.Metadata.Pinned, Priority: i.Metadata.Priority}
		d.State, d.Status = domainStates[i.State.State], i.State.String()
		if d.State == "" {
			d.State = Silent
		}
		d.Memory, d.VCPUs = i.Memory, i.VCPUs
		if i.ID >= 0 {
			// It may have ended just now.
			if d.Process, err = conn.Process(i.Domain); err == nil {
				if stopped, err := d.Process.Stopped(); err == nil && stopped {
					d.State = Frozen
				}
			}
		}
		list = append(list, d)
	}
	return list, nil
}

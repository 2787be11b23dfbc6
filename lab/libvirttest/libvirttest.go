// Package libvirttest has what tests with two libvirt hosts have in common.
package libvirttest

import (
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// Managed is the domain web1 on the first of two hosts, each with a libvirt of its own.
type Managed struct {
	*testing.T
	Lab    *lab.Lab
	Hosts  *libvirtlab.Hosts
	Domain *libvirtlab.Domain
}

// Start starts a lab, the hosts and the domain. They end with the test.
func Start(t *testing.T, o lab.Options, spec libvirtlab.Spec,
	setups ...libvirtlab.Setup) *Managed {
	t.Helper()
	m := &Managed{T: t, Lab: labtest.New(t, o)}
	labtest.Need(t, libvirtlab.Probe())
	ctx := labtest.Within(t, 4*time.Minute)
	var err error
	m.Hosts, err = libvirtlab.New(ctx, m.Lab, setups...)
	m.Check(err)
	t.Cleanup(m.Hosts.Close)
	m.Domain, err = m.Hosts.Start(ctx, "web1", spec)
	m.Check(err)
	return m
}

// Check ends the test if err is not nil.
func (m *Managed) Check(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// Virsh runs a command of an operator's on a host. The test fails if the command does.
func (m *Managed) Virsh(h *libvirtlab.Host, args ...string) string {
	m.Helper()
	out, err := h.Virsh(labtest.Within(m.T, 3*time.Minute), args...)
	if err != nil {
		m.Errorf("virsh %q: %v", args, err)
	}
	return out
}

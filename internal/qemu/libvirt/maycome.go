package libvirt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// Unfit is why a domain may not come to this libvirt.
type Unfit struct{ Problem, Remedy string }

func (u *Unfit) Error() string { return u.Problem + ": " + u.Remedy }

// Vacant returns an error, an Unfit, if the libvirt has a domain of a name or UUID, running or not.
// The UUID may be zero.
func (c *Conn) Vacant(ctx context.Context, name string, uuid UUID) error {
	what := "of that name"
	d, err := c.Find(ctx, name)
	if errors.Is(err, ErrNoDomain) && uuid != (UUID{}) {
		what = "with the same UUID"
		d, err = c.findUUID(ctx, uuid)
	}
	if errors.Is(err, ErrNoDomain) {
		return nil
	} else if err != nil {
		return err
	}
	s, err := c.State(ctx, d)
	if errors.Is(err, ErrNoDomain) {
		return nil // it has gone meanwhile
	} else if err != nil {
		return err
	}
	u := &Unfit{Problem: fmt.Sprintf("libvirt has a domain %s already, %s, %s", what, d.Name, s)}
	if d.ID >= 0 {
		u.Remedy = fmt.Sprintf("end it with `virsh shutdown %s`, or rename one of the two", d.Name)
	} else {
		u.Remedy = fmt.Sprintf("if it is not needed there, `virsh undefine --keep-nvram %[1]s`, "+
			"otherwise `virsh domrename %[1]s NEWNAME`", d.Name)
	}
	return u
}

func (c *Conn) findUUID(ctx context.Context, uuid UUID) (Domain, error) {
	d, err := call(ctx, c, "find the domain "+uuid.String(), func() (golibvirt.Domain, error) {
		return c.l.DomainLookupByUUID(golibvirt.UUID(uuid))
	})
	return domainOf(d), err
}

// FindNetwork returns an error if libvirt has no network of that name. A daemon for domains alone
// cannot tell: then there is none.
func (c *Conn) FindNetwork(ctx context.Context, name string) error {
	err := do(ctx, c, "find the network "+name, func() error {
		_, err := c.l.NetworkLookupByName(name)
		return err
	})
	if e := (*Error)(nil); errors.As(err, &e) && e.Code != int(golibvirt.ErrNoNetwork) {
		return nil
	}
	return err
}

// MayCome returns an error, an Unfit, if this libvirt would not take a domain whose description has
// been checked. It starts nothing.
func (c *Conn) MayCome(ctx context.Context, d Checked) error {
	if err := c.Vacant(ctx, d.Name, d.UUID); err != nil {
		return err
	}
	var x struct {
		Type string `xml:"type,attr"`
		OS   struct {
			Type struct {
				Arch    string `xml:"arch,attr"`
				Machine string `xml:"machine,attr"`
			} `xml:"type"`
		} `xml:"os"`
		CPU struct {
			Mode  string `xml:"mode,attr"`
			In    string `xml:",innerxml"`
			Match string `xml:"match,attr"`
			Check string `xml:"check,attr"`
		} `xml:"cpu"`
		Emulator string `xml:"devices>emulator"`
	}
	if err := xml.Unmarshal([]byte(d.XML), &x); err != nil {
		return fmt.Errorf("%w: %w", ErrXML, err)
	}
	opt := func(s string) (o golibvirt.OptString) {
		if s != "" {
			o = golibvirt.OptString{s}
		}
		return o
	}
	emulator, arch, machine, kind := opt(x.Emulator), opt(x.OS.Type.Arch), opt(x.OS.Type.Machine),
		opt(x.Type)
	refused := func(problem, remedy string, err error) error {
		var refusal *Error
		if errors.As(err, &refusal) {
			return &Unfit{problem + refusal.Text, remedy}
		}
		return err
	}
	_, err := call(ctx, c, "ask what QEMU can", func() (string, error) {
		return c.l.ConnectGetDomainCapabilities(emulator, arch, machine, kind, 0)
	})
	if err != nil {
		return refused("libvirt's QEMU cannot run it: ",
			fmt.Sprintf("have a QEMU there that is as "+
				"new, or restart the domain with a machine type that is known there: "+
				"`virsh edit %s`", d.Name), err)
	}
	if x.CPU.Mode != "custom" {
		return nil // which one it is, is up to the host
	}
	// Match has been an attribute of a description that was checked, and may still be anything.
	cpu := "<cpu mode='custom' match='exact'>" + x.CPU.In + "</cpu>"
	if x.CPU.Match == "minimum" {
		cpu = strings.Replace(cpu, "exact", "minimum", 1)
	}
	flags := uint32(golibvirt.ConnectCompareCPUFailIncompatible)
	if x.CPU.Check == "none" {
		flags = 0 // then libvirt refuses only a model that it does not know
	}
	_, err = call(ctx, c, "compare the CPU", func() (int32, error) {
		return c.l.ConnectCompareHypervisorCPU(emulator, arch, machine, kind, cpu, flags)
	})
	return refused("it lacks the domain's CPU: ",
		fmt.Sprintf("restart the domain with a CPU model "+
			"that both hosts have (`virsh hypervisor-cpu-baseline`): `virsh edit %s`", d.Name), err)
}

// Runner is the user as which libvirt runs QEMUs unless a domain says otherwise, and the version of
// its QEMU. The user is empty where libvirt does not say.
func (c *Conn) Runner(ctx context.Context) (user, version string, err error) {
	text, err := call(ctx, c, "tell its capabilities", c.l.ConnectGetCapabilities)
	if err != nil {
		return "", "", err
	}
	var x struct {
		Models []struct {
			Name   string `xml:"model"`
			Labels []struct {
				Type  string `xml:"type,attr"`
				Label string `xml:",chardata"`
			} `xml:"baselabel"`
		} `xml:"host>secmodel"`
	}
	if err := xml.Unmarshal([]byte(text), &x); err != nil {
		return "", "", fmt.Errorf("libvirt's capabilities: %w", err)
	}
	for _, m := range x.Models {
		for _, l := range m.Labels {
			if m.Name == "dac" && l.Type == "kvm" { // "+64055:+64055"
				user, _, _ = strings.Cut(strings.TrimPrefix(l.Label, "+"), ":")
			}
		}
	}
	n, err := c.QEMUVersion(ctx)
	return user, fmt.Sprintf("%d.%d.%d", n/1e6, n/1e3%1e3, n%1e3), err
}

// QEMUVersion returns the version of the QEMU that domains have by default: 7002022 is 7.2.22.
func (c *Conn) QEMUVersion(ctx context.Context) (uint64, error) {
	return call(ctx, c, "tell the version of its QEMU", c.l.ConnectGetVersion)
}

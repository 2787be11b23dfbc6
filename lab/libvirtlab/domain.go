package libvirtlab

import (
	"context"
	"encoding/xml"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"vacate/lab"
)

// Spec describes a domain. The zero value is good.
type Spec struct {
	// VM is what its guest does. Of Devices, Full is a disk, a network card and a balloon.
	VM      lab.Spec
	Memory  string // what is in the element memoryBacking
	Devices string // more in the element devices
	Domain  string // more in the element domain, such as metadata
	OS      string // more in the element os
	CPU     string // the element cpu; default all that there is
	// Transient has it started without being defined.
	Transient bool
	// Once has it start from a guest that has booted once for all of its kind, as libvirt restores
	// a domain, in a fraction of the time. With another Setup than the usual, or Transient, it
	// boots.
	Once bool
}

// Domain is a domain that can be started on either host.
type Domain struct {
	Name string
	UUID string
	VM   *lab.VM // of host a, where it was started
	XML  string  // as it was defined

	A, B *lab.Expected // the domain's QEMUs of each host
}

// Start starts a domain on host a, and waits until its guest's load has begun.
func (h *Hosts) Start(ctx context.Context, name string, spec Spec) (_ *Domain, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start domain %s: %w", name, err)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	once := spec.Once && !spec.Transient && h.A.setup == Setup{}
	booted := ""
	if once {
		if booted, err = h.A.booted(ctx, spec); err != nil {
			return nil, fmt.Errorf("have a guest boot for others to start from: %w", err)
		}
	}
	a, err := h.A.Host.ExpectBoot(ctx, spec.VM)
	if err != nil {
		return nil, err
	}
	full := a.Spec()
	console := filepath.Join("/var/log/libvirt/lab", name+".console")
	d := &Domain{Name: name, A: a}
	// The domain has one XML for both hosts, and each host its own socket behind one name.
	for _, x := range []*Host{h.A, h.B} {
		e := a
		if x == h.B {
			twin := lab.VM{Spec: full, Guest: a.Guest()}
			if e, err = x.Expect(ctx, &twin); err != nil {
				return nil, err
			}
			d.B = e
		}
		if err := os.Symlink(e.Reports, filepath.Join(x.Dir, "run/lab", name)); err != nil {
			return nil, err
		}
		if x.setup.User != "" {
			if err := os.Chmod(e.Reports, 0o777); err != nil {
				return nil, err
			}
		}
	}
	d.XML = domainXML(name, spec, full, a, console)
	if once {
		d.XML = withUUID(d.XML, uuidOf(name))
	}
	file := filepath.Join(h.A.Dir, name+".xml")
	if err := os.WriteFile(file, []byte(d.XML), 0o644); err != nil {
		return nil, err
	}
	if spec.Transient {
		_, err = h.A.Virsh(ctx, "create", file)
	} else if _, err = h.A.Virsh(ctx, "define", file); err == nil {
		if once {
			err = h.A.restore(ctx, booted, name, file)
		} else {
			_, err = h.A.Virsh(ctx, "start", name)
		}
	}
	if err != nil {
		return nil, err
	}
	if d.UUID, err = h.A.Virsh(ctx, "domuuid", name); err != nil {
		return nil, err
	}
	if d.VM, err = a.Came(ctx); err != nil {
		return nil, err
	}
	if once {
		if err := d.VM.Begin(); err != nil {
			return nil, err
		}
	}
	if err := d.VM.Booted(ctx); err != nil {
		said, _ := os.ReadFile(filepath.Join(h.A.Dir, "log/lab", name+".console"))
		return nil, fmt.Errorf("%w\n%s", err, said[max(0, len(said)-2000):])
	}
	return d, nil
}

// Came waits until the domain's QEMU is there on host b.
func (d *Domain) Came(ctx context.Context) (*lab.VM, error) { return d.B.Came(ctx) }

func domainXML(name string, spec Spec, full lab.Spec, e *lab.Expected, console string) string {
	var b strings.Builder
	kind := "qemu"
	if full.Accel == "kvm" {
		kind = "kvm"
	}
	cpu := spec.CPU
	if cpu == "" {
		cpu = cpuElement(full.CPU)
	}
	fmt.Fprintf(&b, "<domain type='%s'>\n<name>%s</name>\n%s\n<memory unit='MiB'>%d</memory>\n",
		kind, text(name), spec.Domain, full.MemoryMiB)
	switch {
	case spec.Memory != "":
		fmt.Fprintf(&b, "<memoryBacking>%s</memoryBacking>\n", spec.Memory)
	case full.Memfd:
		fmt.Fprintf(&b,
			"<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n")
	}
	fmt.Fprintf(&b,
		"<vcpu>%d</vcpu>\n<os><type arch='x86_64' "+
			"machine='%s'>hvm</type><kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline>%s</os>\n",
		full.VCPUs, text(full.Machine), text(e.Kernel), text(e.Initrd), text(e.Cmdline), spec.OS)
	fmt.Fprintf(&b, "<features><acpi/></features>\n%s\n<devices>\n<emulator>%s</emulator>\n", cpu,
		text(full.QEMU.Path))
	if !strings.Contains(spec.Devices, "<controller type='usb'") { // else libvirt adds one
		fmt.Fprintf(&b, "<controller type='usb' model='none'/>\n")
	}
	fmt.Fprintf(&b, "<serial type='file'><source path='%s' append='on'/></serial>\n", text(console))
	fmt.Fprintf(&b,
		"<serial type='unix'><source mode='connect' path='/run/libvirt/lab/%s'/></serial>\n",
		text(name))
	if full.Devices == lab.Full {
		for i, disk := range full.Disks() {
			fmt.Fprintf(&b, "<disk type='file' device='disk'><driver name='qemu' type='raw' "+
				"cache='none'/><source file='%s'/><target dev='vd%c' bus='virtio'/></disk>\n",
				text(disk), 'a'+i)
		}
		network := "type='user'>"
		if full.Tap {
			network = "type='bridge'><source bridge='" + lab.Bridge + "'/>"
		}
		fmt.Fprintf(&b, "<interface %s<mac address='%s'/><model type='virtio'/></interface>\n"+
			"<memballoon model='virtio'/>\n", network, full.MAC())
	} else {
		fmt.Fprintf(&b, "<memballoon model='none'/>\n")
	}
	fmt.Fprintf(&b, "%s\n</devices>\n</domain>\n", spec.Devices)
	return b.String()
}

// cpuElement is the element for a CPU of QEMU's command line, "max" or "host" less some features.
func cpuElement(cpu string) string {
	model, less, _ := strings.Cut(cpu, ",")
	mode := map[string]string{"max": "maximum", "host": "host-passthrough"}[model]
	var b strings.Builder
	fmt.Fprintf(&b, "<cpu mode='%s'>", mode)
	for f := range strings.SplitSeq(less, ",") {
		if name, ok := strings.CutPrefix(f, "-"); ok {
			fmt.Fprintf(&b, "<feature policy='disable' name='%s'/>", text(name))
		}
	}
	return b.String() + "</cpu>"
}

func text(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s))
	return b.String()
}

package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// vmWith is the VM of managedSpec, with changes.
func vmWith(change func(*lab.Spec)) lab.Spec {
	vm := managedSpec.VM
	change(&vm)
	return vm
}

// A kind of domain.
type kind struct {
	name  string
	spec  libvirtlab.Spec
	setup libvirtlab.Setup
	pages int // huge pages that both hosts need
}

const (
	secondDisk = "<disk type='file' device='disk'><driver name='qemu' type='raw' cache='none'/>" +
		"<source file='%s'/><target dev='vdb' bus='virtio'/></disk>"
	secondNetwork = "<interface type='bridge'><mac address='52:54:00:77:00:02'/>" +
		"<source bridge='br0'/><model type='virtio'/></interface>"
	uefi = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>" +
		"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>"
	tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
)

// bigKinds take long, or need packages of their own.
var bigKinds = []kind{
	{name: "private memfd", spec: libvirtlab.Spec{VM: managedSpec.VM,
		Memory: "<source type='memfd'/>"}},
	{name: "huge pages", pages: 256, spec: libvirtlab.Spec{VM: managedSpec.VM,
		Memory: "<hugepages/>"}},
	{name: "huge pages of a memfd", pages: 256, spec: libvirtlab.Spec{VM: managedSpec.VM,
		Memory: "<hugepages/><source type='memfd'/><access mode='shared'/>"}},
	{name: "Debian 13", setup: libvirtlab.Setup{Release: "trixie"}, spec: managedSpec},
	{name: "another user", setup: libvirtlab.Setup{User: "libvirt-qemu"}, spec: managedSpec},
	{name: "UEFI", setup: libvirtlab.Setup{Release: "bookworm"}, spec: libvirtlab.Spec{
		VM: vmWith(func(s *lab.Spec) { s.Machine = "q35" }), OS: uefi}},
	{name: "UEFI and TPM", setup: libvirtlab.Setup{Release: "bookworm"}, spec: libvirtlab.Spec{
		VM: vmWith(func(s *lab.Spec) { s.Machine = "q35" }), OS: uefi, Devices: tpm}},
}

// Domains of many kinds move, and libvirt's own migration takes them back.
func TestEvictDomainKinds(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "second.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, k := range []kind{
		{name: "transient, host-model, shared memfd", spec: libvirtlab.Spec{VM: managedSpec.VM,
			Memory:    "<source type='memfd'/><access mode='shared'/>",
			Transient: true, CPU: "<cpu mode='host-model'/>"}},
		{name: "4 CPUs, 2 disks, 2 networks, locks", setup: libvirtlab.Setup{Lockd: true},
			spec: libvirtlab.Spec{VM: vmWith(func(s *lab.Spec) { s.VCPUs = 4 }),
				Devices: fmt.Sprintf(secondDisk, disk) + secondNetwork}},
	} {
		k.run(t)
	}
}

// TestEvictDomainMoreKinds is "make domainkinds".
func TestEvictDomainMoreKinds(t *testing.T) {
	for _, k := range bigKinds {
		k.run(t)
	}
}

func (k kind) run(t *testing.T) {
	t.Run(k.name, func(t *testing.T) {
		if k.pages > 0 {
			moreHugePages(t, k.pages)
		}
		if k.setup.User != "" {
			setKernel(t, "/proc/sys/vm/unprivileged_userfaultfd", "1")
		}
		m := startManaged(t, k.spec, k.setup)
		m.mustMove(m.evict(0))
		m.migrateBack()
	})
}

// setKernel gives a setting of the kernel's a value until the test ends.
func setKernel(t *testing.T, file, value string) {
	t.Helper()
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// moreHugePages makes sure that so many more huge pages are free.
func moreHugePages(t *testing.T, n int) {
	t.Helper()
	const file = "/proc/sys/vm/nr_hugepages"
	count := func() (c int) {
		b, err := os.ReadFile(file)
		if err == nil {
			_, err = fmt.Sscan(strings.TrimSpace(string(b)), &c)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	want := count() + n
	setKernel(t, file, fmt.Sprint(want))
	if have := count(); have < want {
		labtest.Need(t, fmt.Errorf("there are %d huge pages, and %d are needed: free memory", have,
			want))
	}
}

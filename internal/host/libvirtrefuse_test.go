package host

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"

	"connectrpc.com/connect"
)

// An obstacle keeps a running domain from leaving.
type obstacle struct {
	name string
	// begin makes the obstacle, and returns what takes it away; nil: the domain has it.
	begin func(m *managed) (end func())
	says  []string // in doctor's finding and its remedy, and in what the eviction is refused with
}

var obstacles = []obstacle{
	{"snapshot", func(m *managed) func() {
		m.Virsh(m.Hosts.A, "snapshot-create-as", "web1", "before", "--disk-only", "--diskspec",
			"vda,snapshot=external,file="+filepath.Join(m.TempDir(), "overlay"))
		return func() { m.Virsh(m.Hosts.A, "snapshot-delete", "web1", "before", "--metadata") }
	}, []string{"has snapshots, and it has 1", "virsh snapshot-delete"}},
	{"block job", func(m *managed) func() {
		m.Virsh(m.Hosts.A, "blockcopy", "web1", "vda", filepath.Join(m.TempDir(), "copy"),
			"--transient-job")
		return func() { m.Virsh(m.Hosts.A, "blockjob", "web1", "vda", "--abort") }
	}, []string{"its disk vda has a block job", "virsh blockjob"}},
	{"paused", func(m *managed) func() {
		m.Virsh(m.Hosts.A, "suspend", "web1")
		return func() { m.Virsh(m.Hosts.A, "resume", "web1") }
	}, []string{"it stands", "virsh resume"}},
	{"a definition of its own there", func(m *managed) func() {
		file := filepath.Join(m.TempDir(), "web1.xml")
		m.Check(os.WriteFile(file, []byte(m.inactive), 0o600))
		m.Virsh(m.Hosts.B, "define", file)
		return func() { m.Virsh(m.Hosts.B, "undefine", "web1") }
	}, []string{"a domain of that name already, web1, shut off",
		"virsh undefine --keep-nvram web1"}},
	{"its UUID there", func(m *managed) func() {
		file := filepath.Join(m.TempDir(), "web2.xml")
		m.Check(os.WriteFile(file, []byte(strings.Replace(m.inactive, "<name>web1", "<name>web2",
			1)), 0o600))
		m.Virsh(m.Hosts.B, "define", file)
		return func() { m.Virsh(m.Hosts.B, "undefine", "web2") }
	}, []string{"a domain with the same UUID already, web2", "virsh undefine --keep-nvram web2"}},
	{"local disk", func(m *managed) func() {
		m.trust(false)
		return func() { m.trust(true) }
	}, []string{"another machine does not have", "virsh blockcopy", "trust_disks = true"}},
	{"no userfaultfd there", func(m *managed) func() {
		const file = "/proc/sys/vm/unprivileged_userfaultfd"
		before, err := os.ReadFile(file)
		m.Check(err)
		if strings.TrimSpace(string(before)) != "0" {
			m.Check(os.WriteFile(file, []byte("0"), 0))
		}
		return func() { m.Check(os.WriteFile(file, before, 0)) }
	}, []string{"may not use userfaultfd as user 64055", "vm.unprivileged_userfaultfd=1"}},
}

// trust has host a's configuration trust the disks, or not.
func (m *managed) trust(yes bool) {
	m.Helper()
	file := filepath.Join(m.a.dir, "vacated.toml")
	b, err := os.ReadFile(file)
	m.Check(err)
	text := strings.Replace(string(b), fmt.Sprintf("trust_disks = %t", !yes),
		fmt.Sprintf("trust_disks = %t", yes), 1)
	m.Check(os.WriteFile(file, []byte(text), 0o600))
	m.a.stop()
	m.a.start()
}

// fatal is what doctor says that blocks an eviction, with the remedies.
func (m *managed) fatal() (said []string) {
	m.Helper()
	r, err := m.a.api.Doctor(labtest.Within(m.T, time.Minute),
		connect.NewRequest(&hostv1.DoctorRequest{Vm: "web1", To: "hostb"}))
	m.Check(err)
	for _, f := range r.Msg.Findings {
		if f.Level == hostv1.Level_LEVEL_FATAL {
			said = append(said, f.Text+"; remedy: "+f.Remedy)
		}
	}
	return said
}

// shown is what host a's libvirt shows of the domain.
func (m *managed) shown() (s string) {
	m.Helper()
	for _, args := range [][]string{{"domstate", "--reason"}, {"dumpxml", "--inactive"}} {
		s += m.Virsh(m.Hosts.A, append(args, "web1")...) + "\n"
	}
	return fmt.Sprintf("%sautostart: %t", s, m.starts(m.Hosts.A))
}

// What keeps a domain from leaving, doctor and the eviction say in the same words, which name the
// remedy. The domain is not touched.
func TestDomainObstacles(t *testing.T) {
	m := startManaged(t, managedSpec, libvirtlab.Setup{}, libvirtlab.Setup{User: "libvirt-qemu"})
	for _, o := range obstacles {
		o.meet(t, m)
	}
	labtest.MustCheck(t, m.Domain.VM)
}

// A domain that has devices and directories of its host stays.
func TestDomainBound(t *testing.T) {
	m := startManaged(t, libvirtlab.Spec{VM: managedSpec.VM,
		Memory: "<source type='memfd'/><access mode='shared'/>",
		Devices: "<controller type='usb' model='qemu-xhci'/>" +
			// libvirt leaves it out, as there is none, and it belongs to the domain.
			"<hostdev mode='subsystem' type='usb'><source startupPolicy='optional'>" +
			"<vendor id='0x1234'/><product id='0x5678'/></source></hostdev>" +
			"<filesystem type='mount'><driver type='virtiofs'/><source dir='" + t.TempDir() +
			"'/><target dir='share'/></filesystem>",
	})
	obstacle{"device of the host and virtiofs", nil,
		[]string{"a device of this host, hostdev0 (usb)", "virsh detach-device-alias",
			`shares a directory of this host, "share"`, "unmount it in the guest"}}.meet(t, m)
	labtest.MustCheck(t, m.Domain.VM)
}

// A domain with a CPU and a machine type that the libvirt of the other host does not know stays.
// "make domainkinds" runs this.
func TestDomainOtherCPU(t *testing.T) {
	m := startManaged(t, libvirtlab.Spec{
		VM: vmWith(func(s *lab.Spec) { s.Machine = "pc-i440fx-7.2" }),
		CPU: "<cpu mode='custom' match='exact' check='none'>" +
			"<model fallback='forbid'>GraniteRapids</model></cpu>",
	}, libvirtlab.Setup{Release: "trixie"}, libvirtlab.Setup{Release: "bookworm"})
	obstacle{"CPU", nil, []string{"it lacks the domain's CPU", "GraniteRapids",
		"virsh hypervisor-cpu-baseline"}}.meet(t, m)
	labtest.MustCheck(t, m.Domain.VM)
}

func (o obstacle) meet(t *testing.T, m *managed) {
	t.Run(o.name, func(t *testing.T) {
		if o.begin != nil {
			defer o.begin(m)()
		}
		before := m.shown()
		said := m.fatal()
		all := strings.Join(said, "\n")
		_, err := m.a.evictWith("web1", "hostb", &hostv1.EvictOptions{})
		if connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Fatal(err)
		}
		for _, words := range o.says {
			if !strings.Contains(all, words) {
				t.Errorf("doctor does not say %q:\n%s", words, all)
			}
		}
		for _, s := range said {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("the eviction is not refused with doctor's %q: %v", s, err)
			}
		}
		if now := m.shown(); now != before {
			t.Errorf("libvirt says\n%s\nand said\n%s", now, before)
		}
	})
}

// What a peer's description may not name, its libvirt may run: the peer is hostile, or its operator
// has other rules. Offered or only asked about, such a domain is refused, and nothing starts. It
// runs on at the peer's.
func TestDomainHostile(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	labtest.Need(t, libvirtlab.Probe())
	ctx := labtest.Within(t, 4*time.Minute)
	hosts, err := libvirtlab.New(ctx, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.Close)
	qemu, err := lab.StockQEMU(ctx)
	if err != nil {
		t.Fatal(err)
	}
	a, b := sites(t, l)
	a.configure(fmt.Sprintf("[libvirt]\nuri = %q\ntrust_disks = true\n", hosts.A.Socket))
	b.configure(fmt.Sprintf("[libvirt]\nuri = %q\nemulators = [%q]\npaths = [\"/srv/vms\"]\n",
		hosts.B.Socket, qemu.Path))
	a.start()
	b.start()
	none := func(what string) {
		t.Helper()
		out, err := hosts.B.Virsh(ctx, "list", "--all", "--name")
		pids, _ := filepath.Glob(filepath.Join(hosts.B.Dir, "run/qemu/web*"))
		if err != nil || out != "" || len(pids) > 0 {
			t.Errorf("%s: host b has %q, %q, %v", what, out, pids, err)
		}
	}
	dir := t.TempDir()
	evil, image := filepath.Join(dir, "evil"), filepath.Join(dir, "image")
	if err := os.Symlink(qemu.Path, evil); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	text := func(name, emulator, device, more string) string {
		return fmt.Sprintf("<domain type='qemu' "+
			"xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>%s</name>"+
			"<uuid>11111111-2222-4333-8444-555555555555</uuid><memory unit='MiB'>32</memory>"+
			"<vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"+
			"<emulator>%s</emulator>%s</devices>%s</domain>", name, emulator, device, more)
	}
	ask := func(xml string) (answer domainAnswer, err error) {
		id, err := certs.Load(filepath.Join(a.dir, "certs"), func(error) {})
		if err != nil {
			t.Fatal(err)
		}
		_, err = putTo(ctx, link.Dialer{Addr: net.JoinHostPort(l.B.Addr, "7601"),
			TLS: id.Client("hostb"), Dial: l.A.Dial}, 0,
			question{Domain: &domainQuestion{XML: xml}}, &answer)
		return answer, err
	}

	if answer, err := ask(text("web1", qemu.Path, "", "")); err != nil ||
		answer != (domainAnswer{}) {
		t.Errorf("a harmless domain: %+v, %v", answer, err)
	}
	for _, x := range []struct{ name, xml, says string }{
		{"emulator", text("web1", evil, "", ""), "the emulator"},
		{"arguments", text("web1", qemu.Path, "", "<qemu:commandline><qemu:arg value='-fw_cfg'/>"+
			"<qemu:arg value='name=opt/x,string=y'/></qemu:commandline>"), "another namespace"},
		{"disk", text("web1", qemu.Path, "<disk type='file' device='disk'><driver name='qemu' "+
			"type='raw' cache='none'/><source file='"+image+"'/><target dev='vda' bus='virtio'/>"+
			"</disk>", ""), "outside of"},
		{"character device", text("web1", qemu.Path,
			"<rng model='virtio'><backend model='random'>/dev/zero</backend></rng>", ""),
			"outside of"},
	} {
		if answer, err := ask(x.xml); err != nil || !strings.Contains(answer.Problem, x.says) {
			t.Errorf("%s: asked: %+v, %v", x.name, answer, err)
		}
		file := filepath.Join(dir, "web1.xml")
		if err := os.WriteFile(file, []byte(x.xml), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := hosts.A.Virsh(ctx, "create", file); err != nil {
			t.Fatal(err)
		}
		e, err := a.evictWith("web1", "hostb", &hostv1.EvictOptions{SkipChecks: true})
		if err != nil {
			t.Fatal(err)
		}
		end, err := a.watch(e.Id, time.Minute)
		if err != nil || end.Outcome != string(evict.Refused) ||
			!strings.Contains(end.Reason, x.says) {
			t.Errorf("%s: offered: %v, %v", x.name, end, err)
		}
		none(x.name)
		if s, err := hosts.A.Virsh(ctx, "domstate", "--reason", "web1"); s != "running (booted)" {
			t.Errorf("%s: on host a it is %q, %v", x.name, s, err)
		}
		if _, err := hosts.A.Virsh(ctx, "destroy", "web1"); err != nil {
			t.Fatal(err)
		}
	}

	// What no libvirt would describe.
	bomb := "<!DOCTYPE d [<!ENTITY a0 'a'>"
	for i := range 30 {
		bomb += fmt.Sprintf("<!ENTITY a%d '&a%d;&a%[2]d;&a%[2]d;&a%[2]d;'>", i+1, i)
	}
	bomb += "]>" + strings.Replace(text("web1", qemu.Path, "", ""), "<vcpu>",
		"<title>&a30;</title><vcpu>", 1)
	if answer, err := ask(bomb); err != nil || !strings.Contains(answer.Problem, "document type") {
		t.Errorf("entities: %+v, %v", answer, err)
	}
	large := strings.Replace(text("web1", qemu.Path, "", ""), "<vcpu>",
		strings.Repeat(" ", 100<<20)+"<vcpu>", 1)
	if answer, err := ask(large); err == nil {
		t.Errorf("100 MiB: %+v", answer)
	}
	none("at last")
	if answer, err := ask(text("web1", qemu.Path, "", "")); err != nil ||
		answer != (domainAnswer{}) {
		t.Errorf("a harmless domain afterwards: %+v, %v", answer, err)
	}
}

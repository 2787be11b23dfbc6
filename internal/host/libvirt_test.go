package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"

	"connectrpc.com/connect"
)

// A domain of libvirt's is listed beside described VMs, and examined; what the other host does not
// let it name is found there. An eviction to a host that does not take it leaves it alone.
func TestLibvirt(t *testing.T) {
	m := libvirttest.Start(t, lab.Options{Rate: 1e9}, libvirtlab.Spec{VM: lab.Spec{MemoryMiB: 256,
		Devices: lab.Full, Load: lab.Load{HotMiB: 16, Slow: true}}})
	h, d := m.Hosts, m.Domain
	a, b := sites(t, m.Lab)
	ctx := labtest.Within(t, 4*time.Minute)
	if _, err := h.A.Virsh(ctx, "define", define(t, d, "web2")); err != nil {
		t.Fatal(err)
	}
	section := func(x *libvirtlab.Host, more string) string {
		return fmt.Sprintf("[libvirt]\nuri = %q\nnetworks = [\"user\"]\n%s\n", x.Socket, more)
	}
	a.configure(section(h.A, "trust_disks = true"))
	b.configure(section(h.B, fmt.Sprintf("paths = [%q, %q]", "/run/libvirt/lab",
		"/var/log/libvirt/lab")))
	a.start()
	b.start()

	r, err := a.api.ListVMs(ctx, connect.NewRequest(&hostv1.ListVMsRequest{}))
	if err != nil || len(r.Msg.Vms) != 2 {
		t.Fatalf("%v, %v", r, err)
	}
	for _, vm := range r.Msg.Vms {
		switch {
		case !vm.Libvirt || vm.Problem != "" || vm.MemoryBytes != 256<<20 || vm.Vcpus != 1:
		case vm.Name == "web1" && vm.State == "running" && vm.QemuStatus == "running (booted)" &&
			int(vm.Pid) == d.VM.PID():
			continue
		case vm.Name == "web2" && vm.State == "none" && vm.QemuStatus == "shut off (unknown)":
			continue
		}
		t.Errorf("%+v", vm)
	}

	_, startErr := a.api.Start(ctx, connect.NewRequest(&hostv1.StartRequest{Vm: "web2"}))
	_, stopErr := a.api.Stop(ctx, connect.NewRequest(&hostv1.StopRequest{Vm: "web1"}))
	_, showErr := a.api.ShowVM(ctx, connect.NewRequest(&hostv1.ShowVMRequest{Vm: "web1"}))
	for say, err := range map[string]error{"`virsh start web2`": startErr,
		"`virsh shutdown web1`": stopErr, "`virsh dumpxml web1`": showErr} {
		if connect.CodeOf(err) != connect.CodeFailedPrecondition ||
			!strings.Contains(err.Error(), say) {
			t.Errorf("%v; want %s", err, say)
		}
	}

	// The paths of b are those of its libvirt, which are not this process's.
	for s, want := range map[*site]string{a: "2 domains of libvirt at ",
		b: "paths: /run/libvirt/lab: "} {
		c, err := ReadConfig(filepath.Join(s.dir, "vacated.toml"))
		if err != nil {
			t.Fatal(err)
		}
		c.Libvirt.Networks = append(c.Libvirt.Networks, "lo", "no-such-network")
		says, err := c.Check()
		if err == nil || !strings.Contains(err.Error(), "networks: no-such-network: ") ||
			strings.Contains(err.Error(), "networks: lo: ") {
			t.Errorf("%s: %q, %v", s.name, says, err)
		}
		c.Libvirt.Networks = nil
		if says, err = c.Check(); !strings.Contains(fmt.Sprint(says, err), want) {
			t.Errorf("%s: %q, %v; want %q", s.name, says, err, want)
		}
	}

	storage := 0
	fatal := func(to string) (texts []string) {
		t.Helper()
		r, err := a.api.Doctor(ctx, connect.NewRequest(&hostv1.DoctorRequest{Vm: "web1", To: to}))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range r.Msg.Findings {
			t.Logf("%v %s %s: %s; %s", f.Level, f.Host, f.Check, f.Text, f.Remedy)
			if f.Check == "storage" && f.Level == hostv1.Level_LEVEL_NOTE {
				storage++
			}
			if f.Level == hostv1.Level_LEVEL_FATAL {
				texts = append(texts, f.Text)
			}
		}
		return texts
	}
	if list := fatal(""); len(list) != 0 || storage != 1 {
		t.Errorf("%q, %d notes on local disks", list, storage)
	}
	if list := fatal("hostb"); len(list) != 1 || !strings.Contains(list[0], "outside of") {
		t.Errorf("host b allows no files, and the findings are %q", list)
	}
	if _, err := h.A.Virsh(ctx, "snapshot-create-as", "web1", "before", "--disk-only"); err != nil {
		t.Fatal(err)
	}
	if list := fatal(""); len(list) != 1 || !strings.Contains(list[0], "snapshots") {
		t.Errorf("it has a snapshot, and the findings are %q", list)
	}
	_, err = a.api.Evict(ctx, connect.NewRequest(&hostv1.EvictRequest{Vm: "web1", To: "hostb"}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition ||
		!strings.Contains(err.Error(), "outside of") {
		t.Error(err)
	}
	labtest.MustCheck(t, d.VM)

	// Without libvirt there are no domains, and nothing is wrong.
	h.A.Kill()
	r, err = a.api.ListVMs(ctx, connect.NewRequest(&hostv1.ListVMsRequest{}))
	if err != nil || len(r.Msg.Vms) != 0 || len(r.Msg.Problems) != 0 {
		t.Errorf("%v, %v", r, err)
	}
}

// define writes the description of a domain like another one to a file.
func define(t *testing.T, like *libvirtlab.Domain, name string) string {
	t.Helper()
	xml := strings.Replace(like.XML, "<name>"+like.Name, "<name>"+name, 1)
	file := filepath.Join(t.TempDir(), name+".xml")
	if err := os.WriteFile(file, []byte(xml), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// libvirt looks at each of its QEMUs when it is first asked what they can, which takes seconds. The
// daemon asks as soon as it starts. An eviction need not wait for that.
func TestAsksLibvirtEarly(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	labtest.Need(t, libvirtlab.Probe())
	hosts, err := libvirtlab.New(labtest.Within(t, 4*time.Minute), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.Close)
	// This libvirt has been asked before, and has told a file.
	hosts.A.Kill()
	known := filepath.Join(hosts.A.Dir, "cache/qemu/capabilities")
	if err := errors.Join(os.RemoveAll(known), os.Mkdir(known, 0o755),
		hosts.A.Start()); err != nil {
		t.Fatal(err)
	}
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := hosts.A.Virsh(ctx, "uri"); err == nil {
			break
		} else if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	a, _ := sites(t, l)
	a.configure(fmt.Sprintf("[libvirt]\nuri = %q\n", hosts.A.Socket))
	a.start()
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if files, err := os.ReadDir(known); err != nil {
			t.Fatal(err)
		} else if len(files) > 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatal("libvirt was not asked")
		}
	}
}

package hypervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// Domains of libvirt's are found beside described VMs. What is wrong with one of them does not hide
// the others.
func TestDomains(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	labtest.Need(t, libvirtlab.Probe())
	ctx := within(t, 2*time.Minute)
	hosts, err := libvirtlab.New(ctx, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.Close)
	virsh := func(args ...string) string {
		t.Helper()
		out, err := hosts.A.Virsh(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	qemu := qemu(t)[0]
	dir := t.TempDir()
	// No guest is booted in any of them.
	define := func(name, metadata string) {
		t.Helper()
		file := filepath.Join(dir, "domain.xml")
		xml := fmt.Sprintf("<domain type='qemu'><name>%s</name>%s<memory unit='MiB'>16</memory>"+
			"<vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"+
			"<emulator>%s</emulator><memballoon model='none'/></devices></domain>", name, metadata,
			qemu)
		if err := os.WriteFile(file, []byte(xml), 0o644); err != nil {
			t.Fatal(err)
		}
		virsh("define", file)
	}
	tagged := func(attributes string) string {
		return "<metadata><vacate:vm xmlns:vacate='urn:vacate:domain:1' " + attributes +
			"/></metadata>"
	}
	define("db1", tagged("pinned='yes' priority='2' labels='app=db'"))
	define("slip", tagged("pined='yes'"))
	define("two words", "")
	define("described", "")
	define("off", "")
	for _, name := range []string{"db1", "two words"} {
		virsh("start", "--paused", name)
	}
	vms := filepath.Join(dir, "vms")
	if err := os.Mkdir(vms, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"described": fmt.Sprintf("qmp = \"%s/qmp\"\ncommand = [%q, \"-qmp\", \"unix:{qmp}\"]", dir,
			qemu),
		"unread": "comand = []",
	} {
		if err := os.WriteFile(filepath.Join(vms, name+".toml"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	h := Host{Dir: vms, URI: hosts.A.Socket}
	list, err := h.All(ctx)
	if unread := Unread(err); len(unread) != 1 || unread[0].VM != "unread" {
		t.Errorf("%v", err)
	}
	found := map[string]VM{}
	for _, vm := range list {
		if vm.Libvirt != "" {
			found[vm.Name] = vm
		}
	}
	if len(list) != 6 || list[0].Name != "described" || len(found) != 5 {
		t.Errorf("%+v", list)
	}
	if vm := found["db1"]; !vm.Pinned || vm.Priority != 2 || vm.Unfit != nil ||
		vm.Labels["app"] != "db" {
		t.Errorf("%+v", vm)
	}
	if vm := found["off"]; vm.Pinned || vm.Priority != 0 || vm.Unfit != nil {
		t.Errorf("%+v", vm)
	}
	for name, say := range map[string]string{"slip": `no "pined"`, "two words": "domrename"} {
		if err := found[name].Unfit; err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%s: %v; want %s", name, err, say)
		}
	}
	if !errors.Is(found["described"].Unfit, ErrTwice) {
		t.Errorf("%+v", found["described"])
	}

	for name, want := range map[string]State{"db1": Paused, "off": None, "two words": Paused} {
		seen, err := Look(ctx, found[name])
		if err != nil || seen.State != want || seen.Memory != 16<<20 || seen.VCPUs != 1 ||
			want == Paused != (seen.Process.PID > 0) {
			t.Errorf("%s: %+v, %v", name, seen, err)
		}
	}
	vm, err := h.Find(ctx, "db1")
	if err != nil || vm.Libvirt == "" || !vm.Pinned {
		t.Errorf("%+v, %v", vm, err)
	}
	if vm, err := h.Find(ctx, "described"); err != nil || vm.Libvirt != "" || vm.QMP == "" {
		t.Errorf("%+v, %v", vm, err)
	}
	for _, where := range []Host{h, {Dir: vms}} {
		if _, err := where.Find(ctx, "web9"); !errors.Is(err, ErrUnknown) ||
			!strings.Contains(err.Error(), "web9.toml") {
			t.Error(err)
		}
	}
	if _, err := Look(ctx, VM{Name: "web9", Libvirt: h.URI}); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
	err = Ask(ctx, vm, func(q *qmp.Client) error {
		s, err := q.QueryStatus(ctx)
		if s.Running || s.Status != "prelaunch" && s.Status != "paused" {
			t.Errorf("%+v", s)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	// Each host's QEMUs are on its core.
	seen, err := Look(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("Cpus_allowed_list:\t%d\n", hosts.A.Core); !strings.Contains(
		proc(t, seen.Process, "status"), want) {
		t.Errorf("its QEMU is not on the core of host a: want %s", want)
	}

	hosts.A.Kill()
	if list, err := h.All(ctx); len(list) != 1 || len(Unread(err)) != 1 {
		t.Errorf("without libvirt: %+v, %v", list, err)
	}
}

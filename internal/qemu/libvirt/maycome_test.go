package libvirt

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// A domain may come unless its name, its UUID, its machine type or its CPU blocks it.
func TestMayCome(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	labtest.Need(t, libvirtlab.Probe())
	ctx := labtest.Within(t, 2*time.Minute)
	h, err := libvirtlab.New(ctx, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	c, err := Dial(ctx, h.A.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	const some, other = "11111111-2222-4333-8444-555555555555",
		"61111111-2222-4333-8444-555555555555"
	text := func(name, uuid, machine, cpu string) string {
		return fmt.Sprintf(
			"<domain type='qemu'><name>%s</name><uuid>%s</uuid><memory>1024</memory>"+
				"<os><type arch='x86_64' machine='%s'>hvm</type></os>%s<devices>"+
				"<emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>", name, uuid,
			machine, cpu)
	}
	if _, err := c.Define(ctx, text("web1", some, "pc", "")); err != nil {
		t.Fatal(err)
	}
	model := func(name string) string {
		return "<cpu mode='custom' match='exact' check='full'><model fallback='forbid'>" + name +
			"</model></cpu>"
	}
	for _, x := range []struct {
		name, uuid, machine, cpu string
		says                     string // none: it may
	}{
		{"web2", other, "pc", "", ""},
		{"web2", other, "pc-i440fx-7.2", model("Nehalem"), ""},
		{"web2", other, "pc", "<cpu mode='host-passthrough'/>", ""},
		{"web1", other, "pc", "", "of that name already, web1, shut off"},
		{"web2", some, "pc", "", "with the same UUID already, web1"},
		{"web2", other, "pc-i440fx-99.0", "", "machine"},
		{"web2", other, "pc", model("Skylake-Server"), "CPU"},
		{"web2", other, "pc", strings.Replace(model("Skylake-Server"), "full", "none", 1), ""},
		{"web2", other, "pc", model("Unheard"), "CPU"},
	} {
		checked := Checked{Name: x.name, XML: text(x.name, x.uuid, x.machine, x.cpu)}
		if checked.UUID, err = ParseUUID(x.uuid); err != nil {
			t.Fatal(err)
		}
		err := c.MayCome(ctx, checked)
		t.Log(err)
		var unfit *Unfit
		if x.says == "" {
			if err != nil {
				t.Errorf("%+v: %v", x, err)
			}
		} else if !errors.As(err, &unfit) || !strings.Contains(unfit.Problem, x.says) ||
			unfit.Remedy == "" {
			t.Errorf("%+v: %v", x, err)
		}
	}
	user, version, err := c.Runner(ctx)
	qemu, qemuErr := lab.StockQEMU(ctx)
	if err != nil || qemuErr != nil || user != "0" || version != qemu.Version {
		t.Errorf("%q, %q, %v; %+v, %v", user, version, err, qemu, qemuErr)
	}
}

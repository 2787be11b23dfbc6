package libvirtlab

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// Watch tells what virsh says on either host, as it changes.
func TestWatch(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	labtest.Need(t, Probe())
	qemu, err := exec.LookPath("qemu-system-x86_64")
	labtest.Need(t, err)
	ctx := labtest.Within(t, 2*time.Minute)
	h, err := New(ctx, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	virsh := func(x *Host, args ...string) {
		t.Helper()
		if _, err := x.Virsh(ctx, args...); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "domain.xml")
	xml := fmt.Sprintf("<domain type='qemu'><name>web1</name><memory unit='MiB'>16</memory>"+
		"<vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"+
		"<emulator>%s</emulator></devices></domain>", qemu)
	if err := os.WriteFile(file, []byte(xml), 0o644); err != nil {
		t.Fatal(err)
	}
	virsh(h.A, "define", file)
	// Until each state has been seen.
	seen := make(chan Moment, 100)
	stop := h.Watch(ctx, func(m Moment) { seen <- m }, "web1", "web9")
	defer stop()
	until := func(a, b string) {
		t.Helper()
		for {
			select {
			case m := <-seen:
				if m.States[0]["web1"] == a && m.States[1]["web1"] == b {
					return
				}
			case <-ctx.Done():
				t.Fatalf("web1 is not %q on host a and %q on host b", a, b)
			}
		}
	}
	until("shut off (unknown)", "")
	virsh(h.A, "start", "--paused", "web1")
	until("paused (user)", "")
	virsh(h.A, "destroy", "web1")
	virsh(h.A, "undefine", "web1")
	virsh(h.B, "create", "--paused", file)
	until("", "paused (user)")
}

package host

import (
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/pressure"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// TestPortray has a QEMU that does not name its threads tell which are CPUs; it is not asked again,
// so that who has its monitor meanwhile is no hindrance.
func TestPortray(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-display", "none", "-smp", "2", "-m",
		"16M", "-S", "-qmp", "unix:"+sock+",server=on,wait=off")
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		labtest.Need(t, err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	h := &Host{known: map[string]knownQEMU{}}
	vm := hypervisor.VM{Name: "web1", QMP: sock}
	ctx := labtest.Within(t, time.Minute)
	p := h.portray(ctx, vm)
	for ; p.process.PID == 0 && ctx.Err() == nil; p = h.portray(ctx, vm) {
		time.Sleep(20 * time.Millisecond) // until it listens
	}
	if p.process.PID != cmd.Process.Pid || len(p.vcpus) != 2 ||
		slices.Contains(p.vcpus, p.process.PID) {
		t.Fatalf("%+v", p)
	}
	used, err := pressure.ReadVM(p.process, p.vcpus)
	if err != nil || used.VCPUs != 2 || used.Ran >= used.Used {
		t.Errorf("%+v, %v", used, err)
	}
	c, err := qmp.Dial(ctx, sock)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	again := h.portray(ctx, vm)
	if again.process != p.process || !slices.Equal(again.vcpus, p.vcpus) || again.problem != "" {
		t.Errorf("while its monitor is taken: %+v", again)
	}
}

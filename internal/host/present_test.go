package host

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// A VM is offered to a host that has it, and the daemon there dies over that. The next one lets the
// VM be, though its command line is that of a twin, as it came here once.
func TestOfferOfPresentVM(t *testing.T) {
	a, b := sites(t, labtest.New(t, lab.Options{}))
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatal(err)
	}
	args := map[*site][]string{}
	for _, s := range []*site{a, b} {
		qmp := filepath.Join(s.dir, "web1.qmp")
		args[s] = []string{qemu, "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg",
			"-m", "64", "-qmp", "unix:" + qmp + ",server=on,wait=off"}
		s.describe("web1", qmp, args[s])
		s.start()
	}
	boot := func() {
		t.Helper()
		cmd := exec.Command(qemu, args[a][1:]...)
		if err := process.StartBound(cmd, cmd.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		a.until("running")
	}
	boot()
	e, err := a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	if end, err := a.watch(e.Id, time.Minute); err != nil || end.Outcome != "completed" {
		t.Fatalf("%v, %v", end, err)
	}
	vm, err := process.Find(b.until("running"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Kill(labtest.Within(t, time.Minute)) })
	boot() // another one of the same name
	// So that it takes seconds to see what there is.
	c, err := net.Dial("unix", filepath.Join(b.dir, "web1.qmp"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := a.evict("web1", "hostb"); err != nil {
		t.Fatal(err)
	}
	for limit := time.Now().Add(3 * time.Second); time.Now().Before(limit); {
		log, err := os.ReadFile(b.log.Name())
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(string(log), "offer taken") > 1 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.kill()
	b.start()
	c.Close()
	b.until("running")
	if !vm.Alive() {
		t.Error("the VM was ended")
	}
}

// until waits until the one VM of a host is in a state, and returns the process of its QEMU.
func (s *site) until(state string) (pid int) {
	s.t.Helper()
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		vms, err := s.api.ListVMs(s.t.Context(), connect.NewRequest(&hostv1.ListVMsRequest{}))
		if err != nil {
			s.t.Fatal(err)
		}
		if vm := vms.Msg.Vms[0]; vm.State == state {
			return int(vm.Pid)
		}
		if time.Now().After(limit) {
			s.t.Fatalf("on %s it is not %q: %v", s.name, state, vms)
		}
	}
}

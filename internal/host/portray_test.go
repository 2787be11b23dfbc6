package host

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/pressure"
	"vacate/internal/sys/process"
	"vacate/lab/labtest"
)

// TestPortray has a QEMU that does not name its threads tell which are CPUs; it is not asked again,
// so that who has its monitor meanwhile is no hindrance.
func TestPortray(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command("qemu-system-x86_64", "-nodefaults", "-display", "none", "-smp", "2", "-m",
		"16M", "-S", "-qmp", "unix:"+sock+",server=on,wait=off")
	if err := process.StartBound(cmd, cmd.Start); err != nil {
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

// What cannot be chosen to leave is in the list all the same, and why.
func TestBarred(t *testing.T) {
	dir := t.TempDir()
	h, v := measured(t)
	h.config, h.known = Config{Name: "hosta", VMs: dir}, map[string]knownQEMU{}
	h.log = slog.New(slog.DiscardHandler)
	h.ahead, h.taken = map[string]lookedAhead{}, map[string]bool{}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		labtest.Need(t, err)
	}
	describe := func(name, command string) {
		t.Helper()
		text := fmt.Sprintf("qmp = %q\ncommand = [%q, \"-qmp\", \"unix:{qmp}\"]\n%s",
			filepath.Join(dir, name+".qmp"), qemu, command)
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	describe("web1", "") // which v is about
	describe("absent", "")
	describe("unread", "comand = []\n")
	start := func(name string, args ...string) *exec.Cmd {
		t.Helper()
		describe(name, "")
		sock := filepath.Join(dir, name+".qmp")
		cmd := exec.Command(qemu,
			append([]string{"-nodefaults", "-display", "none", "-m", "16M", "-S",
				"-qmp", "unix:" + sock + ",server=on,wait=off"}, args...)...)
		if err := process.StartBound(cmd, cmd.Start); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		vm := hypervisor.VM{Name: name, QMP: sock}
		ctx := labtest.Within(t, time.Minute)
		for {
			seen, err := hypervisor.Look(ctx, vm)
			if err != nil {
				t.Fatal(err)
			}
			if seen.Process.PID == cmd.Process.Pid {
				return cmd
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	start("waits", "-incoming", "defer")
	frozen, err := process.Find(start("frozen").Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := frozen.Stop(labtest.Within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	s, err := h.survey(labtest.Within(t, time.Minute), leastOver, "")
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"web1":   "its eviction is not over: see vacate status " + v.entry.ID().String()[:8],
		"frozen": "it stands frozen here",
		"waits":  "a QEMU waits here for it to arrive",
		"unread": "it is not known whether it is here",
	}
	for _, vm := range s.vms {
		if text := want[vm.Name]; text == "" || !strings.HasPrefix(vm.Barred, text) {
			t.Errorf("%s: %q, want %q", vm.Name, vm.Barred, text)
		}
		delete(want, vm.Name)
	}
	if len(want) > 0 {
		t.Errorf("the list lacks %v", want)
	}
}

// What was known of a VM's memory does not hold any more once it has come to use more, as a VM that
// boots does.
func TestEstimateHolds(t *testing.T) {
	p := process.Process{PID: 1234, StartTime: 5678}
	at := func(resident uint64) portrait {
		return portrait{process: p, load: pressure.VMLoad{Resident: resident}}
	}
	e := lookedAhead{process: p, resident: 80 << 20, at: time.Now()}
	for what, x := range map[string]struct {
		estimate lookedAhead
		v        portrait
		want     bool
	}{
		"the same":      {e, at(80 << 20), true},
		"a little":      {e, at(89 << 20), true},
		"it has grown":  {e, at(100 << 20), false},
		"it has shrunk": {e, at(60 << 20), false},
		"another QEMU": {e, portrait{process: process.Process{PID: 1235, StartTime: 5678},
			load: pressure.VMLoad{Resident: 80 << 20}}, false},
		"none": {lookedAhead{}, at(80 << 20), false},
	} {
		if got := x.estimate.holds(x.v, time.Hour); got != x.want {
			t.Errorf("%s: %v", what, got)
		}
	}
	if e.at = e.at.Add(-time.Hour); e.holds(at(80<<20), time.Hour) {
		t.Error("it holds for ever")
	}
}

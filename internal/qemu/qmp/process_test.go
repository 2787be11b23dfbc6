package qmp_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"vacate/internal/qemu/qmp"
	"vacate/lab/labtest"
)

// startContained runs a QEMU in a PID namespace of its own.
func startContained(t *testing.T, args ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a PID namespace")
	}
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command("unshare",
		append([]string{"--pid", "--fork", "--kill-child", "qemu-system-x86_64", "-nodefaults",
			"-display", "none",
			"-qmp", "unix:" + sock + ",server=on,wait=off"}, args...)...)
	startWith(t, cmd, sock)
	return sock
}

// TestProcess finds a QEMU's process and the threads of its CPUs from outside, be they numbered
// otherwise inside, and says what is wrong where somebody else is at the socket.
func TestProcess(t *testing.T) {
	args := []string{"-S", "-m", "16M", "-smp", "2", "-name", "vm,debug-threads=on"}
	direct, own := startQEMU(t, args...)
	contained := startContained(t, args...)
	check := func(t *testing.T, c *qmp.Client, wantPID int) {
		t.Helper()
		pid, vcpus, err := c.Process(t.Context())
		if err != nil || pid != wantPID || len(vcpus) != 2 || vcpus[0] == vcpus[1] {
			t.Fatalf("process %d, want %d; threads %v; %v", pid, wantPID, vcpus, err)
		}
		for i, tid := range vcpus {
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/comm", pid, tid))
			if err != nil || !strings.HasPrefix(string(name), fmt.Sprintf("CPU %d/", i)) {
				t.Errorf("thread %d is %q, %v", tid, name, err)
			}
		}
	}
	t.Run("direct", func(t *testing.T) { check(t, dial(t, direct), own.Pid) })
	t.Run("relayed", func(t *testing.T) {
		check(t, dial(t, labtest.RelayMonitor(t, direct)), own.Pid)
	})
	t.Run("contained", func(t *testing.T) {
		c := dial(t, contained)
		cpus, err := c.QueryCPUs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, vcpus, _ := c.Process(t.Context()); len(vcpus) > 0 && vcpus[0] == cpus[0].ThreadID {
			t.Fatal("QEMU's numbers are ours: this tests nothing")
		}
		check(t, c, c.PeerPID())
	})
	t.Run("contained and relayed", func(t *testing.T) {
		pid, _, err := dial(t, labtest.RelayMonitor(t, contained)).Process(t.Context())
		if err == nil || !strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())) ||
			!strings.Contains(err.Error(), "relayed") {
			t.Errorf("process %d, %v", pid, err)
		}
	})
}

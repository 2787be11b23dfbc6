package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// sleeper starts a process that does nothing, and ends it with the test.
func sleeper(t *testing.T, attr *syscall.SysProcAttr) Process {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	p, err := Find(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// A process in a group of its own hangs on its parent. One in a session of its own does not.
func TestKeeper(t *testing.T) {
	pid, name, err := sleeper(t, &syscall.SysProcAttr{Setpgid: true}).Keeper()
	if own, _ := statOf(os.Getpid()); err != nil || pid != os.Getpid() || name != own.Comm {
		t.Errorf("a job's keeper is %d (%s), %v: want %d (%s)", pid, name, err, os.Getpid(),
			own.Comm)
	}
	pid, name, err = sleeper(t, &syscall.SysProcAttr{Setsid: true}).Keeper()
	if err != nil || pid != 0 {
		t.Errorf("the keeper of a session's leader is %d (%s), %v", pid, name, err)
	}
	if _, _, err := Gone.Keeper(); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// The kernel does what Keeper says: it ends a stopped job when its keeper ends, and lets one be
// whose session is its own.
func TestKeeperEnds(t *testing.T) {
	for option, survives := range map[string]bool{"set -m;": false, "setsid": true} {
		// The shell has a session of its own. Its job has a group, as "set -m" says.
		shell := exec.Command("bash", "-c", option+" sleep 1000 >/dev/null & echo $!; read")
		shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		in, err := shell.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := shell.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := shell.Start(); err != nil {
			t.Fatal(err)
		}
		var pid int
		if _, err := fmt.Fscan(out, &pid); err != nil {
			t.Fatal(err)
		}
		// It is not there before it has its session.
		for name := ""; name != "sleep"; {
			is, err := statOf(pid)
			if err != nil {
				t.Fatal(err)
			}
			name = is.Comm
		}
		p, err := Find(pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Kill(context.Background()) })
		if err := p.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if keeper, _, err := p.Keeper(); err != nil || (keeper == 0) != survives {
			t.Errorf("%q: the keeper is %d, %v", option, keeper, err)
		}
		in.Close()
		shell.Wait()
		if survives {
			if stopped, err := p.Stopped(); !stopped || err != nil {
				t.Errorf("%q: it is stopped: %t, %v", option, stopped, err)
			}
			continue
		}
		for limit := time.Now().Add(time.Minute); p.Alive(); time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				t.Fatalf("%q: it outlived its keeper", option)
			}
		}
	}
}

package process

import (
	"context"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// StartBound starts a command by start, which is cmd.Start or calls it. The kernel kills the
// command when this process ends. The caller waits for the command as usual.
//
// The kernel goes by the thread that started the command (PR_SET_PDEATHSIG of prctl(2)). A thread
// of Go may end with a goroutine that was locked to it. So a thread is kept until the command ends.
func StartBound(cmd *exec.Cmd, start func() error) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(unix.SysProcAttr)
	}
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := start()
		var p Process
		if err == nil {
			p, _ = Find(cmd.Process.Pid) // nobody has waited for it yet, so it has its number
		}
		started <- err
		if err == nil {
			_ = p.Wait(context.Background())
		}
	}()
	return <-started
}

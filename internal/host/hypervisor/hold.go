package hypervisor

import (
	"fmt"
	"os"
	"time"

	"vacate/internal/sys/process"
)

// HoldCommand is the argument that makes a daemon's program a process that only keeps files open.
const HoldCommand = "hold"

// Hold starts a process that keeps files open as its descriptors from 3 on, and does nothing else.
// It lives on when this process ends, like a VM's QEMU. Who may trace it takes the files from it.
func Hold(name string, files ...*os.File) (process.Process, error) {
	program, err := os.Executable()
	if err != nil {
		return process.Process{}, err
	}
	args := []string{program, HoldCommand, name}
	if Scoped() {
		args = append(scope("What an eviction of "+name+" needs", name, nil), args...)
	}
	cmd, err := launch(args, nil, nil, nil, files...)
	if err != nil {
		return process.Process{}, err
	}
	go cmd.Wait()
	p, err := process.Find(cmd.Process.Pid)
	if err != nil {
		return p, fmt.Errorf("the process that keeps what the eviction needs ended at once: %w",
			err)
	}
	return p, nil
}

// StayHeld is what that process does.
func StayHeld() {
	for {
		time.Sleep(time.Hour)
	}
}

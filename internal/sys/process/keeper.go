package process

import "github.com/prometheus/procfs"

// Keeper returns the number and the name of a process whose end may end this one, if it is stopped
// by then; 0 if there is none. When a process group with a stopped process becomes orphaned, the
// kernel sends SIGHUP and SIGCONT to all of the group (setpgid(2)). It becomes orphaned when none
// of its processes has a parent in another group of the same session any more.
//
// The list of processes may change meanwhile. So the answer is good for a warning alone.
func (p Process) Keeper() (pid int, name string, err error) {
	own, err := statOf(p.PID)
	if err != nil {
		return 0, "", err
	}
	all, err := procfs.AllProcs()
	if err != nil {
		return 0, "", err
	}
	for _, one := range all {
		member, err := one.Stat()
		if err != nil || member.PGRP != own.PGRP {
			continue
		}
		parent, err := statOf(member.PPID)
		if err == nil && parent.Session == own.Session && parent.PGRP != own.PGRP {
			return parent.PID, parent.Comm, nil
		}
	}
	return 0, "", nil
}

func statOf(pid int) (procfs.ProcStat, error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return procfs.ProcStat{}, err
	}
	return p.Stat()
}

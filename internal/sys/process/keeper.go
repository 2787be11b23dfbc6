package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// Keeper returns the number and the name of a process whose end may end this one, if it is stopped
// by then; 0 if there is none. When a process group with a stopped process becomes orphaned, the
// kernel sends SIGHUP and SIGCONT to all of the group (setpgid(2)). It becomes orphaned when none
// of its processes has a parent in another group of the same session any more.
//
// The list of processes may change meanwhile. So the answer is good for a warning alone.
func (p Process) Keeper() (pid int, name string, err error) {
	own, err := relationsOf(p.PID)
	if err != nil {
		return 0, "", err
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return 0, "", err
	}
	for _, d := range dirs {
		n, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		member, err := relationsOf(n)
		if err != nil || member.group != own.group {
			continue
		}
		parent, err := relationsOf(member.parent)
		if err == nil && parent.session == own.session && parent.group != own.group {
			return member.parent, parent.name, nil
		}
	}
	return 0, "", nil
}

// relations are what /proc/PID/stat says of a process (proc(5), fields 2 and 4 to 6).
type relations struct {
	name                   string
	parent, group, session int
}

func relationsOf(pid int) (relations, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return relations{}, err
	}
	return parseRelations(b)
}

func parseRelations(b []byte) (r relations, err error) {
	begin, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	fields := bytes.Fields(b[end+1:])
	if begin < 0 || end < begin || len(fields) < 4 {
		return r, fmt.Errorf("not what the kernel tells of a process: %.100q", b)
	}
	r.name = string(b[begin+1 : end])
	var errs [3]error
	r.parent, errs[0] = strconv.Atoi(string(fields[1]))
	r.group, errs[1] = strconv.Atoi(string(fields[2]))
	r.session, errs[2] = strconv.Atoi(string(fields[3]))
	return r, errors.Join(errs[:]...)
}

package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"vacate/internal/sys/process"
)

// Process returns the process of a domain's QEMU, as libvirt has written it down beside its socket.
func (c *Conn) Process(d Domain) (process.Process, error) {
	if strings.Contains(d.Name, "/") {
		return process.Process{}, fmt.Errorf("%.100q cannot be the name of a domain", d.Name)
	}
	var text []byte
	var err error
	for _, sub := range []string{"qemu", "qemu/run"} { // the latter is that of qemu:///session
		text, err = os.ReadFile(filepath.Join(filepath.Dir(c.Socket), sub, d.Name+".pid"))
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		return process.Process{}, fmt.Errorf("find the QEMU of the domain %s: %w", d.Name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return process.Process{}, fmt.Errorf(
			"find the QEMU of the domain %s: libvirt's file has %.50q for its process",
			d.Name,
			text,
		)
	}
	p, err := process.Find(pid)
	if err != nil {
		return p, fmt.Errorf("find the QEMU of the domain %s: %w", d.Name, err)
	}
	args, err := arguments(pid)
	if err != nil {
		return p, fmt.Errorf("find the QEMU of the domain %s: %w", d.Name, err)
	}
	for i, a := range args {
		if a == "-uuid" && i+1 < len(args) && args[i+1] == d.UUID.String() {
			return p, nil
		}
	}
	return p, fmt.Errorf(
		"find the QEMU of the domain %s: process %d, which libvirt has for it, is not that QEMU",
		d.Name,
		pid,
	)
}

// procFile is a file of proc(5) of a process.
func procFile(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

func arguments(pid int) ([]string, error) {
	b, err := os.ReadFile(procFile(pid, "cmdline"))
	if err != nil {
		return nil, err
	}
	var args []string
	for a := range bytes.SplitSeq(bytes.TrimSuffix(b, []byte{0}), []byte{0}) {
		args = append(args, string(a))
	}
	return args, nil
}

// masterKey is in the directory that libvirt has made for the QEMU of a domain.
var masterKey = regexp.MustCompile(`[:=,"](/[^"]*)/master-key\.aes`)

// Directory returns the directory that libvirt has made for a domain's QEMU alone: as that QEMU
// names it, and as a path of this process's. A file that QEMU is told to write goes there.
func Directory(pid int) (theirs, ours string, err error) {
	args, err := arguments(pid)
	if err != nil {
		return "", "", err
	}
	for _, a := range args {
		if m := masterKey.FindStringSubmatch(a); m != nil {
			theirs = m[1]
			ours = filepath.Join(procFile(pid, "root"), theirs)
			if info, err := os.Stat(ours); err != nil || !info.IsDir() {
				return "", "", fmt.Errorf(
					"the directory of process %d: %w",
					pid,
					errors.Join(err, fs.ErrNotExist),
				)
			}
			return theirs, ours, nil
		}
	}
	return "", "", fmt.Errorf("libvirt has made no directory for process %d", pid)
}

package hypervisor

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// Others in tests.
var (
	systemdBooted = "/run/systemd/system" // sd_booted(3)
	systemdRun    = "/usr/bin/systemd-run"
)

// Scoped reports whether VMs that are started here get a scope of systemd of their own.
func Scoped() bool {
	info, err := os.Lstat(systemdBooted)
	return err == nil && info.IsDir()
}

// scope returns what precedes the command line of a VM's QEMU to give it a scope of its own, with
// the usual weight and outside the daemon's unit. systemd-run asks systemd for a scope of its own
// process, and then becomes the QEMU. So the QEMU keeps the process ID that was started, and takes
// no memory before it is in the scope. A name that is new each time cannot be that of a scope that
// has not ended yet.
func scope(what, name string, cred *syscall.Credential) []string {
	var unique [4]byte
	rand.Read(unique[:])
	args := []string{systemdRun, "--scope", "--quiet", "--collect", "--slice=machine.slice",
		"--description=" + what,
		fmt.Sprintf("--unit=vacate-%s-%s.scope", name, hex.EncodeToString(unique[:])), "--"}
	if cred == nil {
		return args
	}
	// systemd-run may become another user itself, but leaves out the user's other groups.
	groups := "--clear-groups"
	if len(cred.Groups) > 0 {
		groups = "--groups=" +
			strings.Trim(strings.ReplaceAll(fmt.Sprint(cred.Groups), " ", ","), "[]")
	}
	return append(args, "/usr/bin/setpriv", fmt.Sprintf("--reuid=%d", cred.Uid),
		fmt.Sprintf("--regid=%d", cred.Gid), groups, "--")
}

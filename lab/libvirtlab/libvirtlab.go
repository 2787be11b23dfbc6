// Package libvirtlab gives the hosts of a lab a libvirt each: the machine's own libvirtd,
// unmodified, in mount and UTS namespaces of its own.
//
//	/etc               as the machine's, read-only, with the users that Debian's package makes
//	/etc/libvirt       of the host alone
//	/run, /var/lib,    empty, but for libvirt's directory, which is of the host alone
//	/var/log, /var/cache
//
// So two daemons on one machine share nothing but disks, and neither can change what is the
// machine's. Their domains boot the lab's guest. Tests ask a daemon with [Host.Virsh], as an
// operator would.
package libvirtlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"vacate/lab"
)

// Packages are the Debian packages that it needs. None of them starts a service.
const Packages = "libvirt-daemon libvirt-clients"

// Probe says what this machine lacks for it, and how to get that.
func Probe() error {
	if err := lab.Probe(); err != nil {
		return err
	}
	for _, tool := range []string{"libvirtd", "virsh", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("a lab with libvirt needs %s: apt-get install %s", tool, Packages)
		}
	}
	return nil
}

// Host is a host of a lab that has a libvirt.
type Host struct {
	*lab.Host
	Dir    string // has its directories: run, lib, log, cache, etc
	Socket string // of its daemon
	URI    string // of its daemon, for virsh

	lab    *lab.Lab
	daemon *exec.Cmd
	output string // file with what the daemon says
}

// Hosts are both.
type Hosts struct{ A, B *Host }

// New starts a daemon on both hosts of a lab. Close it before the lab.
func New(ctx context.Context, l *lab.Lab) (_ *Hosts, err error) {
	if err := Probe(); err != nil {
		return nil, err
	}
	h := &Hosts{}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	for i, place := range []**Host{&h.A, &h.B} {
		of := []*lab.Host{l.A, l.B}[i]
		if *place, err = newHost(l, of, i); err != nil {
			return nil, fmt.Errorf("libvirt of host %s: %w", of.Name, err)
		}
	}
	for _, x := range []*Host{h.A, h.B} {
		if err := x.ready(ctx); err != nil {
			return nil, fmt.Errorf("libvirt of host %s: %w", x.Name, err)
		}
	}
	return h, nil
}

// script has the directories of a host in place of the machine's, and becomes its daemon.
const script = `set -e
dir=$1 name=$2
mount --bind /etc /etc
mount -o remount,bind,ro /etc
mount --bind "$dir/passwd" /etc/passwd
mount --bind "$dir/group" /etc/group
mount --bind "$dir/etc" /etc/libvirt
mount -t tmpfs vacate-lab /run
for d in lib log cache; do
	mount -t tmpfs vacate-lab /var/$d
	mkdir /var/$d/libvirt
	mount --bind "$dir/$d" /var/$d/libvirt
done
mkdir /run/libvirt
mount --bind "$dir/run" /run/libvirt
hostname "$name"
exec libvirtd --timeout 0
`

// conf are its files; host_uuid is added.
var conf = map[string]string{
	"libvirtd.conf": `auth_unix_rw = "none"
unix_sock_group = "root"
log_level = 3
`,
	"qemu.conf": `user = "root"
group = "root"
dynamic_ownership = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
`,
}

func newHost(l *lab.Lab, of *lab.Host, n int) (*Host, error) {
	dir := filepath.Join(l.RunDir(), "lv-"+of.Name)
	h := &Host{Host: of, Dir: dir, lab: l, Socket: filepath.Join(dir, "run/libvirt-sock"),
		output: filepath.Join(dir, "daemon.log")}
	h.URI = "qemu+unix:///system?socket=" + h.Socket
	for _, d := range []string{"run/lab", "lib", "log/lab", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.CopyFS(filepath.Join(dir, "cache"), os.DirFS(cache(l))); errors.Is(err,
		os.ErrNotExist) {
		err = os.MkdirAll(filepath.Join(dir, "cache"), 0o755)
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	for name, text := range conf {
		if name == "libvirtd.conf" {
			text +=
				fmt.Sprintf("host_uuid = "+
					"\"%[1]d%[1]d%[1]d%[1]d1111-1111-4111-8111-111111111111\"\n", n+1)
		}
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	// The daemon wants the user that the package libvirt-daemon-system would make.
	for name, line := range map[string]string{
		"passwd": "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin\n",
		"group":  "libvirt-qemu:x:64055:\n"} {
		b, err := os.ReadFile(filepath.Join("/etc", name))
		if err != nil {
			return nil, err
		}
		if !bytes.Contains(b, []byte("libvirt-qemu:")) {
			b = append(b, line...)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return nil, err
		}
	}
	return h, h.Start()
}

// cache is where what the daemon finds out of QEMU is kept for later labs, as that takes seconds.
func cache(l *lab.Lab) string { return filepath.Join(l.Dir(), "libvirt-cache") }

// Start starts the daemon again after Kill or Stop.
func (h *Host) Start() error {
	out, err := os.OpenFile(h.output, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command("unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c",
		script, "sh", h.Dir, "host-"+h.Name)
	cmd.Stdout, cmd.Stderr = out, out
	if err := h.Host.Start(cmd); err != nil {
		return err
	}
	h.daemon = cmd
	return nil
}

// ready waits until the daemon answers and knows its QEMU.
func (h *Host) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		_, err := h.Virsh(ctx, "domcapabilities", "--virttype", "qemu", "--machine", "pc")
		if err == nil {
			break
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			said, _ := os.ReadFile(h.output)
			return fmt.Errorf("%w: %w\n%s", ctx.Err(), err, said[max(0, len(said)-2000):])
		}
	}
	if _, err := os.Stat(cache(h.lab)); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(h.lab.Dir(), "libvirt-cache-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.CopyFS(filepath.Join(tmp, "qemu"),
		os.DirFS(filepath.Join(h.Dir, "cache/qemu"))); err != nil {
		return err
	}
	if err := os.Rename(tmp, cache(h.lab)); err != nil && !errors.Is(err, os.ErrExist) {
		return err // else another lab was first
	}
	return nil
}

// Ready waits until the daemon answers.
func (h *Host) Ready(ctx context.Context) error { return h.ready(ctx) }

// Kill ends the daemon at once (SIGKILL). Its domains live on.
func (h *Host) Kill() {
	h.daemon.Process.Kill()
	h.daemon.Wait()
}

// Stop has the daemon end by itself (SIGTERM). Its domains live on.
func (h *Host) Stop() {
	h.daemon.Process.Signal(syscall.SIGTERM)
	h.daemon.Wait()
}

// Virsh runs a command of virsh against the daemon and returns what it prints.
func (h *Host) Virsh(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", h.URI}, args...)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("virsh %s on host %s: %w: %s", strings.Join(args, " "), h.Name, err,
			strings.TrimSpace(said.String()))
	}
	return strings.TrimSpace(out.String()), err
}

// Close ends both daemons and the QEMUs that they started.
func (h *Hosts) Close() {
	for _, x := range []*Host{h.A, h.B} {
		if x == nil {
			continue
		}
		if x.daemon != nil {
			x.Kill()
		}
		x.killDomains()
	}
}

func (h *Host) killDomains() {
	files, _ := filepath.Glob(filepath.Join(h.Dir, "run/qemu/*.pid"))
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".pid")
		b, _ := os.ReadFile(f)
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || pid <= 1 {
			continue
		}
		p, err := os.FindProcess(pid)
		if err != nil {
			continue
		}
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if bytes.Contains(line, []byte("guest="+name+",")) {
			// else another process has its number by now
			p.Kill()
		}
		p.Release()
	}
}

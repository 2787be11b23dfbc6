// Package libvirtlab gives the hosts of a lab a libvirt each: the machine's own libvirtd, or that
// of another of Debian's releases, unmodified, in mount and UTS namespaces of its own.
//
//	/usr               the machine's, or that of packages of another release
//	/etc               as the machine's, read-only, with the users that Debian's package makes
//	/etc/libvirt       of the host alone
//	/run, /var/lib,    empty, but for libvirt's directory, which is of the host alone
//	/var/log, /var/cache
//	/sys/devices/system/cpu/online
//	                   the host's core, where the lab's hosts have one each
//
// So two daemons on one machine share nothing but disks, and neither can change what is the
// machine's. Their domains boot the lab's guest. Tests ask a daemon with [Host.Virsh], as an
// operator would.
package libvirtlab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
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

// Setup is how a host's libvirt is set up. The zero value is good.
type Setup struct {
	// Release is Debian's whose libvirt, QEMU, swtpm and firmware the host has, such as "trixie".
	// They are downloaded once. Default what the machine has.
	Release string
	User    string // as which QEMUs run: root, which is the default, or libvirt-qemu
	Lockd   bool   // virtlockd has locks on disks
}

// fetch are the packages of another release.
var fetch = []string{"libvirt-daemon", "libvirt-daemon-driver-qemu", "qemu-system-x86", "ovmf",
	"swtpm", "swtpm-tools", "coreutils", "util-linux"}

// more of them are needed since the daemon was taken apart.
var more = map[string][]string{"trixie": {"libvirt-daemon-lock", "libvirt-daemon-plugin-lockd"}}

// Host is a host of a lab that has a libvirt.
type Host struct {
	*lab.Host
	Dir    string // has its directories: run, lib, log, cache, etc
	Socket string // of its daemon
	URI    string // of its daemon, for virsh
	Remote string // the same over the lab's link, for the other host's daemon

	lab    *lab.Lab
	setup  Setup
	root   string // has /usr and /etc of another release
	output string // file with what the daemon says

	mu      sync.Mutex // a daemon is started by one at a time
	daemon  *daemon    // nil: none is wanted
	crashes int        // of daemons
}

type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has ended, and another was started where one is wanted
}

// mostCrashes is how often a daemon is started anew.
const mostCrashes = 10

// Hosts are both.
type Hosts struct{ A, B *Host }

// New starts a daemon on both hosts of a lab. Close it before the lab. Host b is set up as a if
// there is no second setup.
func New(ctx context.Context, l *lab.Lab, setups ...Setup) (_ *Hosts, err error) {
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
		var setup Setup
		if len(setups) > 0 {
			setup = setups[min(i, len(setups)-1)]
		}
		if *place, err = newHost(ctx, l, of, i, setup); err != nil {
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
dir=$1 name=$2 root=$3 lockd=$4 user=$5
if [ "$root" ]; then
	mount -t overlay -o lowerdir="$root/etc:/etc" vacate-lab /etc
	mount --bind /dev/null /etc/ld.so.cache
else
	mount --bind /etc /etc
	mount -o remount,bind,ro /etc
fi
mount --bind "$dir/passwd" /etc/passwd
mount --bind "$dir/group" /etc/group
mount --bind "$dir/etc" /etc/libvirt
mount -t tmpfs vacate-lab /run
for d in lib log cache; do
	mount -t tmpfs vacate-lab /var/$d
	mkdir /var/$d/libvirt
	mount --bind "$dir/$d" /var/$d/libvirt
done
mkdir /run/libvirt /var/lib/swtpm-localca /var/log/swtpm
mount --bind "$dir/run" /run/libvirt
mkdir -p /dev/hugepages
mount -t hugetlbfs vacate-lab /dev/hugepages
if [ -e "$dir/online" ]; then
	mount --bind "$dir/online" /sys/devices/system/cpu/online
fi
# A machine without USB has no place where libvirt could look in vain for a device of a domain's.
[ -d /sys/bus/usb ] || { mount -t tmpfs vacate-lab /sys/bus; mkdir -p /sys/bus/usb/devices; }
# A user who may not open it has libvirt ask QEMU anew, slowly, each time that it wants to know.
if [ "$user" ] && [ -e /dev/kvm ]; then
	mknod -m 666 "$dir/kvm" c 10 232
	mount --bind "$dir/kvm" /dev/kvm
fi
hostname "$name"
[ -z "$root" ] || mount --bind "$root/usr" /usr
if [ "$lockd" = true ]; then
	setpriv --pdeathsig KILL virtlockd --timeout 0 &
	while [ ! -S /run/libvirt/virtlockd-sock ]; do sleep 0.1; done
fi
exec libvirtd --listen --timeout 0
`

// files are those of the daemon's configuration.
func (s Setup) files(n int) map[string]string {
	user := cmp.Or(s.User, "root")
	qemu := fmt.Sprintf(`user = %[1]q
group = %[1]q
swtpm_user = "root"
swtpm_group = "root"
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
hugetlbfs_mount = "/dev/hugepages"
`, user)
	if user == "root" {
		qemu += "dynamic_ownership = 0\n"
	}
	if s.Lockd {
		qemu += "lock_manager = \"lockd\"\n"
	}
	return map[string]string{
		"libvirtd.conf": fmt.Sprintf(`auth_unix_rw = "none"
auth_tcp = "none"
listen_tcp = 1
listen_tls = 0
unix_sock_group = "root"
log_level = 3
host_uuid = "%[1]d%[1]d%[1]d%[1]d1111-1111-4111-8111-111111111111"
`, n+1),
		"qemu.conf": qemu,
	}
}

func newHost(ctx context.Context, l *lab.Lab, of *lab.Host, n int, setup Setup) (*Host, error) {
	dir := filepath.Join(l.RunDir(), "lv-"+of.Name)
	h := &Host{Host: of, Dir: dir, lab: l, setup: setup,
		Socket: filepath.Join(dir, "run/libvirt-sock"),
		output: filepath.Join(dir, "daemon.log")}
	h.URI = "qemu+unix:///system?socket=" + h.Socket
	h.Remote = "qemu+tcp://" + of.Addr + "/system"
	if r := setup.Release; r != "" {
		var err error
		if h.root, err = lab.Release(ctx, l.Dir(), r, append(more[r], fetch...)...); err != nil {
			return nil, err
		}
	}
	if setup.User != "" {
		for _, d := range []string{l.RunDir(), filepath.Dir(l.RunDir())} {
			if err := os.Chmod(d, 0o711); err != nil {
				return nil, err
			}
		}
	}
	for _, d := range []string{"run/lab", "lib", "log/lab", "etc"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	cache, err := h.cache()
	if err != nil {
		return nil, err
	}
	if err := os.CopyFS(filepath.Join(dir, "cache"), os.DirFS(cache)); errors.Is(err,
		os.ErrNotExist) {
		err = os.MkdirAll(filepath.Join(dir, "cache"), 0o755)
		if err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	for name, text := range setup.files(n) {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	// The daemon lets a QEMU run on all CPUs that are online, also where it may not itself.
	if of.Core >= 0 {
		if err := os.WriteFile(filepath.Join(dir, "online"), fmt.Appendln(nil, of.Core),
			0o644); err != nil {
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
// The daemon believes none of it once either program has changed.
func (h *Host) cache() (string, error) {
	name := "libvirt-cache"
	for _, of := range []string{h.setup.Release, h.setup.User} {
		if of != "" {
			name += "-" + of
		}
	}
	changed := int64(0)
	for _, file := range []string{"/usr/bin/qemu-system-x86_64", "/usr/sbin/libvirtd"} {
		info, err := os.Stat(filepath.Join(h.root, file))
		if err != nil {
			return "", err
		}
		changed = max(changed, info.Sys().(*syscall.Stat_t).Ctim.Sec)
	}
	return filepath.Join(h.lab.Dir(), fmt.Sprintf("%s-%d", name, changed)), nil
}

// Start starts the daemon again after Kill or Stop.
func (h *Host) Start() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.start()
}

func (h *Host) start() error {
	out, err := h.log()
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command("unshare", "--mount", "--uts", "--propagation", "private", "sh", "-c",
		script, "sh", h.Dir, "host-"+h.Name, h.root, strconv.FormatBool(h.setup.Lockd),
		h.setup.User)
	cmd.Stdout, cmd.Stderr = out, out
	if err := h.Host.Start(cmd); err != nil {
		return err
	}
	h.daemon = &daemon{cmd, make(chan struct{})}
	go h.keep(h.daemon)
	return nil
}

// keep starts the daemon anew if it ends by itself, as systemd does by its unit: libvirt 9.0
// crashes at times when a QEMU ends just after a migration.
func (h *Host) keep(d *daemon) {
	defer close(d.ended)
	why := d.cmd.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.daemon != d {
		return
	}
	h.daemon = nil
	if h.crashes++; h.crashes > mostCrashes {
		return
	}
	h.note(fmt.Sprintf("the lab starts libvirtd again, which ended by itself: %v", why))
	if err := h.start(); err != nil {
		h.note(fmt.Sprintf("the lab cannot start libvirtd: %v", err))
	}
}

// log opens the file with what the daemon prints, to add to it.
func (h *Host) log() (*os.File, error) {
	return os.OpenFile(h.output, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}

// note adds a line to what the daemon prints.
func (h *Host) note(line string) {
	if f, err := h.log(); err == nil {
		fmt.Fprintln(f, line)
		f.Close()
	}
}

// take ends the keeping of the daemon; nil if there is none.
func (h *Host) take() *daemon {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.daemon
	h.daemon = nil
	return d
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
	cache, err := h.cache()
	if err != nil {
		return err
	}
	if _, err := os.Stat(cache); err == nil {
		return nil
	}
	// A host that has been in use knows each of its QEMUs, not only the one for domains' own CPUs.
	if _, err := h.Virsh(ctx, "capabilities"); err != nil {
		return err
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
	if err := os.Rename(tmp, cache); err != nil && !errors.Is(err, os.ErrExist) {
		return err // else another lab was first
	}
	return nil
}

// Ready waits until the daemon answers.
func (h *Host) Ready(ctx context.Context) error { return h.ready(ctx) }

// Kill ends the daemon at once (SIGKILL). Its domains live on.
func (h *Host) Kill() { h.end(syscall.SIGKILL) }

// Stop has the daemon end by itself (SIGTERM). Its domains live on.
func (h *Host) Stop() { h.end(syscall.SIGTERM) }

func (h *Host) end(by syscall.Signal) {
	if d := h.take(); d != nil {
		d.cmd.Process.Signal(by)
		<-d.ended
	}
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

// Paths are the directories below which the lab's domains name files.
func (h *Hosts) Paths() []string {
	return []string{h.A.lab.Dir(), h.A.lab.RunDir(), os.TempDir(), "/run/libvirt/lab",
		"/var/log/libvirt/lab"}
}

// Close ends both daemons and the QEMUs that they started.
func (h *Hosts) Close() {
	for _, x := range []*Host{h.A, h.B} {
		if x == nil {
			continue
		}
		x.Kill()
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

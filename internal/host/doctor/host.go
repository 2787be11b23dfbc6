package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"vacate/internal/sys/room"
	"vacate/internal/sys/sched"

	"vacate/internal/qemu/guestmem"

	"golang.org/x/sys/unix"
)

// HostOptions is what the daemon knows of itself.
type HostOptions struct {
	Name        string
	Journal     string   // directory
	QEMUs       []string // programs to ask for their version
	Certificate CertFacts
	// what VMs that are coming will still take of a limit; nil: nothing
	Promised func(room.Limit) uint64
}

// Host gathers the facts of this host; it takes some 10 ms for each QEMU. What cannot be found out
// is zero, or an error's text. It changes nothing: of what it opens, it opens its own.
func Host(ctx context.Context, o HostOptions) HostFacts {
	h := HostFacts{
		Name:        o.Name,
		BootID:      word("/proc/sys/kernel/random/boot_id"),
		Kernel:      word("/proc/sys/kernel/osrelease"),
		PageSize:    uint64(os.Getpagesize()),
		User:        uint32(os.Geteuid()),
		Effective:   effective(),
		PidfdGetfd:  told(tryPidfdGetfd()),
		ProcessRead: told(tryProcessRead()),
		KVM:         told(tryKVM()),
		CPU:         parseCPU(head("/proc/cpuinfo", 256<<10)),
		CPUWait:     parsePressure(head("/proc/pressure/cpu", 4<<10)),
		MemoryWait:  parsePressure(head("/proc/pressure/memory", 4<<10)),
		Certificate: o.Certificate,
	}
	h.CPU.Count = runtime.NumCPU()
	h.Userfaultfd = userfaultfd()
	h.PtraceScope, _ = strconv.Atoi(word("/proc/sys/kernel/yama/ptrace_scope"))
	fmt.Sscan(word("/proc/loadavg"), &h.Load)
	// A twin is started by the daemon, in its control groups.
	h.Limits, _ = room.Limits(os.Getpid())
	for i, l := range h.Limits {
		if o.Promised != nil {
			h.Limits[i].Used += min(l.Free(), o.Promised(l))
		}
	}
	mem := room.Meminfo(head("/proc/meminfo", 64<<10))
	h.SwapTotal, h.SwapFree = mem["SwapTotal"], mem["SwapFree"]
	if o.Journal != "" {
		h.Journal = space(o.Journal)
	}
	for _, path := range o.QEMUs {
		h.QEMUs = append(h.QEMUs, askQEMU(ctx, path))
	}
	clip(&h)
	h.Synchronised = synchronised()
	h.Time = time.Now().Round(0)
	return h
}

// capSysPtrace is CAP_SYS_PTRACE of linux/capability.h.
const capSysPtrace = unix.CAP_SYS_PTRACE

func (h HostFacts) mayTrace() bool { return h.Effective>>capSysPtrace&1 == 1 }

func told(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// head returns the first bytes of a file, or nothing.
func head(name string, limit int64) []byte {
	f, err := os.Open(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, limit))
	return b
}

// word returns the content of a small file without white space at its ends.
func word(name string) string { return strings.TrimSpace(string(head(name, 4<<10))) }

// effective returns the capabilities in force, of proc_pid_status(5).
func effective() (caps uint64) {
	for line := range strings.Lines(string(head("/proc/thread-self/status", 16<<10))) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, _ = strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return caps
}

// Of linux/userfaultfd.h (Linux 6.12), x86-64 and arm64.
const (
	uffdNew = 0xaa00 // USERFAULTFD_IOC_NEW on /dev/userfaultfd

	uffdMissingHugetlb = 1 << 4
	uffdMissingShmem   = 1 << 5
)

// userfaultfd tries both ways to a userfaultfd, each with a page of our own, which nobody touches.
func userfaultfd() UserfaultFacts {
	u := UserfaultFacts{Unprivileged: -1}
	if n, err := strconv.Atoi(word("/proc/sys/vm/unprivileged_userfaultfd")); err == nil {
		u.Unprivileged = n
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	features, err := tryUserfaultfd(int(fd), errno)
	u.Error, u.Features = told(err), features

	dev, err := unix.Open("/dev/userfaultfd", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		u.Device = told(&os.PathError{Op: "open", Path: "/dev/userfaultfd", Err: err})
		return u
	}
	defer unix.Close(dev)
	fd, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(dev), uffdNew,
		unix.O_CLOEXEC|unix.O_NONBLOCK)
	features, err = tryUserfaultfd(int(fd), errno)
	u.Device, u.Features = told(err), u.Features|features
	return u
}

// tryUserfaultfd takes a new userfaultfd through what QEMU does with one, and closes it.
func tryUserfaultfd(fd int, errno unix.Errno) (features uint64, _ error) {
	if errno != 0 {
		return 0, os.NewSyscallError("userfaultfd", errno)
	}
	defer unix.Close(fd)
	size := os.Getpagesize()
	page, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(page)
	return guestmem.Userfault(fd, page)
}

func tryPidfdGetfd() error {
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, pidfd, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	return unix.Close(fd)
}

func tryProcessRead() error {
	from, to := [1]byte{1}, [1]byte{}
	_, err := unix.ProcessVMReadv(os.Getpid(), []unix.Iovec{{Base: &to[0], Len: 1}},
		[]unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&from[0])), Len: 1}}, 0)
	runtime.KeepAlive(&from)
	return os.NewSyscallError("process_vm_readv", err)
}

// tryKVM asks KVM for its API's version. That it answers does not prove that a guest runs.
func tryKVM() error {
	const getAPIVersion, version = 0xae00, 12 // of linux/kvm.h
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/dev/kvm", Err: err}
	}
	defer unix.Close(fd)
	v, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), getAPIVersion, 0)
	if errno != 0 {
		return os.NewSyscallError("KVM_GET_API_VERSION", errno)
	}
	if v != version {
		return fmt.Errorf("/dev/kvm has version %d of its API, not %d", v, version)
	}
	return nil
}

// synchronised asks the kernel whether its clock is held by somebody, adjtimex(2).
func synchronised() bool {
	const timeError, unsynchronised = 5, 0x40 // TIME_ERROR and STA_UNSYNC of linux/timex.h
	var t unix.Timex                          // modes 0: only asks
	state, err := unix.Adjtimex(&t)
	return err == nil && state != timeError && t.Status&unsynchronised == 0
}

// parseCPU reads the first processor of /proc/cpuinfo on x86; elsewhere little is found.
func parseCPU(b []byte) (c CPUFacts) {
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, 64<<10)
	for lines.Scan() && lines.Text() != "" {
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(name) {
		case "model name":
			c.Model = value
		}
	}
	return c
}

// parsePressure returns "some avg10" of a file in /proc/pressure, in percent.
func parsePressure(b []byte) (percent float64) {
	fmt.Sscanf(string(b), "some avg10=%g", &percent)
	return min(max(percent, 0), 100)
}

// space asks for the room in the nearest directory above path that is there.
func space(path string) SpaceFacts {
	s := SpaceFacts{Path: path}
	var fs unix.Statfs_t
	err := unix.Statfs(path, &fs)
	for dir := path; errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir); {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &fs)
	}
	switch {
	case err != nil:
		s.Error = told(&os.PathError{Op: "statfs", Path: path, Err: err})
	case fs.Flags&unix.ST_RDONLY != 0:
		s.Error = "the file system is read-only"
	default:
		s.Free = fs.Bavail * uint64(fs.Bsize)
	}
	return s
}

// Bounds for asking a QEMU's program.
const (
	askTime = 5 * time.Second
	maxSaid = 256 << 10
)

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d{1,4}\.\d{1,4}\.\d{1,4})`)

// askQEMU runs a program twice, to ask for its version and machine types. It runs as
// the daemon, from a path that this host's operator gave.
func askQEMU(ctx context.Context, path string) QEMUFacts {
	q := QEMUFacts{Path: path}
	fail := func(err error) QEMUFacts {
		q.Error = err.Error()
		return q
	}
	if !filepath.IsAbs(path) {
		return fail(errors.New("not an absolute path"))
	}
	said, err := ask(ctx, path, "--version")
	if err != nil {
		return fail(err)
	}
	m := versionLine.FindSubmatch(said)
	if m == nil {
		return fail(errors.New("--version says nothing of QEMU"))
	}
	q.Version = string(m[1])
	if said, err = ask(ctx, path, "-machine", "help"); err != nil {
		return fail(err)
	}
	q.Machines = parseMachines(said)
	return q
}

func ask(ctx context.Context, path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second // for a child that keeps the pipe open
	cmd.Dir = "/"
	said := limited{left: maxSaid}
	cmd.Stdout = &said
	err := sched.Usual(cmd.Start) // as nothing waits for it that matters as much as the VMs here
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", path, args[0], err)
	}
	return said.b, nil
}

// limited keeps what is written first and takes no more than that.
type limited struct {
	b    []byte
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, errors.New("it says too much")
	}
	l.b, l.left = append(l.b, p...), l.left-len(p)
	return len(p), nil
}

var machineName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

// parseMachines reads the list that "-machine help" prints: a line of title, then a name and a
// description each.
func parseMachines(b []byte) (names []string) {
	first := true
	for line := range strings.Lines(string(b)) {
		name, _, _ := strings.Cut(strings.TrimRight(line, "\r\n"), " ")
		if !first && machineName.MatchString(name) && len(names) < maxList {
			names = append(names, name)
		}
		first = false
	}
	return names
}

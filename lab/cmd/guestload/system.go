package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"vacate/lab/guestmodules"
	"vacate/lab/loadproto"
)

// params are the parameters of the kernel command line. Sizes are in pages.
type params struct {
	hot, idle, other, cache, file int
	workers, others               int
	work, zipf, scatter, stale    bool
	slow                          bool
	seed                          uint64
	addr                          netip.Prefix // IPv4, or not valid: none
	ports                         []string     // names of virtio-serial ports to wait for
	run                           []string     // files of programs to start
	serve                         *server      // nil: none
}

// server is a program of the server's disk.
type server struct {
	user uint32
	args []string // with its file
}

func parseServer(s string) (*server, error) {
	user, rest, ok := strings.Cut(s, ",")
	n, err := strconv.ParseUint(user, 10, 32)
	if !ok || err != nil || !strings.HasPrefix(rest, "/") {
		return nil, fmt.Errorf("%.40q: want USER,/FILE", s)
	}
	return &server{uint32(n), strings.Split(rest, ",")}, nil
}

func parseParams(cmdline string) (params, error) {
	p := params{workers: runtime.NumCPU(), others: 1, work: true,
		file: 8 << 20 / loadproto.PageSize, seed: 1}
	for _, field := range strings.Fields(cmdline) {
		field, ours := strings.CutPrefix(field, "vacate.")
		if !ours {
			continue
		}
		key, value, _ := strings.Cut(field, "=")
		var err error
		switch key {
		case "hot":
			p.hot, err = parsePages(value)
		case "idle":
			p.idle, err = parsePages(value)
		case "other":
			p.other, err = parsePages(value)
		case "cache":
			p.cache, err = parsePages(value)
		case "file":
			p.file, err = parsePages(value)
		case "workers":
			p.workers, err = parseCount(value)
		case "others":
			p.others, err = parseCount(value)
		case "seed":
			p.seed, err = strconv.ParseUint(value, 10, 64)
		case "addr":
			p.addr, err = parseAddr(value)
		case "port":
			p.ports = append(p.ports, value)
		case "run":
			p.run = append(p.run, value)
		case "serve":
			p.serve, err = parseServer(value)
		case "mode":
			p.work, err = oneOf(value, "work", "idle")
		case "pace":
			p.slow, err = oneOf(value, "slow", "full")
		case "access":
			p.zipf, err = oneOf(value, "zipf", "uniform")
		case "place":
			p.scatter, err = oneOf(value, "mixed", "ordered")
		case "free":
			p.stale, err = oneOf(value, "stale", "fresh")
		default:
			err = fmt.Errorf("not a parameter")
		}
		if err != nil {
			return p, fmt.Errorf("kernel command line: vacate.%s: %w", key, err)
		}
	}
	return p, nil
}

func readParams() (params, error) {
	line, waited := os.LookupEnv(paramsEnv)
	if !waited {
		cmdline, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return params{}, err
		}
		line = string(cmdline)
	}
	return parseParams(line)
}

// oneOf reports whether s is the first of two words, and fails if it is
// neither.
func oneOf(s, yes, no string) (bool, error) {
	if s != yes && s != no {
		return false, fmt.Errorf("%q: want %s or %s", s, yes, no)
	}
	return s == yes, nil
}

func parseAddr(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err == nil && !p.Addr().Is4() {
		err = fmt.Errorf("%s is no IPv4 address", p)
	}
	return p, err
}

func parseCount(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err == nil && (n < 1 || n > 1024) {
		err = fmt.Errorf("%d: want 1 to 1024", n)
	}
	return n, err
}

// parsePages reads a size in bytes, with K, M or G, and returns pages.
func parsePages(s string) (int, error) {
	shift := 0
	if n := len(s); n > 0 {
		switch s[n-1] {
		case 'K':
			shift = 10
		case 'M':
			shift = 20
		case 'G':
			shift = 30
		}
		if shift > 0 {
			s = s[:n-1]
		}
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("size %q: %w", s, err)
	}
	return int(n << shift / loadproto.PageSize), nil
}

func mountAll() error {
	for _, m := range []struct{ kind, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"},
		{"sysfs", "/sys"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

// portWait is how long a driver may take to find a port.
const portWait = 10 * time.Second

// linkPorts waits for virtio-serial ports and gives them their names in /dev,
// as udev does.
func linkPorts(names []string) error {
	if len(names) == 0 {
		return nil
	}
	const dir = "/dev/virtio-ports"
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, want := range names {
		for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
			device, err := findPort(want)
			if err != nil {
				return err
			}
			if device != "" {
				if err := os.Symlink("../"+device,
					filepath.Join(dir, filepath.Base(want))); err != nil {
					return err
				}
				break
			}
			if time.Since(begun) > portWait {
				return fmt.Errorf("the machine has no virtio-serial port %q", want)
			}
		}
	}
	return nil
}

// findPort returns a port's device in /dev, or nothing.
func findPort(want string) (string, error) {
	files, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, f := range files {
		name, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(name)) == want {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", err
}

// start starts a program, whose end is told on the console.
func start(run string) error {
	name, args, _ := strings.Cut(run, ",")
	cmd := exec.Command(name)
	if args != "" {
		cmd.Args = append(cmd.Args, strings.Split(args, ",")...)
	}
	return begin(cmd)
}

func begin(cmd *exec.Cmd) error {
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	go func() {
		err := cmd.Wait()
		fmt.Fprintf(os.Stderr, "guestload: %s has ended: %v\n", cmd.Path, err)
	}()
	return nil
}

// begin mounts the server's disk, and starts it there.
func (s *server) begin() error {
	const disk, root = "/dev/vdb", "/server"
	if err := guestmodules.Load("/disk-modules"); err != nil {
		return err
	}
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Mount(disk, root, "ext4", unix.MS_NOATIME, "")
		if err == nil {
			break
		} else if err != unix.ENOENT || time.Since(begun) > portWait {
			return fmt.Errorf("mount %s: %w", disk, err)
		}
	}
	for _, m := range []struct{ kind, at string }{{"devtmpfs", "dev"}, {"proc", "proc"}} {
		if err := unix.Mount(m.kind, filepath.Join(root, m.at), m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	cmd := exec.Command(s.args[0], s.args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/bin", "LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root,
		Credential: &syscall.Credential{Uid: s.user, Gid: s.user}}
	return begin(cmd)
}

// netUp brings the network card up, if there is one, so that its rings are in use. It gets
// addr, if that is one.
func netUp(addr netip.Prefix) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("eth0")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err == unix.ENODEV && !addr.IsValid() {
		return nil
	} else if err != nil {
		return fmt.Errorf("eth0: %w", err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("eth0 up: %w", err)
	}
	if !addr.IsValid() {
		return nil
	}
	for _, set := range []struct {
		request uint
		value   []byte
	}{
		{unix.SIOCSIFADDR, addr.Addr().AsSlice()},
		{unix.SIOCSIFNETMASK, net.CIDRMask(addr.Bits(), 32)},
	} {
		if err := req.SetInet4Addr(set.value); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, set.request, req); err != nil {
			return fmt.Errorf("address %s of eth0: %w", addr, err)
		}
	}
	return nil
}

// openPort opens the report port raw, at a speed that keeps the driver's
// time-outs short.
func openPort() (*os.File, error) {
	f, err := os.OpenFile("/dev/ttyS1", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t := unix.Termios{
		Cflag:  unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200,
		Ispeed: unix.B115200,
		Ospeed: unix.B115200,
	}
	t.Cc[unix.VMIN] = 1
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &t); err != nil {
		return nil, fmt.Errorf("set up /dev/ttyS1: %w", err)
	}
	return f, nil
}

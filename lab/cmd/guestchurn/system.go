package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
	"vacate/lab/guestmodules"
)

// system is what the guest offers to the load.
type system struct {
	workers []string
	seed    uint64
	memKiB  int
	disk    bool // /disk is an ext4 on a virtio disk
	swap    bool
	net     bool // the host echoes what is sent to echoAddr
	lacks   []string
	trace   string // where tracefs is, or ""
}

// Only to others than process 1: these are where workers find their files.
const (
	diskDir  = "/disk"
	shmemDir = "/shmem"
	traceDir = "/sys/kernel/tracing"
)

func setUp() (*system, error) {
	s := &system{seed: 1}
	for _, m := range []struct{ kind, at, options string }{
		{"devtmpfs", "/dev", ""}, {"proc", "/proc", ""}, {"sysfs", "/sys", ""},
		{"tmpfs", shmemDir, "huge=within_size"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return nil, err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, m.options); err != nil {
			return nil, fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	// With less than 512 MiB, Linux would use no transparent huge pages.
	if err := os.WriteFile("/sys/kernel/mm/transparent_hugepage/enabled", []byte("always"),
		0); err != nil {
		return nil, err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Fields(string(cmdline)) {
		if v, ok := strings.CutPrefix(field, "churn.seed="); ok {
			if s.seed, err = strconv.ParseUint(v, 10, 64); err != nil {
				return nil, fmt.Errorf("kernel command line: %s: %w", field, err)
			}
		}
		if v, ok := strings.CutPrefix(field, "churn.workers="); ok {
			s.workers = strings.Split(v, ",")
		}
	}
	if err := guestmodules.Load("/modules"); err != nil {
		return nil, err
	}
	if s.memKiB, err = meminfo("MemTotal"); err != nil {
		return nil, err
	}
	lack := func(what string, err error) bool {
		if err != nil {
			s.lacks = append(s.lacks, fmt.Sprintf("%s: %v", what, err))
		}
		return err == nil
	}
	s.disk = lack("disk", mountDisk())
	s.swap = lack("swap", swapOn("/dev/vdb"))
	s.net = lack("network", netUp())
	if lack("trace", unix.Mount("tracefs", traceDir, "tracefs", 0, "")) {
		s.trace = traceDir
	}
	return s, nil
}

func meminfo(key string) (kib int, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == key+":" {
			return strconv.Atoi(f[1])
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no %s", key)
}

func mountDisk() error {
	if err := os.MkdirAll(diskDir, 0o755); err != nil {
		return err
	}
	if err := waitFor("/dev/vda"); err != nil {
		return err
	}
	return unix.Mount("/dev/vda", diskDir, "ext4", 0, "errors=continue")
}

// waitFor waits for a device that a module makes.
func waitFor(name string) error {
	for range 100 {
		if _, err := os.Stat(name); err == nil {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("there is no %s", name)
}

// swapOn writes the header of a swap device, and lets the kernel swap to it. The header (union
// swap_header in include/linux/swap.h) has version, last page and number of bad pages at 1024, and
// a magic at the end of the first page.
func swapOn(dev string) error {
	if err := waitFor(dev); err != nil {
		return err
	}
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	head := make([]byte, churnproto.PageSize)
	binary.LittleEndian.PutUint32(head[1024:], 1)
	binary.LittleEndian.PutUint32(head[1028:], uint32(size/churnproto.PageSize-1))
	copy(head[churnproto.PageSize-10:], "SWAPSPACE2")
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	name, err := unix.BytePtrFromString(dev)
	if err != nil {
		return err
	}
	if _, _, e := unix.Syscall(unix.SYS_SWAPON, uintptr(unsafe.Pointer(name)), 0, 0); e != 0 {
		return fmt.Errorf("swapon: %w", e)
	}
	return nil
}

// echoAddr is where QEMU's user-mode network echoes.
var echoAddr = unix.SockaddrInet4{Port: 7, Addr: [4]byte{10, 0, 2, 100}}

// netUp brings up the loopback device and the network card, with the address that QEMU's
// user-mode network gives to guests.
func netUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, dev := range []string{"lo", "eth0"} {
		req, err := unix.NewIfreq(dev)
		if err != nil {
			return err
		}
		if dev != "lo" {
			req.SetInet4Addr([]byte{10, 0, 2, 15})
			if err := unix.IoctlIfreq(fd, unix.SIOCSIFADDR, req); err != nil {
				return fmt.Errorf("%s: %w", dev, err)
			}
			req.SetInet4Addr([]byte{255, 255, 255, 0})
			if err := unix.IoctlIfreq(fd, unix.SIOCSIFNETMASK, req); err != nil {
				return fmt.Errorf("%s: %w", dev, err)
			}
		}
		req.SetUint16(unix.IFF_UP)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
			return fmt.Errorf("%s: %w", dev, err)
		}
	}
	return nil
}

// openPort opens the virtio-serial port of churnproto's name.
func openPort() (*os.File, error) {
	for range 200 {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			b, _ := os.ReadFile(n)
			if strings.TrimSpace(string(b)) == churnproto.Port {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("there is no virtio-serial port %q", churnproto.Port)
}

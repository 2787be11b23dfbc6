package evict

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"unsafe"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// direct places pages in a QEMU's memory itself, through the userfaultfd on which that QEMU waits
// for them. QEMU's own loader copies each page through a socket and makes a system call for it.
// Here one call places a whole run, and a fetched page does not wait until QEMU's loader thread is
// scheduled. The kernel refuses to place a page twice.
//
// The descriptor is QEMU's own, duplicated with pidfd_getfd(2). That needs the right to trace QEMU,
// as reading the source's memory does. QEMU's list of received pages then lacks those placed here.
// Nothing in a completing migration reads that list (QEMU 7.2 to 11.1).
//
// The calls have the format of linux/userfaultfd.h. A direct may be used concurrently.
type direct struct {
	uffd int
	hva  []uint64 // of each block of the layout; 0 if it cannot be placed directly
	zero []byte   // as large as the largest page of a block
	huge []bool
}

const (
	uffdioCopy     = 0xc028aa03
	uffdioZeropage = 0xc020aa04
)

// errNoDirect is wrapped by the reasons for which pages go through QEMU's stream.
var errNoDirect = errors.New("pages cannot be placed directly")

// openDirect finds the userfaultfd of a QEMU that listens for pages.
func openDirect(qemu process.Process, mem *guestmem.Memory, l layout) (*direct, error) {
	dir := fmt.Sprintf("/proc/%d/fd", mem.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoDirect, err)
	}
	found := -1
	for _, entry := range entries {
		target, err := os.Readlink(filepath.Join(dir, entry.Name()))
		if err != nil || target != "anon_inode:[userfaultfd]" {
			continue
		}
		if found >= 0 {
			// Another process (vhost-user) shares the memory: QEMU must tell it of every page.
			return nil, fmt.Errorf("%w: QEMU has several userfaultfds", errNoDirect)
		}
		if _, err := fmt.Sscan(entry.Name(), &found); err != nil {
			return nil, fmt.Errorf("%w: %w", errNoDirect, err)
		}
	}
	if found < 0 {
		return nil, fmt.Errorf("%w: QEMU has no userfaultfd", errNoDirect)
	}
	d := &direct{hva: make([]uint64, len(l)), huge: make([]bool, len(l))}
	largest := uint64(migstream.TargetPageSize)
	for i, b := range l {
		for _, m := range mem.Blocks() {
			if m.Name == b.Name && m.Located && m.PageSize == b.PageSize && m.Size >= b.Length {
				d.hva[i] = m.HVA
			}
		}
		d.huge[i] = b.PageSize != migstream.TargetPageSize
		largest = max(largest, b.PageSize)
	}
	d.zero = make([]byte, largest)
	pidfd, err := qemu.Open()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoDirect, err)
	}
	defer unix.Close(pidfd)
	if d.uffd, err = unix.PidfdGetfd(pidfd, found, 0); err != nil {
		return nil, fmt.Errorf("%w: take QEMU's userfaultfd: %w", errNoDirect, err)
	}
	return d, nil
}

func (d *direct) close() error { return unix.Close(d.uffd) }

// places reports whether pages of a block can be placed.
func (d *direct) places(block int) bool { return d.hva[block] != 0 }

// place places the pages of a run, whose data it takes off the front of data. It returns how many
// it has placed.
func (d *direct) place(r pageRun, size uint64, data []byte) (pages int, err error) {
	at := d.hva[r.Block] + uint64(r.First)*size
	length := uint64(r.Count) * size
	var done uint64
	switch {
	case !r.Zero:
		done, err = d.copy(at, data[:length])
	case d.huge[r.Block]:
		for ; done < length && err == nil; done += size {
			if _, err = d.copy(at+done, d.zero[:size]); err != nil {
				break
			}
		}
	default:
		done, err = d.fill(at, length)
	}
	return int(done / size), err
}

// copy places data at an address of QEMU's. It returns how much it has placed.
func (d *direct) copy(at uint64, data []byte) (done uint64, err error) {
	for len(data) > 0 {
		arg := struct {
			dst, src, len, mode uint64
			copied              int64
		}{at, uint64(uintptr(unsafe.Pointer(&data[0]))), uint64(len(data)), 0, 0}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.uffd), uffdioCopy,
			uintptr(unsafe.Pointer(&arg)))
		runtime.KeepAlive(data)
		n, err := progress(errno, arg.copied, len(data))
		if err != nil {
			return done, err
		}
		at += uint64(n)
		done += uint64(n)
		data = data[n:]
	}
	return done, nil
}

// fill places zero pages at an address of QEMU's. It returns how much it has placed.
func (d *direct) fill(at, length uint64) (done uint64, err error) {
	for done < length {
		arg := struct {
			start, len, mode uint64
			filled           int64
		}{at + done, length - done, 0, 0}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.uffd), uffdioZeropage,
			uintptr(unsafe.Pointer(&arg)))
		n, err := progress(errno, arg.filled, int(length-done))
		if err != nil {
			return done, err
		}
		done += uint64(n)
	}
	return done, nil
}

// progress returns how many bytes a call placed. The kernel may stop part-way; it then returns
// EAGAIN with what it did.
func progress(errno unix.Errno, done int64, asked int) (int, error) {
	switch {
	case done > 0 && done <= int64(asked):
		return int(done), nil
	case errno == unix.EAGAIN:
		return 0, nil
	case errno == 0:
		return 0, fmt.Errorf("%w: the kernel placed %d of %d bytes", errQEMU, done, asked)
	case errno == unix.ENOMEM:
		return 0, fmt.Errorf("%w: %w: place pages in its memory: %w", errQEMU, errNoMemory, errno)
	}
	return 0, fmt.Errorf("%w: place pages in its memory: %w", errQEMU, errno)
}

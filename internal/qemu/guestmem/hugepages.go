package guestmem

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// HugePage is the size of a transparent huge page on x86-64, in bytes. A unit of a block is so much
// of it, counted from its first byte.
const HugePage = 2 << 20

const (
	pagesPerUnit = HugePage / units.PageSize
	// pagemapFrame is the page's frame in an entry of pagemap(5); 0 for who may not know it.
	pagemapFrame = 1<<55 - 1
	flagTHP      = 1 << 22 // of /proc/kpageflags
	// adviceCollapse is MADV_COLLAPSE of linux/mman.h (Linux 6.1).
	adviceCollapse = 25
)

var (
	// ErrNoCollapse is wrapped by errors of Collapse where no unit can be made a huge page.
	ErrNoCollapse = errors.New("this host cannot make huge pages of a process's memory")
	// ErrBusy is wrapped by errors of Collapse that may not come again.
	ErrBusy = errors.New("pages of the unit are in use")
	// ErrNoHugePage is wrapped by errors of Collapse for want of a free huge page.
	ErrNoHugePage = errors.New("the host has no free huge page")
)

// Units returns how many whole units of a block may be transparent huge pages: none of one that is
// not located, lies askew, or is on pages of another size anyway.
func (m *Memory) Units(block int) int {
	b := &m.blocks[block]
	if !b.Located || b.PageSize != units.PageSize || b.HVA%HugePage != 0 {
		return 0
	}
	f := &m.backing[block]
	if b.Kind != Anonymous && (b.Kind != SharedFile || !f.tmpfs || f.offset%HugePage != 0) {
		return 0
	}
	return int(b.Size / HugePage) // #nosec G115 -- a block is smaller than the address space
}

// Huge reports which of a block's units are huge pages. It needs CAP_SYS_ADMIN.
func (m *Memory) Huge(block int) ([]bool, error) {
	huge := make([]bool, m.Units(block))
	if len(huge) == 0 {
		return huge, nil
	}
	flags, err := os.Open("/proc/kpageflags")
	if err != nil {
		return nil, fmt.Errorf("find huge pages: %w", err)
	}
	defer flags.Close()
	for i := range huge {
		if huge[i], err = m.isHuge(flags, m.blocks[block].HVA+uint64(i)*HugePage); err != nil {
			return nil, fmt.Errorf("find huge pages of block %s: %w", m.blocks[block].Name,
				m.explain(err))
		}
	}
	if !m.alive() {
		return nil, m.explain(unix.ESRCH)
	}
	return huge, nil
}

// isHuge looks at the first page of a unit, and whether the last one follows it in the host's
// memory.
func (m *Memory) isHuge(flags *os.File, at uint64) (bool, error) {
	first, err := m.frame(at)
	if err != nil || first%pagesPerUnit != 0 || first == 0 {
		return false, err
	}
	last, err := m.frame(at + HugePage - units.PageSize)
	if err != nil || last != first+pagesPerUnit-1 {
		return false, err
	}
	var word [8]byte
	// #nosec G115 -- 55 bits at most
	if _, err := flags.ReadAt(word[:], int64(first*8)); err != nil {
		return false, err
	}
	return binary.NativeEndian.Uint64(word[:])&flagTHP != 0, nil
}

// frame returns the frame of the page at an address of QEMU's; 0 if none is there.
func (m *Memory) frame(at uint64) (uint64, error) {
	var word [8]byte
	// #nosec G115 -- an address
	if _, err := m.pagemap.ReadAt(word[:], int64(at/units.PageSize*8)); err != nil {
		if err == io.EOF {
			err = unix.ESRCH
		}
		return 0, err
	}
	entry := binary.NativeEndian.Uint64(word[:])
	switch {
	case entry&pagemapUsed != 1<<63:
		return 0, nil
	case entry&pagemapFrame == 0:
		return 0, fmt.Errorf("%w: the kernel names frames only with CAP_SYS_ADMIN", unix.EPERM)
	}
	return entry & pagemapFrame, nil
}

// Collapse has the kernel make each of n units from one on a huge page, of what is there and
// zeroes. The guest runs on; what touches a unit meanwhile waits until that is done. On an error
// some of them may be huge pages. It needs CAP_SYS_NICE and the right to trace QEMU.
func (m *Memory) Collapse(block, unit, n int) error {
	if unit < 0 || n < 1 || unit > m.Units(block)-n {
		return fmt.Errorf("make huge pages: units %d+%d are not in the block", unit, n)
	}
	at := m.blocks[block].HVA + uint64(unit)*HugePage
	part := unix.RemoteIovec{Base: uintptr(at), Len: n * HugePage}
	_, _, errno := unix.Syscall6(unix.SYS_PROCESS_MADVISE, uintptr(m.pidfd),
		uintptr(unsafe.Pointer(&part)), 1, adviceCollapse, 0, 0)
	switch errno {
	case 0:
		return nil
	case unix.ENOMEM:
		return fmt.Errorf("make huge pages: %w", ErrNoHugePage)
	case unix.EAGAIN, unix.EBUSY, unix.EINTR:
		return fmt.Errorf("make huge pages: %w: %w", ErrBusy, errno)
	case unix.EINVAL:
		if !canCollapse() {
			return fmt.Errorf("%w: that takes Linux 6.1 or later, with transparent huge pages",
				ErrNoCollapse)
		}
	case unix.ENOSYS:
		return fmt.Errorf("%w: that takes Linux 6.1 or later", ErrNoCollapse)
	case unix.EPERM:
		return fmt.Errorf("%w: that takes CAP_SYS_NICE and CAP_SYS_PTRACE", ErrNoCollapse)
	}
	return fmt.Errorf("make huge pages: %w", m.explain(errno))
}

// canCollapse reports whether the kernel knows the advice, by giving it to no memory at all.
func canCollapse() bool {
	_, _, errno := unix.Syscall(unix.SYS_MADVISE, 0, 0, adviceCollapse)
	return errno == 0
}

package guestmem

import (
	"errors"
	"os"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attachSelf makes a Memory of memory of this process, in one block.
func attachSelf(t *testing.T, memory []byte, kind Kind, file *os.File) *Memory {
	t.Helper()
	m, err := hold(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	size := uint64(len(memory))
	m.blocks = []Block{{Name: "ram", Size: size, Total: size, PageSize: 4096,
		HVA: uint64(uintptr(unsafe.Pointer(&memory[0]))), Located: true, Kind: kind}}
	m.backing = []backing{{file: file, tmpfs: file != nil}}
	return m
}

// aligned maps memory that begins with a unit.
func aligned(t *testing.T, units, fd, flags int) []byte {
	t.Helper()
	size := uintptr(units * HugePage)
	all, err := unix.MmapPtr(-1, 0, nil, size+HugePage, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.MunmapPtr(all, size+HugePage) })
	at := unsafe.Add(all, (HugePage-uintptr(all)%HugePage)%HugePage)
	if _, err := unix.MmapPtr(fd, 0, at, size, unix.PROT_READ|unix.PROT_WRITE,
		flags|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	return unsafe.Slice((*byte)(at), size)
}

// Memory that is in small pages is in huge ones once it was collapsed, and holds what it held.
func TestCollapse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	memfd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(memfd), "ram")
	if err := file.Truncate(3 * HugePage); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		kind  Kind
		flags int
		file  *os.File
	}{
		"anonymous": {Anonymous, unix.MAP_PRIVATE | unix.MAP_ANONYMOUS, nil},
		"memfd":     {SharedFile, unix.MAP_SHARED, file},
	} {
		t.Run(name, func(t *testing.T) {
			fd := -1
			if c.file != nil {
				fd = int(c.file.Fd())
			}
			memory := aligned(t, 3, fd, c.flags)
			// The last unit stays without a page.
			for at := 0; at < 2*HugePage; at += 4096 {
				memory[at] = byte(at >> 12)
			}
			m := attachSelf(t, memory, c.kind, c.file)
			before, err := m.Huge(0)
			if err != nil {
				t.Fatal(err)
			}
			if want := []bool{false, false, false}; !slices.Equal(before, want) {
				t.Fatalf("before, %v are huge: want %v", before, want)
			}
			err = m.Collapse(0, 1, 1)
			if errors.Is(err, ErrNoCollapse) || errors.Is(err, ErrNoHugePage) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			after, err := m.Huge(0)
			if err != nil {
				t.Fatal(err)
			}
			if want := []bool{false, true, false}; !slices.Equal(after, want) {
				t.Fatalf("the second unit was collapsed, and %v are huge: want %v", after, want)
			}
			for at := 0; at < 2*HugePage; at += 4096 {
				if memory[at] != byte(at>>12) {
					t.Fatalf("byte %#x is %#x", at, memory[at])
				}
			}
			if err := m.Collapse(0, 2, 2); err == nil {
				t.Error("a unit behind the block was collapsed")
			}
		})
	}
}

// Memory that a QEMU keeps from being huge, as while post-copy lasts, stays as it is.
func TestCollapseForbidden(t *testing.T) {
	memory := aligned(t, 1, -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err := unix.Madvise(memory, unix.MADV_NOHUGEPAGE); err != nil {
		t.Skip(err)
	}
	memory[0] = 1
	m := attachSelf(t, memory, Anonymous, nil)
	if err := m.Collapse(0, 0, 1); err == nil || errors.Is(err, ErrBusy) {
		t.Errorf("got %v", err)
	}
}

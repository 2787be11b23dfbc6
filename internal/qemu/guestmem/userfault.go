package guestmem

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of linux/userfaultfd.h (Linux 6.12), x86-64 and arm64.
const (
	uffdAPI             = 0xaa
	uffdioAPI           = 0xc018aa3f
	uffdioRegister      = 0xc020aa00
	uffdioRegisterCopy  = 1 << 3 // of the ioctls that it reports: UFFDIO_COPY
	uffdRegisterMissing = 1
)

// Userfault takes a new userfaultfd through what QEMU does with one for some memory, which it does
// not touch. It returns the features that the kernel has.
func Userfault(fd int, memory []byte) (features uint64, err error) {
	api := struct{ api, features, ioctls uint64 }{api: uffdAPI}
	if err := ioctl(fd, uffdioAPI, unsafe.Pointer(&api)); err != nil {
		return 0, os.NewSyscallError("UFFDIO_API", err)
	}
	reg := struct{ start, len, mode, ioctls uint64 }{uint64(uintptr(unsafe.Pointer(&memory[0]))),
		uint64(len(memory)), uffdRegisterMissing, 0}
	if err := ioctl(fd, uffdioRegister, unsafe.Pointer(&reg)); err != nil {
		return api.features, os.NewSyscallError("UFFDIO_REGISTER", err)
	}
	if reg.ioctls&uffdioRegisterCopy == 0 {
		return api.features, errors.New("UFFDIO_REGISTER: pages cannot be copied in")
	}
	return api.features, nil
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// fileSystems are the names of those that memory may lie on by mistake.
var fileSystems = map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs", unix.NFS_SUPER_MAGIC: "NFS",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.RAMFS_MAGIC: "ramfs",
	unix.CEPH_SUPER_MAGIC: "Ceph"}

// CanFault makes sure that the kernel can have somebody else bring pages of a block when they are
// touched, as post-copy needs. It tries this on one page of the very file, mapped as QEMU maps it,
// but in this process. What it has no right to try, it passes.
func (m *Memory) CanFault(block int) error {
	b, back := m.blocks[block], &m.backing[block]
	if back.file == nil {
		return nil // private memory without a file
	}
	how, access := unix.MAP_PRIVATE, os.O_RDONLY
	if b.Kind == SharedFile {
		how, access = unix.MAP_SHARED, os.O_RDWR
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", back.file.Fd()), access, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil
	}
	defer unix.Close(int(fd))
	// Without a reservation, for which there might be no huge page.
	page, err := unix.Mmap(int(f.Fd()), back.offset, int(b.PageSize), unix.PROT_READ|unix.PROT_WRITE, how|unix.MAP_NORESERVE) // #nosec G115 -- 1 GiB at most
	if err != nil {
		return nil
	}
	defer unix.Munmap(page)
	if _, err = Userfault(int(fd), page); err == nil {
		return nil
	}
	var fs unix.Statfs_t
	kind := "an unknown file system"
	if unix.Fstatfs(int(f.Fd()), &fs) == nil {
		if kind = fileSystems[fs.Type]; kind == "" {
			kind = fmt.Sprintf("a file system of type %#x", uint32(fs.Type)) // #nosec G115 -- a magic number of 32 bits
		}
	}
	name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", back.file.Fd()))
	return fmt.Errorf("memory %q is the file %s on %s, and the kernel has no userfaultfd for "+
		"files there (%w)", b.Name, name, kind, err)
}

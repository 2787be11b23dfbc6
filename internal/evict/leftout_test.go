package evict

import (
	"context"
	"net"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"vacate/internal/evict/pageset"
	"vacate/internal/qemu/migstream"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// missingMemory is memory of this process. Its pages are missing until the returned direct places
// them.
func missingMemory(t *testing.T, pages int) ([]byte, *direct) {
	t.Helper()
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		labtest.Need(t, errno)
	}
	mem, err := unix.Mmap(-1, 0, pages*migstream.TargetPageSize, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	const uffdioAPI, uffdioRegister, api, missing = 0xc018aa3f, 0xc020aa00, 0xaa, 1
	first := uintptr(unsafe.Pointer(&mem[0]))
	hello := [3]uint64{api}
	register := [4]uint64{uint64(first), uint64(len(mem)), missing}
	for _, call := range []struct {
		request uintptr
		arg     unsafe.Pointer
	}{{uffdioAPI, unsafe.Pointer(&hello)}, {uffdioRegister, unsafe.Pointer(&register)}} {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, call.request,
			uintptr(call.arg)); errno != 0 {
			t.Fatal(errno)
		}
	}
	d := &direct{uffd: int(fd), hva: []uint64{uint64(first)},
		zero: make([]byte, migstream.TargetPageSize), huge: []bool{false}}
	t.Cleanup(func() {
		d.close()
		unix.Munmap(mem)
	})
	return mem, d
}

// A QEMU asks only once for a page. It may have asked an engine that died for one that was left
// out, and not answer before it has it. Then the engine places all pages that were left out.
func TestFillLeftOut(t *testing.T) {
	const pages = 64
	mem, d := missingMemory(t, pages)
	there := func() (n int) {
		list := make([]byte, pages)
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mem[0])),
			uintptr(len(mem)), uintptr(unsafe.Pointer(&list[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for _, b := range list {
			n += int(b & 1)
		}
		return n
	}
	socket := filepath.Join(t.TempDir(), "qmp")
	ln, err := net.Listen("unix", socket) // which says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	e := Destination{QMP: socket}.engine(CutOff)
	l := layout{{Name: "pc.ram", Length: pages * migstream.TargetPageSize,
		PageSize: migstream.TargetPageSize, Pages: pages}}
	e.incoming.layout = l
	e.pages.begin(l)
	e.placer = newPlacer(nil, testSection, l)
	e.placer.direct.Store(d)
	if err := e.skip(appendPages(nil, []pageRun{{pageset.Run{First: 3, Count: 40}, true}})); err !=
		nil {
		t.Fatal(err)
	}
	if n := there(); n != 0 {
		t.Fatalf("%d pages are there from the start", n)
	}
	left, leave := context.WithCancelCause(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- e.serve(left) }()
	for limit := time.Now().Add(time.Minute); there() != 40; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Errorf("%d pages of those left out were placed", there())
			break
		}
	}
	leave(ErrLeave)
	if err := <-ended; err == nil {
		t.Error("the engine ended well")
	}
	if n := e.pages.left(); n != pages-40 {
		t.Errorf("%d pages are missing, want %d", n, pages-40)
	}
	e.placer.direct.Store(nil)
	e.close()
}

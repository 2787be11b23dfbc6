// Command guest is the whole user space of the guests that the tests of linux boot.
// It uses memory in all common ways and says "ready" on the console.
//
// Then it takes commands on the second serial port, a line each:
//
//	rest, go   stops and resumes its work, and answers "end\n"
//	flags      writes the words of /proc/kpageflags to the port, as runs: "HEX COUNT\n",
//	           and "end\n"
//	census     starts two processes and tells of them
//	crowd      starts many
package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if len(os.Args) > 1 && os.Getpid() != 1 { // process 1 is given what the kernel does not know
		helper(os.Args[1])
		child()
	}
	if err := run(); err != nil {
		fmt.Println("guest failed:", err)
	}
	select {}
}

var working sync.Mutex // held while a piece of work is done

func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"},
		{"tmpfs", "/tmp"}} {
		os.Mkdir(m[1], 0o755)
		if err := syscall.Mount(m[0], m[1], m[0], 0, ""); err != nil && err != syscall.EBUSY {
			return fmt.Errorf("mount %s: %w", m[0], err)
		}
	}
	os.WriteFile("/proc/sys/vm/nr_hugepages", []byte("4"), 0)
	small, err := fill(24<<20, syscall.MADV_NOHUGEPAGE)
	if err != nil {
		return err
	}
	huge, err := fill(16<<20, syscall.MADV_HUGEPAGE)
	if err != nil {
		return err
	}
	for _, name := range []string{"/tmp/shmem", "/file"} {
		if err := os.WriteFile(name, small[:8<<20], 0o644); err != nil {
			return err
		}
	}
	for range 3 {
		if err := exec.Command("/init", "child").Start(); err != nil {
			return err
		}
	}
	port, err := os.OpenFile("/dev/ttyS1", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	// Raw: the port must neither echo nor change line ends.
	var t syscall.Termios
	syscall.Syscall(syscall.SYS_IOCTL, port.Fd(), syscall.TCGETS, uintptr(unsafe.Pointer(&t)))
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cc[syscall.VMIN] = 1
	syscall.Syscall(syscall.SYS_IOCTL, port.Fd(), syscall.TCSETS, uintptr(unsafe.Pointer(&t)))
	time.Sleep(200 * time.Millisecond)
	fmt.Println("guest is ready")
	go func() { // some life
		for i := 0; ; i++ {
			working.Lock()
			huge[i*4096%len(huge)]++
			os.WriteFile("/tmp/changing", small[:(i%64)<<12], 0o644)
			working.Unlock()
			time.Sleep(5 * time.Millisecond)
		}
	}()
	lines := bufio.NewScanner(port)
	for lines.Scan() {
		var err error
		switch strings.TrimSpace(lines.Text()) {
		case "flags":
			err = flags(port)
		case "rest":
			working.Lock()
			fmt.Fprintln(port, "end")
		case "go":
			working.Unlock()
			fmt.Fprintln(port, "end")
		case "census":
			err = census(port)
		case "crowd":
			err = crowd(port)
		}
		if err != nil {
			return err
		}
	}
	return lines.Err()
}

func fill(size, advice int) ([]byte, error) {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	syscall.Madvise(b, advice)
	for i := 0; i < len(b); i += 8 {
		*(*uint64)(unsafe.Pointer(&b[i])) = uint64(i)*0x9e3779b97f4a7c15 + 1
	}
	return b, nil
}

func child() {
	fill(4<<20, syscall.MADV_NOHUGEPAGE)
	for {
		time.Sleep(100 * time.Millisecond)
	}
}

var words [16 << 20 / 8]uint64 // for up to 8 GiB

func flags(port *os.File) error {
	f, err := os.Open("/proc/kpageflags")
	if err != nil {
		return err
	}
	defer f.Close()
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&words)), len(words)*8)
	n := 0
	for n < len(buf) {
		got, err := f.Read(buf[n:])
		if got == 0 || err != nil {
			break
		}
		n += got
	}
	w := bufio.NewWriterSize(port, 1<<16)
	all := words[:n/8]
	for i := 0; i < len(all); {
		j := i
		for j < len(all) && all[j] == all[i] {
			j++
		}
		fmt.Fprintf(w, "%x %d\n", all[i], j-i)
		i = j
	}
	fmt.Fprintln(w, "end")
	return w.Flush()
}

package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// What the processes for census hold besides what a Go program has anyway, in bytes.
const (
	idleSmall, idleHuge, idleNone = 6 << 20, 4 << 20, 1 << 20
	hotSize                       = 8 << 20
)

// helper is a process that census starts.
func helper(name string) {
	os.WriteFile("/proc/self/comm", []byte(name), 0)
	switch name {
	case "hot":
		b, _ := fill(hotSize, syscall.MADV_NOHUGEPAGE)
		for i := 0; ; i = (i + 4096) % len(b) {
			b[i]++
		}
	case "member":
		fill(20<<20, syscall.MADV_NOHUGEPAGE)
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "idle":
		fill(idleSmall, syscall.MADV_NOHUGEPAGE)
		fill(idleHuge, syscall.MADV_HUGEPAGE)
		none, _ := fill(idleNone, syscall.MADV_NOHUGEPAGE)
		syscall.Mprotect(none, syscall.PROT_NONE)
		shared, _ := syscall.Mmap(-1, 0, 64<<10, syscall.PROT_READ|syscall.PROT_WRITE,
			syscall.MAP_ANON|syscall.MAP_SHARED)
		zero, _ := syscall.Mmap(-1, 0, 64<<10, syscall.PROT_READ,
			syscall.MAP_ANON|syscall.MAP_PRIVATE)
		for i := 0; i < len(shared); i += 4096 {
			shared[i] = 1 + zero[i]
		}
		fmt.Println("ready")
		time.Sleep(time.Hour)
	}
}

// quiet ends the life that main makes.
var quiet atomic.Bool

// census starts the process hot, which uses a CPU, and idle, which is stopped for a
// second before it tells of them:
//
//	process NAME PID NANOSECONDS   CPU time
//	idle TABLES THREADS            KiB of page tables but for the top, threads
//	page ADDRESS FRAME             of idle, hexadecimal, in order
//	end
func census(port *os.File) error {
	quiet.Store(true)
	start := func(name string) (*exec.Cmd, error) {
		cmd := exec.Command("/init", name)
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		if name == "idle" {
			if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
				return nil, err
			}
		}
		return cmd, nil
	}
	idle, err := start("idle")
	if err != nil {
		return err
	}
	time.Sleep(100 * time.Millisecond)
	idle.Process.Signal(syscall.SIGSTOP)
	hot, err := start("hot")
	if err != nil {
		return err
	}
	time.Sleep(time.Second)
	w := bufio.NewWriterSize(port, 1<<16)
	for _, p := range []struct {
		name string
		pid  int
	}{{"idle", idle.Process.Pid}, {"hot", hot.Process.Pid}, {"init", 1}} {
		// The first number is of the first thread alone; the process's is the sum.
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.pid))
		if err != nil {
			return err
		}
		sum := uint64(0)
		for _, t := range tasks {
			var ns uint64
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/schedstat", p.pid, t.Name()))
			if err == nil {
				fmt.Sscan(string(b), &ns)
			}
			sum += ns
		}
		fmt.Fprintln(w, "process", p.name, p.pid, sum)
	}
	proc := fmt.Sprintf("/proc/%d/", idle.Process.Pid)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		return err
	}
	number := func(key string) (n int) {
		if _, after, ok := bytes.Cut(status, []byte("\n"+key+":")); ok {
			fmt.Sscan(string(after), &n)
		}
		return n
	}
	fmt.Fprintln(w, "idle", number("VmPTE"), number("Threads"))
	maps, err := os.ReadFile(proc + "maps")
	if err != nil {
		return err
	}
	pagemap, err := os.Open(proc + "pagemap")
	if err != nil {
		return err
	}
	defer pagemap.Close()
	buf := unsafe.Slice((*byte)(unsafe.Pointer(&words)), 64<<10)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		if _, err := fmt.Sscanf(line, "%x-%x", &from, &to); err != nil || from>>63 != 0 {
			continue
		}
		for from < to {
			n, err := pagemap.ReadAt(buf[:min(uint64(len(buf)), (to-from)/4096*8)],
				int64(from/4096*8))
			if n == 0 {
				return err
			}
			for e := buf[:n]; len(e) >= 8; e, from = e[8:], from+4096 {
				const present, frame = 1 << 63, 1<<55 - 1 // pagemap(5)
				if v := binary.LittleEndian.Uint64(e); v&present != 0 && v&frame != 0 {
					fmt.Fprintf(w, "page %x %x\n", from, v&frame)
				}
			}
		}
	}
	// Writing all of that has taken CPU time, which only hot may have.
	if err := w.Flush(); err != nil {
		return err
	}
	time.Sleep(300 * time.Millisecond)
	_, err = fmt.Fprintln(port, "end")
	return err
}

// crowd starts processes that hold 480 MB in small pages, all told.
func crowd(port *os.File) error {
	for range 24 {
		cmd := exec.Command("/init", "member")
		out, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(port, "end")
	return err
}

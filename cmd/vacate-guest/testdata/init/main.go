// Command init is process 1 of the guest that vacate-guest is tested in. It loads the
// modules, starts the agent and processes with marked memory, and takes commands on the
// virtio-serial port "test".
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	hugePages = 14 // MADV_HUGEPAGE
	noHuge    = 15
)

// fill maps a number of MiB and marks its pages: a magic number, role, index.
func fill(role uint64, mib int, advice int) []byte {
	mem, err := syscall.Mmap(-1, 0, mib<<20, syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	syscall.Madvise(mem, advice)
	for at := 0; at < len(mem); at += 4096 {
		binary.LittleEndian.PutUint64(mem[at+8:], role)
		binary.LittleEndian.PutUint64(mem[at+16:], uint64(at/4096))
		binary.LittleEndian.PutUint64(mem[at:], 0x5ca1ab1ecafef00d)
	}
	return mem
}

func work(role string) {
	mib, _ := strconv.Atoi(os.Args[1])
	switch role {
	case "hot":
		mem := fill(1, mib, noHuge)
		fmt.Println("ready hot")
		for n := uint64(0); ; n++ {
			for at := 32; at < len(mem); at += 4096 {
				mem[at]++
			}
			time.Sleep(200 * time.Millisecond) // it rests most of the time
		}
	case "idle":
		fill(2, mib, noHuge)
	case "huge":
		fill(3, mib, hugePages)
	}
	fmt.Println("ready", role)
	for { // not select: Go would call that a deadlock
		syscall.Pause()
	}
}

var agent *exec.Cmd

func start(flags ...string) error {
	agent = exec.Command("/vacate-guest", flags...)
	agent.Stdout, agent.Stderr = os.Stdout, os.Stderr
	return agent.Start()
}

func command(line string) string {
	f := strings.Fields(line)
	switch f[0] {
	case "agent":
		if err := start(f[1:]...); err != nil {
			return err.Error()
		}
	case "signal":
		n, _ := strconv.Atoi(f[1])
		agent.Process.Signal(syscall.Signal(n))
	case "wait":
		agent.Wait()
		return agent.ProcessState.String()
	case "run":
		out, err := exec.Command(f[1], f[2:]...).CombinedOutput()
		return strconv.Quote(string(out)) + fmt.Sprint(err)
	case "cpu": // of the agent, in nanoseconds
		var sum int
		all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", agent.Process.Pid))
		for _, name := range all {
			b, _ := os.ReadFile(name)
			n, _ := strconv.Atoi(strings.Fields(string(b))[0])
			sum += n
		}
		return strconv.Itoa(sum)
	case "rss":
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", agent.Process.Pid))
		return strings.Fields(string(b))[1]
	case "read":
		file, err := os.Open(f[1])
		if err != nil {
			return err.Error()
		}
		defer file.Close()
		b := make([]byte, 4096)
		n, _ := io.ReadFull(file, b)
		return strconv.Quote(string(b[:n]))
	case "spawn":
		return spawn(f[1], f[2])
	case "garbage": // write to the port what the agent would not
		f, err := os.OpenFile(port("org.vacate.agent"), os.O_RDWR, 0)
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		b := make([]byte, 4096)
		if _, err := f.Read(b); err != nil {
			return err.Error()
		}
		for i := range b {
			b[i] = byte(i * 7)
		}
		for range 64 {
			f.Write(b)
		}
	}
	return "ok"
}

func port(name string) string {
	for {
		all, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range all {
			if b, _ := os.ReadFile(n); strings.TrimSpace(string(b)) == name {
				return "/dev/" + filepath.Base(filepath.Dir(n))
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func spawn(role, mib string) string {
	cmd := exec.Command("/"+role, mib)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err.Error()
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	return strings.TrimSpace(line)
}

func main() {
	if role := filepath.Base(os.Args[0]); os.Getpid() != 1 {
		work(role)
	}
	syscall.Mount("proc", "/proc", "proc", 0, "")
	syscall.Mount("sysfs", "/sys", "sysfs", 0, "")
	syscall.Mount("devtmpfs", "/dev", "devtmpfs", 0, "")
	modules, _ := filepath.Glob("/modules/*")
	for _, m := range modules {
		f, err := os.Open(m)
		if err != nil {
			panic(err)
		}
		args, _ := syscall.BytePtrFromString("")
		_, _, errno := syscall.Syscall(313, f.Fd(), uintptr(ptr(args)), 0) // finit_module
		if errno != 0 && errno != syscall.EEXIST {
			fmt.Println(m, errno)
		}
		f.Close()
	}
	for _, role := range []string{"hot", "idle", "huge"} {
		os.Symlink("/init", "/"+role)
	}
	f, err := os.OpenFile(port("test"), os.O_RDWR, 0)
	if err != nil {
		panic(err)
	}
	fmt.Fprintln(f, "up")
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadString('\n')
		if err != nil { // no host
			time.Sleep(20 * time.Millisecond)
			continue
		}
		fmt.Fprintln(f, command(line))
	}
}

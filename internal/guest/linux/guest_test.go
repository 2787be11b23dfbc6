package linux

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	sysprocess "vacate/internal/sys/process"
	"vacate/lab"
)

var guestKernels = flag.String("kernel", "6.1",
	"kernels to test with, by their names in the lab, with commas between, or \"all\"")

// need skips a test that lacks something, or fails it where nothing may be lacking.
func need(t testing.TB, ok bool, what string) {
	t.Helper()
	switch {
	case ok:
	case os.Getenv("VACATE_REQUIRE") == "1":
		t.Fatalf("needs %s", what)
	default:
		t.Skipf("needs %s", what)
	}
}

// kernels returns the directories of the guest kernels to test with.
func kernels(t testing.TB) []string {
	if testing.Short() {
		t.Skip("boots guests")
	}
	_, err := exec.LookPath("qemu-system-x86_64")
	need(t, err == nil, "qemu-system-x86_64: install the package qemu-system-x86")
	need(t, os.Geteuid() == 0, "root, to read the memory of qemu")
	var names []string
	for _, k := range lab.Kernels {
		names = append(names, k.Name)
	}
	if *guestKernels != "all" {
		names = strings.Split(*guestKernels, ",")
	}
	var dirs []string
	for _, name := range names {
		k, err := lab.FindKernel(name)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := lab.FetchKernel(t.Context(), "../../../.lab", k, slog.New(slog.DiscardHandler))
		need(t, err == nil, fmt.Sprintf("a guest kernel: %v", err))
		dirs = append(dirs, dir)
	}
	return dirs
}

// A machine is a QEMU with a guest.
type machine struct {
	*qmp.Client
	pid     int
	console string
	port    net.Conn // to the guest's program
	mem     *guestmem.Memory
	*Live
}

type spec struct {
	kernel, cmdline string // the kernel's directory
	mib, cpus       int
	memfd           bool
	extra           []string
}

// boot starts a guest and waits until its program is ready.
func boot(t testing.TB, s spec) *machine {
	t.Helper()
	dir := t.TempDir()
	initrd := filepath.Join(dir, "initrd")
	if err := os.WriteFile(initrd, initramfs(t), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.cpus == 0 {
		s.cpus = 1
	}
	console, sock := filepath.Join(dir, "console"), filepath.Join(dir, "qmp")
	release, err := os.ReadFile(filepath.Join(s.kernel, "release"))
	if err != nil {
		t.Fatal(err)
	}
	cpu := lab.DefaultCPU("tcg", string(release))
	args := []string{"-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-accel",
		"tcg,thread=multi", "-cpu", cpu,
		"-smp", fmt.Sprint(s.cpus), "-m", fmt.Sprintf("%dM", s.mib), "-kernel",
		filepath.Join(s.kernel, "vmlinuz"), "-initrd", initrd,
		"-append", "console=ttyS0 oops=panic panic=-1 " + s.cmdline,
		"-chardev", "file,id=console,path=" + console, "-serial", "chardev:console",
		"-chardev", "socket,id=port,path=" + filepath.Join(dir, "port") + ",server=on,wait=off",
		"-serial", "chardev:port",
		"-qmp", "unix:" + sock + ",server=on,wait=off"}
	if s.memfd {
		args = append(args, "-machine", "pc,memory-backend=ram", "-object",
			fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", s.mib))
	}
	cmd := exec.Command("qemu-system-x86_64", append(args, s.extra...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := sysprocess.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	gone := make(chan struct{})
	go func() { cmd.Wait(); close(gone) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-gone })
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	m := &machine{pid: cmd.Process.Pid, console: console}
	for {
		var err error
		if m.Client, err = qmp.Dial(ctx, sock); err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
		select {
		case <-gone:
			t.Fatalf("qemu ended: %s", stderr.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Cleanup(func() { m.Client.Close() })
	for {
		b, _ := os.ReadFile(console)
		if bytes.Contains(b, []byte("guest is ready")) {
			break
		}
		if bytes.Contains(b, []byte("guest failed")) {
			t.Fatalf("guest failed: %s", b[max(0, len(b)-1000):])
		}
		select {
		case <-gone:
			t.Fatalf("qemu ended: %s", stderr.String())
		case <-ctx.Done():
			log, _ := os.ReadFile(console)
			t.Fatalf("guest does not start: %s", log[max(0, len(log)-3000):])
		case <-time.After(50 * time.Millisecond):
		}
	}
	if m.port, err = net.Dial("unix", filepath.Join(dir, "port")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.port.Close() })
	if m.mem, err = guestmem.Attach(ctx, m.Client); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.mem.Close() })
	if m.Live, err = NewLive(m.mem, m.Client); err != nil {
		t.Fatal(err)
	}
	return m
}

// dump has QEMU write an ELF core file of the guest, and opens that.
func (m *machine) dump(t testing.TB) *os.File {
	t.Helper()
	core := filepath.Join(t.TempDir(), "core")
	if err := m.Run(t.Context(), "dump-guest-memory",
		map[string]any{"paging": false, "protocol": "file:" + core}, nil); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(core)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (m *machine) stop(t testing.TB) {
	t.Helper()
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) cont(t testing.TB) {
	t.Helper()
	if err := m.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// program is testdata/guest, once it is built.
var program []byte

// initramfs has testdata/guest as its only program.
func initramfs(t testing.TB) []byte {
	t.Helper()
	if program == nil {
		out := filepath.Join(t.TempDir(), "init")
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
			"-o", out, "./testdata/guest")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build the guest load: %v\n%s", err, b)
		}
		var err error
		if program, err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	add := func(name string, mode int, data []byte) { // "newc"
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	add("dev", 0o40755, nil)
	add("init", 0o100755, program)
	add("TRAILER!!!", 0, nil)
	return b.Bytes()
}

func forKernels(t *testing.T, f func(t *testing.T, kernel string)) {
	for _, k := range kernels(t) {
		t.Run(filepath.Base(k), func(t *testing.T) { f(t, k) })
	}
}

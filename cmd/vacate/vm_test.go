package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"google.golang.org/protobuf/encoding/protojson"
)

// process is the test binary as vacate, on a lab's host.
type process struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	lines  chan string // of standard output; closed at its end
	out    *os.File    // what lines are read from
	mu     sync.Mutex
	stderr bytes.Buffer // guarded by mu
	said   chan struct{}
}

func start(t testing.TB, h *lab.Host, args ...string) *process {
	t.Helper()
	// The tests' binary under the name vacate is vacate: testscript sees to that.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "vacate")
	if err := os.Symlink(self, name); err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, name: args[0], cmd: exec.Command(name, args...),
		lines: make(chan string, 10_000), said: make(chan struct{}, 1)}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out, p.cmd.Stdout, p.cmd.Stderr = r, w, p
	p.cmd.WaitDelay = time.Minute
	if err := h.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	w.Close()
	go func() {
		defer close(p.lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			p.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		p.cmd.Wait() // fails if it was waited for already
		r.Close()
	})
	return p
}

// Write takes what the process says on standard error.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	p.stderr.Write(b)
	p.mu.Unlock()
	select {
	case p.said <- struct{}{}:
	default:
	}
	p.t.Logf("%s: %s", p.name, strings.TrimSpace(string(b)))
	return len(b), nil
}

func (p *process) errors() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stderr.String()
}

// awaitError waits for a text on standard error.
func (p *process) awaitError(text string) {
	p.t.Helper()
	timeout := time.After(time.Minute)
	for !strings.Contains(p.errors(), text) {
		select {
		case <-p.said:
		case <-timeout:
			p.t.Fatalf("%s did not say %q but %q", p.name, text, p.errors())
		}
	}
}

// awaitLine waits for a line of standard output that contains a text.
func (p *process) awaitLine(text string) string {
	p.t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case line, ok := <-p.lines:
			if !ok {
				p.t.Fatalf("%s ended without a line with %q", p.name, text)
			}
			if strings.Contains(line, text) {
				return line
			}
		case <-timeout:
			p.t.Fatalf("no line of %s has %q", p.name, text)
		}
	}
}

// exit waits for the end of the process and compares its exit code.
func (p *process) exit(code int) {
	p.t.Helper()
	ended := make(chan error, 1)
	go func() { ended <- p.cmd.Wait() }()
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) || p.cmd.ProcessState.ExitCode() != code {
			p.t.Fatalf("%s ended with %v, want code %d; it said %s", p.name, p.cmd.ProcessState,
				code, p.errors())
		}
	case <-time.After(2 * time.Minute):
		p.t.Fatalf("%s does not end; it said %s", p.name, p.errors())
	}
}

// rest returns the lines not read yet, once the process has ended.
func (p *process) rest() []string {
	var list []string
	for line := range p.lines {
		list = append(list, line)
	}
	return list
}

// receive starts the twin of a VM on a host, and vacate for it; it returns where that listens.
func startReceive(t testing.TB, h *lab.Host, vm *lab.VM) (twin *lab.VM, p *process, addr string) {
	t.Helper()
	twin, err := h.Incoming(labtest.Within(t, time.Minute), vm, lab.IncomingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p = start(t, h, "receive", "--qmp", twin.QMP, "--listen", h.Addr+":0")
	line := p.awaitLine("")
	addr, ok := strings.CutPrefix(line, "listening on ")
	if !ok {
		t.Fatalf("the first line is %q", line)
	}
	return twin, p, addr
}

// mustWork waits until the guest has worked on, and met no bad page.
func mustWork(t testing.TB, vm *lab.VM) {
	t.Helper()
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Fatal(err)
	}
	if s := vm.Guest.Samples(); s[len(s)-1].Bad != 0 || s[len(s)-1].VM != vm.Name {
		t.Fatalf("the guest says %+v", s[len(s)-1])
	}
}

// decode reads a line of JSON strictly.
func decode(t testing.TB, line string) (p *hostv1.Progress, r *evict.Report) {
	t.Helper()
	mustFit(t, "line", []byte(line))
	var v struct {
		Type     string
		Progress json.RawMessage
		Report   *evict.Report
	}
	if err := json.Unmarshal([]byte(line), &v); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	if v.Type == "progress" {
		p = new(hostv1.Progress)
		if err := protojson.Unmarshal(v.Progress, p); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	return p, v.Report
}

func readReport(t testing.TB, name string) evict.Report {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	var r evict.Report
	mustFit(t, "Report", b)
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return r
}

// One VM is moved by vacate itself: with a Ctrl-C that comes too late; then back, with
// nobody reading what it says; then not at all, as a Ctrl-C comes in time; then to a QEMU
// that dies.
func TestVM(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 3e8})
	vm, err := l.A.Boot(labtest.Within(t, 3*time.Minute),
		lab.Spec{MemoryMiB: 256,
			Load: lab.Load{HotMiB: 40, IdleMiB: 60, OtherMiB: 10, FileMiB: 4, Slow: true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 2000); err != nil {
		t.Fatal(err)
	}
	report := filepath.Join(t.TempDir(), "report.json")

	twin, dest, addr := startReceive(t, l.B, vm)
	src := start(t, l.A, "evict", "--qmp", vm.QMP, "--to", addr, "--json", "--report", report)
	src.awaitLine(`"state":"pushing"`)
	for _, s := range []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP} {
		src.cmd.Process.Signal(s)
	}
	for _, s := range []string{"SIGINT", "SIGTERM", "SIGHUP"} {
		src.awaitError(s + ": the eviction cannot be aborted any more.")
	}
	src.exit(exitCompleted)
	dest.exit(exitCompleted)
	received := dest.rest()
	if !slices.ContainsFunc(received, func(line string) bool { // huge pages may come behind it
		return strings.HasSuffix(line, "the VM runs here, with all of its memory")
	}) {
		t.Errorf("vacate receive said %q", received)
	}
	list := src.rest()
	pages := uint64(0)
	for i, line := range list {
		p, r := decode(t, line)
		if (r != nil) != (i == len(list)-1) {
			t.Fatalf("line %d of %d is %q", i, len(list), line)
		}
		if p != nil {
			if p.PagesSent < pages || p.PagesTotal < p.PagesSent {
				t.Errorf("behind %d pages comes %q", pages, line)
			}
			pages = p.PagesSent
			continue
		}
		if r.Outcome != "completed" || r.Transfer == nil || r.Total == nil || r.Pages.Total == 0 ||
			pages != uint64(r.Pages.Total) {
			t.Errorf("%d pages, %+v", pages, r)
		}
	}
	if r := readReport(t, report); r.Outcome != "completed" || r.Pages.Duplicate != 0 {
		t.Errorf("%+v", r)
	}
	mustWork(t, twin)

	// And back, with both outputs closed as soon as the VM is on its way.
	var back *lab.VM
	back, dest, addr = startReceive(t, l.A, twin)
	src = start(t, l.B, "evict", "--qmp", twin.QMP, "--to", addr, "--json", "--report", report)
	src.awaitLine(`"state":"pushing"`)
	src.out.Close()
	dest.out.Close()
	src.exit(exitCompleted)
	dest.exit(exitCompleted)
	if r := readReport(t, report); r.Outcome != "completed" {
		t.Errorf("%+v", r)
	}
	mustWork(t, back)

	// The destination's QEMU does not react, so nothing is touched, and all waits until Ctrl-C.
	twin, dest, addr = startReceive(t, l.B, back)
	if err := syscall.Kill(twin.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	src = start(t, l.A, "evict", "--qmp", back.QMP, "--to", addr, "--report", report)
	src.awaitError(" s  the VM runs here; vacate prepares the move")
	src.cmd.Process.Signal(os.Interrupt)
	src.awaitError("SIGINT: aborting; the VM stays on this host.")
	src.exit(exitAborted)
	if s := src.errors(); !strings.Contains(s, "vacate: aborted while preparing: ") ||
		!strings.Contains(s, "touched") {
		t.Errorf("it said %s", s)
	}
	if r := readReport(t, report); r.Outcome != "aborted" || r.Transfer != nil {
		t.Errorf("%+v", r)
	}
	if err := syscall.Kill(twin.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	dest.cmd.Process.Signal(os.Interrupt)
	dest.exit(exitRefused)
	if !twin.Alive() {
		t.Error("the destination's QEMU is gone, although it was not touched")
	}
	twin.Kill()
	if text := strings.Join(src.rest(), "\n"); text != "The VM stays here." {
		t.Errorf("the report is %s", text)
	}
	mustWork(t, back)
	labtest.MustCheck(t, back)

	// The destination's QEMU dies once it runs the VM.
	twin, dest, addr = startReceive(t, l.B, back)
	src = start(t, l.A, "evict", "-v", "--qmp", back.QMP, "--to", addr, "--report", report)
	src.awaitError(" s  the VM runs on ")
	twin.Kill()
	src.exit(exitLost)
	dest.exit(exitLost)
	if s := src.errors(); !strings.Contains(s, "vacate: lost contact while ") ||
		!strings.Contains(s, "Here it stays frozen, with all of its memory: do not end its QEMU.") {
		t.Errorf("it said %s", s)
	}
	text := strings.Join(src.rest(), "\n")
	if !strings.HasPrefix(text, "contact with the VM is lost.\n") ||
		!strings.Contains(text, "\noutcome             lost contact\n") ||
		!strings.Contains(text, "\ndown time ") {
		t.Errorf("the report is %s", text)
	}
	t.Logf("%s", text)
	if r := readReport(t, report); r.Outcome != "lost contact" || r.Total != nil {
		t.Errorf("%+v", r)
	}
}

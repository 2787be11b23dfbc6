package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// describe makes a description in a new directory, of the command given, or of the QEMU that is
// installed.
func describe(t *testing.T, more string, command ...string) VM {
	t.Helper()
	if command == nil {
		command = qemu(t)
	}
	dir := t.TempDir()
	for i, arg := range command {
		command[i] = fmt.Sprintf("%q", arg)
	}
	text := fmt.Sprintf("qmp = %q\ncommand = [%s]\n%s\n", filepath.Join(dir, "qmp"),
		strings.Join(command, ", "), more)
	if err := os.WriteFile(filepath.Join(dir, "vm.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	vm, err := Find(dir, "vm")
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

func qemu(t *testing.T, more ...string) []string {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	return append([]string{path, "-nodefaults", "-display", "none", "-machine", "pc,accel=tcg",
		"-m", "64", "-smp", "2",
		"-qmp", "unix:{qmp},server=on,wait=off"}, more...)
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func kill(t *testing.T, p process.Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := p.Kill(ctx); err != nil {
		t.Error(err)
	}
	if p.Alive() {
		t.Errorf("process %d lives", p.PID)
	}
}

func startTwinOf(t *testing.T, vm VM) process.Process {
	t.Helper()
	p, err := StartTwin(within(t, 30*time.Second), vm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, p) })
	return p
}

func look(t *testing.T, vm VM) Seen {
	t.Helper()
	seen, err := Look(within(t, 10*time.Second), vm)
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

// proc reads a file of a process.
func proc(t *testing.T, p process.Process, file string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestTwin(t *testing.T) {
	vm := describe(t, `env = { VACATE_TEST = "a b" }`)
	if seen := look(t, vm); seen.State != None || seen.Status != "" || seen.Process.PID != 0 {
		t.Errorf("before: %+v", seen)
	}
	// A descriptor that children inherit, and a low priority.
	leak, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leak)
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 5); err != nil {
		t.Fatal(err)
	}
	p := startTwinOf(t, vm)
	if prio, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err != nil || prio != 15 {
		t.Errorf("our priority became %d, %v", prio, err)
	}

	seen := look(t, vm)
	if !seen.Version.AtLeast(4, 2) {
		t.Errorf("version %v", seen.Version)
	}
	want := Seen{State: Incoming, Status: "inmigrate", Process: p, Version: seen.Version,
		Memory: 64 << 20, Threads: seen.Threads, VCPUs: 2}
	for _, tid := range seen.Threads {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", p.PID, tid)); err != nil ||
			tid == p.PID {
			t.Errorf("thread %d of a virtual CPU: %v", tid, err)
		}
	}
	if !reflect.DeepEqual(seen, want) || len(seen.Threads) != 2 {
		t.Errorf("%+v, want %+v", seen, want)
	}
	if sid, err := unix.Getsid(p.PID); sid != p.PID || err != nil {
		t.Errorf("session %d, %v", sid, err)
	}
	if prio, err := unix.Getpriority(unix.PRIO_PROCESS, p.PID); err != nil ||
		os.Geteuid() == 0 && prio != 20 {
		t.Errorf("priority %d, %v", prio, err)
	}
	if env := proc(t, p, "environ"); !strings.Contains(env, "VACATE_TEST=a b\x00") ||
		!strings.HasPrefix(env, "PATH=") || strings.Count(env, "\x00") != 2 {
		t.Errorf("environment %q", env)
	}
	if adj := proc(t, p, "oom_score_adj"); adj != "0\n" {
		t.Errorf("oom_score_adj %q", adj)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", p.PID, fd.Name()))
		if target == "/dev/zero" {
			t.Errorf("it inherited descriptor %s", fd.Name())
		}
	}

	var present *PresentError
	if _, err := StartTwin(within(t, 10*time.Second), vm); !errors.As(err, &present) ||
		!reflect.DeepEqual(present.Seen, want) ||
		!strings.Contains(err.Error(), "a twin of VM vm waits already") {
		t.Errorf("started twice: %v", err)
	}
	if !p.Alive() {
		t.Error("it did not survive that")
	}
	kill(t, p)
	if seen := look(t, vm); seen.State != None {
		t.Errorf("after: %+v", seen)
	}
	// Once more, over the socket that was left behind.
	kill(t, startTwinOf(t, vm))
	for i := 0; ; i++ { // the zombie goes
		if _, err := process.Find(p.PID); errors.Is(err, process.ErrGone) {
			break
		} else if i == 500 {
			t.Fatalf("process %d is still to be waited for: %v", p.PID, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// TestSurvive has the process that started a twin killed.
func TestSurvive(t *testing.T) {
	if dir := os.Getenv("HYPERVISOR_DIR"); dir != "" {
		vm, err := Find(dir, "vm")
		if err != nil {
			t.Fatal(err)
		}
		p, err := StartTwin(t.Context(), vm)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("started", p.PID, p.StartTime)
		time.Sleep(time.Hour)
	}
	vm := describe(t, "")
	cmd := exec.Command(os.Args[0], "-test.run", "^TestSurvive$")
	cmd.Env = append(os.Environ(), "HYPERVISOR_DIR="+filepath.Dir(vm.file))
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	var p process.Process
	if _, err := fmt.Fscanf(out, "started %d %d\n", &p.PID, &p.StartTime); err != nil {
		t.Fatal(err)
	}
	defer kill(t, p)
	unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	cmd.Wait()
	if seen := look(t, vm); seen.State != Incoming || seen.Process != p {
		t.Errorf("%+v, want process %+v", seen, p)
	}
}

func TestStartFails(t *testing.T) {
	path := qemu(t)[0]
	for _, c := range []struct {
		say     string
		command []string
	}{
		{"no-such-option: invalid option", qemu(t, "-no-such-option")},
		// One that finds it when its monitor is there.
		{"QEMU ended at once: ", qemu(t, "-drive", "file=/no/such/disk,format=raw")},
		{"no such file", []string{"/no/such/qemu", "{qmp}"}},
		{"deadline exceeded", []string{"/bin/sh", "-c", "exec sleep 1000 # {qmp}", "sh"}},
		{"must become QEMU (exec)",
			[]string{"/bin/sh", "-c",
				path +
					" -display none -machine none -qmp unix:{qmp},server=on,wait=off \"$@\"; exit",
				"sh"}},
	} {
		vm := describe(t, "", c.command...)
		ctx := within(t, 10*time.Second)
		if c.say == "deadline exceeded" {
			ctx = within(t, 300*time.Millisecond)
		}
		p, err := StartTwin(ctx, vm)
		if err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%+v, %v; want %s", p, err, c.say)
		}
		if seen := look(t, vm); seen.State != None {
			t.Errorf("%s: left behind: %+v", c.say, seen)
		}
	}
	// One that does not wait: it was given no place for -incoming.
	vm := describe(t, "")
	vm.Command = vm.Command[:len(vm.Command)-1]
	if _, err := StartTwin(within(t, 10*time.Second), vm); err == nil ||
		!strings.Contains(err.Error(), "does not wait for a VM: it is running") {
		t.Error(err)
	}
	if seen := look(t, vm); seen.State != None {
		t.Errorf("left behind: %+v", seen)
	}
}

func TestUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	vm := describe(t, `user = "nobody"`)
	for _, dir := range []string{filepath.Dir(vm.QMP), filepath.Dir(filepath.Dir(vm.QMP))} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	own := t.TempDir()
	vm.Command[len(vm.Command)-2] = strings.Replace(vm.Command[len(vm.Command)-2],
		filepath.Dir(vm.QMP), own, 1)
	vm.QMP = filepath.Join(own, "qmp")
	if err := errors.Join(os.Chmod(filepath.Dir(own), 0o755),
		os.Chown(own, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	p := startTwinOf(t, vm)
	if status := proc(t, p, "status"); !strings.Contains(status,
		"Uid:\t65534\t65534\t65534\t65534\n") {
		t.Error(status)
	}
	vm.User = "no-such-user"
	kill(t, p)
	if _, err := StartTwin(t.Context(), vm); err == nil ||
		!strings.Contains(err.Error(), "no-such-user") {
		t.Error(err)
	}
}

func TestLook(t *testing.T) {
	vm := describe(t, "")
	args := vm.Args(false)
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = os.Stderr
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	var q *qmp.Client
	for i := 0; q == nil; i++ {
		var err error
		if q, err = qmp.Dial(t.Context(), vm.QMP); err != nil && i == 1000 {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	is := func(want State, status, migration string) {
		t.Helper()
		q.Close()
		seen := look(t, vm)
		if seen.State != want || seen.Status != status || seen.Migration != migration ||
			seen.Process.PID != cmd.Process.Pid || !seen.Process.Alive() {
			t.Errorf("%+v, want %v", seen, want)
		}
		var err error
		if q, err = qmp.Dial(t.Context(), vm.QMP); err != nil {
			t.Fatal(err)
		}
	}
	run := func(command string, args any) {
		t.Helper()
		if err := q.Run(t.Context(), command, args, nil); err != nil {
			t.Fatal(err)
		}
	}
	is(Running, "running", "")
	_, err := StartTwin(within(t, 300*time.Millisecond), vm)
	if err == nil || !strings.Contains(err.Error(), "its monitor does not answer") {
		t.Error(err)
	}
	if seen, err := Look(within(t, 300*time.Millisecond), vm); err != nil || seen.State != Silent {
		t.Errorf("%+v, %v", seen, err)
	}
	run("stop", nil)
	is(Paused, "paused", "")
	run("cont", nil)
	run("migrate", map[string]any{"uri": "exec:cat >/dev/null"})
	for i := 0; ; i++ {
		if m, err := q.QueryMigrate(t.Context()); err == nil && m.Status == "completed" {
			break
		} else if i == 1000 {
			t.Fatalf("%+v, %v", m, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	is(Frozen, "postmigrate", "completed")
	q.Close()
	if _, err := StartTwin(within(t, 10*time.Second), vm); err == nil ||
		!strings.Contains(err.Error(), "frozen by an eviction") {
		t.Error(err)
	}
	// A stopped process takes no client, and soon has no room for one more that waits.
	p, err := process.Find(cmd.Process.Pid)
	if err == nil {
		err = p.Stop(within(t, 10*time.Second))
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 4 {
		if seen, err := Look(within(t, 10*time.Second), vm); err != nil || seen.State != Frozen ||
			seen.Status != "stopped" {
			t.Errorf("%+v, %v", seen, err)
		}
	}
	if _, err := StartTwin(within(t, 10*time.Second), vm); err == nil ||
		!strings.Contains(err.Error(), "frozen by an eviction") {
		t.Error(err)
	}
}

// Where systemd runs, a QEMU starts by way of systemd-run, keeps the process ID, and has its user's
// groups.
func TestScope(t *testing.T) {
	dir := t.TempDir()
	told := filepath.Join(dir, "told")
	script := filepath.Join(dir, "systemd-run")
	text :=
		fmt.Sprintf("#!/bin/sh\necho \"$@\" >%s\nwhile [ \"$1\" != -- ]; do shift; "+
			"done\nshift\nexec \"$@\"\n", told)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	oldBooted, oldRun := systemdBooted, systemdRun
	systemdBooted, systemdRun = dir, script
	t.Cleanup(func() { systemdBooted, systemdRun = oldBooted, oldRun })
	for _, more := range []string{"", "user = \"nobody\""} {
		vm := describe(t, more)
		if more != "" {
			if os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			os.Chmod(filepath.Dir(filepath.Dir(vm.QMP)), 0o755)
			os.Chmod(filepath.Dir(vm.QMP), 0o777)
		}
		p, err := Start(within(t, 30*time.Second), vm)
		if err != nil {
			t.Fatal(err)
		}
		defer kill(t, p)
		b, err := os.ReadFile(told)
		if err != nil || !strings.HasPrefix(string(b), "--scope ") ||
			!strings.Contains(string(b), "--unit=vacate-vm-") {
			t.Errorf("systemd-run was told %q, %v", b, err)
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if want := strings.Join(vm.Args(false), "\x00") + "\x00"; err != nil ||
			string(line) != want {
			t.Errorf("process %d is %q, %v", p.PID, line, err)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
		if err != nil || more != "" &&
			!strings.Contains(string(status), "Uid:\t65534\t65534\t65534\t65534") {
			t.Errorf("status %s, %v", status, err)
		}
		if seen, err := Look(within(t, 10*time.Second), vm); err != nil || seen.State != Running {
			t.Errorf("it is %v, %v", seen, err)
		}
	}
}

// A twin that is still systemd-run is found as one, and counts as there.
func TestTwinsInScope(t *testing.T) {
	vm := VM{Name: "vm", Command: []string{"/usr/bin/sleep", "1000", incoming},
		QMP: filepath.Join(t.TempDir(), "none")}
	cmd := exec.Command("/bin/sh",
		append([]string{"-c", "sleep 1000", "systemd-run", "--"}, vm.Args(true)...)...)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		cmd.Wait()
	})
	deadline := time.Now().Add(10 * time.Second)
	for {
		twins, err := Twins(vm)
		if err != nil {
			t.Fatal(err)
		}
		seen, err := Search(t.Context(), vm)
		if err != nil {
			t.Fatal(err)
		}
		if len(twins) == 1 && twins[0].PID == cmd.Process.Pid &&
			seen.State == Starting && seen.Process == twins[0] {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("twins: %v, seen: %v, want process %d", twins, seen, cmd.Process.Pid)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

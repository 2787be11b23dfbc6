package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"vacate/internal/cli"
	"vacate/internal/evict"
	"vacate/internal/guest/inspect"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/qmp"
	sysprocess "vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The survey that was recorded of a real guest, as text.
func TestMemoryText(t *testing.T) {
	b, err := os.ReadFile("../../internal/guest/inspect/testdata/survey.json")
	if err != nil {
		t.Fatal(err)
	}
	var m inspect.Memory
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	m.Notes = []string{
		"a reason for distrust that is so long that it takes more than one line of a terminal, " +
			"of 80 columns", "another\x1b[31m"}
	m.Times = inspect.Times{Attach: 0.25, Frozen: 0.0051,
		Stages: []inspect.Stage{{Name: "scan", Seconds: 0.002},
			{Name: "free lists", Seconds: 0.0007}, {Name: "tasks", Seconds: 0.0021}}}
	got := memoryText(m, false, false)
	for line := range strings.Lines(got) {
		if n := utf8.RuneCountInString(strings.TrimSpace(line)); n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	const golden = "testdata/memory.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Error(cmp.Diff(string(want), got))
	}
}

// What a guest calls itself and its processes does nothing to a terminal.
func TestHostileNames(t *testing.T) {
	m := inspect.NewMemory(&pageclass.Survey{Processes: []pageclass.Process{
		{PID: 1, Name: "\x1b]0;owned\x07\x1b[2J"}, {PID: 2, Name: "evil\nname\r\t"},
		{PID: 3, Name: "\u202etxt.exe\u2066"},
		{PID: 4, Name: "\xff\xfe\x80"}, {PID: 5, Name: `C:\x1b`},
		{PID: 6, Name: strings.Repeat("x", 1<<20)}, {PID: 7, Name: "naïve 漢"},
		{PID: 8, Name: "z" + strings.Repeat("\u0300", 9)},
	}})
	m.Kernel, m.Notes = "6.1\x1b[31m", []string{"\x9b31m\n\nnote"}
	got := memoryText(m, true, true)
	for _, r := range got {
		if r != '\n' && !unicode.IsGraphic(r) {
			t.Errorf("it writes %q", r)
		}
	}
	if len(got) > 4000 {
		t.Errorf("%d bytes", len(got))
	}
	for _, want := range []string{`\x1b]0;owned\a\x1b[2J`, `evil\nname\r\t`, `\u202etxt.exe\u2066`,
		`\xff\xfe\x80`, `C:\\x1b`, "xxx...", "naïve 漢", `z\u0300\u0300`} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
}

// Whatever the name, what is shown is short and printable, and short names stay apart.
func FuzzEscape(f *testing.F) {
	f.Add("systemd", "kworker/0:1")
	f.Add("\x1b[31m", `\x1b[31m`)
	f.Add("\xe6\xbc", "漢\u0301\u202e")
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := escape(a), escape(b)
		for _, r := range x {
			if !unicode.IsPrint(r) || unicode.Is(unicode.M, r) {
				t.Errorf("%q becomes %q", a, x)
			}
		}
		if !utf8.ValidString(x) || len(x) > maxName*10 {
			t.Errorf("%q becomes %q", a, x)
		}
		if x == y && a != b && len(a) <= maxName && len(b) <= maxName {
			t.Errorf("%q and %q both become %q", a, b, x)
		}
	})
}

// halting starts a QEMU whose VM does nothing, and a second monitor to look at it.
func halting(t *testing.T) (path string, other *qmp.Client, qemu *os.Process) {
	t.Helper()
	if testing.Short() {
		t.Skip("short: starts QEMU")
	}
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	bios := filepath.Join(dir, "bios")
	if err := os.WriteFile(bios, haltingBIOS, 0o644); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "1")
	cmd := exec.Command(bin, "-nodefaults", "-display", "none", "-accel", "tcg", "-machine", "pc",
		"-m", "16", "-bios", bios,
		"-qmp", "unix:"+path+",server=on,wait=off", "-qmp", "unix:"+dir+"/2,server=on,wait=off")
	if err := sysprocess.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for ctx := labtest.Within(t, time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if other, err = qmp.Dial(ctx, dir+"/2"); err == nil {
			t.Cleanup(func() { other.Close() })
			return path, other, cmd.Process
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

// The VM stands still when it is looked at, and runs after that, come what may; one that
// was paused stays paused.
func TestStill(t *testing.T) {
	path, other, process := halting(t)
	ctx := labtest.Within(t, 2*time.Minute)
	running := func() bool {
		t.Helper()
		s, err := other.QueryStatus(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return s.Running
	}
	broken := errors.New("broken")
	var c *qmp.Client
	interrupt := func() {} // set for each case
	for _, k := range []struct {
		name  string
		look  func(context.Context) error
		limit time.Duration
		want  error
		says  string
	}{
		{name: "looked at", look: func(context.Context) error { return nil }},
		{name: "failed", look: func(context.Context) error { return broken },
			want: evict.ErrAborted, says: "broken"},
		{name: "too long", look: func(ctx context.Context) error {
			<-ctx.Done()
			return broken
		}, limit: 2 * time.Second, want: evict.ErrAborted, says: "longer than 2s"},
		{name: "deaf", look: func(ctx context.Context) error {
			// it does not heed ctx, so it looks at a VM that runs
			for !running() {
				time.Sleep(time.Millisecond)
			}
			return nil
		}, limit: 2 * time.Second, want: evict.ErrAborted, says: "longer than 2s"},
		{name: "interrupted", look: func(ctx context.Context) error {
			interrupt()
			<-ctx.Done()
			return ctx.Err()
		}, want: evict.ErrAborted, says: "interrupted by SIGINT"},
		{name: "monitor lost", look: func(context.Context) error { c.Close(); return nil }},
		{name: "run by another", look: func(context.Context) error {
			if err := other.Cont(ctx); err != nil {
				return err
			}
			for !running() {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(50 * time.Millisecond) // the event comes by the other monitor
			return nil
		}, want: evict.ErrAborted, says: "someone else"},
	} {
		for _, paused := range []bool{false, true} {
			if paused && k.name == "deaf" {
				continue // nobody has it run
			}
			name := k.name
			if paused {
				name += ", paused"
			}
			t.Run(name, func(t *testing.T) {
				var err error
				if c, err = qmp.Dial(ctx, path); err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if paused {
					if err := c.Stop(ctx); err != nil {
						t.Fatal(err)
					}
					defer other.Cont(ctx)
				}
				if k.limit == 0 {
					k.limit = time.Minute
				}
				ctx, cancel := context.WithCancelCause(ctx)
				defer cancel(nil)
				interrupt = func() { cancel(cli.Interrupted{Signal: syscall.SIGINT}) }
				looked := false
				stood, was, err := still(ctx, path, c, k.limit, func(ctx context.Context) error {
					looked = !running()
					return k.look(ctx)
				})
				if !looked || was != paused || (stood > 0) == paused {
					t.Errorf("looked at it standing still: %v; paused: %v; stood for %v", looked,
						was, stood)
				}
				if !errors.Is(err, k.want) || err != nil && !strings.Contains(err.Error(), k.says) {
					t.Errorf("%v, want %v and %q", err, k.want, k.says)
				}
				if k.name != "run by another" && running() == paused {
					t.Errorf("it was paused: %v, and now runs: %v", paused, !paused)
				}
			})
		}
	}
	t.Run("panic", func(t *testing.T) {
		c, err := qmp.Dial(ctx, path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		func() {
			defer func() { recover() }()
			still(ctx, path, c, time.Minute, func(context.Context) error { panic("a bug") })
		}()
		if !running() {
			t.Error("it stands still")
		}
	})
	t.Run("qemu dies", func(t *testing.T) {
		c, err := qmp.Dial(ctx, path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _, err = still(ctx, path, c, time.Minute,
			func(context.Context) error { return process.Kill() })
		if !errors.Is(err, evict.ErrLost) {
			t.Error(err)
		}
	})
}

// A real guest is surveyed while it works, with and without success, and from a core file.
// It works on, and its memory is what it was.
func TestInspectMemory(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	vm, err := l.A.Boot(labtest.Within(t, 3*time.Minute),
		lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 40, IdleMiB: 30, OtherMiB: 10, FileMiB: 8,
			Slow: true}})
	if err != nil {
		t.Fatal(err)
	}
	mustWork(t, vm)
	dir := t.TempDir()
	vacate := func(code int, args ...string) (stdout []string, stderr string) {
		t.Helper()
		p := start(t, l.A, append([]string{"inspect", "memory"}, args...)...)
		p.exit(code)
		return p.rest(), p.errors()
	}

	picture := filepath.Join(dir, "map.png")
	out, _ := vacate(exitCompleted, "--qmp", vm.QMP, "--json", "--map", picture)
	mustWork(t, vm)
	live := decodeMemory(t, out)
	if live.Source != "vm" || live.Pages < 60000 || live.Pages > 65536 ||
		live.Free.Skippable == 0 || live.Times.Frozen <= 0 {
		t.Errorf("%+v", live)
	}
	anon := 0
	for _, k := range live.Kinds {
		if k.Kind == pageclass.Anon {
			anon = k.Pages
		}
	}
	if anon < 80*256 { // hot, idle and other
		t.Errorf("%d anonymous pages", anon)
	}
	if len(live.Processes) == 0 || live.Processes[0].Name != "init" || !live.Processes[0].Active ||
		live.Processes[0].Pages < 40*256 {
		t.Errorf("%+v", live.Processes)
	}
	b, err := os.ReadFile(picture)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := png.Decode(bytes.NewReader(b)); err != nil {
		t.Error(err)
	}

	out, _ = vacate(exitCompleted, "--qmp", vm.QMP)
	if text := strings.Join(out, "\n"); !strings.Contains(text,
		"kernel        Linux "+live.Kernel+"\n") || !strings.Contains(text, "\nstood still   ") {
		t.Errorf("%s", text)
	}
	mustWork(t, vm)

	// Not enough time for anything.
	_, stderr := vacate(exitAborted, "--qmp", vm.QMP, "--freeze-limit", "1ns", "--map",
		filepath.Join(dir, "none.svg"))
	if !strings.Contains(stderr, "--freeze-limit") {
		t.Errorf("it said %s", stderr)
	}
	mustWork(t, vm)

	c, err := qmp.Dial(labtest.Within(t, time.Minute), vm.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	core := filepath.Join(dir, "core")
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Run(labtest.Within(t, time.Minute), "dump-guest-memory",
		map[string]any{"paging": false, "protocol": "file:" + core}, nil); err != nil {
		t.Fatal(err)
	}
	c.Close()
	out, _ = vacate(exitCompleted, "--qmp", vm.QMP, "--json")
	paused := decodeMemory(t, out)
	if paused.Times.Frozen != 0 {
		t.Errorf("it was paused, and stood still for %v s", paused.Times.Frozen)
	}
	out, _ = vacate(exitCompleted, core, "--json")
	dumped := decodeMemory(t, out)
	if dumped.Source != "core" || !cmp.Equal(dumped.Free, paused.Free) {
		t.Errorf("the core file says %+v, the VM %+v", dumped.Free, paused.Free)
	}
	if c, err = qmp.Dial(labtest.Within(t, time.Minute), vm.QMP); err != nil {
		t.Fatal(err)
	}
	if s, err := c.QueryStatus(t.Context()); err != nil || s.Running {
		t.Errorf("it was paused, and is %+v, %v", s, err)
	}
	if err := c.Cont(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Close()
	mustWork(t, vm)
	labtest.MustCheck(t, vm)
	if list, _ := filepath.Glob(filepath.Join(dir, ".*")); len(list) > 0 {
		t.Errorf("left behind: %v", list)
	}
	if _, err := os.Stat(filepath.Join(dir, "none.svg")); err == nil {
		t.Error("a map of nothing")
	}
}

// decodeMemory reads --json's line strictly.
func decodeMemory(t *testing.T, lines []string) inspect.Memory {
	t.Helper()
	var v struct {
		Type   string         `json:"type"`
		Memory inspect.Memory `json:"memory"`
	}
	d := json.NewDecoder(strings.NewReader(strings.Join(lines, "\n")))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil || v.Type != "memory" || len(lines) != 1 {
		t.Fatalf("%v: %q", err, lines)
	}
	return v.Memory
}

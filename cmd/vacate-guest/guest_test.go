package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/guest/agent"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"
)

// machine is a real guest with the agent's port, and its memory in a file.
type machine struct {
	t       testing.TB
	agent   string // socket of the agent's port
	monitor string
	memory  *os.File
	frames  uint64
	conn    net.Conn // the port "test"
	lines   *bufio.Reader
	console string
}

var guestKernel = flag.String("kernel", "6.1", "kernel to test with, by its name in the lab")

// kernelDir returns the directory with the kernel's vmlinuz, release and modules/.
func kernelDir(t testing.TB) string {
	k, err := lab.FindKernel(*guestKernel)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := lab.FetchKernel(t.Context(), "../../.lab", k, slog.New(slog.DiscardHandler))
	labtest.Need(t, err)
	return dir
}

func build(t testing.TB, dir, name, pkg string) []byte {
	t.Helper()
	out := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", out,
		pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// archive writes a cpio archive in the format "newc".
func archive(b *bytes.Buffer, name string, mode int, data []byte) {
	fmt.Fprintf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		b.Len()+1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
	b.Write(data)
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

func boot(t testing.TB, mib int, flags ...string) *machine {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots a VM")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	labtest.Need(t, err)
	kernel := kernelDir(t)
	release, err := os.ReadFile(filepath.Join(kernel, "release"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var initrd bytes.Buffer
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		archive(&initrd, d, 0o040755, nil)
	}
	modules, _ := filepath.Glob(filepath.Join(kernel, "modules", "*"))
	for _, m := range modules {
		data, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		archive(&initrd, "modules/"+filepath.Base(m), 0o100644, data)
	}
	archive(&initrd, "vacate-guest", 0o100755, build(t, dir, "vacate-guest", "."))
	archive(&initrd, "init", 0o100755, build(t, dir, "init", "./testdata/init"))
	archive(&initrd, "TRAILER!!!", 0, nil)
	file := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(file("initrd"), initrd.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, agent: file("agent"), monitor: file("qmp"), console: file("console"),
		frames: uint64(mib) << 8}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc,memory-backend=ram",
		"-accel", "tcg,thread=multi", "-cpu", lab.DefaultCPU("tcg", string(release)), "-smp", "2",
		"-m", strconv.Itoa(mib) + "M",
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,share=on,mem-path=%s", mib,
			file("memory")),
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", file("initrd"), "-append",
		"console=ttyS0 panic=-1 quiet",
		"-chardev", "file,id=console,path=" + m.console, "-serial", "chardev:console",
		"-qmp", "unix:" + m.monitor + ",server=on,wait=off",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,server=on,wait=off,path=" + m.agent,
		"-device", "virtserialport,id=port,chardev=agent,name=" + agent.PortName,
		"-chardev", "socket,id=test,server=on,wait=off,path=" + file("test"),
		"-device", "virtserialport,chardev=test,name=test",
	}
	cmd := exec.Command(qemu, append(args, flags...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			text, _ := os.ReadFile(m.console)
			t.Logf("qemu: %s\nconsole: %s", stderr.Bytes(), text[max(0, len(text)-4096):])
		}
	})
	for m.conn == nil {
		select {
		case <-ended:
			t.Fatalf("qemu has ended: %s", stderr.Bytes())
		case <-time.After(50 * time.Millisecond):
		}
		m.conn, _ = net.Dial("unix", file("test"))
	}
	t.Cleanup(func() { m.conn.Close() })
	m.lines = bufio.NewReader(m.conn)
	m.conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
	if line, err := m.lines.ReadString('\n'); err != nil || line != "up\n" {
		t.Fatalf("boot: %q, %v", line, err)
	}
	if m.memory, err = os.Open(file("memory")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.memory.Close() })
	return m
}

// do has the guest's init carry a command out.
func (m *machine) do(command string) string {
	m.t.Helper()
	m.conn.SetDeadline(time.Now().Add(2 * time.Minute))
	if _, err := fmt.Fprintln(m.conn, command); err != nil {
		m.t.Fatal(err)
	}
	line, err := m.lines.ReadString('\n')
	if err != nil {
		m.t.Fatalf("%s: %v", command, err)
	}
	return strings.TrimSpace(line)
}

func (m *machine) number(command string) int {
	m.t.Helper()
	n, err := strconv.Atoi(m.do(command))
	if err != nil {
		m.t.Fatal(err)
	}
	return n
}

func (m *machine) dial() *agent.Agent {
	m.t.Helper()
	a, err := agent.Dial(m.t.Context(), m.agent)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { a.Close() })
	return a
}

// patience is a deadline that a busy machine does not miss.
const patience = 20 * time.Second

func (m *machine) ask(a *agent.Agent) (*pageclass.Survey, agent.Stats) {
	m.t.Helper()
	s, st, err := a.Ask(m.t.Context(), agent.Options{Frames: m.frames, Deadline: patience})
	if err != nil {
		m.t.Fatal(err)
	}
	return s, st
}

// marks reads from outside which pages hold which marks: role and index by frame.
func (m *machine) marks() map[uint32][2]uint64 {
	m.t.Helper()
	found := map[uint32][2]uint64{}
	buf := make([]byte, 4096)
	for f := range m.frames {
		if _, err := m.memory.ReadAt(buf, int64(f)*4096); err != nil {
			m.t.Fatal(err)
		}
		if binary.LittleEndian.Uint64(buf) == 0x5ca1ab1ecafef00d {
			found[uint32(f)] = [2]uint64{binary.LittleEndian.Uint64(buf[8:]),
				binary.LittleEndian.Uint64(buf[16:])}
		}
	}
	return found
}

// TestGuest compares what the agent tells of a real guest with what is known from outside:
// the processes' pages bear marks, which are read from the guest's memory.
func TestGuest(t *testing.T) {
	t.Parallel()
	memory := 512 // MiB, below 3 GiB: there the file is the guest's memory in one piece
	if n, err := strconv.Atoi(os.Getenv("VACATE_GUEST_MIB")); err == nil {
		memory = n
	}
	m := boot(t, memory)
	mib := memory / 16 // of each process
	// Less than the default, which dial_test.go of package agent has, saves waiting.
	const active = 6 * time.Second
	t.Log(m.do("run /vacate-guest --print"))
	for _, role := range []string{"idle", "huge", "hot"} {
		if got := m.do(fmt.Sprint("spawn ", role, " ", mib)); got != "ready "+role {
			t.Fatalf("spawn %s: %s", role, got)
		}
	}
	c, err := qmp.Dial(t.Context(), m.monitor)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := agent.Find(t.Context(), c); err == nil {
		t.Error("found an agent before it was started")
	} else {
		t.Log(err)
	}
	m.do("agent")
	var path string
	for begin := time.Now(); path == ""; time.Sleep(50 * time.Millisecond) {
		if path, err = agent.Find(t.Context(), c); err != nil && time.Since(begin) > patience {
			t.Fatal(err)
		}
	}
	if path != m.agent {
		t.Errorf("found %s, want %s", path, m.agent)
	}
	a := m.dial()
	time.Sleep(active + time.Second) // until idle processes are not active
	st, err := a.Prepare(t.Context(), agent.Options{Deadline: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("prepare: %+v", st)
	time.Sleep(3 * time.Second)
	s, st, err := a.Ask(t.Context(), agent.Options{Frames: m.frames, Deadline: patience,
		ActiveWithin: active})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ask: %+v; %.0f bytes/GiB", st, float64(st.Bytes)/float64(m.frames)*(1<<18))
	t.Logf("classes %v", s.Counts())
	for i, p := range s.Processes {
		t.Logf("%d %+v", i+1, p)
	}
	if uint64(len(s.Pages)) < m.frames*9/10 || st.Incomplete {
		t.Errorf("%d pages of %d, incomplete %v", len(s.Pages), m.frames, st.Incomplete)
	}
	if !s.Fresh {
		t.Error("accessed bits are not fresh after prepare")
	}
	place := make([]int, len(s.Pages))
	for i, f := range s.Sequence {
		place[f] = i + 1
	}
	type sum struct{ marked, owned, class, kind, accessed, mapped, sorted int }
	sums := map[uint64]*sum{}
	names := map[uint64]string{1: "hot", 2: "idle", 3: "huge"}
	last := map[uint64][2]int{} // index and place
	marks := m.marks()
	for f := range uint32(len(s.Pages)) {
		mark, ok := marks[f]
		if !ok {
			continue
		}
		role := names[mark[0]]
		x := sums[mark[0]]
		if x == nil {
			x = &sum{}
			sums[mark[0]] = x
		}
		p := s.Pages[f]
		x.marked++
		if p.Owner != 0 && s.Processes[p.Owner-1].Name == role {
			x.owned++
		}
		want := pageclass.UserData
		if role != "hot" {
			want = pageclass.Other
		}
		if p.Class == want {
			x.class++
		}
		if p.Kind == pageclass.Anon {
			x.kind++
		}
		if p.Flags&pageclass.Accessed != 0 {
			x.accessed++
		}
		if p.Flags&pageclass.Mapped != 0 {
			x.mapped++
		}
		if l := last[mark[0]]; place[f] != 0 && (int(mark[1]) > l[0]) == (place[f] > l[1]) {
			x.sorted++
		}
		last[mark[0]] = [2]int{int(mark[1]), place[f]}
	}
	pages := mib << 8
	for role, name := range names {
		x := sums[role]
		if x == nil {
			t.Errorf("%s: no page bears its mark", name)
			continue
		}
		t.Logf("%s: %+v", name, *x)
		// The process's stack or the compiler may keep a mark or two elsewhere.
		if most := pages - pages/100; x.owned < most || x.class < most || x.kind < most ||
			x.mapped < most || x.sorted < most {
			t.Errorf("%s: of %d pages only %+v are told right", name, pages, *x)
		}
		switch {
		case name == "hot" && x.accessed < pages*9/10:
			t.Errorf("only %d of %d hot pages are told accessed", x.accessed, pages)
		case name == "idle" && x.accessed > pages/10:
			t.Errorf("%d of %d idle pages are told accessed", x.accessed, pages)
		}
	}
	counts := s.Counts()
	for _, c := range []pageclass.Class{pageclass.KernelCode, pageclass.Kernel, pageclass.PageTable,
		pageclass.UserCode, pageclass.UserData, pageclass.FileInactive, pageclass.Free} {
		if counts[c] == 0 {
			t.Errorf("no page of class %v", c)
		}
	}
	for _, p := range s.Processes {
		if p.Name != "init" && p.Active != (p.Name == "hot") {
			t.Errorf("process %+v", p)
		}
	}
	t.Log(m.do("run /vacate-guest --print"))

	t.Run("costs", func(t *testing.T) {
		cpu := m.number("cpu")
		const idle = 2 * time.Second
		time.Sleep(idle)
		t.Logf("idle: %v of CPU in %v; resident %d pages", time.Duration(m.number("cpu")-cpu), idle,
			m.number("rss"))
		var before *pageclass.Survey
		stale := func(what string) {
			s, st := m.ask(a)
			t.Logf("ask: %+v", st)
			if before != nil {
				free, used := 0, 0
				for f, p := range before.Pages {
					if p.Class == pageclass.Free {
						free++
						if f < len(s.Pages) && s.Pages[f].Class != pageclass.Free {
							used++
						}
					}
				}
				t.Logf("%s: of %d free pages %d are in use at the next survey", what, free, used)
			}
			before = s
		}
		stale("")
		stale("at once")
		time.Sleep(time.Second)
		stale("1 s later")
		m.do(fmt.Sprint("spawn idle ", mib))
		stale("more processes")
		t.Logf("resident %d pages", m.number("rss"))
	})
}

// TestRecord is no test: it writes an answer and files of /proc from a real guest, for tests
// that need no guest.
func TestRecord(t *testing.T) {
	m := boot(t, 256)
	m.do("spawn idle 4")
	m.do("spawn hot 4")
	m.do("agent")
	a := m.dial()
	if _, err := a.Prepare(t.Context(), agent.Options{Deadline: patience}); err != nil {
		t.Fatal(err)
	}
	a.Close()
	time.Sleep(time.Second)
	conn, err := net.Dial("unix", m.agent)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := agent.Request{ID: 1, Deadline: 5 * time.Second, ActiveWithin: 16 * time.Second,
		MaxBytes: 1 << 20, Frames: 1 << 16}
	conn.Write(r.Append(nil))
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	answer, _ := io.ReadAll(conn)
	put := func(name string, data []byte) {
		if err := os.WriteFile(name, data, 0o644); err != nil || len(data) == 0 {
			t.Fatal(name, err)
		}
	}
	release, err := strconv.Unquote(m.do("read /proc/sys/kernel/osrelease"))
	if err != nil {
		t.Fatal(err)
	}
	release = strings.TrimSpace(release)
	put("../../internal/guest/agent/testdata/answer-"+release, answer)
	for _, name := range []string{"1/stat", "1/sched", "1/maps", "iomem", "kcore"} {
		text, err := strconv.Unquote(m.do("read /proc/" + name))
		if err != nil {
			t.Fatal(name, err)
		}
		put("testdata/"+strings.ReplaceAll(name, "/", "-")+"-"+release, []byte(text))
	}
}

// TestRestless has the host and the agent come and go at the worst moments.
func TestRestless(t *testing.T) {
	t.Parallel()
	m := boot(t, 256)
	m.do("agent")
	o := agent.Options{Frames: m.frames, Deadline: patience}
	short := o
	short.Deadline = 300 * time.Millisecond

	t.Run("host goes", func(t *testing.T) {
		request := (&agent.Request{ID: 9, Deadline: time.Second, MaxBytes: 1 << 20,
			Frames: m.frames}).Append(nil)
		for i := range 30 {
			conn, err := net.Dial("unix", m.agent)
			if err != nil {
				t.Fatal(err)
			}
			if i%3 == 0 {
				conn.Write(request[:1+i])
			} else {
				conn.Write(request)
			}
			time.Sleep(time.Duration(i%10) * 20 * time.Millisecond)
			conn.SetDeadline(time.Now().Add(patience))
			if i%3 != 0 && i%4 == 0 { // amid the answer
				io.ReadFull(conn, make([]byte, 40))
			}
			conn.Close()
		}
		a := m.dial()
		_, st := m.ask(a)
		t.Logf("%+v", st)
		a.Close()
	})
	t.Run("cut requests", func(t *testing.T) {
		conn, err := net.Dial("unix", m.agent)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		r := agent.Request{ID: 11, Prepare: true, Deadline: patience, MaxBytes: 1 << 20,
			Frames: m.frames}
		b := r.Append(nil)
		conn.Write(append(append([]byte("garbage"), b[:50]...), b...))
		conn.SetReadDeadline(time.Now().Add(patience))
		answer := make([]byte, 32)
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer[:7]) != "vacateG" ||
			binary.LittleEndian.Uint64(answer[16:]) != 11 {
			t.Errorf("%q, %v", answer, err)
		}
	})
	t.Run("agent stalls", func(t *testing.T) {
		a := m.dial()
		defer a.Close()
		m.do("signal 19")
		if _, _, err := a.Ask(t.Context(), short); !errors.Is(err, agent.ErrSilent) {
			t.Error(err)
		}
		m.do("signal 18")
		m.ask(a)
	})
	t.Run("no time", func(t *testing.T) {
		a := m.dial()
		defer a.Close()
		for _, d := range []time.Duration{time.Millisecond, 10 * time.Millisecond,
			50 * time.Millisecond, 100 * time.Millisecond} {
			o := o
			o.Deadline = d
			s, st, err := a.Ask(t.Context(), o)
			if err != nil && !errors.Is(err, agent.ErrSilent) {
				t.Error(d, err)
			}
			if err == nil {
				t.Logf("%v: incomplete %v, %v", d, st.Incomplete, s.Counts())
			}
		}
		m.ask(a)
	})
	t.Run("agent is killed", func(t *testing.T) {
		a := m.dial()
		defer a.Close()
		m.do("signal 9")
		m.do("wait")
		if _, _, err := a.Ask(t.Context(), short); !errors.Is(err, agent.ErrSilent) {
			t.Error(err)
		}
		done := make(chan error, 1)
		go func() { // what waits in the socket comes first
			_, _, err := a.Ask(context.Background(), short)
			done <- err
		}()
		got := m.do("garbage")
		if err := <-done; err == nil {
			t.Error("garbage is an answer")
		} else {
			t.Log(got, err)
		}
	})
	t.Run("agent comes again", func(t *testing.T) {
		m.do("agent --clear 10s")
		a := m.dial()
		defer a.Close()
		m.ask(a)
		time.Sleep(11 * time.Second)
		if _, st := m.ask(a); st.Prepared < 0 {
			t.Error("accessed bits were not cleared without being asked")
		}
	})
	t.Run("port comes and goes", func(t *testing.T) {
		c, err := qmp.Dial(t.Context(), m.monitor)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		find := func(want error) {
			t.Helper()
			var path string
			var err error
			for begin := time.Now(); time.Since(begin) <
				patience; time.Sleep(100 * time.Millisecond) {
				if path, err = agent.Find(t.Context(), c); errors.Is(err, want) {
					return
				}
			}
			t.Fatalf("found %q, %v, want %v", path, err, want)
		}
		find(nil)
		if err := c.Run(t.Context(), "device_del", map[string]any{"id": "port"}, nil); err != nil {
			t.Fatal(err)
		}
		find(agent.ErrNoPort)
		// Without an id it is in another place of QEMU's tree.
		for begin := time.Now(); ; time.Sleep(100 * time.Millisecond) {
			// QEMU lets the old one go some time later
			err := c.Run(t.Context(), "device_add",
				map[string]any{"driver": "virtserialport", "chardev": "agent",
					"name": agent.PortName}, nil)
			if err == nil {
				break
			}
			if time.Since(begin) > patience {
				t.Fatal(err)
			}
		}
		find(nil)
		a := m.dial()
		defer a.Close()
		m.ask(a)
	})
	t.Run("agent ends", func(t *testing.T) {
		m.do("signal 15")
		if got := m.do("wait"); got != "exit status 0" {
			t.Errorf("on SIGTERM: %s", got)
		}
	})
	t.Run("port is named", func(t *testing.T) {
		text := m.do("run /vacate-guest --port /dev/nothing")
		if !strings.Contains(text, "no such file") {
			t.Error(text)
		}
	})
}

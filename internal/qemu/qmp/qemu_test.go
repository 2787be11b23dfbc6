package qmp_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

var record = flag.Bool("record", false, "record testdata/session.jsonl from the installed QEMU")

// startQEMU runs a real QEMU and returns its monitor's path and its process.
func startQEMU(t *testing.T, args ...string) (string, *os.Process) {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(bin, append([]string{"-nodefaults", "-display", "none",
		"-qmp", "unix:" + sock + ",server=on,wait=off"}, args...)...)
	startWith(t, cmd, sock)
	return sock, cmd.Process
}

// startWith starts a command that becomes a QEMU, and returns when that has opened its monitor.
func startWith(t *testing.T, cmd *exec.Cmd, sock string) {
	t.Helper()
	cmd.Stderr = os.Stderr
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 500 {
		if _, err := os.Stat(sock); err == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("qemu opened no monitor")
}

func dial(t *testing.T, path string) *qmp.Client {
	t.Helper()
	c, err := qmp.Dial(t.Context(), path)
	for i := 0; i < 500 && errors.Is(err, syscall.ECONNREFUSED); i++ {
		// bound, but not listening yet
		time.Sleep(20 * time.Millisecond)
		c, err = qmp.Dial(t.Context(), path)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestSession(t *testing.T) {
	sock, proc := startQEMU(t, "-M", "none", "-S")
	c := dial(t, sock)
	ctx := t.Context()
	if c.PeerPID() != proc.Pid {
		t.Errorf("peer pid %d, want %d", c.PeerPID(), proc.Pid)
	}
	v := must(c.QueryVersion(ctx))(t)
	if v != c.Version() || !v.AtLeast(5, 0) || v.AtLeast(v.Major, v.Minor+1) {
		t.Errorf("versions: asked %v, greeted %v", v, c.Version())
	}
	if s := must(c.QueryStatus(ctx))(t); s.Status != "prelaunch" || s.Running {
		t.Errorf("status %+v", s)
	}
	if m := must(c.QueryMachine(ctx))(t); m != "none" {
		t.Errorf("machine %q", m)
	}
	if out := must(c.HMP(ctx, "p/d 6*7"))(t); out != "42\n" {
		t.Errorf("HMP: %q", out)
	}
	var refused *qmp.Error
	err := c.Run(ctx, "no-such-command", nil, nil)
	if !errors.As(err, &refused) || refused.Command != "no-such-command" ||
		!errors.Is(err, qmp.ErrCommandNotFound) {
		t.Errorf("unknown command: %v", err)
	}
	if err := c.Run(ctx, "stop", map[string]int{"x": 1}, nil); !errors.As(err, &refused) ||
		errors.Is(err, qmp.ErrCommandNotFound) {
		t.Errorf("bad argument: %v", err)
	}
	var wrong struct{ Running string }
	if err := c.Run(ctx, "query-status", nil, &wrong); err == nil || errors.Is(err, qmp.ErrClosed) {
		t.Errorf("wrong type: %v", err)
	}
	check(t, c.Quit(ctx))
	<-c.Done()
	if _, err := c.QueryStatus(ctx); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("after quit: %v", err)
	}
}

func TestTypedCommands(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(disk, make([]byte, 1<<20), 0o600))
	sock, _ := startQEMU(t, "-M", "pc-i440fx-7.2", "-m", "64", "-smp", "2", "-incoming", "defer",
		"-S",
		"-drive", "file="+disk+",format=raw,if=none,id=d,readonly=on", "-device",
		"virtio-blk-pci,drive=d",
		"-device", "virtio-balloon-pci")
	c := dial(t, sock)
	ctx := t.Context()
	if m := must(c.QueryMachine(ctx))(t); m != "pc-i440fx-7.2" {
		t.Errorf("machine %q", m)
	}
	if m := must(c.QueryMigrate(ctx))(t); m.Status != "" {
		t.Errorf("fresh incoming QEMU has migration status %q", m.Status)
	}
	check(t, c.SetMigrationCapabilities(ctx, map[string]bool{"postcopy-ram": true, "events": true}))
	caps := must(c.QueryMigrationCapabilities(ctx))(t)
	if !caps["postcopy-ram"] || !caps["events"] || caps["multifd"] {
		t.Errorf("capabilities %v", caps)
	}
	check(t, c.SetMigrationParameters(ctx, map[string]any{"max-postcopy-bandwidth": 1 << 40}))
	if p := must(c.QueryMigrateParameters(ctx))(t); p.MaxPostcopyBandwidth == nil ||
		*p.MaxPostcopyBandwidth != 1<<40 {
		t.Errorf("parameters %+v", p)
	}
	blocks := must(c.QueryBlock(ctx))(t)
	if len(blocks) != 1 || blocks[0].Device != "d" || blocks[0].Inserted.File != disk ||
		!blocks[0].Inserted.ReadOnly {
		t.Errorf("block devices %+v", blocks)
	}
	if cpus := must(c.QueryCPUs(ctx))(t); len(cpus) != 2 || cpus[1].Index != 1 ||
		cpus[1].ThreadID == 0 {
		t.Errorf("cpus %+v", cpus)
	}
	check(t, c.MigrateIncoming(ctx, "unix:"+filepath.Join(t.TempDir(), "in")))
	if m := must(c.QueryMigrate(ctx))(t); m.Status != "" && m.Status != "setup" { // by version
		t.Errorf("listening QEMU has migration status %q", m.Status)
	}
}

// SeaBIOS sets up the ring of a disk it might boot from, so no guest is needed.
func TestVirtioRings(t *testing.T) {
	sock, _ := startQEMU(t, "-M", "pc", "-m", "64", "-device", "virtio-balloon-pci",
		"-blockdev", "null-co,node-name=d,size=1048576,read-zeroes=on", "-device",
		"virtio-blk-pci,drive=d,bootindex=1,num-queues=2")
	c := dial(t, sock)
	ctx := t.Context()
	devices, err := c.QueryVirtio(ctx)
	if errors.Is(err, qmp.ErrCommandNotFound) {
		t.Skip("needs QEMU 7.2 or later: x-query-virtio")
	}
	check(t, err)
	if len(devices) != 2 {
		t.Fatalf("virtio devices %+v", devices)
	}
	for _, d := range devices {
		if d.Name != "virtio-blk" {
			if rings := must(c.QueryVirtioQueues(ctx, d.Path))(t); len(rings) != 0 {
				t.Errorf("%s without a driver has rings %+v", d.Name, rings)
			}
			continue
		}
		var rings []qmp.VirtioQueue
		for range 300 {
			if rings = must(c.QueryVirtioQueues(ctx, d.Path))(t); len(rings) > 0 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if len(rings) != 1 {
			t.Fatalf("rings %+v, want the one that the firmware uses", rings)
		}
		if r := rings[0]; r.Index != 0 || r.Num == 0 || r.Desc == 0 || r.Avail <= r.Desc ||
			r.Used <= r.Avail || r.Used >= 64<<20 {
			t.Errorf("ring %+v", r)
		}
	}
	if _, err := c.QueryVirtioQueues(ctx, "/machine"); err == nil {
		t.Error("rings of something that is no virtio device")
	}
}

// A FIFO without a reader stalls QEMU's main loop inside a command.
func TestStalledMainLoop(t *testing.T) {
	sock, proc := startQEMU(t, "-M", "pc", "-m", "16", "-S")
	c := dial(t, sock)
	ctx := t.Context()
	fifo := filepath.Join(t.TempDir(), "fifo")
	check(t, unix.Mkfifo(fifo, 0o600))
	stall := make(chan error, 1)
	save := map[string]any{"val": 0, "size": 4096, "filename": fifo}
	stallQEMU := func() {
		go func() { stall <- c.Run(ctx, "pmemsave", save, nil) }()
		for ctx := t.Context(); ctx.Err() == nil; {
			short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			_, err := c.QueryStatus(short)
			cancel()
			if err != nil {
				return
			}
		}
	}
	stallQEMU()

	// Give up on more commands than may be under way: the later ones give up
	// waiting for their turn. None may leave a reply for the wrong command.
	for i := range 6 {
		short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		if _, err := c.HMP(short, fmt.Sprint("p/d ", i)); !errors.Is(err,
			context.DeadlineExceeded) {
			t.Errorf("command %d on a stalled QEMU: %v", i, err)
		}
		cancel()
	}
	var refused *qmp.Error
	if err := c.MigratePause(ctx); !errors.As(err, &refused) {
		// no migration to pause: but answered
		t.Errorf("out of band on a stalled QEMU: %v", err)
	}
	f := must(os.Open(fifo))(t)
	page := make([]byte, 8192)
	n := 0
	for n < 4096 {
		m, err := f.Read(page[n:])
		check(t, err)
		n += m
	}
	f.Close()
	check(t, <-stall)
	for i := range 10 {
		if out := must(c.HMP(ctx, fmt.Sprint("p/d ", 100+i)))(t); out != fmt.Sprintln(100+i) {
			t.Fatalf("reply of another command: %q", out)
		}
	}
	if err := c.RunOOB(ctx, "query-status", nil, nil); !errors.As(err, &refused) {
		t.Errorf("in-band command out of band: %v", err)
	}

	// Now QEMU dies inside the command.
	stallQEMU()
	proc.Kill()
	if err := <-stall; !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("qemu killed during a command: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	sock, _ := startQEMU(t, "-M", "none", "-S")
	c := dial(t, sock)
	sub := c.Subscribe(1)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 100 {
				n := g*1000 + i
				ctx, cancel := context.WithCancel(t.Context())
				if i%5 == 4 {
					go cancel() // at any moment of the exchange
				}
				out, err := c.HMP(ctx, fmt.Sprint("p/d ", n))
				cancel()
				if err == nil && out != fmt.Sprintln(n) {
					t.Errorf("asked %d, got %q", n, out)
				}
				if err != nil && !(i%5 == 4 && errors.Is(err, context.Canceled)) {
					t.Error(err)
				}
				if i%10 == 0 {
					var refused *qmp.Error
					if err := c.MigratePause(t.Context()); !errors.As(err, &refused) {
						t.Errorf("out of band: %v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	// Events: STOP and RESUME in turn; one of them fits.
	for range 5 {
		check(t, c.Cont(t.Context()))
		check(t, c.Stop(t.Context()))
	}
	if e := <-sub.C; e.Name != "RESUME" || time.Since(e.Time).Abs() > time.Hour {
		t.Errorf("first event %+v", e)
	}
	if sub.Dropped() != 9 {
		t.Errorf("%d events dropped, want 9", sub.Dropped())
	}
	late := c.Subscribe(1)
	late.Close()
	late.Close()
	if _, open := <-late.C; open {
		t.Error("event after the subscription's end")
	}
	for range 3 {
		wg.Go(func() { c.Close() })
	}
	wg.Wait()
	if _, open := <-sub.C; open {
		t.Error("event after the client's end")
	}
	if _, open := <-c.Subscribe(1).C; open {
		t.Error("event from a closed client")
	}
	if err := c.Err(); !errors.Is(err, qmp.ErrClosed) {
		t.Error(err)
	}
}

func TestPassDescriptor(t *testing.T) {
	sock, _ := startQEMU(t, "-M", "pc", "-m", "16", "-S")
	c := dial(t, sock)
	ctx := t.Context()
	// No limit on open files is as high: a number that was just closed may be taken again.
	if err := c.GetFD(ctx, "stream", 1<<30); err == nil {
		t.Error("passed a closed descriptor")
	}
	if err := c.GetFD(ctx, "stream", -1); err == nil {
		t.Error("passed no descriptor")
	}
	pair := must(unix.Socketpair(unix.AF_UNIX,
		unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0))(t)
	ours := os.NewFile(uintptr(pair[0]), "stream")
	defer ours.Close()
	check(t, ours.SetReadDeadline(time.Now().Add(time.Minute)))
	check(t, c.GetFD(ctx, "stream", pair[1]))
	unix.Close(pair[1])
	check(t, c.Migrate(ctx, "fd:stream", false))
	magic := make([]byte, 8)
	if _, err := ours.Read(magic); err != nil || string(magic[:4]) != "QEVM" {
		t.Errorf("stream begins with %q, %v", magic, err)
	}
	// A migration that reaches its last stage holds QEMU's main loop until its bytes are taken.
	ours.Close()
	if m := must(c.QueryMigrate(ctx))(t); m.Status == "" {
		t.Error("migration without a status")
	}
	check(t, c.MigrateCancel(ctx))
}

func TestOneClientAtATime(t *testing.T) {
	sock, _ := startQEMU(t, "-M", "none", "-S")
	first := dial(t, sock)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := qmp.Dial(ctx, sock)
	if !errors.Is(err, qmp.ErrBusy) || !strings.Contains(err.Error(), "another client") {
		t.Errorf("second client: %v", err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := qmp.Dial(ctx, sock); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	first.Close()
	second := dial(t, sock)
	if _, err := second.QueryStatus(t.Context()); err != nil {
		t.Error(err)
	}
}

// Several clients come at once, as when an eviction begins while others look at the VM. Each waits
// for its turn, and none is told that the monitor is silent.
func TestClientsAtOnce(t *testing.T) {
	sock, _ := startQEMU(t, "-M", "none", "-S")
	first := dial(t, sock)
	const clients = 4 // more than QEMU's queue has room for
	ended := make(chan error, clients)
	for range clients {
		go func() {
			c, err := qmp.Dial(t.Context(), sock)
			if err == nil {
				_, err = c.QueryStatus(t.Context())
				c.Close()
			}
			ended <- err
		}()
	}
	time.Sleep(200 * time.Millisecond) // they come meanwhile
	first.Close()
	for range clients {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
}

func TestDialErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := qmp.Dial(t.Context(), filepath.Join(dir, "none")); !errors.Is(err,
		fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	stale := filepath.Join(dir, "stale")
	l := must(net.ListenUnix("unix", &net.UnixAddr{Name: stale}))(t)
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := qmp.Dial(t.Context(), stale); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("stale socket: %v", err)
	}
	hmp := filepath.Join(dir, "hmp")
	sock, _ := startQEMU(t, "-M", "none", "-S", "-monitor", "unix:"+hmp+",server=on,wait=off")
	dial(t, sock)
	if _, err := qmp.Dial(t.Context(), hmp); !errors.Is(err, qmp.ErrNotQMP) ||
		!strings.Contains(err.Error(), "human monitor") {
		t.Errorf("human monitor: %v", err)
	}
}

// TestRecord rewrites the corpus: go test ./internal/qemu/qmp -run TestRecord -record
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("records only with -record")
	}
	sock, _ := startQEMU(t, "-M", "pc", "-m", "64", "-S", "-device", "virtio-balloon-pci",
		"-blockdev", "null-co,node-name=d,size=1048576", "-device", "virtio-blk-pci,drive=d")
	conn := must(net.Dial("unix", sock))(t)
	defer conn.Close()
	r := bufio.NewReader(conn)
	out := must(os.Create("testdata/session.jsonl"))(t)
	defer out.Close()
	keep := func() string {
		line, err := r.ReadString('\n')
		check(t, err)
		out.WriteString(strings.TrimRight(line, "\r\n") + "\n")
		return line
	}
	keep()
	for id, cmd := range []string{
		`"qmp_capabilities","arguments":{"enable":["oob"]}`, `"query-version"`, `"query-status"`,
		`"query-migrate"`,
		`"query-migrate-capabilities"`, `"query-migrate-parameters"`, `"query-block"`,
		`"query-cpus-fast"`,
		`"x-query-virtio"`,
		`"x-query-virtio-queue-status","arguments":{"path":"/machine/peripheral-anon/device[0]/virtio-backend","queue":0}`,
		`"x-query-virtio-queue-status","arguments":{"path":"/machine/peripheral-anon/device[0]/virtio-backend","queue":99}`,
		`"qom-get","arguments":{"path":"/machine","property":"type"}`, `"no-such-command"`,
		`"human-monitor-command","arguments":{"command-line":"info ramblock"}`, `"cont"`, `"stop"`,
		`"migrate-start-postcopy"`, `"quit"`,
	} {
		fmt.Fprintf(conn, "{\"execute\":%s,\"id\":%d}\n", cmd, id+1)
		for !strings.Contains(keep(), fmt.Sprintf(`"id": %d`, id+1)) {
		}
	}
}

// Commands that were begun are carried out in order. What QEMU said before its process was stopped
// is all there after a Drain, and a stopped QEMU is told from a busy one.
func TestStoppedQEMU(t *testing.T) {
	sock, proc := startQEMU(t, "-M", "none", "-S")
	c := dial(t, sock)
	ctx := t.Context()
	qemu := must(process.Find(proc.Pid))(t)
	for range 20 {
		events := c.Subscribe(16)
		cont, status, stop := c.Begin(ctx, "cont", nil), c.Begin(ctx, "query-status",
			nil), c.Begin(ctx, "stop", nil)
		var between qmp.Status
		check(t, errors.Join(cont.Reply(ctx, nil), status.Reply(ctx, &between),
			stop.Reply(ctx, nil)))
		if !between.Running {
			t.Fatalf("between cont and stop: %+v", between)
		}
		last := c.Begin(ctx, "cont", nil) // it may be carried out before QEMU is stopped, or after
		check(t, qemu.Stop(ctx))
		check(t, c.Drain(ctx))
		said := len(events.C)
		if _, err := qmp.Dial(ctx, sock); !errors.Is(err, qmp.ErrStopped) {
			t.Fatalf("a stopped QEMU: %v", err)
		}
		check(t, c.Drain(ctx))
		if now := len(events.C); now != said || said < 2 {
			t.Fatalf("%d events after Drain, %d later", said, now)
		}
		check(t, qemu.Continue())
		check(t, last.Reply(ctx, nil))
		check(t, c.Drain(ctx))
		if now := len(events.C); now != 3 {
			t.Fatalf("%d events of cont, stop, cont", now)
		}
		check(t, c.Stop(ctx))
		events.Close()
	}
	if _, err := c.QueryStatus(ctx); err != nil {
		t.Fatal(err)
	}
	var refused *qmp.Error
	if err := c.Begin(ctx, "no-such-command", nil).Reply(ctx, nil); !errors.As(err, &refused) {
		t.Errorf("unknown command: %v", err)
	}
	check(t, qemu.Stop(ctx))
	check(t, qemu.Kill(ctx))
	<-c.Done()
	if err := errors.Join(c.Drain(ctx), c.Begin(ctx, "stop", nil).Reply(ctx, nil)); !errors.Is(err,
		qmp.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

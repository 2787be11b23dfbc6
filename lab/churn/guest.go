// Package churn tests whether the pages that a survey calls free are free. Its real guests allocate
// and free memory of every kind all the time, and verify every byte of it (lab/cmd/guestchurn).
// There are four ways, all at random moments of the guest's life:
//
//   - Overwrite fills each page that a survey calls skippable with garbage, and lets the
//     guest run on. Nothing may notice.
//   - Oracle follows what the guest's kernel itself says of its allocator, event by event
//     (tracepoints kmem:mm_page_alloc and kmem:mm_page_free, in perf(2) rings that are read
//     in the frozen guest's memory): no page that is allocated may be skippable.
//   - Compare puts a survey beside the kernel's own /proc/kpageflags of the same moment.
//   - Sensitivity overwrites pages that are in use, kind by kind, to tell how much the
//     silence of the first way is worth.
//
// Tried with Debian's cloud kernels 5.10 to 7.3 under QEMU 7.2.
package churn

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/linux"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/churnproto"
)

// Config describes a guest. The zero value is good.
type Config struct {
	Kernel    lab.Kernel
	MemoryMiB int // default 384
	VCPUs     int // default 1
	Seed      uint64
	// under emulation: Overwrite stops after any instruction, not only where a block of them ends
	SingleStep bool
	SlabChecks bool // have the kernel check its slabs as it goes (slub_debug=FZ)
	Reporting  bool // have the kernel report free pages, which QEMU then takes away
	// fit for Move: with disks that two hosts share, and no network card; snapshots cannot be taken
	Movable bool
	Cmdline string // more of the kernel's
}

func (c *Config) String() string {
	s := fmt.Sprintf("%d MiB, %d CPU", c.MemoryMiB, c.VCPUs)
	if c.SingleStep {
		s += ", single steps"
	}
	if c.SlabChecks {
		s += ", slab checks"
	}
	if c.Reporting {
		s += ", free page reporting"
	}
	if c.Movable {
		s += ", movable"
	}
	return s
}

// A Problem is something that must not happen to a guest whose memory is whole.
type Problem struct {
	At   time.Time
	Kind string // "bad", "death", "kernel" (its log), "silent", "stuck", "halt" or "gone"
	Text string
}

func (p Problem) String() string { return p.Kind + ": " + p.Text }

// A Guest is a running churn guest. Its methods must not be called concurrently.
type Guest struct {
	Config Config
	Hello  churnproto.Hello

	vm      *lab.VM
	files   string // what the names of its files begin with
	qmp     *qmp.Client
	events  *qmp.Subscription
	conn    net.Conn
	moves   chan net.Conn // takes the guest's port on each VM after the first
	reading sync.WaitGroup
	mem     *guestmem.Memory
	linux   *linux.Guest
	console console
	nextID  int

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced with every message
	hello    bool
	beat     churnproto.Beat
	beats    int
	beatAt   time.Time
	moved    []time.Time // when each worker's count last grew
	problems []Problem
	told     uint64 // problems that the guest has reported
	waiting  string // id of the command under way; what belongs to others is dropped
	reply    *churnproto.Reply
	tables   map[string][]byte
}

var runs atomic.Int64

// Boot starts a guest on host a of the lab and waits until its load has begun.
func Boot(ctx context.Context, l *lab.Lab, c Config) (*Guest, error) {
	g, err := boot(ctx, l, c)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		// Seen once in some hundred boots under emulation, before anything here looks at the
		// guest: an oops where the kernel patches its own code while another CPU runs it.
		g, err = boot(ctx, l, c)
	}
	return g, err
}

func boot(ctx context.Context, l *lab.Lab, c Config) (_ *Guest, err error) {
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 384
	}
	if c.VCPUs == 0 {
		c.VCPUs = 1
	}
	g := &Guest{Config: c, changed: make(chan struct{}), beatAt: time.Now()}
	defer func() {
		if err != nil {
			g.Close()
			err = fmt.Errorf("boot churn guest with kernel %s: %w", c.Kernel.Name, err)
		}
	}()
	g.files = filepath.Join(l.RunDir(), fmt.Sprintf("churn-%d-", runs.Add(1)))
	if err := writeDisks(ctx, g.files+"disk", g.files+"swap"); err != nil {
		return nil, err
	}
	// Debian's own checks are on by default, such as those of lists; time-outs would only
	// tell that this machine is busy.
	cmdline := fmt.Sprintf("churn.seed=%d nowatchdog rcupdate.rcu_cpu_stall_suppress=1", c.Seed)
	if c.SlabChecks {
		cmdline += " slub_debug=FZ"
	}
	port := g.files + "port"
	g.vm, err = l.A.Boot(ctx, lab.Spec{
		Kernel: c.Kernel, MemoryMiB: c.MemoryMiB, VCPUs: c.VCPUs,
		Init: "guestchurn", Cmdline: cmdline + " " + c.Cmdline, Extra: g.devices(port),
	})
	if err != nil {
		return nil, err
	}
	g.console.name = g.vm.Console
	if g.qmp, g.conn, err = connect(ctx, g.vm, port); err != nil {
		return nil, err
	}
	g.events = g.qmp.Subscribe(64)
	g.moves = make(chan net.Conn, 1)
	in := &ports{now: g.conn, next: g.moves}
	g.reading.Go(func() { g.follow(in) })
	if err := g.wait(ctx, 2*time.Minute, "the guest's load to begin",
		func() bool { return g.hello }); err != nil {
		return nil, err
	}
	if c.Movable {
		g.Hello.Lacks = slices.DeleteFunc(g.Hello.Lacks,
			func(what string) bool { return strings.HasPrefix(what, "network: ") })
	}
	g.console.read() // what it says while it boots is nobody's doing
	if g.mem, err = guestmem.Attach(ctx, g.qmp); err != nil {
		return nil, err
	}
	return g, nil
}

// devices are QEMU's arguments for what the guest has, its port at a socket of that name.
func (g *Guest) devices(port string) []string {
	c := &g.Config
	// What is not written to the files themselves, a twin would not see.
	snapshot := ",snapshot=on"
	if c.Movable {
		snapshot = ""
	}
	extra := []string{
		"-drive", "if=none,id=disk,format=raw,file=" + g.files + "disk" + snapshot, "-device",
		"virtio-blk-pci,drive=disk",
		"-drive", "if=none,id=swap,format=raw,file=" + g.files + "swap" + snapshot, "-device",
		"virtio-blk-pci,drive=swap",
		"-device", "virtio-serial-pci", "-chardev",
		"socket,id=churn,server=on,wait=off,path=" + port,
		"-device", "virtserialport,chardev=churn,name=" + churnproto.Port,
		// A guest that breaks stands still, rather than that it starts anew or ends.
		"-device", "pvpanic", "-action", "panic=pause,reboot=shutdown,shutdown=pause",
	}
	if !c.Movable { // the network's program, which echoes, cannot move
		extra = append(extra, "-netdev",
			"user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:7-cmd:cat", "-device",
			"virtio-net-pci,netdev=net")
	}
	if c.Reporting {
		extra = append(extra, "-device", "virtio-balloon-pci,free-page-reporting=on")
	}
	return extra
}

// connect connects to a VM's monitor and to the guest's port.
func connect(ctx context.Context, vm *lab.VM,
	port string) (client *qmp.Client, conn net.Conn, err error) {
	for client == nil { // QEMU makes its sockets one after the other
		// The other monitor, which serves one client at a time, is for who evicts the VM.
		if client, err = qmp.Dial(ctx, vm.LabQMP); err == nil {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-vm.Done():
			return nil, nil, fmt.Errorf("qemu has exited: %w", err)
		case <-ctx.Done():
			return nil, nil, err
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, nil, err
		}
	}
	if conn, err = net.Dial("unix", port); err != nil {
		client.Close()
		return nil, nil, err
	}
	return client, conn, nil
}

// Attach finds the guest's kernel, for Survey.
func (g *Guest) Attach(ctx context.Context) error {
	live, err := linux.NewLive(g.mem, g.qmp)
	if err != nil {
		return err
	}
	g.linux, err = linux.Attach(ctx, live)
	return err
}

// Survey surveys the guest, which must be stopped and attached. The result is good until
// the next survey.
func (g *Guest) Survey(ctx context.Context) (*linux.Result, error) { return g.linux.Survey(ctx) }

// writeDisks makes an empty ext4, and room to swap.
func writeDisks(ctx context.Context, disk, swap string) error {
	for _, name := range []string{disk, swap} {
		f, err := os.Create(name)
		if err != nil {
			return err
		}
		err = f.Truncate(256 << 20)
		if e := f.Close(); err == nil {
			err = e
		}
		if err != nil {
			return err
		}
	}
	out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-E",
		"lazy_itable_init=0,lazy_journal_init=0", disk).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	return nil
}

// Close ends the guest.
func (g *Guest) Close() error {
	if g.mem != nil {
		g.mem.Close()
	}
	if g.events != nil {
		g.events.Close()
	}
	if g.qmp != nil {
		g.qmp.Close()
	}
	if g.vm != nil {
		g.vm.Kill()
	}
	if g.conn != nil {
		g.conn.Close()
	}
	if g.moves != nil {
		close(g.moves)
		g.moves = nil
	}
	g.reading.Wait()
	return nil
}

// follow takes the guest's messages until they end.
func (g *Guest) follow(from io.Reader) {
	in := churnproto.NewReader(from)
	for {
		t, payload, err := in.Next()
		if err == nil {
			err = g.take(t, payload)
		}
		if err != nil {
			return
		}
	}
}

// maxProblems bounds what is kept of a guest that falls apart.
const maxProblems = 200

func (g *Guest) take(t churnproto.Type, payload []byte) (err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.changed)
	g.changed = make(chan struct{})
	now := time.Now()
	switch t {
	case churnproto.TypeHello:
		g.hello, g.beatAt = true, now
		err = json.Unmarshal(payload, &g.Hello)
		g.moved = make([]time.Time, len(g.Hello.Workers))
		for i := range g.moved {
			g.moved[i] = now
		}
	case churnproto.TypeBeat:
		before := g.beat.Ops
		g.beat = churnproto.Beat{}
		err = json.Unmarshal(payload, &g.beat)
		g.beats++
		g.beatAt = now
		if lost := g.beat.Told - min(g.beat.Told, g.told); lost > 0 {
			g.told = g.beat.Told
			g.problem(Problem{now, "bad",
				fmt.Sprintf("the guest has told of %d problems more than were heard of", lost)})
		}
		for i := range min(len(g.moved), len(g.beat.Ops)) {
			if i >= len(before) || before[i] != g.beat.Ops[i] {
				g.moved[i] = now
			}
		}
	case churnproto.TypeBad:
		g.told++
		var b churnproto.Bad
		err = json.Unmarshal(payload, &b)
		g.problem(Problem{now, "bad", g.worker(b.Worker) + b.String()})
	case churnproto.TypeDeath:
		g.told++
		var d churnproto.Death
		err = json.Unmarshal(payload, &d)
		g.problem(Problem{now, "death", g.worker(d.Worker) + d.Status + ": " + d.Said})
	case churnproto.TypeReply:
		var r churnproto.Reply
		err = json.Unmarshal(payload, &r)
		if r.ID == g.waiting {
			g.reply = &r
		}
	case churnproto.TypeTable:
		id, name, offset, data, err := churnproto.ParseTable(payload)
		if err != nil {
			return err
		}
		if id == g.waiting && offset == uint64(len(g.tables[name])) &&
			len(g.tables[name]) < 64<<20 {
			g.tables[name] = append(g.tables[name], data...)
		}
	}
	return err
}

func (g *Guest) worker(i int) string {
	if i < 0 || i >= len(g.Hello.Workers) {
		return ""
	}
	return "worker " + g.Hello.Workers[i] + ": "
}

func (g *Guest) problem(p Problem) {
	if len(g.problems) < maxProblems {
		g.problems = append(g.problems, p)
	}
}

// wait returns when ok does, which is called with mu held.
func (g *Guest) wait(ctx context.Context, most time.Duration, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	for {
		g.mu.Lock()
		done, changed := ok(), g.changed
		g.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-g.vm.Done():
			return fmt.Errorf("wait for %s: the VM has exited", what)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; the guest's console says last: %s", what, ctx.Err(),
				g.console.last())
		}
	}
}

// send gives the guest a command. finish takes its reply.
func (g *Guest) send(verb string) error {
	g.nextID++
	id := strconv.Itoa(g.nextID)
	g.mu.Lock()
	g.waiting, g.reply, g.tables = id, nil, map[string][]byte{}
	g.mu.Unlock()
	// The newline before it ends what a snapshot may have cut.
	g.conn.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, err := fmt.Fprintf(g.conn, "\n%s %s\n", id, verb)
	return err
}

func (g *Guest) finish(ctx context.Context,
	verb string) (*churnproto.Reply, map[string][]byte, error) {
	if err := g.wait(ctx, commandTime, "the guest to "+verb,
		func() bool { return g.reply != nil }); err != nil {
		return nil, nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.reply.Error != "" {
		return nil, nil, fmt.Errorf("the guest cannot %s: %s", verb, g.reply.Error)
	}
	return g.reply, g.tables, nil
}

// commandTime is how long a guest may take for a command on a busy machine.
const commandTime = 2 * time.Minute

// Command has the guest carry out a command of lab/cmd/guestchurn.
func (g *Guest) Command(ctx context.Context, verb string) (*churnproto.Reply, error) {
	if err := g.send(verb); err != nil {
		return nil, err
	}
	r, _, err := g.finish(ctx, verb)
	return r, err
}

// Stop stops the guest where it is.
func (g *Guest) Stop(ctx context.Context) error { return g.qmp.Stop(ctx) }

// stopAnywhere stops the guest after any instruction. Emulation stops only where a block of
// instructions ends; for the last few milliseconds these are made to have one each.
func (g *Guest) stopAnywhere(ctx context.Context, after time.Duration) error {
	command := "one-insn-per-tb"
	if !g.qmp.Version().AtLeast(8, 1) {
		command = "singlestep"
	}
	if err := g.hmp(ctx, command+" on"); err != nil {
		return err
	}
	time.Sleep(after)
	if err := g.Stop(ctx); err != nil {
		return err
	}
	return g.hmp(ctx, command+" off")
}

// Cont lets it run on.
func (g *Guest) Cont(ctx context.Context) error {
	g.mu.Lock()
	now := time.Now()
	g.beatAt = now // it could not while it stood
	g.mu.Unlock()
	return g.qmp.Cont(ctx)
}

// Problems returns what has gone wrong so far: what the guest has told, and what its
// kernel's log says.
func (g *Guest) Problems() []Problem {
	found := g.console.read()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, text := range found {
		g.problem(Problem{time.Now(), "kernel", text})
	}
	for len(g.events.C) > 0 {
		if e := <-g.events.C; e.Name == "SHUTDOWN" || e.Name == "RESET" {
			g.problem(Problem{time.Now(), "halt", "the guest has reset itself: " + string(e.Data)})
		}
	}
	select {
	case <-g.vm.Done():
		g.problem(Problem{time.Now(), "gone", "the VM has exited"})
	default:
	}
	return append([]Problem(nil), g.problems...)
}

// Silent adds a problem if a running guest has said nothing for so long. So it does if one of its
// workers has done nothing for ten times as long and two minutes.
func (g *Guest) Silent(most time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if d := time.Since(g.beatAt); d > most {
		g.problem(Problem{time.Now(), "silent",
			fmt.Sprintf("no message for %v", d.Round(time.Millisecond))})
		g.beatAt = time.Now()
	}
	for i, at := range g.moved {
		if d := time.Since(at); d > max(2*time.Minute, 10*most) {
			g.problem(Problem{time.Now(), "stuck",
				fmt.Sprintf("worker %s has done nothing for %v", g.Hello.Workers[i],
					d.Round(time.Second))})
			g.moved[i] = time.Now()
		}
	}
}

// answered reports whether the command under way is carried out; that it failed is a problem.
func (g *Guest) answered() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.reply != nil && g.reply.Error != "" {
		g.problem(Problem{time.Now(), "silent", "the guest cannot do as told: " + g.reply.Error})
	}
	return g.reply != nil
}

// forget drops all problems, as when the guest is set back to a time before them.
func (g *Guest) forget() {
	g.Problems() // takes what waits
	g.mu.Lock()
	defer g.mu.Unlock()
	g.problems = nil
	now := time.Now()
	g.beatAt = now
	for i := range g.moved {
		g.moved[i] = now
	}
}

// Beat returns what the guest has told last of its work.
func (g *Guest) Beat() churnproto.Beat {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.beat
}

// save makes a snapshot of the stopped guest, to which load sets it back.
func (g *Guest) save(ctx context.Context) error { return g.hmp(ctx, "savevm churn") }
func (g *Guest) load(ctx context.Context) error { return g.hmp(ctx, "loadvm churn") }

func (g *Guest) hmp(ctx context.Context, command string) error {
	out, err := g.qmp.HMP(ctx, command)
	if err == nil && out != "" {
		err = errors.New(out)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

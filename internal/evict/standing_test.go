package evict_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// A standingCase is a guest that comes to stand in a state, and goes on from there.
type standingCase struct {
	state string
	args  string
	code  func() []byte // of its option ROM
	stop  func(v *standingVM)
	goOn  func(v *standingVM, q *qmp.Client) // makes the guest go on; without it `cont` does
	newer bool                               // QEMU before 8.2 cannot move it
}

var standingCases = []standingCase{
	{state: "paused", code: counterROM,
		stop: func(v *standingVM) { v.counts("source"); v.does(v.source, "stop") }},
	{state: "prelaunch", code: counterROM, args: "-S"},
	{state: "guest-panicked", code: panicROM, args: "-device pvpanic -action panic=pause"},
	{state: "watchdog", code: watchdogROM, args: "-device ib700 -action watchdog=pause"},
	{state: "io-error", code: func() []byte { return make([]byte, 512) },
		args: "-device virtio-blk-pci,drive=d -drive " +
			"if=none,id=d,format=raw,file={full}/disk.raw,cache.direct=off"},
	{state: "suspended", code: suspendROM, newer: true, goOn: func(v *standingVM, q *qmp.Client) {
		v.does(q, "cont")
		v.is(q, "suspended")
		v.does(q, "system_wakeup")
	}},
}

// panicROM is counterROM, which panics first.
func panicROM() []byte {
	return before(
		0xba, 0x05, 0x05, // mov dx, 0x505: pvpanic
		0xb0, 0x01, // mov al, 1
		0xee, // out dx, al
	)
}

// watchdogROM is counterROM, whose watchdog runs out first.
func watchdogROM() []byte {
	return before(
		0xba, 0x43, 0x04, // mov dx, 0x443: ib700
		0xb0, 0x0f, // mov al, 15: after 0 s
		0xee, // out dx, al
	)
}

// suspendROM is a guest that suspends itself to memory. It writes a full stop each time it is woken
// up or starts.
func suspendROM() []byte {
	return before(
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xb0, '.', // mov al, '.'
		0xee,             // out dx, al
		0xba, 0x04, 0x06, // mov dx, 0x604: PM1a_CNT of a pc
		0xb8, 0x00, 0x24, // mov ax, 0x2400: S3, sleep
		0xef, // out dx, ax
		0xf4, // hlt
	)
}

// before is counterROM with code ahead of it.
func before(code ...byte) []byte {
	rom := make([]byte, 512)
	n := copy(rom, []byte{0x55, 0xaa, 1})
	n += copy(rom[n:], code)
	copy(rom[n:], counterROM()[3:100])
	for _, b := range rom[:511] {
		rom[511] -= b
	}
	return rom
}

// writingSector is a boot sector that writes itself to sector 32 of its disk, and then counts like
// counterROM.
func writingSector() []byte {
	s := make([]byte, 512)
	n := copy(s, []byte{
		// segments 0, stack at 0x7c00
		0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb,
		0xb8, 0x01, 0x03, // mov ax, 0x0301: write a sector
		0xb9, 0x21, 0x00, // mov cx, 33: sector 32, counted from 1
		0xba, 0x80, 0x00, // mov dx, 0x80: the first disk
		0xbb, 0x00, 0x7c, // mov bx, 0x7c00
		0xcd, 0x13, // int 0x13
		0x73, 0x01, // jnc on
		0xf4, // hlt: it failed
	})
	copy(s[n:], counterROM()[3:100])
	s[510], s[511] = 0x55, 0xaa
	return s
}

// standingVM is a VM of a standingCase, and its twin.
type standingVM struct {
	*testing.T
	dir          string
	source, twin *qmp.Client
	full         string // a full file system
	armed        func() // called when the destination gets ready
}

func (v *standingVM) monitor(side string) string { return filepath.Join(v.dir, side+".qmp") }

func (v *standingVM) start(q lab.QEMU, side string, args ...string) *qmp.Client {
	c, err := startProgram(v.T, q.Path, v.monitor(side),
		append([]string{"-machine", "pc", "-accel", "tcg", "-m", "64", "-option-rom",
			filepath.Join(v.dir, "rom"),
			"-serial", "file:" + filepath.Join(v.dir, side+".out"), "-qmp",
			"unix:" + v.monitor(side+"-lab") + ",server=on,wait=off"}, args...)...)
	if err != nil {
		v.Fatal(err)
	}
	c.Close()
	if c, err = qmp.Dial(v.Context(), v.monitor(side+"-lab")); err != nil {
		v.Fatal(err)
	}
	v.Cleanup(func() { c.Close() })
	return c
}

func (v *standingVM) does(q *qmp.Client, command string) {
	v.Helper()
	if err := q.Run(v.Context(), command, nil, nil); err != nil {
		v.Fatalf("%s: %v", command, err)
	}
}

// is waits until a VM is in a state.
func (v *standingVM) is(q *qmp.Client, want string) {
	v.Helper()
	var s qmp.Status
	var err error
	for range 600 {
		if s, err = q.QueryStatus(v.Context()); err != nil || s.Status == want {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil || s.Status != want {
		v.Fatalf("the VM is %q, %v; want %q", s.Status, err, want)
	}
}

func (v *standingVM) dots(side string) int {
	v.Helper()
	b, err := os.ReadFile(filepath.Join(v.dir, side+".out"))
	if err != nil {
		v.Fatal(err)
	}
	if bytes.ContainsRune(b, '!') {
		v.Fatalf("the guest's memory and CPU disagree: %s", b)
	}
	return bytes.Count(b, []byte("."))
}

// counts waits until the guest has gone on.
func (v *standingVM) counts(side string) {
	v.Helper()
	before := v.dots(side)
	for range 600 {
		if v.dots(side) > before {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	v.Fatalf("the guest does not go on at the %s", side)
}

// fill makes a full file system that holds only a disk with the boot sector.
func (v *standingVM) fill() {
	v.full = filepath.Join(v.dir, "full")
	if err := os.Mkdir(v.full, 0o700); err != nil {
		v.Fatal(err)
	}
	labtest.Need(v.T, unix.Mount("tmpfs", v.full, "tmpfs", 0, "size=64k"))
	v.Cleanup(func() {
		if err := unix.Unmount(v.full, unix.MNT_DETACH); err != nil {
			v.Error(err)
		}
	})
	disk := filepath.Join(v.full, "disk.raw")
	if err := errors.Join(os.WriteFile(disk, writingSector(), 0o600),
		os.Truncate(disk, 1<<20)); err != nil {
		v.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(v.full, "filler"), make([]byte, 128<<10),
		0o600); !errors.Is(err, unix.ENOSPC) {
		v.Fatal(err)
	}
}

func (c standingCase) begin(t *testing.T, q lab.QEMU) *standingVM {
	dir, err := os.MkdirTemp("", "vacate-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	v := &standingVM{T: t, dir: dir}
	if err := os.WriteFile(filepath.Join(v.dir, "rom"), c.code(), 0o600); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(c.args, "{full}") {
		v.fill()
	}
	args := strings.Fields(strings.ReplaceAll(c.args, "{full}", v.full))
	v.source = v.start(q, "source", args...)
	if c.stop != nil {
		c.stop(v)
	}
	v.is(v.source, c.state)
	if !slices.Contains(args, "-S") {
		args = append(args, "-S")
	}
	v.twin = v.start(q, "twin", append(args, "-incoming", "defer")...)
	return v
}

// lateAbort is a source's journal that aborts the eviction as late as it can: the source knows that
// the twin is loaded, and notes the mark without which it may not commit.
type lateAbort struct {
	evict.Journal
	prepared <-chan struct{}
	abort    func()
}

func (j lateAbort) Note(m evict.Mark, reason string) error {
	if m == evict.MarkMayRun {
		select {
		case <-j.prepared:
		case <-time.After(30 * time.Second): // the VM then moves, and the test fails
			return nil
		}
		time.Sleep(20 * time.Millisecond) // the source hears it
		j.abort()
	}
	return j.Journal.Note(m, reason)
}

// evict moves the VM. Without commit, it aborts when the twin is loaded.
func (v *standingVM) evict(commit bool) (evict.Report, error, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		v.Fatal(err)
	}
	defer ln.Close()
	evicting, abort := context.WithCancel(labtest.Within(v.T, time.Minute))
	defer abort()
	receiving, stop := context.WithCancelCause(labtest.Within(v.T, time.Minute))
	defer stop(nil)
	source := evict.Source{QMP: v.monitor("source"),
		Connect: link.Dialer{Addr: ln.Addr().String()}.Session}
	prepared := make(chan struct{})
	said := sync.OnceFunc(func() { close(prepared) })
	destination := evict.Destination{QMP: v.monitor("twin"), Show: func(p evict.Progress) {
		if p.State == evict.Prepared {
			said()
		}
	}}
	if !commit {
		source.Journal = lateAbort{Journal: emptyJournal{}, prepared: prepared, abort: abort}
	}
	if v.armed != nil {
		destination.Show = func(p evict.Progress) {
			if p.State == evict.Arming {
				v.armed()
			}
		}
	}
	received := make(chan error, 1)
	go func() { received <- receiveOn(receiving, destination, ln) }()
	report, err := source.Evict(evicting)
	if err != nil {
		stop(errors.New("the source gave up"))
	}
	return report, err, <-received
}

// A VM that stands, in whatever state, moves and does not run: its operator decides that at the
// destination. If the eviction fails, the VM stands as before, and can move again.
func TestStanding(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	for name, find := range map[string]func(context.Context) (lab.QEMU, error){
		"stock": lab.StockQEMU, "debian 12": cached(t, lab.Backports12QEMU),
		"newest": cached(t, lab.BackportsQEMU),
	} {
		q, err := find(labtest.Within(t, 5*time.Minute))
		labtest.Need(t, err)
		for _, c := range standingCases {
			t.Run(name+" "+c.state, func(t *testing.T) { c.try(t, q) })
		}
	}
}

func (c standingCase) try(t *testing.T, q lab.QEMU) {
	v := c.begin(t, q)
	if c.newer && strings.HasPrefix(q.Version, "7.") {
		_, err, _ := v.evict(true)
		refused(t, err, "is suspended, and QEMU 7.2 forgets", "system_wakeup")
		v.is(v.source, c.state)
		return
	}
	// It stays what it was, even if the eviction is aborted once the VM is frozen.
	for range 2 {
		report, err, _ := v.evict(false)
		if !errors.Is(err, evict.ErrAborted) ||
			!strings.Contains(err.Error(), "unharmed, as it did before") {
			t.Fatalf("given up: %v", err)
		}
		if report.Stood != c.state || report.Down != nil {
			t.Errorf("given up: it stood %q, down time %v", report.Stood, report.Down)
		}
		v.is(v.source, c.state)
		v.twin = c.again(v, q)
	}
	there := v.dots("source")
	report, err, destErr := v.evict(true)
	if err != nil || destErr != nil {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if report.Stood != c.state || report.Down != nil || report.Transfer == nil {
		t.Errorf("it stood %q, down time %v, transfer %v", report.Stood, report.Down,
			report.Transfer)
	}
	if n := v.dots("source"); n != there || v.dots("twin") != 0 {
		t.Errorf("the guest ran: it wrote %d and %d full stops", n-there, v.dots("twin"))
	}
	v.is(v.twin, "paused")
	if c.goOn != nil {
		c.goOn(v, v.twin)
		v.counts("twin")
		return
	}
	if v.full != "" {
		if err := os.Remove(filepath.Join(v.full, "filler")); err != nil {
			t.Fatal(err)
		}
	}
	v.does(v.twin, "cont")
	v.counts("twin")
	v.counts("twin")
	if v.full != "" {
		b, err := os.ReadFile(filepath.Join(v.full, "disk.raw"))
		if err != nil || !bytes.Equal(b[32*512:33*512], writingSector()) {
			t.Errorf("the request that failed was not tried again: %v, %x", err,
				b[32*512:32*512+16])
		}
	}
}

// again starts the twin again.
func (c standingCase) again(v *standingVM, q lab.QEMU) *qmp.Client {
	args := strings.Fields(strings.ReplaceAll(c.args, "{full}", v.full))
	if !slices.Contains(args, "-S") {
		args = append(args, "-S")
	}
	return v.start(q, "twin", append(args, "-incoming", "defer")...)
}

// An operator pauses a VM that is about to be evicted: it moves, and does not run.
func TestPausedWhilePreparing(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	q, err := lab.StockQEMU(t.Context())
	labtest.Need(t, err)
	v := standingCase{state: "running", code: counterROM}.begin(t, q)
	v.counts("source")
	there := 0
	v.armed = sync.OnceFunc(func() {
		v.does(v.source, "stop")
		there = v.dots("source")
	})
	report, err, destErr := v.evict(true)
	if err != nil || destErr != nil {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if report.Stood != "paused" || report.Down != nil {
		t.Errorf("it stood %q, down time %v", report.Stood, report.Down)
	}
	v.is(v.twin, "paused")
	if n := v.dots("source"); n != there || v.dots("twin") != 0 {
		t.Errorf("the guest ran: it wrote %d and %d full stops", n-there, v.dots("twin"))
	}
	v.does(v.twin, "cont")
	v.counts("twin")
}

// An operator runs a VM that came standing while its memory is still arriving. It fetches what it
// touches, and all of its memory is as it was.
func TestStandingGoesOn(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{Devices: lab.Full,
		Load: lab.Load{HotMiB: 40, IdleMiB: 70, CacheMiB: 10}})
	twin := incoming(t, l, vm)
	if err := vm.Execute(labtest.Within(t, 20*time.Second), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	ln := listen(t, l.B)
	rate := new(evict.Limit)
	rate.Set(20 << 20)
	ctx := labtest.Within(t, 2*time.Minute)
	received := make(chan error, 1)
	go func() { received <- receiveOn(ctx, evict.Destination{QMP: twin.QMP}, ln) }()
	pushing := make(chan struct{})
	begun := sync.OnceFunc(func() { close(pushing) })
	ended := make(chan error, 1)
	var report evict.Report
	go func() {
		var err error
		report, err = evict.Source{QMP: vm.QMP, Connect: connectTo(l.A, ln.Addr().String()),
			Limit: rate, Show: func(p evict.Progress) {
				if p.State == evict.Pushing && p.Stands == "paused" {
					begun()
				}
			}}.Evict(ctx)
		ended <- err
	}()
	select {
	case <-pushing:
	case err := <-ended:
		t.Fatal(err)
	}
	if s, err := twin.Status(ctx); err != nil || s != "paused" {
		t.Errorf("the twin is %q, %v", s, err)
	}
	if err := twin.Execute(ctx, "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := twin.Guest.WaitOps(labtest.Within(t, time.Minute), 1000); err != nil {
		t.Error(err)
	}
	if err, destErr := <-ended, <-received; err != nil || destErr != nil {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if report.Stood != "paused" || report.Pages.Fetched == 0 {
		t.Errorf("it stood %q, and fetched %d pages", report.Stood, report.Pages.Fetched)
	}
	if s, err := twin.Status(ctx); err != nil || s != "running" {
		t.Errorf("in the end the twin is %q, %v", s, err)
	}
	labtest.MustCheck(t, twin)
}

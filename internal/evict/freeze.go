package evict

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// A freezer freezes a VM at the source. docs/decisions/0001-freezing-the-source.md says why in this
// way.
//
//	while the guest runs   newFreezer   QEMU gets a file to save to
//	                       freeze       `stop`, then `xen-save-devices-state` with live set,
//	                                    which is not tied to Xen: QEMU saves all devices,
//	                                    inactivates the disks and gives up their locks.
//	                                    `cont` undoes it
//	while the twin loads   hold         SIGSTOP for QEMU's process: no command can run the guest
//
// freeze wraps what QEMU saved as post-copy does, behind a head like the one that QEMU would have
// made.
type freezer struct {
	q      *qmp.Client
	mem    *guestmem.Memory
	file   *os.File // the file that QEMU saves to; nil if QEMU makes it
	fdset  int      // QEMU's number for it
	name   string   // QEMU's name for it
	late   bool     // an event may come after the reply to a later command
	events events   // from the start of the freeze on

	// What a manager's monitor does differently; nil for QEMU's own.
	subscribe func(context.Context) (events, error)
	drain     func(context.Context, process.Process) error
	open      func() (r io.ReaderAt, size int64, err error) // opens what QEMU saved
	// events about the guest since the freeze began
	said   []string
	frozen int // how many of them the freeze caused
}

// saved is a VM that was frozen.
type saved struct {
	// what the VM did before it was frozen, and must do again wherever it goes on
	was  qmp.Status
	at   time.Time // when the guest stopped; zero if QEMU did not say
	load []byte    // what the destination's QEMU needs to load the devices
}

// ramSection is the number of the RAM section in the stream. No device has it.
const ramSection = 0x7ffffff0

// switchTimeout is how long QEMU may take to freeze the guest and save its devices.
const switchTimeout = 20 * time.Second

// makeHead makes the start of the stream, from its header to the footer of the RAM section's start.
// It is like that of a QEMU that begins a migration with post-copy.
func makeHead(machine string, section uint32, blocks []guestmem.Block) ([]byte, layout, error) {
	sizes := uint64(0)
	list := make([]migstream.Block, len(blocks))
	for i, b := range blocks {
		sizes |= b.PageSize
		list[i] = migstream.Block{Name: b.Name, Length: b.Size, PageSize: b.PageSize}
	}
	l, err := newLayout(list)
	if err != nil {
		return nil, nil, err
	}
	var head []byte
	for _, item := range []migstream.Item{
		migstream.Header{}, migstream.Configuration{Machine: machine},
		migstream.Command{ID: migstream.CmdOpenReturnPath}, migstream.PingCommand(1),
		migstream.AdviseCommand(sizes),
		migstream.SectionStart{ID: section, Name: "ram", Version: migstream.RAMVersion},
		migstream.MemSize{Blocks: list}, migstream.EOS{}, migstream.Footer{ID: section},
	} {
		head = item.Append(head)
	}
	if len(head) > maxHead {
		return nil, nil,
			fmt.Errorf("the VM has so many RAM blocks that their list is longer than %d bytes",
				maxHead)
	}
	return head, l, nil
}

// newFreezer gets ready to freeze a VM. The VM does not notice.
func newFreezer(ctx context.Context, q *qmp.Client, mem *guestmem.Memory) (_ *freezer, err error) {
	f := &freezer{q: q, mem: mem}
	fd, err := unix.MemfdCreate("vacate", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file for QEMU to save to: %w", err)
	}
	f.file = os.NewFile(uintptr(fd), "the saved devices")
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	// QEMU picks the descriptor of the set with exactly the access that it wants.
	writable, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("make a file for QEMU to save to: %w", err)
	}
	defer writable.Close()
	var added struct {
		Set int `json:"fdset-id"`
	}
	if err := q.RunFD(ctx, "add-fd", map[string]any{"opaque": "vacate"}, &added,
		int(writable.Fd())); err != nil {
		return nil, fmt.Errorf("hand QEMU a file: %w", err)
	}
	f.fdset, f.name = added.Set, fmt.Sprintf("/dev/fdset/%d", added.Set)
	return f, nil
}

// canSave makes sure that QEMU has the command that saves the devices. That command leaves out
// devices that send their state in steps, such as VFIO's: package fit finds them.
func canSave(ctx context.Context, q *qmp.Client) error {
	// without a file QEMU refuses it in any case
	err := q.Run(ctx, "xen-save-devices-state", nil, nil)
	if errors.Is(err, qmp.ErrCommandNotFound) {
		return fmt.Errorf("QEMU %v cannot save a VM's devices without Xen: use a build with the "+
			"command xen-save-devices-state, as 7.2 to 11.1 have it", q.Version())
	}
	if !isRefusal(err) {
		return errors.Join(errors.New("QEMU took a command that lacks its arguments"), err)
	}
	return nil
}

// errMoved is wrapped by the errors of a VM whose QEMU got commands from somebody else while it was
// being frozen.
var errMoved = errors.New("somebody else gave the VM's QEMU commands while it was being frozen")

// freeze freezes the guest and makes QEMU save its devices. ran says that the VM may be running:
// freeze then pauses it. Without ran, the VM stood when it was checked. If such a VM runs by now,
// freeze leaves it alone and returns errRuns. After any other error the caller must return the VM
// to the state saved.was.
func (f *freezer) freeze(ctx context.Context, ran bool) (s saved, err error) {
	if f.events != nil {
		f.events.Close()
	}
	f.said = nil
	if f.events, err = subscribe(ctx, f.q, f.subscribe); err != nil {
		return s, err
	}
	frozen := ""
	if s.was, frozen, err = f.pause(ctx, ran); err != nil {
		return s, err
	}
	now, blocks, err := f.save(ctx)
	if err != nil {
		return s, err
	}
	switch {
	case now.Status == frozen:
	case s.was.Running && fit.Standing(now.Status) && now.Status != "suspended":
		s.was = now // it stopped by itself before it could be paused, as when a disk failed
	default:
		return s, fmt.Errorf("%w: its state is %q", errMoved, now.Status)
	}
	if err := f.unchanged(blocks); err != nil {
		return s, err
	}
	s.at = f.listen()
	for until := time.Now().Add(eventTime); f.late && s.was.Running && s.at.IsZero() &&
		time.Now().Before(until); s.at = f.listen() {
		time.Sleep(pollInterval)
	}
	// A VM that stood said so before, or just as this began.
	f.frozen = len(f.said)
	if f.frozen > 1 || f.frozen == 1 && f.said[0] != "STOP" || f.frozen == 0 && s.was.Running {
		return s, fmt.Errorf("%w: %s", errMoved, strings.Join(f.said, ", "))
	}
	s.load, err = f.read()
	return s, err
}

// pause pauses a VM that runs, and leaves one alone that stood. It returns the state before that,
// and the state in which the VM stands now.
func (f *freezer) pause(ctx context.Context, ran bool) (was qmp.Status, frozen string, err error) {
	// QEMU handles these commands in a row, in less than a millisecond. If somebody else pauses the
	// VM between the first and the last, we take that pause for ours.
	status, migrate := f.q.Begin(ctx, "query-status", nil), f.q.Begin(ctx, "query-migrate", nil)
	var stop *qmp.Pending
	if ran {
		stop = f.q.Begin(ctx, "stop", nil)
	}
	err = status.Reply(ctx, &was)
	var m qmp.Migration
	err = errors.Join(err, migrate.Reply(ctx, &m))
	if ran {
		err = errors.Join(err, stop.Reply(ctx, nil))
	}
	if err != nil {
		return was, "", err
	}
	frozen = "paused"
	switch {
	case was.Running && !ran:
		return was, "", errRuns
	case was.Running:
	case !fit.Standing(was.Status):
		return was, "", fmt.Errorf("%w, its state is %q", errStood, was.Status)
	case was.Status == "suspended":
		// The save command would leave it in the state save-vm. After `stop` QEMU remembers that it
		// is suspended.
		if err := f.q.Run(ctx, "stop", nil, nil); err != nil {
			return was, "", err
		}
	default:
		frozen = was.Status
	}
	return was, frozen, mayLeave(m)
}

// save makes QEMU save the devices of a VM that stands. It returns the state that the VM is in
// then, and QEMU's list of its RAM blocks. It makes sure that no job works on the disks.
func (f *freezer) save(ctx context.Context) (now qmp.Status, blocks string, err error) {
	save := f.q.Begin(ctx, "xen-save-devices-state",
		map[string]any{"filename": f.name, "live": true})
	after := f.q.Begin(ctx, "query-status", nil)
	jobs := f.q.Begin(ctx, "query-jobs", nil)
	list := f.q.Begin(ctx, "human-monitor-command",
		map[string]any{"command-line": "info ramblock"})
	var running []job
	saveErr := save.Reply(ctx, nil)
	if err := errors.Join(after.Reply(ctx, &now), jobs.Reply(ctx, &running),
		list.Reply(ctx, &blocks)); err != nil {
		return now, "", errors.Join(saveErr, err)
	}
	if err := unfinished(running); err != nil {
		return now, "", errors.Join(saveErr, err)
	}
	return now, blocks, saveErr
}

// errStood is wrapped by the error for a VM that stopped by itself, in a state in which it cannot
// be moved.
var errStood = errors.New("the VM stopped before it could be frozen")

// errRuns is the error for a VM that stood, and that somebody has run since.
var errRuns = errors.New("somebody told QEMU to run the VM")

// job holds the fields of QEMU's JobInfo that name a job.
type job struct {
	ID     string `json:"id"`
	Type   string `json:"type"`
	Status string `json:"status"`
}

// unfinished returns an error that names the jobs that are not over.
func unfinished(jobs []job) error {
	var names []string
	for _, j := range jobs {
		if j.Status != "concluded" && j.Status != "null" {
			names = append(names, fmt.Sprintf("%s (%s, %s)", j.ID, j.Type, j.Status))
		}
	}
	if names == nil {
		return nil
	}
	return fmt.Errorf("QEMU works on the VM's disks: the job %s is not finished: wait for its "+
		"end, or end it with block-job-cancel", strings.Join(names, ", and "))
}

// unchanged makes sure that the RAM blocks are those of the head.
func (f *freezer) unchanged(text string) error {
	blocks, err := guestmem.ParseBlocks(strings.ReplaceAll(text, "\r\n", "\n"))
	if err != nil {
		return err
	}
	same := slices.EqualFunc(blocks, f.mem.Blocks(), func(a, b guestmem.Block) bool {
		return a.Name == b.Name && a.Size == b.Size && a.PageSize == b.PageSize
	})
	if !same {
		return errors.New("the VM's memory is not what it was a moment ago: a device was " +
			"plugged or unplugged, or the firmware's tables grew: try again")
	}
	return nil
}

// listen notes the events that have come. It returns when the guest first stopped.
func (f *freezer) listen() (stopped time.Time) {
	for {
		name, at, ok := f.events.next()
		if !ok {
			return stopped
		}
		switch name {
		case "STOP":
			if stopped.IsZero() {
				stopped = at
			}
			fallthrough
		case "RESUME", "WAKEUP", "RESET", "SHUTDOWN":
			f.said = append(f.said, name)
		}
	}
}

// eventTime is how long to wait for an event that comes late.
const eventTime = 2 * time.Second

// events are QEMU's events about its guest, in order.
type events interface {
	next() (name string, at time.Time, ok bool) // ok is false if no event has come
	Dropped() uint64
	Close()
}

type qmpEvents struct{ *qmp.Subscription }

func (s qmpEvents) next() (name string, at time.Time, ok bool) {
	select {
	case ev, ok := <-s.C:
		return ev.Name, ev.Time, ok
	default:
		return "", at, false
	}
}

// subscribe begins to follow QEMU's events: in the given way, or in QEMU's own if there is none.
func subscribe(ctx context.Context, q *qmp.Client,
	other func(context.Context) (events, error)) (events, error) {
	if other != nil {
		return other(ctx)
	}
	return qmpEvents{q.Subscribe(256)}, nil
}

// drain waits until all events that a stopped QEMU sent have come.
func drain(ctx context.Context, q *qmp.Client, other func(context.Context, process.Process) error,
	qemu process.Process) error {
	if other != nil {
		return other(ctx, qemu)
	}
	return q.Drain(ctx)
}

// resumed reports whether somebody else has run the guest since the freeze began. What the guest
// does now is then up to them.
func (f *freezer) resumed() bool {
	if f.events == nil {
		return false
	}
	f.listen()
	return slices.Contains(f.said, "RESUME")
}

// read reads what QEMU saved, and makes the device state of it, as post-copy wraps it.
func (f *freezer) read() ([]byte, error) {
	open := f.open
	if open == nil {
		open = func() (io.ReaderAt, int64, error) {
			info, err := f.file.Stat()
			if err != nil {
				return nil, 0, err
			}
			return f.file, info.Size(), nil
		}
	}
	r, size, err := open()
	if err != nil {
		return nil, fmt.Errorf("read what QEMU saved: %w", err)
	}
	if size > migstream.MaxPackage {
		return nil, fmt.Errorf("QEMU's state of the devices has %d bytes; %d are supported",
			size, migstream.MaxPackage)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, size), b); err != nil {
		return nil, fmt.Errorf("read what QEMU saved: %w", err)
	}
	p, err := migstream.Package(b, pingLoaded)
	if err != nil {
		return nil, fmt.Errorf("what QEMU saved of the devices: %w", err)
	}
	return p.Append(nil), nil
}

// hold stops the process of a QEMU whose guest is frozen, and makes sure that the guest did not run
// before. QEMU announces that it runs the guest before it does. So if it announced nothing before
// it was stopped, the guest did not run.
func (f *freezer) hold(ctx context.Context, qemu process.Process) error {
	if err := qemu.Stop(ctx); err != nil {
		return err
	}
	if err := drain(ctx, f.q, f.drain, qemu); err != nil {
		return err
	}
	f.listen()
	switch {
	case f.events.Dropped() > 0:
		return errors.New("QEMU sent too many events while the VM was being frozen")
	case len(f.said) != f.frozen:
		return fmt.Errorf("%w: %s", errMoved, strings.Join(f.said, ", "))
	}
	return nil
}

// forget makes QEMU close the file.
func (f *freezer) forget(ctx context.Context) error {
	if f.file == nil {
		return nil
	}
	return f.q.Run(ctx, "remove-fd", map[string]any{"fdset-id": f.fdset}, nil)
}

func (f *freezer) close() {
	if f.file != nil {
		f.file.Close()
	}
	if f.events != nil {
		f.events.Close()
	}
}

// hostFacts are what a source must know of the QEMU that holds a frozen VM: a stopped QEMU cannot
// answer.
type hostFacts struct {
	Process process.Process `json:"process"`
	// the VM ran before the freeze, and runs again after a roll-back
	Ran bool `json:"ran"`
	// if it did not run: QEMU's word for its state
	Stood     string             `json:"stood,omitempty"`
	Blocks    []guestmem.Block   `json:"blocks"`
	Mappings  []guestmem.Mapping `json:"mappings"`
	Registers registers          `json:"registers,omitempty"` // of the frozen guest's vCPUs
	Machine   string             `json:"machine"`
	QEMU      string             `json:"qemu"`
}

// registers is the output of QEMU's human monitor for the registers of a guest that is now frozen.
type registers string

// HMP answers as that monitor did.
func (r registers) HMP(_ context.Context, line string) (string, error) {
	if line != registersCommand || r == "" {
		return "", errors.New("the frozen VM's QEMU cannot be asked")
	}
	return string(r), nil
}

const registersCommand = "info registers -a"

func parseFacts(b []byte) (f hostFacts, err error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return f, fmt.Errorf("read from the journal what describes the frozen VM: %w", err)
	}
	return f, nil
}

package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"vacate/internal/evict/pushorder"
	"vacate/internal/qemu/qmp"
	"vacate/lab"
	"vacate/lab/libvirtlab"
)

// A strategy is a way to move a VM. prepare runs before the clock starts; move
// returns when the source holds nothing any more, which it notes in trial.end.
type strategy struct {
	name    string
	paused  bool // the twin starts with -S
	prepare func(*trial, context.Context) error
	move    mover
}

type mover func(*trial, context.Context) error

var strategies = []strategy{
	// The first, which variants are made of.
	{name: "vacate", paused: true, prepare: (*trial).receive, move: evict()},
	{name: "qemu-postcopy", prepare: qemu("postcopy-ram"), move: (*trial).postcopy},
	{name: "qemu-postcopy-preempt", prepare: qemu("postcopy-ram", "postcopy-preempt"),
		move: (*trial).postcopy},
	{name: "qemu-precopy", prepare: qemu(), move: (*trial).precopy},
	{name: "qemu-precopy-multifd", prepare: qemu("multifd"), move: (*trial).precopy},
	{name: "qemu-precopy-autoconverge", prepare: qemu("auto-converge"), move: (*trial).precopy},
	{name: "stop-and-copy", prepare: qemu(), move: (*trial).stopAndCopy},
}

// variant makes a strategy of vacate with other options, by a name like
// "vacate:address+near:off:all": an order of the push, where the guest's pages are learnt of
// (a value of --enlighten), and "all" for moving free pages, too; each may be left out.
func variant(name string, of strategy, move func(flags ...string) mover) (strategy, error) {
	var flags []string
	for part := range strings.SplitSeq(strings.TrimPrefix(name, "vacate:"), ":") {
		switch part {
		case "all":
			flags = append(flags, "--send-free")
		case "auto", "host", "agent", "off":
			flags = append(flags, "--enlighten", part)
		default:
			if _, err := pushorder.ParsePolicy(part); err != nil {
				return strategy{}, fmt.Errorf("strategy %q: %w", name, err)
			}
			flags = append(flags, "--order", part)
		}
	}
	of.name, of.move = name, move(flags...)
	return of, nil
}

// Strategies are the names of all strategies.
func Strategies() []string { return namesOf(strategies) }

func namesOf(list []strategy) []string {
	names := make([]string, len(list))
	for i, s := range list {
		names[i] = s.name
	}
	return names
}

// Alike reports whether all strategies leave a guest alike, so that all can move it in turn. Then
// all are this project's engine, and move free pages, or none does.
func Alike(names []string) bool {
	var free []bool
	for _, name := range names {
		parts := strings.Split(name, ":")
		if parts[0] != strategies[0].name {
			return false
		}
		free = append(free, slices.ContainsFunc(parts,
			func(p string) bool { return p == "all" || p == "off" || p == "agent" }))
	}
	return len(slices.Compact(free)) <= 1
}

// trial is one run under way.
type trial struct {
	*bench
	run      *Run
	vm, twin *lab.VM
	release  func() // the memory that is kept at hand for the twin; nil if there is none
	keep     bool   // the guest will be evicted once more
	src, dst *monitor
	start    time.Time
	end      time.Time
	receiver *exec.Cmd          // nil before and after it runs
	used     float64            // seconds of CPU, by the source's engine
	received *bytes.Buffer      // what it wrote on standard error; read it after its end
	domain   *libvirtlab.Domain // nil: no libvirt has the VM
	tasks    sync.WaitGroup
}

const (
	enginePort = 7601
	qemuPort   = 4444
	// How long "vacate receive" may take until it listens.
	listenLimit = 20 * time.Second
	// In bytes per second. More than any link here has: only the link shall limit migrations.
	unlimited = 1 << 40
)

// errUnsupported is wrapped by prepare's error where the QEMU lacks what the
// strategy needs.
var errUnsupported = errors.New("not supported")

// receive starts the engine at the destination and waits until it listens.
func (t *trial) receive(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, t.opts.Vacate, "receive", "--qmp", t.twin.QMP, "--listen",
		t.engineAddr())
	t.received = new(bytes.Buffer)
	cmd.Stderr = t.received
	t.profile(cmd, "receive")
	if err := t.twin.Host.Start(cmd); err != nil {
		return err
	}
	t.receiver = cmd
	ctx, cancel := context.WithTimeout(ctx, listenLimit)
	defer cancel()
	listening := fmt.Sprintf(":%04X 00000000:0000 0A ", enginePort) // 0A: TCP_LISTEN, see proc(5)
	for {
		sockets, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", t.receiver.Process.Pid))
		if err == nil && bytes.Contains(sockets, []byte(listening)) {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			cmd.Process.Kill()
			return fmt.Errorf("vacate receive does not listen: %w: %w", context.Cause(ctx),
				t.endReceiver())
		}
	}
}

func (t *trial) engineAddr() string { return fmt.Sprintf("%s:%d", t.twin.Host.Addr, enginePort) }

// profile has an engine write a CPU profile.
func (t *trial) profile(cmd *exec.Cmd, side string) {
	cmd.Env = os.Environ()
	if t.opts.Profile != "" {
		name := fmt.Sprintf("%s-%d.pprof", side, t.run.Rep)
		cmd.Env = append(cmd.Env, "VACATE_CPUPROFILE="+filepath.Join(t.opts.Profile, name))
	}
}

// engineReport is what is taken from the engine's report, of evict.Report.
type engineReport struct {
	Outcome string `json:"outcome"`
	Reason  string `json:"reason"`
	Begun   *time.Time
	Pages   struct {
		Early, Pushed, Near, Fetched, Zero, Skipped, Unused, Duplicate uint64
	} `json:"pages"`
	Fetch *Quantiles `json:"fetch_latency_s"`
}

// evict moves the VM by this project's engine, with more flags if need be.
func evict(flags ...string) mover {
	return func(t *trial, ctx context.Context) error { return t.evict(ctx, flags) }
}

func (t *trial) evict(ctx context.Context, flags []string) error {
	cmd := exec.CommandContext(ctx, t.opts.Vacate,
		append([]string{"evict", "--qmp", t.vm.QMP, "--to", t.engineAddr(), "--json"}, flags...)...)
	t.profile(cmd, "evict")
	if err := t.runEngine(ctx, cmd); err != nil {
		return fmt.Errorf("%w; %w", err, t.endReceiver())
	}
	return t.waitReceiver()
}

// cpuTime returns how many seconds of CPU a process that has ended used.
func cpuTime(cmd *exec.Cmd) float64 {
	return (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
}

// exit returns a channel that gets the time at which the source's QEMU ends.
func (t *trial) exit() <-chan time.Time {
	gone := make(chan time.Time, 1)
	t.tasks.Go(func() {
		<-t.vm.Done() // at the latest when the trial is closed
		gone <- time.Now()
	})
	return gone
}

// noteExit waits for the end of the source's QEMU, which is that of the move.
func (t *trial) noteExit(ctx context.Context, gone <-chan time.Time) error {
	select {
	case t.end = <-gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the source's QEMU to exit: %w", context.Cause(ctx))
	}
}

// runEngine runs a command vacate evict, and takes its figures.
func (t *trial) runEngine(ctx context.Context, cmd *exec.Cmd) error {
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	gone := t.exit()
	if err := t.vm.Host.Start(cmd); err != nil {
		return err
	}
	report, err := readReport(bufio.NewScanner(out))
	err = errors.Join(err, cmd.Wait())
	t.used = cpuTime(cmd)
	if report != nil {
		t.run.Engine = report
		var r engineReport
		if e := json.Unmarshal(report, &r); e != nil {
			return fmt.Errorf("report of vacate evict: %w", errors.Join(e, err))
		}
		if err == nil && r.Outcome != Completed {
			err = fmt.Errorf("outcome %q", r.Outcome)
		}
		if r.Reason != "" {
			err = errors.Join(err, errors.New(r.Reason))
		}
		if r.Begun != nil {
			// Like QEMU's capabilities and monitors, the engines' connection is made before the
			// clock starts.
			t.begunAt(t.start.Add(r.Begun.Sub(t.start.Round(0))))
		}
		p := &r.Pages
		t.run.Pages = &Pages{ptr(p.Early + p.Pushed + p.Near), &p.Fetched, &p.Zero,
			ptr(p.Skipped + p.Unused), &p.Duplicate}
		t.run.Fetch = r.Fetch
	}
	if err != nil {
		return fmt.Errorf("vacate evict: %w; it said %s", err, &said)
	}
	return t.noteExit(ctx, gone)
}

// begunAt has t = 0 be later than the command: what comes before is preparation.
func (t *trial) begunAt(at time.Time) {
	t.run.Prepare = seconds(at.Sub(t.start).Seconds())
	t.start = at
}

// waitReceiver waits for the end of vacate receive.
func (t *trial) waitReceiver() error {
	err := t.receiver.Wait()
	if t.run.Engine != nil && err == nil {
		t.run.EngineCPU = &EngineCPU{round(t.used), round(cpuTime(t.receiver))}
	}
	t.receiver = nil
	if err != nil {
		return fmt.Errorf("vacate receive: %w; it said %s", err, t.received)
	}
	return nil
}

// endReceiver ends vacate receive, unless it ends by itself, and returns what
// it has to say.
func (t *trial) endReceiver() error {
	kill := time.AfterFunc(time.Second, func() { t.receiver.Process.Kill() })
	defer kill.Stop()
	if err := t.waitReceiver(); err != nil {
		return err
	}
	return errors.New("vacate receive ended well")
}

// readReport reads the JSON lines of "vacate evict --json" to their end and
// returns the report among them, or nil.
func readReport(lines *bufio.Scanner) (report json.RawMessage, err error) {
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var line struct {
			Type   string
			Report json.RawMessage
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return report, fmt.Errorf("output line %.100q: %w", lines.Text(), err)
		}
		if line.Type == "report" {
			report = line.Report
		}
	}
	return report, lines.Err()
}

func (t *trial) uri() string { return fmt.Sprintf("tcp:%s:%d", t.twin.Host.Addr, qemuPort) }

// qemu returns the preparation of QEMU's own migration with capabilities.
func qemu(capabilities ...string) func(*trial, context.Context) error {
	return func(t *trial, ctx context.Context) error {
		on := map[string]bool{"events": true}
		for _, m := range []*monitor{t.src, t.dst} {
			has, err := m.QueryMigrationCapabilities(ctx)
			if err != nil {
				return err
			}
			for _, c := range capabilities {
				if _, ok := has[c]; !ok {
					return fmt.Errorf("%w: QEMU %v has no migration capability %s", errUnsupported,
						m.Version(), c)
				}
				on[c] = true
			}
			if err := m.SetMigrationCapabilities(ctx, on); err != nil {
				return err
			}
		}
		if err := t.src.SetMigrationParameters(ctx,
			map[string]any{"max-bandwidth": uint64(unlimited)}); err != nil {
			return err
		}
		return t.dst.MigrateIncoming(ctx, t.uri())
	}
}

// forget has a QEMU that took a guest forget the capabilities that it was given for that: the
// next strategy is to find it as if it were new.
func (m *monitor) forget(ctx context.Context) error {
	has, err := m.QueryMigrationCapabilities(ctx)
	if err != nil {
		return err
	}
	off := map[string]bool{}
	for c, on := range has {
		if on {
			off[c] = false
		}
	}
	if len(off) == 0 {
		return nil
	}
	return m.SetMigrationCapabilities(ctx, off)
}

func (t *trial) postcopy(ctx context.Context) error {
	if err := t.src.Migrate(ctx, t.uri(), false); err != nil {
		return err
	}
	for {
		err := t.src.MigrateStartPostcopy(ctx)
		if err == nil {
			break
		}
		var refused *qmp.Error
		if !errors.As(err, &refused) || time.Since(t.start) > 5*time.Second {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return t.complete(ctx)
}

// complete waits until the migration has completed at both ends.
func (t *trial) complete(ctx context.Context) error {
	for _, m := range []*monitor{t.src, t.dst} {
		e, err := m.wait(ctx, t.start, "the migration to complete", over(m, Completed))
		if err != nil {
			return err
		}
		t.ended(e.at)
	}
	return t.notePages(ctx)
}

func (t *trial) ended(at time.Time) {
	if at.After(t.end) {
		t.end = at
	}
}

// over matches the end of a migration, which must be one of those wanted.
func over(m *monitor, wanted ...string) func(event) (bool, error) {
	return func(e event) (bool, error) {
		if e.name != "MIGRATION" {
			return false, nil
		}
		for _, w := range wanted {
			if e.status == w {
				return true, nil
			}
		}
		switch e.status {
		case "completed", "failed", "cancelled", "postcopy-paused":
			return false, fmt.Errorf("the migration is %s on VM %s", e.status, m.name)
		}
		return false, nil
	}
}

// notePages takes QEMU's own counts. What was sent beyond the VM's pages was
// sent once more.
func (t *trial) notePages(ctx context.Context) error {
	m, err := t.src.QueryMigrate(ctx)
	if err != nil {
		return err
	}
	r := m.RAM
	if r == nil || r.PageSize == 0 {
		return nil
	}
	sent := r.Normal + r.Duplicate
	p := &Pages{Zero: &r.Duplicate, Fetched: &r.PostcopyRequests}
	if sent >= r.PostcopyRequests {
		p.Pushed = ptr(sent - r.PostcopyRequests)
	}
	if total := r.Total / r.PageSize; sent >= total {
		p.Duplicate = ptr(sent - total)
	}
	t.run.Pages = p
	return nil
}

func (t *trial) precopy(ctx context.Context) error {
	if err := t.src.Migrate(ctx, t.uri(), false); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, t.opts.PrecopyBound)
	_, err := t.src.wait(bounded, t.start, "the migration to complete", over(t.src, Completed))
	cancel()
	if err == nil {
		return t.complete(ctx)
	}
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if err := t.notePages(ctx); err != nil { // afterwards QEMU has no counts
		return err
	}
	if err := t.src.MigrateCancel(ctx); err != nil {
		return err
	}
	e, err := t.src.wait(ctx, t.start, "the migration to be cancelled",
		over(t.src, Completed, "cancelled"))
	if err != nil {
		return err
	}
	if e.status == Completed { // at the last moment
		return t.complete(ctx)
	}
	t.ended(e.at)
	t.run.Outcome = NotConverged
	t.run.Reason = fmt.Sprintf("given up after %v", t.opts.PrecopyBound)
	status, err := t.src.QueryStatus(ctx)
	if err == nil && !status.Running { // cancelled while it switched over
		err = t.src.Cont(ctx)
	}
	return err
}

func (t *trial) stopAndCopy(ctx context.Context) error {
	if err := t.src.Stop(ctx); err != nil {
		return err
	}
	if err := t.src.Migrate(ctx, t.uri(), false); err != nil {
		return err
	}
	if err := t.complete(ctx); err != nil {
		return err
	}
	if err := t.dst.Cont(ctx); err != nil {
		return err
	}
	e, err := t.dst.wait(ctx, t.start, "the guest to run", named("RESUME"))
	t.ended(e.at)
	return err
}

// find returns strategies of a list by their names, or variants of its first, which evict makes.
func find(names []string, list []strategy, evict func(flags ...string) mover) ([]strategy, error) {
	var found []strategy
	for _, n := range names {
		if strings.HasPrefix(n, list[0].name+":") {
			v, err := variant(n, list[0], evict)
			if err != nil {
				return nil, err
			}
			found = append(found, v)
			continue
		}
		i := slices.IndexFunc(list, func(s strategy) bool { return s.name == n })
		if i < 0 {
			return nil, fmt.Errorf("no strategy %q: there are %s, and vacate:ORDER", n,
				strings.Join(namesOf(list), ", "))
		}
		found = append(found, list[i])
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no strategy given: there are %s",
			strings.Join(namesOf(list), ", "))
	}
	return found, nil
}

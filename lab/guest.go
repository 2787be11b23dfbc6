package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"vacate/lab/loadproto"
)

// Guest is a running guest as its load reports it, over whichever VMs carry
// it. Times are when reports came in, on the host's clock. Methods may be
// called from any goroutine.
type Guest struct {
	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every message
	samples []Sample
	clocks  []Clocks
	ready   bool
	hellos  int
	hello   loadproto.Hello
	lastSeq uint64
	torn    int
	badSeen []loadproto.BadWord
	sets    []loadproto.SetResult
	finals  int
	final   loadproto.Final
	failure error
}

// Sample is one report.
type Sample struct {
	At  time.Time // of arrival
	VM  string    // name of the VM it came from
	Ops uint64    // pages worked on since the guest's load began
	Bad uint64    // bad pages seen since then
	// Touches are the slow first touches since the report before, those of
	// lost reports included.
	Touches loadproto.Touches
}

// Clocks is one report of the bare guest on its clocks and interrupts.
type Clocks struct {
	At time.Time // of arrival
	VM string    // name of the VM it came from
	loadproto.Clocks
}

// maxSamples is an hour of reports; when they are too many, the older half goes.
const maxSamples = 36_000

func newGuest() *Guest { return &Guest{changed: make(chan struct{})} }

// follow takes the report lines of one VM until the connection ends.
func (g *Guest) follow(vm string, conn net.Conn) {
	lines := bufio.NewReaderSize(conn, loadproto.MaxLine+1)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 {
			g.take(vm, time.Now(), line)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func (g *Guest) take(vm string, now time.Time, line []byte) {
	var m loadproto.Message
	err := errors.New("no newline")
	if n := len(line) - 1; line[n] == '\n' {
		m, err = loadproto.Parse(line[:n])
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.changed)
	g.changed = make(chan struct{})
	if err != nil {
		g.torn++
		return
	}
	switch m := m.(type) {
	case loadproto.Ready:
		g.ready = true
	case loadproto.Hello:
		g.hello, g.lastSeq = m, 0
		g.hellos++
		if m.Version != loadproto.Version {
			g.failure = fmt.Errorf("guest load speaks version %d, this lab %d: build both anew",
				m.Version, loadproto.Version)
		}
	case loadproto.Report:
		s := Sample{At: now, VM: vm, Ops: m.Ops, Bad: m.Bad, Touches: m.Touches}
		if m.Seq > g.lastSeq+1 { // the report before was torn
			s.Touches.Merge(&m.Before)
		}
		g.lastSeq = m.Seq
		if len(g.samples) == maxSamples {
			g.samples = slices.Delete(g.samples, 0, maxSamples/2)
		}
		g.samples = append(g.samples, s)
	case loadproto.Clocks:
		if len(g.clocks) == maxSamples {
			g.clocks = slices.Delete(g.clocks, 0, maxSamples/2)
		}
		g.clocks = append(g.clocks, Clocks{now, vm, m})
	case loadproto.BadWord:
		g.badSeen = append(g.badSeen, m)
	case loadproto.SetResult:
		g.sets = append(g.sets, m)
	case loadproto.Final:
		g.final = m
		g.finals++
	case loadproto.Fail:
		g.failure = fmt.Errorf("guest load failed: %s", m.Text)
	}
}

// wait returns when ok does, which is called with mu held after every message.
func (g *Guest) wait(ctx context.Context, what string, gone <-chan struct{}, ok func() bool) error {
	for {
		g.mu.Lock()
		done, failure, changed := ok(), g.failure, g.changed
		g.mu.Unlock()
		if failure != nil {
			return failure
		}
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-gone:
			return fmt.Errorf("wait for %s: the VM has exited", what)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		}
	}
}

// Samples returns the reports so far, at least those of the last half hour.
func (g *Guest) Samples() []Sample {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.samples)
}

// Clocks returns what the bare guest reported of its clocks so far.
func (g *Guest) Clocks() []Clocks {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.clocks)
}

// Torn returns how many lines were cut, as happens to one at a switch-over.
func (g *Guest) Torn() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.torn
}

// Starts returns how often the load has begun: once, and once per reboot.
func (g *Guest) Starts() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hellos
}

// Bad returns the first bad words that the guest has found, at most 20 per
// start of the load.
func (g *Guest) Bad() []loadproto.BadWord {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.badSeen)
}

// Err returns why the load cannot go on, or nil.
func (g *Guest) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failure
}

// Rate is how fast the load worked on pages in a span of time.
type Rate struct {
	From      time.Time
	PerSecond float64
}

// Throughput returns the rates of the whole steps from one time to another.
// Counts between two reports are interpolated.
func (g *Guest) Throughput(from, to time.Time, step time.Duration) []Rate {
	if step <= 0 {
		return nil
	}
	samples := g.Samples()
	var rates []Rate
	before := opsAt(samples, from)
	for t := from.Add(step); !t.After(to); t = t.Add(step) {
		now := opsAt(samples, t)
		rates = append(rates, Rate{t.Add(-step), max(0, now-before) / step.Seconds()})
		before = now
	}
	return rates
}

func opsAt(samples []Sample, t time.Time) float64 {
	i, _ := slices.BinarySearchFunc(samples, t,
		func(s Sample, t time.Time) int { return s.At.Compare(t) })
	switch {
	case len(samples) == 0:
		return 0
	case i == 0:
		return float64(samples[0].Ops)
	case i == len(samples):
		return float64(samples[i-1].Ops)
	}
	a, b := samples[i-1], samples[i]
	if b.Ops < a.Ops { // a reboot between them
		return float64(b.Ops)
	}
	return float64(a.Ops) + float64(b.Ops-a.Ops)*float64(t.Sub(a.At))/float64(b.At.Sub(a.At))
}

// Stalls are the first touches of a page that took at least 200 µs.
type Stalls struct {
	Count              uint64
	P50, P99, Max, Sum time.Duration
}

// Stalls returns those reported after one time, up to another. A stall is
// reported when it ends.
func (g *Guest) Stalls(from, to time.Time) Stalls {
	var all loadproto.Touches
	for _, s := range g.Samples() {
		if s.At.After(from) && !s.At.After(to) {
			all.Merge(&s.Touches)
		}
	}
	return Stalls{
		Count: all.Count(),
		P50:   time.Duration(all.Quantile(0.50)),
		P99:   time.Duration(all.Quantile(0.99)),
		Max:   time.Duration(all.Max),
		Sum:   time.Duration(all.Sum),
	}
}

// WaitOps waits until the load has worked on n more pages than now.
func (g *Guest) WaitOps(ctx context.Context, n uint64) error {
	goal, first := uint64(0), true
	return g.wait(ctx, fmt.Sprintf("%d pages of work", n), nil, func() bool {
		if len(g.samples) == 0 {
			return n == 0
		}
		now := g.samples[len(g.samples)-1].Ops
		if first {
			goal, first = now+n, false
		}
		return now >= goal
	})
}

// Check is the result of a full check of all the guest's pages.
type Check struct {
	Pages uint64 // checked
	Bad   uint64 // bad in this check, met while working, or bad in checks before
	Sets  []loadproto.SetResult
	Words []loadproto.BadWord // the first bad words, in detail
}

// Check has the guest, which must be running on vm, end its work and check
// every page of every set. A guest that has worked can be checked again, but
// works no more.
func (g *Guest) Check(ctx context.Context, vm *VM) (Check, error) {
	g.mu.Lock()
	finals := g.finals
	g.sets = nil
	g.mu.Unlock()
	if err := vm.command(loadproto.CommandCheck); err != nil {
		return Check{}, fmt.Errorf("check guest: %w", err)
	}
	if err := g.wait(ctx, "the guest's check", vm.done,
		func() bool { return g.finals > finals }); err != nil {
		return Check{}, vm.explain(fmt.Errorf("check guest: %w", err))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return Check{g.final.Pages, g.final.Bad, slices.Clone(g.sets), slices.Clone(g.badSeen)}, nil
}

// Reboot has the guest, which must be running on vm, reboot itself, and waits
// until its load has begun anew.
func (g *Guest) Reboot(ctx context.Context, vm *VM) error {
	starts := g.Starts()
	if err := vm.command(loadproto.CommandReboot); err != nil {
		return fmt.Errorf("reboot guest: %w", err)
	}
	err := g.wait(ctx, "the rebooted guest's load", vm.done,
		func() bool { return g.hellos > starts })
	if err != nil {
		return vm.explain(fmt.Errorf("reboot guest: %w", err))
	}
	return nil
}

// PowerOff has the guest, which must be running on vm, power itself off. It does not wait for that.
func (g *Guest) PowerOff(vm *VM) error { return vm.command(loadproto.CommandPowerOff) }

// Panic has the guest, which must be running on vm, tell QEMU's device pvpanic that it panicked.
// It does not wait for that.
func (g *Guest) Panic(vm *VM) error { return vm.command(loadproto.CommandPanic) }

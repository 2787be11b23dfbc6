// Package bench compares ways to move a running VM, on real VMs in a lab. They are the engine of
// this project ("vacate"), QEMU's own post-copy with and without preemption, its pre-copy, and
// stop-and-copy.
//
// All strategies of one benchmark move identically prepared guests over the same shaped link. The
// STOP and RESUME events of the two QEMUs time them alike. The guest itself says what it felt, and
// checks all of its memory in the end. QEMU's strategies are those of QEMU 7.2 to 11.1 with default
// settings, but for a bandwidth limit that is out of the way.
//
//	      t = 0             STOP    RESUME                   end
//	───────┼─ ─ ─ ─ ─ ─ ─ ─ ─┼────────┼─────────────────────────┼───► recovery
//	before │                 │◄ down ►│                         │
//	       │◄ execution transfer ────►│                         │
//	       │◄ total ───────────────────────────────────────────►│
package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"vacate/lab"

	"golang.org/x/sys/unix"
)

// Options say what to measure.
type Options struct {
	Strategies []string // in this order; see Strategies
	Load       string   // what the result is to call the load; see Loads
	// Spec is the VM with its load, such as function Spec returns.
	Spec lab.Spec
	// Accel is what the VMs run under: "kvm", "tcg", or "auto", the default, which is KVM where the
	// guest runs under it. With "kvm" the bare guest takes the place of Linux where only that runs.
	Accel string
	// Chain lets one guest serve all strategies of a repetition, from host to host and back, as
	// long as it comes through well. Repetitions take strategies from the first and from the last
	// in turn. It saves the boots. Where one strategy skips free pages another sends them as zeroes
	// next.
	Chain bool
	// Libvirt has each host have a libvirt and a vacated: the VM is a domain. Then strategies are
	// of DomainStrategies. Release is Debian's whose libvirt and QEMU that is, such as "trixie";
	// default the machine's.
	Libvirt      bool
	Release      string
	Lab          lab.Options // among them the link's rate
	Repeat       int
	PrecopyBound time.Duration // after it pre-copy is given up
	Vacate       string        // the vacate binary; default the one beside this executable
	Profile      string        // directory for CPU profiles of the engine; default none
	Trace        bool          // find the fetches of vacate, under KVM with one vCPU
	// Hasty does not wait until the load is as fast as before the move, nor until it is steady
	// ahead of it. Rates then mean little, as suits tests.
	Hasty bool
	Log   *slog.Logger
	Done  func(Run) // called after every run; may be nil
}

const (
	settleLeast = 2500 * time.Millisecond
	settleMost  = 10 * time.Second
	moveLimit   = 5 * time.Minute  // beside the bound of pre-copy
	recoverMost = 15 * time.Second // after the end
	after       = 500 * time.Millisecond
	lateStalls  = 300 * time.Millisecond // reports come every 100 ms
)

type bench struct {
	opts    Options
	lab     *lab.Lab
	domains *domains // nil without libvirt
}

// ErrBadPages says that a guest found its memory changed.
var ErrBadPages = errors.New("the guest's memory is damaged")

// Measure runs every strategy once per repetition. Failed runs do not end it;
// they are in the result, and their errors are joined in the error returned.
func Measure(ctx context.Context, opts Options) (Result, error) {
	list, move := strategies, evict
	if opts.Libvirt {
		list, move = domainStrategies, evictDomain
		if opts.Chain || opts.Spec.BareMetal || opts.Spec.Agent {
			return Result{}, errors.New("a domain has a guest of its own for each run, Linux " +
				"without an agent: leave out --chain, --guest and --agent")
		}
	}
	chosen, err := find(opts.Strategies, list, move)
	if err != nil {
		return Result{}, err
	}
	if _, err := Spec(opts.Load); err != nil {
		return Result{}, err
	}
	if opts.Repeat < 1 {
		return Result{}, errors.New("repetitions must be at least 1")
	}
	if opts.PrecopyBound <= 0 {
		return Result{}, errors.New("the bound of pre-copy must be positive")
	}
	if opts.Accel == "" {
		opts.Accel = "auto"
	}
	if !slices.Contains(Accels(), opts.Accel) {
		return Result{}, fmt.Errorf("accelerator %q: want one of %s", opts.Accel,
			strings.Join(Accels(), ", "))
	}
	if opts.Vacate == "" {
		if opts.Vacate, err = lab.Program("vacate"); err != nil {
			return Result{}, err
		}
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	l, err := lab.New(ctx, opts.Lab)
	if err != nil {
		return Result{}, err
	}
	b := &bench{opts: opts, lab: l}
	result := Result{Version: Version, Runs: []Run{}}
	result.Machine.Pinned = l.A.Core >= 0 && l.A.Core != l.B.Core
	if err = b.chooseGuest(ctx); err == nil {
		result.Machine.Congestion, err = l.UseCubic()
	}
	if err == nil && opts.Libvirt {
		err = b.startLibvirt(ctx)
	}
	if err == nil {
		err = b.measure(ctx, chosen, &result)
	}
	if b.domains != nil {
		err = errors.Join(err, b.domains.close())
	}
	return result, errors.Join(err, l.Close())
}

// Accels are what the VMs may run under.
func Accels() []string { return []string{"auto", "kvm", "tcg"} }

// chooseGuest settles what the VMs run under, and which guest they have.
func (b *bench) chooseGuest(ctx context.Context) error {
	s := &b.opts.Spec
	if s.BareMetal {
		if err := fitsBare(s); err != nil {
			return err
		}
	}
	if b.opts.Accel == "auto" {
		return nil // the lab finds out
	}
	s.Accel = b.opts.Accel
	if s.Accel == "tcg" {
		return nil
	}
	runs := func(bare bool) (bool, error) {
		like := *s
		like.BareMetal = bare
		accel, err := b.lab.Accelerator(ctx, like)
		return accel == "kvm", err
	}
	if ok, err := runs(s.BareMetal); ok || err != nil {
		return err
	}
	if !s.BareMetal {
		if ok, err := runs(true); err != nil {
			return err
		} else if ok {
			b.opts.Log.Info("Linux does not run under KVM here: the bare guest takes its place")
			s.BareMetal = true
			return fitsBare(s)
		}
	}
	return errors.New("no guest runs under KVM here: leave out --accel kvm")
}

// fitsBare says what of a load the bare guest lacks.
func fitsBare(s *lab.Spec) error {
	if l := &s.Load; l.CacheMiB > 0 || l.FileMiB > 0 || l.Others > 1 || l.Stale {
		return errors.New("the bare guest has no page cache, no processes, and no free memory " +
			"that was used before: choose a load such as hot, zipf or uniform")
	}
	return nil
}

func (b *bench) measure(ctx context.Context, chosen []strategy, result *Result) error {
	var errs []error
	for rep := 1; rep <= b.opts.Repeat; rep++ {
		order := slices.Clone(chosen)
		if b.opts.Chain && rep%2 == 0 { // what drifts along a chain hits all alike
			slices.Reverse(order)
		}
		var guest *guest // left by the run before
		for i, s := range order {
			b.opts.Log.Info("run", "strategy", s.name, "rep", rep)
			var run *Run
			var err error
			run, guest, err = b.try(ctx, s, rep, guest, b.opts.Chain && i < len(order)-1, result)
			if run != nil {
				result.Runs = append(result.Runs, *run)
				if b.opts.Done != nil {
					b.opts.Done(*run)
				}
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s, repetition %d: %w", s.name, rep, err))
			}
			if run == nil || ctx.Err() != nil {
				return errors.Join(append(errs, ctx.Err())...)
			}
		}
	}
	return errors.Join(errs...)
}

// A guest is one that can be evicted once more.
type guest struct {
	vm      *lab.VM
	evicted int // so many times
}

// try moves a guest, or boots one if that is nil; if it is to keep the guest and
// that came through well, it is returned. The run is nil if it did not come so
// far that there is something to measure.
func (b *bench) try(ctx context.Context, s strategy, rep int, g *guest, keep bool,
	result *Result) (*Run, *guest, error) {
	t := &trial{bench: b, keep: keep,
		run: &Run{Strategy: s.name, Load: b.opts.Load, Rep: rep, Outcome: Completed,
			Throughput: []Point{}}}
	defer t.close()
	if g != nil {
		t.vm, t.run.EvictedBefore = g.vm, g.evicted
	}
	if err := t.setUp(ctx, s, result); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, moveLimit+b.opts.PrecopyBound,
		errors.New("the run took too long"))
	defer cancel()
	err := t.measure(ctx, s)
	switch {
	case errors.Is(err, errUnsupported):
		t.run.Outcome, t.run.Reason = Unsupported, err.Error()
		err = nil
	case errors.Is(err, errDamaged):
		t.run.Outcome, t.run.Reason = Damaged, err.Error()
		err = nil
	case err != nil:
		t.run.Outcome, t.run.Reason = Failed, err.Error()
	case keep && t.run.Outcome == Completed:
		g = &guest{t.twin, t.run.EvictedBefore + 1}
		t.twin = nil // not to be closed
		return t.run, g, nil
	}
	return t.run, nil, err
}

// setUp boots the guest, if need be, and starts its twin on the other host.
func (t *trial) setUp(ctx context.Context, s strategy, result *Result) (err error) {
	if t.domains != nil {
		return t.setUpDomain(ctx, result)
	}
	if t.vm == nil {
		if t.vm, err = t.lab.A.Boot(ctx, t.opts.Spec); err != nil {
			return err
		}
	}
	to := t.lab.A
	if t.vm.Host == to {
		to = t.lab.B
	}
	if t.release, err = warm(t.opts.Spec.MemoryMiB << 20); err != nil {
		return err
	}
	if t.twin, err = to.Incoming(ctx, t.vm, lab.IncomingOptions{Running: !s.paused}); err != nil {
		return err
	}
	if result.Machine.QEMU == "" {
		if err := describe(result, t.vm, t.opts.Lab.Rate); err != nil {
			return err
		}
	}
	if t.src, err = watch(ctx, t.vm, t.opts.Log); err != nil {
		return err
	}
	t.dst, err = watch(ctx, t.twin, t.opts.Log)
	return err
}

// close ends everything that was started.
func (t *trial) close() {
	if t.release != nil {
		t.release()
	}
	for _, m := range []*monitor{t.src, t.dst} {
		if m != nil {
			m.close()
		}
	}
	for _, vm := range []*lab.VM{t.vm, t.twin} {
		if vm != nil {
			vm.Kill()
		}
	}
	if t.domain != nil {
		t.closeDomain()
	}
	if t.receiver != nil {
		t.receiver.Process.Kill()
		t.receiver.Wait()
	}
	t.tasks.Wait()
}

// measure moves the guest and fills in the run.
func (t *trial) measure(ctx context.Context, s strategy) error {
	if s.prepare != nil {
		if err := s.prepare(t, ctx); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	if err := t.settle(ctx); err != nil {
		return err
	}
	before, err := t.lab.LinkBytes()
	if err != nil {
		return err
	}
	t.start = time.Now()
	move := s.move
	if t.opts.Trace {
		move = tracing(move)
	}
	if err := move(t, ctx); err != nil {
		t.throughput(time.Now()) // shows what the guest felt
		return err
	}
	now, err := t.lab.LinkBytes()
	if err != nil {
		return err
	}
	t.run.LinkBytes = ptr(now - before)
	t.run.Total = seconds(t.end.Sub(t.start).Seconds())
	if err := t.observe(ctx); err != nil {
		return err
	}
	err = t.check(ctx)
	if err != nil && ctx.Err() == nil && t.domain != nil && !isVacate(s.name) {
		// By libvirt's own migration: QEMU loses writes in pre-copy under software emulation.
		return fmt.Errorf("%w: %w", errDamaged, err)
	}
	return err
}

// isVacate reports whether a strategy is this project's.
func isVacate(name string) bool {
	return strings.HasPrefix(name, strategies[0].name)
}

// check lets the guest check its memory, unless it is kept: a guest does not work on afterwards. A
// kept guest has checked what it has met.
func (t *trial) check(ctx context.Context) error {
	at := t.twin
	if t.run.Outcome == NotConverged {
		at = t.vm
	} else if t.keep {
		last, err := t.reported(ctx)
		if err != nil {
			return err
		}
		t.run.Bad = &last.Bad
		if last.Bad != 0 {
			return fmt.Errorf("%w: %d pages are bad so far: %v", ErrBadPages, last.Bad,
				at.Guest.Bad())
		}
		return t.dst.forget(ctx)
	}
	bounded, cancel := context.WithTimeoutCause(ctx, checkLimit,
		fmt.Errorf("the guest does not answer within %v", checkLimit))
	defer cancel()
	check, err := at.Guest.Check(bounded, at)
	if err != nil {
		return err
	}
	t.run.Bad = &check.Bad
	if check.Bad != 0 {
		return fmt.Errorf("%w: %d of %d pages are bad: %v", ErrBadPages, check.Bad, check.Pages,
			check.Words)
	}
	if check.Pages == 0 {
		return errors.New("the guest checked no page")
	}
	return nil
}

// reported returns the guest's last report, once it has one from its new host.
func (t *trial) reported(ctx context.Context) (lab.Sample, error) {
	for {
		if err := t.twin.Guest.Err(); err != nil {
			return lab.Sample{}, err
		}
		samples := t.twin.Guest.Samples()
		if n := len(samples); n > 0 && samples[n-1].VM == t.twin.Name {
			return samples[n-1], nil
		}
		select {
		case <-ctx.Done():
			return lab.Sample{}, fmt.Errorf("wait for a report from VM %s: %w", t.twin.Name,
				context.Cause(ctx))
		case <-time.After(step):
		}
	}
}

// settle waits until the load's throughput is steady.
func (t *trial) settle(ctx context.Context) error {
	began := time.Now()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step):
		}
		now := time.Now()
		if now.Sub(began) < settleLeast {
			continue
		}
		r := t.vm.Guest.Throughput(now.Add(-2*time.Second), now, time.Second)
		samples := t.vm.Guest.Samples()
		// A guest that stands still is as steady as can be.
		runs := len(samples) > 0 && now.Sub(samples[len(samples)-1].At) < time.Second
		if len(r) == 2 && runs {
			a, b := r[0].PerSecond, r[1].PerSecond
			if diff := a - b; t.opts.Hasty || max(diff, -diff) <= 0.05*max(a, b) {
				return nil
			}
		}
		if now.Sub(began) > settleMost {
			t.opts.Log.Warn("the load's throughput is not steady", "runs", runs)
			return nil
		}
	}
}

// throughput puts the series up to a time into the run.
func (t *trial) throughput(to time.Time) {
	rates := t.vm.Guest.Throughput(t.start.Add(-beforeTime), to, step)
	series := make([]Point, len(rates))
	for i, r := range rates {
		series[i] = Point{round(r.From.Sub(t.start).Seconds()), round(r.PerSecond)}
	}
	t.run.Throughput = series
	t.run.Before = rateBefore(series)
}

// noteTransfer finds out when the guest ran at the destination.
func (t *trial) noteTransfer(ctx context.Context) error {
	e, err := t.dst.wait(ctx, t.start, "the guest to run", named("RESUME"))
	if err != nil {
		return err
	}
	t.run.Transfer = seconds(e.at.Sub(t.start).Seconds())
	if stop := t.src.last("STOP", t.start, e.at); !stop.IsZero() {
		t.run.Down = seconds(e.at.Sub(stop).Seconds())
	}
	return nil
}

// observe waits for the guest's recovery and fills in what the guest felt.
func (t *trial) observe(ctx context.Context) error {
	run := t.run
	if run.Outcome == Completed {
		if err := t.noteTransfer(ctx); err != nil {
			return err
		}
	}
	for {
		now := time.Now()
		t.throughput(now)
		if run.Before != nil && run.Transfer != nil {
			run.Recovery = recovery(run.Throughput, *run.Before, *run.Transfer)
		}
		over := t.opts.Hasty || run.Recovery != nil || run.Before == nil || run.Transfer == nil
		if since := now.Sub(t.end); since > after && over || since > recoverMost {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step):
		}
	}
	if run.Before != nil {
		run.WorkLost = seconds(workLost(run.Throughput, *run.Before, *run.Total))
		s := t.vm.Guest.Stalls(t.start, t.end.Add(lateStalls))
		run.Stall = &Quantiles{s.P50.Seconds(), s.P99.Seconds(), s.Max.Seconds(), s.Sum.Seconds(),
			s.Count}
	}
	return nil
}

var (
	cpuModel = regexp.MustCompile(`(?m)^model name\s*: (.*)$`)
)

// describe fills in the machine and the VM.
func describe(r *Result, vm *lab.VM, rate uint64) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err
	}
	s := &vm.Spec
	r.Machine = Machine{
		Congestion: r.Machine.Congestion, Pinned: r.Machine.Pinned,
		CPU: submatch(cpuModel, cpus), Cores: strings.Count(string(cpus), "processor\t"),
		MemoryBytes: info.Totalram * uint64(info.Unit),
		Kernel:      unix.ByteSliceToString(u.Release[:]),
		QEMU:        s.QEMU.Version, Accel: s.Accel, GuestKernel: vm.Release,
	}
	if rate > 0 {
		r.Machine.Link = &rate
	}
	r.VM = VM{s.Machine, s.MemoryMiB, s.VCPUs, string(s.Devices), s.Memfd, s.Load.HotMiB,
		s.Load.IdleMiB, s.Load.OtherMiB, s.Load.CacheMiB, "linux", "uniform", "together", s.Agent}
	if s.BareMetal {
		r.VM.Guest = bareGuest
	}
	if s.Load.Zipf {
		r.VM.Access = "zipf"
	}
	if s.Load.Mixed {
		r.VM.Place = "scattered"
	}
	return nil
}

func submatch(re *regexp.Regexp, text []byte) string {
	if m := re.FindSubmatch(text); m != nil {
		return strings.TrimSpace(string(m[1]))
	}
	return ""
}

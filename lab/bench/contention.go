package bench

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"time"

	"vacate/lab"
	"vacate/lab/latency"
	"vacate/lab/memclient"
	"vacate/lab/pgclient"
)

// ContentionOptions say what to measure of VMs that contend.
type ContentionOptions struct {
	Strategies []string     // see Strategies
	Servers    []lab.Server // or Idle
	Rates      []uint64     // of the link, in bits per second
	// Wanted is how much of a core each VM wants, Clients what its clients ask for.
	Wanted  float64
	Clients Clients
	// ServerMiB is how much the servers hold; MemoryMiB is the memory of each of the VMs.
	ServerMiB, MemoryMiB int
	Repeat               int
	// PrecopyBound is how many times as long as the link needs for all of a VM's memory pre-copy
	// may take until it is given up.
	PrecopyBound float64
	Lab          lab.Options
	Vacate       string // the vacate binary; default the one beside this executable
	Log          *slog.Logger
	Done         func(ContentionRun) // called after every run; may be nil
}

// Contention is what was measured of VMs that contend. Its JSON form is described in docs/paper.md.
type Contention struct {
	Version   int             `json:"version"`
	Machine   Machine         `json:"machine"`
	MemoryMiB int             `json:"memory_mib"` // of each VM
	ServerMiB int             `json:"server_mib"`
	Wanted    float64         `json:"wanted_cores"` // by each VM
	Clients   Clients         `json:"clients"`
	Runs      []ContentionRun `json:"runs"`
}

// ContentionRun is one of two VMs, with the same server, leaving the core that they share. Times
// are in seconds from the decision to evict, and nil for what was never reached.
type ContentionRun struct {
	Server   string `json:"server"`
	Strategy string `json:"strategy"`
	Rate     uint64 `json:"link_bits_per_s"`
	Rep      int    `json:"rep"` // from 1
	Outcome  string `json:"outcome"`
	Reason   string `json:"reason,omitempty"`

	Prepare  *float64 `json:"prepare_s"`
	Transfer *float64 `json:"execution_transfer_s"`
	Down     *float64 `json:"down_time_s"`
	Total    *float64 `json:"total_s"`
	// both ways, headers and what clients of the VM said to it over the link included
	LinkBytes *uint64 `json:"link_bytes"`
	// When each VM, and both together, are back at 90 % of their final level for good.
	Contending *float64 `json:"contending_90_s"`
	Migrated   *float64 `json:"migrated_90_s"`
	Aggregate  *float64 `json:"aggregate_90_s"`
	// Rates of answers before, and in the end.
	Before [2]float64 `json:"before_per_s"` // of the VM that moves, and of the one that stays
	Final  [2]float64 `json:"final_per_s"`
	Pages  *Pages     `json:"pages"`
	Wrong  uint64     `json:"wrong_answers"`
	Broken int        `json:"broken_connections"`
	Bad    *uint64    `json:"bad_pages"`
	// Moves and Stays are the VMs in steps of 100 ms: begin, answers per second, and their median
	// and 90th percentile in seconds.
	Moves []Step `json:"moves"`
	Stays []Step `json:"stays"`
}

// Idle is what VMs serve that have neither a server nor clients.
const Idle lab.Server = "idle"

// Step is a begin, answers per second, and of these the median latency and the 90th percentile.
// Times are in seconds.
type Step [4]float64

const (
	contendBefore = 3 * time.Second // how long is looked before
	contendAfter  = 6 * time.Second // and after the end
	finalTime     = 4 * time.Second // of that, what counts as the final level
	paceTime      = 3 * time.Second // over which it is measured what a core is worth
	checkLimit    = 2 * time.Minute // in which a guest checks itself, or is dead
)

// Loader is a client of a server.
type Loader interface {
	Rates(from, to time.Time, step time.Duration) []latency.Rate
	Set(perSecond float64)
	Stats() latency.Stats
	Stop() latency.Stats
}

// contention is two VMs with a server each, on host a, and their clients.
type contention struct {
	bench
	opts    ContentionOptions
	server  lab.Server
	vms     [2]*lab.VM // the one that moves, the one that stays
	loaders [2]Loader
	seen    latency.Stats // of both, so far
}

// Contend measures how strategies relieve a host's core on which two VMs with servers contend. It
// returns what was measured also with an error.
func Contend(ctx context.Context, opts ContentionOptions) (Contention, error) {
	result := Contention{Version: Version, MemoryMiB: opts.MemoryMiB, ServerMiB: opts.ServerMiB,
		Wanted: opts.Wanted, Clients: opts.Clients, Runs: []ContentionRun{}}
	chosen, err := find(opts.Strategies, strategies, evict)
	if err != nil {
		return result, err
	}
	if opts.Vacate == "" {
		if opts.Vacate, err = lab.Program("vacate"); err != nil {
			return result, err
		}
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	for _, server := range opts.Servers {
		if err := contendOn(ctx, opts, server, chosen, &result); err != nil {
			return result, fmt.Errorf("%s: %w", server, err)
		}
	}
	return result, nil
}

func contendOn(ctx context.Context, opts ContentionOptions, server lab.Server, chosen []strategy,
	result *Contention) (err error) {
	l, err := lab.New(ctx, opts.Lab)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	if result.Machine.Congestion, err = l.UseCubic(); err != nil {
		return err
	}
	result.Machine.Pinned = l.A.Core >= 0 && l.A.Core != l.B.Core
	c := &contention{bench: bench{opts: Options{Vacate: opts.Vacate, Log: opts.Log}, lab: l},
		opts:   opts,
		server: server}
	defer func() {
		for _, k := range c.loaders {
			if k != nil {
				k.Stop()
			}
		}
	}()
	if err := c.setUp(ctx, result); err != nil {
		return err
	}
	for rep := 1; rep <= opts.Repeat; rep++ {
		for _, rate := range opts.Rates {
			for _, s := range chosen {
				opts.Log.Info("run", "server", server, "rate", rate, "strategy", s.name, "rep", rep)
				run, err := c.run(ctx, s, rate)
				run.Rep = rep
				result.Runs = append(result.Runs, run)
				if opts.Done != nil {
					opts.Done(run)
				}
				if errors.Is(err, errDamaged) {
					if err := c.setUp(ctx, result); err != nil {
						return err
					}
					continue
				}
				if err != nil {
					return fmt.Errorf("%s at %s: %w", s.name, bits(rate), err)
				}
			}
		}
	}
	return nil
}

// setUp boots the VMs, and has their clients fill them.
func (c *contention) setUp(ctx context.Context, result *Contention) error {
	if err := c.lab.SetRate(0); err != nil {
		return err
	}
	spec := lab.Spec{
		MemoryMiB: c.opts.MemoryMiB, Devices: lab.Full, Tap: true, Server: c.server,
		ServerMiB: c.opts.ServerMiB,
		Load:      lab.Load{IdleMiB: 16, Sleep: true, Seed: 1}, // which is there to be checked
	}
	if c.server == Idle {
		spec.Server, spec.ServerMiB = lab.NoServer, 0
	}
	for i := range c.vms {
		if k := c.loaders[i]; k != nil {
			k.Stop()
			c.vms[i].Kill()
		}
		c.seen = latency.Stats{}
		var err error
		if c.vms[i], err = c.lab.A.Boot(ctx, spec); err != nil {
			return err
		}
		if c.loaders[i], err = Load(ctx, c.lab, c.vms[i], c.opts.Clients); err != nil {
			return err
		}
	}
	if result.Machine.QEMU == "" {
		var r Result
		if err := describe(&r, c.vms[0], 0); err != nil {
			return err
		}
		r.Machine.Congestion, r.Machine.Pinned = result.Machine.Congestion, result.Machine.Pinned
		result.Machine = r.Machine
	}
	return nil
}

// SetPace measures for four seconds how many answers the shared core is worth. From then on the
// clients of each VM want a part of that: with 0.6, those of two VMs together want a fifth more
// than the core has.
func SetPace(ctx context.Context, loaders []Loader, wanted float64) (core float64, err error) {
	for _, k := range loaders {
		k.Set(0)
	}
	if err := pause(ctx, paceTime+time.Second); err != nil {
		return 0, err
	}
	now := time.Now()
	for _, k := range loaders {
		for _, r := range k.Rates(now.Add(-paceTime), now, paceTime) {
			core += r.PerSecond
		}
	}
	for _, k := range loaders {
		k.Set(wanted * core)
	}
	return core, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Clients says what the clients of a server ask for.
type Clients struct {
	// the share of requests that write, more than 0, up to 1
	Writes float64 `json:"writes"`
	Bytes  int     `json:"bytes"` // of a value of memcached or Redis
	// of each VM's clients; each has one request at a time under way
	Connections int `json:"connections"`
}

// UsualClients mostly read. With fewer connections, what queues on the link would limit what they
// can ask for.
var UsualClients = Clients{Writes: 0.1, Bytes: 4000, Connections: 16}

// Load starts the client of a VM's server, in the lab's client, which fills it: as many requests as
// are answered.
func Load(ctx context.Context, l *lab.Lab, vm *lab.VM, o Clients) (Loader, error) {
	if vm.Spec.Server == lab.NoServer {
		return nobody{}, nil
	}
	var k Loader
	var err error
	if vm.Spec.Server == lab.PostgreSQL {
		k, err = pgclient.Start(ctx,
			pgclient.Options{Addr: vm.ServerAddr(), Dial: l.Client.Dial,
				Rows: vm.Spec.ServerMiB << 20 / lab.ItemBytes, Writes: o.Writes,
				Conns: o.Connections})
	} else {
		k, err = memclient.Start(ctx, memclient.Options{
			Addr: vm.ServerAddr(), Dial: l.Client.Dial, Bytes: o.Bytes,
			Items: vm.Spec.ServerMiB << 20 / 5 * 4 / max(1, o.Bytes),
			Redis: vm.Spec.Server == lab.Redis, Writes: o.Writes, Conns: o.Connections,
		})
	}
	if err != nil {
		return nil, err // and no Loader that is a nil client
	}
	return k, nil
}

// nobody is the client of a VM that has none.
type nobody struct{}

func (nobody) Rates(time.Time, time.Time, time.Duration) []latency.Rate { return nil }
func (nobody) Set(float64)                                              {}
func (nobody) Stats() latency.Stats                                     { return latency.Stats{} }
func (nobody) Stop() latency.Stats                                      { return latency.Stats{} }

// run has one VM leave by a strategy, and come back.
func (c *contention) run(ctx context.Context, s strategy,
	rate uint64) (run ContentionRun, err error) {
	run = ContentionRun{Server: string(c.server), Strategy: s.name, Rate: rate, Outcome: Completed}
	bound := time.Duration(c.opts.PrecopyBound * float64(c.opts.MemoryMiB<<20*8) / float64(rate) *
		float64(time.Second))
	c.bench.opts.PrecopyBound = bound
	t := &trial{bench: &c.bench, run: &Run{Strategy: s.name, Outcome: Completed}, vm: c.vms[0]}
	defer t.leave(&c.vms[0])
	if err := c.lab.SetRate(rate); err != nil {
		return run, err
	}
	if t.twin, err = c.lab.B.Incoming(ctx, t.vm,
		lab.IncomingOptions{Running: !s.paused}); err != nil {
		return run, err
	}
	if t.src, err = watch(ctx, t.vm, c.opts.Log); err != nil {
		return run, err
	}
	if err := t.src.forget(ctx); err != nil {
		return run, err
	}
	if t.dst, err = watch(ctx, t.twin, c.opts.Log); err != nil {
		return run, err
	}
	if err := s.prepare(t, ctx); err != nil {
		return run, fmt.Errorf("prepare: %w", err)
	}
	// Anew for each run: what a core of this machine is worth changes with what else it does.
	core, err := SetPace(ctx, c.loaders[:], c.opts.Wanted)
	if err != nil {
		return run, err
	}
	c.opts.Log.Info("pace", "server", c.server, "core_per_s", core, "each_per_s",
		c.opts.Wanted*core)
	if err := pause(ctx, contendBefore+time.Second); err != nil {
		return run, err
	}
	before, err := c.lab.LinkBytes()
	if err != nil {
		return run, err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, moveLimit+bound,
		errors.New("the run took too long"))
	defer cancel()
	decided := time.Now()
	t.start = decided
	err = s.move(t, bounded)
	run.Outcome, run.Reason = t.run.Outcome, t.run.Reason
	if err != nil {
		run.Outcome, run.Reason = Failed, err.Error()
		return run, err
	}
	since := func(at time.Time) *float64 { return seconds(at.Sub(decided).Seconds()) }
	now, err := c.lab.LinkBytes()
	if err != nil {
		return run, err
	}
	run.LinkBytes, run.Pages, run.Prepare = ptr(now-before), t.run.Pages, t.run.Prepare
	if run.Outcome == Completed {
		run.Total = since(t.end)
		if err := t.noteTransfer(bounded); err != nil {
			return run, err
		}
		run.Transfer, run.Down = seconds(*t.run.Transfer+t.start.Sub(decided).Seconds()), t.run.Down
	}
	if err := pause(ctx, contendAfter); err != nil {
		return run, err
	}
	c.compute(&run, decided)
	return run, c.comeBack(ctx, t, &run)
}

// compute fills in what the clients saw.
func (c *contention) compute(run *ContentionRun, decided time.Time) {
	to := time.Now()
	var series [3][]Point // of each VM, and of both
	for i, k := range c.loaders {
		steps := make([]Step, 0, 1000)
		for _, r := range k.Rates(decided.Add(-contendBefore), to, step) {
			at := round(r.From.Sub(decided).Seconds())
			steps = append(steps,
				Step{at, round(r.PerSecond), round(r.P50.Seconds()), round(r.P90.Seconds())})
			series[i] = append(series[i], Point{at, r.PerSecond})
		}
		if i == 0 {
			run.Moves = steps
		} else {
			run.Stays = steps
		}
	}
	for i := range min(len(series[0]), len(series[1])) {
		series[2] = append(series[2], Point{series[0][i][0], series[0][i][1] + series[1][i][1]})
	}
	end := to.Sub(decided).Seconds()
	var back [3]*float64
	for i, s := range series {
		final := mean(s, end-finalTime.Seconds(), end)
		if i < 2 {
			run.Before[i], run.Final[i] = round(mean(s, -contendBefore.Seconds(), 0)), round(final)
		}
		if run.Outcome == Completed && final > 0 {
			back[i] = recovery(s, final, 0)
		}
	}
	run.Migrated, run.Contending, run.Aggregate = back[0], back[1], back[2]
	var all latency.Stats
	for _, k := range c.loaders {
		s := k.Stats()
		all.Wrong, all.Broken = all.Wrong+s.Wrong, all.Broken+s.Broken
	}
	run.Wrong, run.Broken = all.Wrong-c.seen.Wrong, all.Broken-c.seen.Broken
	c.seen = all
}

// errDamaged is returned for a run that has damaged the guest.
var errDamaged = errors.New("the guest was damaged")

// mean of a series between two times.
func mean(s []Point, from, to float64) float64 {
	sum, n := 0.0, 0
	for _, p := range s {
		if p[0] >= from-epsilon && p[0]+stepS <= to+epsilon {
			sum, n = sum+p[1], n+1
		}
	}
	if n == 0 {
		return 0
	}
	return sum / float64(n)
}

// comeBack has the guest check its memory, and brings it to host a again.
func (c *contention) comeBack(ctx context.Context, t *trial, run *ContentionRun) error {
	at := t.vm
	if run.Outcome == Completed {
		at = t.twin
	}
	bounded, cancel := context.WithTimeoutCause(ctx, checkLimit,
		fmt.Errorf("the guest does not answer within %v", checkLimit))
	check, err := at.Guest.Check(bounded, at)
	cancel()
	ours := isVacate(run.Strategy)
	if err != nil {
		if ours || ctx.Err() != nil {
			return err
		}
		return c.damaged(run, err)
	}
	run.Bad = &check.Bad
	if check.Bad != 0 || run.Wrong != 0 || run.Broken != 0 {
		errs := append(c.loaders[0].Stats().Errors, c.loaders[1].Stats().Errors...)
		err := fmt.Errorf("%w: %d of %d pages, %d wrong answers, %d broken connections: %w",
			ErrBadPages, check.Bad, check.Pages, run.Wrong, run.Broken, errors.Join(errs...))
		if ours {
			return err
		}
		return c.damaged(run, err)
	}
	if at == t.vm {
		return nil
	}
	if err := c.lab.SetRate(0); err != nil {
		return err
	}
	if err := t.dst.forget(ctx); err != nil {
		return err
	}
	back := &trial{bench: &c.bench, run: &Run{Outcome: Completed}, vm: t.twin}
	defer back.leave(&c.vms[0])
	t.twin = nil
	if back.twin, err = c.lab.A.Incoming(ctx, back.vm, lab.IncomingOptions{}); err != nil {
		return err
	}
	if err := back.receive(ctx); err != nil {
		return err
	}
	back.start = time.Now()
	return back.evict(ctx, nil)
}

// damaged notes that QEMU's own migration has damaged the guest, which is not ours to mend: who
// went on with it would be blamed.
func (c *contention) damaged(run *ContentionRun, err error) error {
	c.opts.Log.Error("a guest was damaged: it is booted anew", "strategy", run.Strategy, "error",
		err)
	run.Outcome, run.Reason = Damaged, err.Error()
	run.Contending, run.Migrated, run.Aggregate = nil, nil, nil
	return errDamaged
}

// leave closes a trial, but for the VM that has the guest, which it tells.
func (t *trial) leave(guest **lab.VM) {
	if t.twin != nil && !t.end.IsZero() && t.run.Outcome == Completed {
		*guest = t.twin
	}
	if *guest == t.twin {
		t.twin = nil
	}
	if *guest == t.vm {
		t.vm = nil
	}
	t.close()
}

// CSV writes the figures of each run, a line each, without the series.
func (c *Contention) CSV(w io.Writer) error {
	out := csv.NewWriter(w)
	out.Write([]string{"server", "strategy", "link_bits_per_s", "rep", "outcome", "prepare_s",
		"execution_transfer_s", "down_time_s", "total_s", "contending_90_s", "migrated_90_s",
		"aggregate_90_s",
		"link_bytes", "before_moves_per_s", "before_stays_per_s", "final_moves_per_s",
		"final_stays_per_s", "bad_pages"})
	number := func(f *float64) string {
		if f == nil {
			return ""
		}
		return strconv.FormatFloat(*f, 'f', -1, 64)
	}
	count := func(n *uint64) string {
		if n == nil {
			return ""
		}
		return strconv.FormatUint(*n, 10)
	}
	for _, r := range c.Runs {
		out.Write([]string{r.Server, r.Strategy, strconv.FormatUint(r.Rate, 10),
			strconv.Itoa(r.Rep), r.Outcome, number(r.Prepare), number(r.Transfer), number(r.Down),
			number(r.Total),
			number(r.Contending), number(r.Migrated), number(r.Aggregate), count(r.LinkBytes),
			number(&r.Before[0]), number(&r.Before[1]), number(&r.Final[0]), number(&r.Final[1]),
			count(r.Bad)})
	}
	out.Flush()
	return out.Error()
}

// String sums a run up in a line.
func (r ContentionRun) String() string {
	at := func(f *float64) string {
		if f == nil {
			return "never"
		}
		return fmt.Sprintf("%.2f s", *f)
	}
	s :=
		fmt.Sprintf("%s, %s, %s: %s; runs there %s, total %s; back: contending %s, migrated %s, "+
			"both %s; %.0f+%.0f/s before, %.0f+%.0f/s in the end",
			r.Server, bits(r.Rate), r.Strategy, r.Outcome, at(r.Transfer), at(r.Total),
			at(r.Contending), at(r.Migrated), at(r.Aggregate), r.Before[0], r.Before[1], r.Final[0],
			r.Final[1])
	if r.Wrong > 0 {
		s += fmt.Sprintf("; %d WRONG ANSWERS", r.Wrong)
	}
	if r.Reason != "" {
		s += "; " + r.Reason
	}
	return s
}

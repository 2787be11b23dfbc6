package evict

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/sys/process"
	"vacate/internal/sys/sched"
	"vacate/internal/sys/units"
)

// QEMU keeps the kernel from using huge pages in a VM's memory while post-copy lasts. Afterwards
// all memory is in small pages, and the VM is slower for minutes or for good. So the source reports
// which units of 2 MiB were huge pages. Once the eviction is complete, the destination makes the
// kernel turn them into huge pages again, from outside.

// unitPages is how many pages make one unit, which may be a transparent huge page.
const unitPages = guestmem.HugePage / units.PageSize

// --- The source ---

// tellHuge finds out which units of the frozen VM's memory are huge pages, and tells the
// destination.
func (e *source) tellHuge() {
	huge := make([][]bool, len(e.image.frozen.layout))
	for i := range huge {
		var err error
		if huge[i], err = e.image.frozen.mem.Huge(e.image.frozen.index[i]); err != nil {
			if !errors.Is(err, guestmem.ErrGone) {
				e.Log.Info("cannot tell the destination which memory is in huge pages",
					"reason", err)
			}
			return
		}
	}
	e.image.huge.Store(&huge)
	if a := e.at.Load(); a != nil { // else it is told when it comes back
		if err := e.image.sendHuge(a); err != nil {
			a.FailSoon(err)
		}
	}
}

// sendHuge tells the destination which units are huge pages, if that is known yet.
func (i *image) sendHuge(a *attachment) error {
	huge := i.huge.Load()
	if huge == nil {
		return nil
	}
	for block, h := range *huge {
		if !slices.Contains(h, true) {
			continue
		}
		if err := a.Lane(link.Push).Write(frameHuge, appendHuge(nil, block, h)); err != nil {
			return err
		}
	}
	return nil
}

// appendHuge encodes which units of a block are huge pages: u16 block, u16 0, u32 count of units,
// u64 0, then a bit for each, as in appendPresent.
func appendHuge(b []byte, block int, huge []bool) []byte {
	b = appendRequest(b, pageset.Run{Block: block, Count: len(huge)})
	words := make([]uint64, (len(huge)+63)/64)
	for i, h := range huge {
		if h {
			words[i/64] |= 1 << (i % 64)
		}
	}
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

// parseHuge is the reverse of appendHuge.
func (l layout) parseHuge(b []byte) (block int, huge []bool, err error) {
	if len(b) < runSize {
		return 0, nil, fmt.Errorf("%w: huge pages, in %d bytes", errFrame, len(b))
	}
	r, err := l.parseRequest(b[:runSize])
	if err != nil {
		return 0, nil, err
	}
	b = b[runSize:]
	if r.First != 0 || r.Count > l[r.Block].units() || len(b) != (r.Count+63)/64*8 {
		return 0, nil, fmt.Errorf("%w: %d bytes about %d huge pages", errFrame, len(b), r.Count)
	}
	huge = make([]bool, r.Count)
	for i := range huge {
		huge[i] = b[i/8]>>(i%8)&1 != 0
	}
	return r.Block, huge, nil
}

// units returns how many units of the block may be huge pages.
func (b blockLayout) units() int {
	if b.PageSize != units.PageSize {
		return 0
	}
	return b.Pages / unitPages
}

// --- The destination's engine ---

// hugeUnits is what a destination knows about the units of the VM's memory.
type hugeUnits struct {
	mu   sync.Mutex
	huge [][]bool // by block: those that were huge pages at the source; guarded by mu

	keeping sync.Mutex // held while they are being stored

	// came numbers the units in the order in which their first pages came; 0 if none came. The push
	// begins with what the guest needs most, so this order does, too.
	came [][]atomic.Uint32
	last atomic.Uint32
}

func (u *hugeUnits) begin(l layout) {
	u.huge, u.came = make([][]bool, len(l)), make([][]atomic.Uint32, len(l))
	for i, b := range l {
		u.came[i] = make([]atomic.Uint32, b.units())
	}
}

// arrived notes that pages came.
func (u *hugeUnits) arrived(runs []pageRun) {
	for _, r := range runs {
		came := u.came[r.Block]
		last := (int(r.First) + r.Count - 1) / unitPages
		for i := int(r.First) / unitPages; i <= last && i < len(came); i++ {
			if came[i].Load() == 0 {
				came[i].CompareAndSwap(0, u.last.Add(1))
			}
		}
	}
}

// takeHuge stores what the source reports about huge pages.
func (e *destination) takeHuge(payload []byte) error {
	block, huge, err := e.incoming.layout.parseHuge(payload)
	if err != nil {
		return err
	}
	e.units.mu.Lock()
	e.units.huge[block] = huge
	e.units.mu.Unlock()
	if e.Journal != nil && e.HugePages != nil {
		e.tasks.Go(e.keepHuge)
	}
	return nil
}

// keepHuge stores the source's reports in the journal, so that another engine has them.
func (e *destination) keepHuge() {
	e.units.keeping.Lock() // the last writer knows everything
	defer e.units.keeping.Unlock()
	e.units.mu.Lock()
	b, err := json.Marshal(e.hugePagesIn(e.mem.Blocks()))
	e.units.mu.Unlock()
	if err == nil {
		err = e.Journal.Keep(KeptHuge, b)
	}
	if err != nil {
		e.Log.Warn("cannot record in the journal which memory was in huge pages: if this engine "+
			"dies, all of it stays in small ones", "error", err)
	}
}

// hugePagesIn returns the task for the VM here once it is whole. Its memory is in these blocks. The
// caller holds units.mu.
func (e *destination) hugePagesIn(blocks []guestmem.Block) *HugePages {
	h := &HugePages{PID: e.process.PID, Start: e.process.StartTime, Boot: process.BootID(),
		Blocks: blocks}
	type ranked struct {
		hugeUnit
		rank uint32
	}
	var order []ranked
	for i, huge := range e.units.huge {
		name := e.incoming.layout[i].Name
		at := slices.IndexFunc(h.Blocks, func(b guestmem.Block) bool { return b.Name == name })
		if at < 0 || !slices.Contains(huge, true) {
			continue
		}
		h.Huge = append(h.Huge, hugeBlock{at, appendHuge(nil, 0, huge)[runSize:]})
		for u, is := range huge {
			if is { // units without any page rank last
				order = append(order, ranked{hugeUnit{at, u}, e.units.came[i][u].Load() - 1})
			}
		}
	}
	slices.SortStableFunc(order, func(a, b ranked) int { return cmp.Compare(a.rank, b.rank) })
	for _, r := range order {
		h.order = append(h.order, r.hugeUnit)
	}
	return h
}

// passOnHuge hands the task to the caller's HugePages function, which outlives the engine.
func (e *destination) passOnHuge() {
	if e.HugePages == nil {
		return
	}
	e.units.mu.Lock()
	defer e.units.mu.Unlock()
	if h := e.hugePagesIn(e.mem.Blocks()); len(h.Huge) > 0 {
		e.HugePages(h)
	}
}

// --- The task ---

// HugePages is the task for a VM that came by post-copy: to turn those units of its memory back
// into huge pages that were huge pages at the source. It is stored under KeptHuge.
type HugePages struct {
	PID    int              `json:"pid"`
	Start  uint64           `json:"start_ticks"`
	Boot   string           `json:"boot"`
	Blocks []guestmem.Block `json:"blocks"`
	Huge   []hugeBlock      `json:"huge"`
	// Done is the result; nil before the task is done.
	Done *Restored `json:"done,omitempty"`

	order []hugeUnit // the hottest first; nil: by address
}

type hugeBlock struct {
	Block int    `json:"block"` // in Blocks
	Units []byte `json:"units"` // a bit for each
}

type hugeUnit struct{ block, unit int }

// Restored says how many huge pages the VM has back.
type Restored struct {
	Huge     int `json:"huge"`     // units that were huge pages at the source
	Restored int `json:"restored"` // those of them that are huge again
	Sparse   int `json:"sparse"`   // those left as they are, as more than half of each is not there
	// Reason is why the others are not huge; empty if all are.
	Reason  string  `json:"reason,omitempty"`
	Longest float64 `json:"longest_s"` // the longest call of the kernel, for up to 8 units
	Worked  float64 `json:"worked_s"`  // the time of all calls
	Elapsed float64 `json:"elapsed_s"` // since it began
}

// LoadHugePages returns the task that the journal has for an eviction; nil if none.
func LoadHugePages(j Journal) (*HugePages, error) {
	b, err := j.Kept(KeptHuge)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	h := new(HugePages)
	if err := json.Unmarshal(b, h); err != nil {
		return nil, fmt.Errorf("huge pages, in the journal: %w", err)
	}
	for _, b := range h.Huge {
		if b.Block < 0 || b.Block >= len(h.Blocks) {
			return nil, fmt.Errorf("huge pages, in the journal: there is no block %d", b.Block)
		}
	}
	return h, nil
}

// The task's limits. It takes half of an idle core, and a fifth of one that others want, too.
const (
	restFree      = 1
	restWanted    = 4
	hugePasses    = 3
	hugePause     = time.Second // between passes
	hugeShowEvery = 100 * time.Millisecond
	// mostAtOnce is how many adjacent units one call turns into huge pages. For each call the
	// kernel wakes a thread on every core of the host.
	mostAtOnce = 8
	// mostHungry is how many units in a row may find no free huge page before a pass ends.
	mostHungry = 16
)

// Restore works until the task or ctx is done, and returns the result. It reports its progress to
// show.
func (h *HugePages) Restore(ctx context.Context, log *slog.Logger,
	show func(Restored)) (Restored, error) {
	var r Restored
	err := sched.Usual(func() error {
		var err error
		r, err = h.restore(ctx, show)
		return err
	})
	log.Info("the VM's huge pages", "huge", r.Huge, "restored", r.Restored, "sparse", r.Sparse,
		"reason", r.Reason, "longest", r.Longest, "worked", r.Worked, "elapsed", r.Elapsed,
		"error", err)
	return r, err
}

func (h *HugePages) restore(ctx context.Context, show func(Restored)) (r Restored, err error) {
	left := h.units()
	r.Huge = len(left)
	start := time.Now()
	defer func() { r.Elapsed = time.Since(start).Seconds() }()
	if neverHuge() {
		r.Reason = "this host has no transparent huge pages: " + enabledFile + " is never"
		return r, nil
	}
	qemu := process.Of(h.PID, h.Start, h.Boot)
	if !qemu.Alive() {
		r.Reason = "the VM's QEMU has ended"
		return r, nil
	}
	mem, err := guestmem.Reopen(h.PID, h.Blocks)
	if err != nil {
		r.Reason = err.Error()
		return r, nil
	}
	defer mem.Close()
	t := task{mem: mem, r: &r, show: func() {
		r.Elapsed = time.Since(start).Seconds()
		show(r)
	}}
	for pass := 0; pass < hugePasses && len(left) > 0; pass++ {
		if pass > 0 {
			if err := sleep(ctx, hugePause); err != nil {
				return r, err
			}
		}
		if left, err = t.pass(ctx, left); err != nil {
			break
		}
	}
	switch {
	case r.Restored+r.Sparse == r.Huge:
		r.Reason = ""
	case errors.Is(err, guestmem.ErrGone):
		r.Reason, err = "the VM's QEMU has ended", nil
	case errors.Is(err, guestmem.ErrNoCollapse):
		r.Reason, err = err.Error(), nil
	}
	return r, err
}

// task is Restore at work.
type task struct {
	mem   *guestmem.Memory
	r     *Restored
	show  func()
	shown time.Time
	pace  pace
}

// pass tries each unit once, and returns those that another pass may still turn into huge pages.
func (t *task) pass(ctx context.Context, left []hugeUnit) (again []hugeUnit, err error) {
	for hungry := 0; len(left) > 0 && hungry < mostHungry; {
		n, err := t.together(left)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			t.r.Sparse++
			left = left[1:]
			continue
		}
		err = t.collapse(left[0], n)
		for n > 1 && err != nil && !final(err) { // one by one
			n = 1
			err = t.collapse(left[0], n)
		}
		switch {
		case err == nil:
			t.r.Restored += n
			hungry = 0
		case final(err):
			return nil, err
		case errors.Is(err, guestmem.ErrNoHugePage):
			hungry++
			again, t.r.Reason = append(again, left[0]), err.Error()
		case errors.Is(err, guestmem.ErrBusy):
			again, t.r.Reason = append(again, left[0]), err.Error()
		default:
			t.r.Reason = err.Error()
		}
		left = left[n:]
		if time.Since(t.shown) >= hugeShowEvery {
			t.shown = time.Now()
			t.show()
		}
		if err := sleep(ctx, t.pace.rest()); err != nil {
			return nil, err
		}
	}
	return append(again, left...), nil
}

// final reports whether no other unit can succeed.
func final(err error) bool {
	return errors.Is(err, guestmem.ErrGone) || errors.Is(err, guestmem.ErrNoCollapse)
}

// collapse turns n units into huge pages.
func (t *task) collapse(u hugeUnit, n int) error {
	began := time.Now()
	err := t.mem.Collapse(u.block, u.unit, n)
	took := time.Since(began).Seconds()
	t.r.Worked += took
	t.r.Longest = max(t.r.Longest, took)
	return err
}

// together returns how many of the first units are adjacent and fit in one call; 0 if the first one
// is sparse.
func (t *task) together(left []hugeUnit) (n int, err error) {
	for n < min(len(left), mostAtOnce) && left[n] == (hugeUnit{left[0].block, left[0].unit + n}) {
		sparse, err := isSparse(t.mem, left[n])
		if sparse || err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// units returns the units in the order in which to turn them into huge pages.
func (h *HugePages) units() []hugeUnit {
	if h.order != nil {
		return slices.Clone(h.order)
	}
	var list []hugeUnit
	for _, b := range h.Huge {
		for i := range len(b.Units) * 8 {
			if b.Units[i/8]>>(i%8)&1 != 0 {
				list = append(list, hugeUnit{b.Block, i})
			}
		}
	}
	return list
}

// isSparse reports whether less than half of a unit is there. The rest was left out, as the guest
// does not use it. As a huge page it would take the host's memory.
func isSparse(mem *guestmem.Memory, u hugeUnit) (bool, error) {
	var there [unitPages / 64]uint64
	if err := mem.Placed(u.block, uint64(u.unit)*unitPages, unitPages, there[:]); err != nil {
		return false, err
	}
	n := 0
	for _, w := range there {
		n += bits.OnesCount64(w)
	}
	return n < unitPages/2, nil
}

const enabledFile = "/sys/kernel/mm/transparent_hugepage/enabled"

// neverHuge reports whether this host's administrator disabled transparent huge pages. The call
// that makes them ignores that.
func neverHuge() bool {
	b, err := os.ReadFile(enabledFile)
	return err != nil || strings.Contains(string(b), "[never]")
}

// pace bounds how much of a core the task takes. It must be used on the thread that works.
type pace struct{ ran, waited time.Duration }

// rest returns how long the task must pause after its work since the last pause.
func (p *pace) rest() time.Duration {
	ran, waited := p.ran, p.waited
	b, err := os.ReadFile("/proc/thread-self/schedstat")
	if err == nil {
		_, err = fmt.Sscan(string(b), &p.ran, &p.waited)
	}
	if err != nil || ran == 0 {
		return time.Millisecond
	}
	ran, waited = p.ran-ran, p.waited-waited
	// If the thread had to wait for the core, others want it.
	if waited > ran/8 {
		return restWanted * ran
	}
	return restFree * ran
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

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

// QEMU forbids the kernel to have huge pages in a VM's memory while post-copy lasts. After it, all
// of the memory is in small pages, and the VM is slower for minutes or for good. So the source
// tells which units of 2 MiB were huge pages, and once the eviction is complete the destination has
// the kernel make them huge again, from outside.

// unitPages is how many pages of a block may be one transparent huge page.
const unitPages = guestmem.HugePage / units.PageSize

// --- The source ---

// tellHuge finds out which units of the frozen VM's memory are huge pages, and tells the
// destination.
func (e *source) tellHuge() {
	huge := make([][]bool, len(e.frozen.layout))
	for i := range huge {
		var err error
		if huge[i], err = e.frozen.mem.Huge(e.frozen.index[i]); err != nil {
			if !errors.Is(err, guestmem.ErrGone) {
				e.Log.Info("the destination does not hear which memory is in huge pages",
					"reason", err)
			}
			return
		}
	}
	e.huge.Store(&huge)
	if a := e.at.Load(); a != nil { // else it is told when it is back
		if err := e.sendHuge(a); err != nil {
			a.FailSoon(err)
		}
	}
}

// sendHuge tells the destination which units are huge pages, as far as that is known yet.
func (e *source) sendHuge(a *attachment) error {
	huge := e.huge.Load()
	if huge == nil {
		return nil
	}
	for i, h := range *huge {
		if !slices.Contains(h, true) {
			continue
		}
		if err := a.Lane(link.Push).Write(frameHuge, appendHuge(nil, i, h)); err != nil {
			return err
		}
	}
	return nil
}

// appendHuge encodes which units of a block are huge pages: u16 block, u16 0, u32 count of units,
// u64 0, then a bit for each, as in appendHas.
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
		return 0, nil, fmt.Errorf("%w: %d bytes tell of %d huge pages", errFrame, len(b), r.Count)
	}
	huge = make([]bool, r.Count)
	for i := range huge {
		huge[i] = b[i/8]>>(i%8)&1 != 0
	}
	return r.Block, huge, nil
}

// units is how many units the block has that may be huge pages.
func (b blockLayout) units() int {
	if b.PageSize != units.PageSize {
		return 0
	}
	return b.Pages / unitPages
}

// --- The destination's engine ---

// hugeUnits is what a destination knows of the units of the VM's memory.
type hugeUnits struct {
	mu   sync.Mutex
	huge [][]bool // by block: those that were huge pages at the source; guarded by mu

	keeping sync.Mutex // held while they are stored

	// came is the place of each unit in the order in which the first of their pages came; 0 for one
	// of which none has. As the push begins with what the guest needs most, so does this.
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

// takeHuge takes what the source tells of huge pages.
func (e *destination) takeHuge(payload []byte) error {
	block, huge, err := e.layout.parseHuge(payload)
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

// keepHuge stores what the source told so far, so that another engine need not be told.
func (e *destination) keepHuge() {
	e.units.keeping.Lock() // the last to write knows all
	defer e.units.keeping.Unlock()
	e.units.mu.Lock()
	b, err := json.Marshal(e.hugePagesIn(e.mem.Blocks()))
	e.units.mu.Unlock()
	if err == nil {
		err = e.Journal.Keep(KeptHuge, b)
	}
	if err != nil {
		e.Log.Warn("the journal does not take it which memory was in huge pages: should this "+
			"engine die, all stays in small ones", "error", err)
	}
}

// hugePagesIn is what is to be done for the VM here once it is whole, whose memory is in these
// blocks. It is called with units.mu held.
func (e *destination) hugePagesIn(blocks []guestmem.Block) *HugePages {
	h := &HugePages{PID: e.process.PID, Start: e.process.StartTime, Boot: process.BootID(),
		Blocks: blocks}
	type ranked struct {
		hugeUnit
		rank uint32
	}
	var order []ranked
	for i, huge := range e.units.huge {
		name := e.layout[i].Name
		at := slices.IndexFunc(h.Blocks, func(b guestmem.Block) bool { return b.Name == name })
		if at < 0 || !slices.Contains(huge, true) {
			continue
		}
		h.Huge = append(h.Huge, hugeBlock{at, appendHuge(nil, 0, huge)[runSize:]})
		for u, is := range huge {
			if is { // of those that did not come the rank is the greatest
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

// passOnHuge hands the task over to whoever does it when the engine has ended.
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

// HugePages is what is to be done for a VM that came by post-copy: those units of its memory that
// were huge pages at the source are to be huge again. It is stored under KeptHuge.
type HugePages struct {
	PID    int              `json:"pid"`
	Start  uint64           `json:"start_ticks"`
	Boot   string           `json:"boot"`
	Blocks []guestmem.Block `json:"blocks"`
	Huge   []hugeBlock      `json:"huge"`
	// Done is what came of it; nil: it is to be done.
	Done *Restored `json:"done,omitempty"`

	order []hugeUnit // the hottest first; nil: by address
}

type hugeBlock struct {
	Block int    `json:"block"` // in Blocks
	Units []byte `json:"units"` // a bit for each
}

type hugeUnit struct{ block, unit int }

// Restored tells how far the VM has its huge pages back.
type Restored struct {
	Huge     int `json:"huge"`     // units that were huge pages at the source
	Restored int `json:"restored"` // those of them that are again
	Sparse   int `json:"sparse"`   // those left as they are, as more than half of them is not there
	// Reason is why others are not; empty: all are.
	Reason  string  `json:"reason,omitempty"`
	Longest float64 `json:"longest_s"` // the longest call of the kernel, for up to 8 units
	Worked  float64 `json:"worked_s"`  // the time that all calls took
	Elapsed float64 `json:"elapsed_s"` // since it began
}

// LoadHugePages returns what the journal has of the task of an eviction; nil if nothing.
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

// How the task goes about it. It takes half of a core that nobody else wants, and a fifth of one
// that others want, too.
const (
	restFree      = 1
	restWanted    = 4
	hugePasses    = 3
	hugePause     = time.Second // between passes
	hugeShowEvery = 100 * time.Millisecond
	// mostAtOnce is how many units that lie side by side are made huge with one call. For each call
	// the kernel wakes a thread on every core of the host.
	mostAtOnce = 8
	// mostHungry is after how many units in a row that found no free huge page a pass ends.
	mostHungry = 16
)

// Restore does the task, until it is done or ctx is, and returns what came of it. show is told how
// far it is.
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

// pass tries each unit once, and returns those that may do better in another pass.
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

// final reports whether no other unit can do better.
func final(err error) bool {
	return errors.Is(err, guestmem.ErrGone) || errors.Is(err, guestmem.ErrNoCollapse)
}

// collapse makes units huge.
func (t *task) collapse(u hugeUnit, n int) error {
	began := time.Now()
	err := t.mem.Collapse(u.block, u.unit, n)
	took := time.Since(began).Seconds()
	t.r.Worked += took
	t.r.Longest = max(t.r.Longest, took)
	return err
}

// together returns how many of the first units lie side by side and can be made huge with one call;
// 0 if the first one is sparse.
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

// units returns the units in the order in which they are to be huge.
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

// isSparse reports whether less than half of a unit is there: it was left out as the guest does not
// use it, and as a huge page it would take the host's memory.
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

// neverHuge reports whether this host's administrator wants no transparent huge pages. The call
// that makes them does not ask.
func neverHuge() bool {
	b, err := os.ReadFile(enabledFile)
	return err != nil || strings.Contains(string(b), "[never]")
}

// pace bounds how much of a core the task takes. It must be used on the thread that works.
type pace struct{ ran, waited time.Duration }

// rest returns how long the task has to rest after what it did since the last rest.
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
	// Others want the core where the thread had to wait for it.
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

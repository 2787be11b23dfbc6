package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// run is one eviction that something happens to.
type run struct {
	t        *testing.T
	lab      *lab.Lab
	a, b     *site
	vm       *lab.VM
	expected *lab.Expected
	disks    map[*site]*lab.SmallDisk
	eviction string
	begun    time.Time
	memory   *lab.SmallDisk // what the twin's memory is on, if anything bounds it
	cuts     [2]int         // that each direction of the link has now
	// repairs end what faults began; the daemons are held no longer then.
	repairs []repair
	waits   []<-chan struct{} // for what faults do by themselves
	told    atomic.Bool       // the guest was told to power itself off
	domain  *managed          // nil for a VM that libvirt does not have
	granted bool              // an operator's abort; known after mend
}

// A repair is due some time after its fault.
type repair struct {
	due time.Time
	do  func() error
}

// A fault is what happens to an eviction in some state.
type fault struct {
	name string
	do   func(*run)
	// allowed are the outcomes that there may be besides moved and stayed: where physics allows no
	// better.
	allowed []outcome
}

// outcome is where the VM is in the end.
type outcome string

const (
	moved   outcome = "runs on the destination"
	stayed  outcome = "runs on the source"
	frozen  outcome = "frozen on the source, resumed there by an operator"
	dead    outcome = "ended, as its QEMU was killed where it ran, whole, or both were"
	halved  outcome = "lost, as its QEMU on the source was killed while it held pages"
	off     outcome = "ended, as its guest powered itself off on the destination"
	nowhere outcome = "lost" // never allowed
)

// cutTime is how long the link is away: longer than it takes to notice.
const cutTime = 4 * time.Second

// later has a fault end after a time.
func (r *run) later(after time.Duration, f func() error) {
	r.repairs = append(r.repairs, repair{time.Now().Add(after), f})
}

// mend ends all faults, each when it is due.
func (r *run) mend() {
	slices.SortStableFunc(r.repairs, func(a, b repair) int { return a.due.Compare(b.due) })
	for _, p := range r.repairs {
		time.Sleep(time.Until(p.due))
		if err := p.do(); err != nil {
			r.t.Error(err)
		}
	}
	for _, done := range r.waits {
		<-done
	}
	r.repairs, r.waits = nil, nil
}

// cut cuts directions of the link. One that is cut twice is mended when both cuts are over.
func (r *run) cut(toB, toA bool) {
	count := func(n int) error {
		for i, cut := range []bool{toB, toA} {
			if cut {
				r.cuts[i] += n
			}
		}
		return r.lab.SetLink(r.cuts[0] == 0, r.cuts[1] == 0)
	}
	if err := count(1); err != nil {
		r.t.Fatal(err)
	}
	r.later(cutTime, func() error { return count(-1) })
}

func (r *run) stall() {
	if err := r.lab.Stall(true); err != nil {
		r.t.Fatal(err)
	}
	r.later(cutTime, func() error { return r.lab.Stall(false) })
}

func (r *run) restart(s *site) {
	s.kill()
	r.later(100*time.Millisecond, func() error {
		if !s.runs() { // another fault may have had it started
			s.start()
		}
		return nil
	})
}

func (r *run) fill(d *lab.SmallDisk) {
	if err := d.Fill(); err != nil {
		r.t.Fatal(err)
	}
	r.later(3*time.Second, d.Free)
}

// killTwin kills the QEMU on the destination, if there is one.
func (r *run) killTwin() {
	if vms := r.expected.VMs(); len(vms) > 0 {
		vms[len(vms)-1].Kill()
	}
}

// powerOff has the guest power itself off once it runs on the destination, if it ever does.
func (r *run) powerOff() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(20 *
			time.Millisecond) {
			samples, vms := r.vm.Guest.Samples(), r.expected.VMs()
			if n := len(vms); n > 0 && samples[len(samples)-1].VM == vms[n-1].Name {
				if r.vm.Guest.PowerOff(vms[n-1]) == nil { // else it has ended since
					r.told.Store(true)
				}
				return
			}
			if e, err := r.a.api.GetEviction(r.t.Context(),
				connect.NewRequest(&hostv1.GetEvictionRequest{Id: r.eviction})); err == nil &&
				e.Msg.Outcome != "" {
				return
			}
		}
	}()
	r.waits = append(r.waits, done)
}

// slow is how many bytes a second are pushed where the guest is to power itself off before the end.
const slow = 4 << 20

const (
	sourceKilled = "source QEMU killed"
	twinKilled   = "destination QEMU killed"
	noMemory     = "destination without memory"
	powersOff    = "guest powers off"
)

// faults are what may happen.
var faults = []fault{
	{"source daemon killed", func(r *run) { r.restart(r.a) }, nil},
	{"destination daemon killed", func(r *run) { r.restart(r.b) }, nil},
	{"both daemons killed", func(r *run) { r.restart(r.a); r.restart(r.b) }, nil},
	{sourceKilled, func(r *run) { r.vm.Kill() }, []outcome{dead, halved}},
	{twinKilled, (*run).killTwin, []outcome{frozen, dead}},
	{"link cut", func(r *run) { r.cut(true, true) }, nil},
	{"link cut to the destination", func(r *run) { r.cut(true, false) }, nil},
	{"link cut to the source", func(r *run) { r.cut(false, true) }, nil},
	{"link stalled", (*run).stall, nil},
	{"source journal full", func(r *run) { r.fill(r.disks[r.a]) }, nil},
	{"destination journal full", func(r *run) { r.fill(r.disks[r.b]) }, nil},
	{noMemory, func(r *run) { r.fill(r.memory) }, nil},
	{powersOff, (*run).powerOff, []outcome{off, dead}},
}

// A way leads to a state that no undisturbed eviction comes to: something is done in a state before
// it.
type way struct {
	at string
	do func(*run)
}

func (r *run) abort() {
	// It answers when the eviction has ended.
	go r.a.api.Abort(r.t.Context(), connect.NewRequest(&hostv1.AbortRequest{Id: r.eviction}))
	time.Sleep(200 * time.Millisecond)
}

var (
	abortLoading = way{"source/loading", (*run).abort}
	cutPushing   = way{"source/pushing", func(r *run) { r.cut(true, true) }}
	twinDies     = way{"source/pushing", (*run).killTwin}
	guestEnds    = way{"source/pushing", (*run).powerOff}
)

// ways are those to the states that want one; of the destination they begin at the source, which is
// where an eviction is led.
var ways = map[string]way{
	"source/in doubt":          {"destination/running", func(r *run) { r.cut(true, true) }},
	"source/reconnecting":      cutPushing,
	"source/rolling back":      abortLoading,
	"source/aborted":           abortLoading,
	"source/lost contact":      twinDies,
	"destination/cut off":      cutPushing,
	"destination/aborted":      abortLoading,
	"destination/lost contact": twinDies,
	"source/shut down":         guestEnds,
	"destination/shut down":    guestEnds,
}

// points are all states of both machines, as the code has them.
func points() (list []string) {
	for _, s := range evict.SourceStates() {
		list = append(list, "source/"+string(s))
	}
	for _, s := range evict.DestinationStates() {
		list = append(list, "destination/"+string(s))
	}
	return list
}

// refusal leads to the two states refused: an offer that does not fit.
func refusal(at string) bool { return strings.HasSuffix(at, "/refused") }

// late are the states in which all pages are at the destination: the guest cannot power itself off
// sooner.
var late = []string{"destination/completing", "destination/completed", "source/retiring",
	"source/completed"}

// reachTime is how long an eviction may take to a state, on a busy machine. A guest that powers
// itself off meanwhile needs its pages for that.
const reachTime = 2 * time.Minute

// load is what the VMs do: a little, so that several evictions may run side by side.
var load = lab.Load{HotMiB: 16, IdleMiB: 48, Slow: true}

// disturb evicts a VM, has the faults happen in the state, and returns where the VM is when all has
// settled. A second fault comes so long after the first was mended; or 10 times as long after that
// began, where no machine came to a state of recovery before: not every fault is one to recover
// from, and one that is may not be noticed yet.
func disturb(t *testing.T, l *lab.Lab, saved *lab.Saved, c cell, delay time.Duration) outcome {
	r := &run{t: t, lab: l, disks: map[*site]*lab.SmallDisk{}}
	vm, err := saved.Start(labtest.Within(t, time.Minute), l.A)
	if err != nil {
		t.Fatal(err)
	}
	r.vm = vm
	t.Cleanup(func() {
		r.vm.Kill()
		if r.expected != nil {
			for _, vm := range r.expected.VMs() {
				vm.Kill()
			}
		}
		if err := errors.Join(l.SetLink(true, true), l.Stall(false)); err != nil {
			t.Error(err)
		}
	})
	r.a, r.b = sites(t, l)
	for _, s := range []*site{r.a, r.b} {
		if c.has("source journal full") || c.has("destination journal full") {
			r.disks[s] = r.smallDisk(64 << 20)
			if err := os.Symlink(r.disks[s].Dir, filepath.Join(s.dir, "journal")); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.a.describe("web1", r.vm.QMP, r.vm.Args)
	twin := &lab.VM{Spec: r.vm.Spec, Guest: r.vm.Guest}
	if refusal(c.at) {
		twin.Spec.MemoryMiB /= 2
	}
	options := &hostv1.EvictOptions{SkipChecks: true}
	if (c.has(powersOff) || strings.HasSuffix(c.at, "/shut down")) && !slices.Contains(late, c.at) {
		options.RateLimit = slow
	}
	if c.has(noMemory) {
		size := twin.Spec.MemoryMiB
		r.memory = r.smallDisk(uint64(size+16) << 20)
		twin.Spec.Machine += ",memory-backend=pc.ram"
		twin.Spec.Extra = append(slices.Clone(twin.Spec.Extra), "-object",
			fmt.Sprintf("memory-backend-file,id=pc.ram,size=%dM,share=on,mem-path=%s", size,
				r.memory.Dir))
		// Once it is complete, nothing but the kernel stands between a page that was left out and a
		// host without memory for it.
		options.SendFree = true
	}
	r.expected = r.b.expect("web1", twin)

	w, detour := ways[c.at]
	at := r.at(c.at)
	hold := map[*site][]string{}
	hold[at] = append(hold[at], c.at)
	if detour {
		hold[r.at(w.at)] = append(hold[r.at(w.at)], w.at)
	}
	r.a.start(hold[r.a]...)
	r.b.start(hold[r.b]...)
	r.begun = time.Now()
	e, err := r.a.evictWith("web1", "hostb", options)
	if err != nil {
		t.Fatal(err)
	}
	r.eviction = e.Id
	if detour {
		if !r.at(w.at).reach(w.at, reachTime) {
			t.Fatalf("the eviction did not come to %s", w.at)
		}
		w.do(r)
		r.at(w.at).release(w.at)
	}
	if !at.reach(c.at, reachTime) {
		t.Fatalf("the eviction did not come to %s", c.at)
	}
	c.fault.do(r)
	at.release(c.at)
	if c.second != nil {
		if c.when == onceMended {
			r.mend()
			time.Sleep(delay)
		} else if limit := 10 * delay; !r.recovering(limit) {
			t.Logf("no machine came to a state of recovery within %v", limit)
		}
		t.Logf("%s: the %s at %q, the %s at %q", c.second.name, r.a.name, r.state(r.a), r.b.name,
			r.state(r.b))
		c.second.do(r)
	}
	r.mend()
	return r.settle(c)
}

func (r *run) smallDisk(bytes uint64) *lab.SmallDisk {
	disk, err := r.lab.SmallDisk(bytes)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := disk.Close(); err != nil {
			r.t.Error(err)
		}
	})
	return disk
}

// recovery are the states in which an engine gets over a fault.
var recovery = []string{"source/rolling back", "source/in doubt", "source/reconnecting",
	"destination/cut off"}

// recovering waits until a machine comes to a state of recovery, and reports whether one did.
func (r *run) recovering(limit time.Duration) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for _, s := range []*site{r.a, r.b} {
			for _, at := range s.came() {
				if slices.Contains(recovery, at) {
					return true
				}
			}
		}
	}
	return false
}

// state is what a daemon says of the eviction's state, for the log.
func (r *run) state(s *site) string {
	ctx, cancel := context.WithTimeout(r.t.Context(), 100*time.Millisecond)
	defer cancel()
	e, err := s.api.GetEviction(ctx, connect.NewRequest(&hostv1.GetEvictionRequest{Id: r.eviction}))
	if err != nil {
		return connect.CodeOf(err).String()
	}
	return cmp.Or(e.Msg.Outcome, e.Msg.State)
}

func (r *run) at(point string) *site {
	if strings.HasPrefix(point, "source/") {
		return r.a
	}
	return r.b
}

// look returns the eviction as a daemon sees it; nil if it knows of none.
func (r *run) look(s *site) *hostv1.Eviction {
	e, err := s.api.GetEviction(labtest.Within(r.t, 10*time.Second),
		connect.NewRequest(&hostv1.GetEvictionRequest{Id: r.eviction}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return e.Msg
}

// ended waits until both sides are done, and returns the eviction as each sees it. The destination
// may know of none.
func (r *run) ended() (src, dst *hostv1.Eviction) {
	limit := time.Now().Add(90 * time.Second)
	if r.domain != nil { // libvirt may wait for a job that has ended, and does so for 30 s
		limit = limit.Add(time.Minute)
	}
	for {
		src, dst = r.look(r.a), r.look(r.b)
		if src == nil {
			r.t.Fatal("the source does not know of the eviction")
		}
		if src.Outcome != "" && (src.EndedAt != nil || src.Decidable) &&
			(dst == nil || dst.EndedAt != nil) {
			return src, dst
		}
		if time.Now().After(limit) {
			r.t.Fatalf("it does not come to an end: source %v; destination %v", src, dst)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// settle waits until both sides are done, and checks all that must be true then.
func (r *run) settle(c cell) outcome {
	t := r.t
	src, dst := r.ended()
	twins := r.expected.VMs()
	if n := len(twins); n > 0 && r.told.Load() && src.Outcome == "completed" {
		if err := twins[n-1].Ended(labtest.Within(t, time.Minute)); err != nil {
			t.Fatalf("the guest was told to power itself off: %v", err)
		}
	}
	var twin *lab.VM
	alive := 0
	for _, vm := range twins {
		if vm.Alive() {
			twin = vm
			alive++
		}
	}
	if alive > 1 {
		t.Fatalf("%d twins are alive", alive)
	}
	here, there := status(r.vm), status(twin)
	t.Logf("source: %q, %q, mark %q, QEMU %q; destination: QEMU %q", src.Outcome, src.Reason,
		src.Mark, here, there)
	if here == "running" && there == "running" {
		t.Fatal("TWO COPIES RUN")
	}
	o := nowhere
	asked := c.has(powersOff) || strings.HasSuffix(c.at, "/shut down")
	switch {
	case src.Outcome == "shut down":
		if here != "" || there != "" {
			t.Fatalf("it is told to be shut down, and the source's QEMU is %q, the "+
				"destination's %q", here, there)
		}
		o = off
	case here == "" && there == "" && r.told.Load() && !c.has(twinKilled) &&
		src.Outcome == "completed":
		o = off // just after the end
	case here == "" && there == "" &&
		((src.Outcome == "refused" || src.Outcome == "aborted") && c.has(sourceKilled) ||
			src.Outcome == "completed" && src.Mark == string(evict.MarkCompleted) &&
				c.has(twinKilled)):
		o = dead // after the end, or as good as
	case src.Outcome == "completed":
		if there != "running" || here != "" {
			t.Fatalf("it is told to be complete, and the source's QEMU is %q, the destination's %q",
				here, there)
		}
		o = moved
		labtest.MustCheck(t, twin)
	case src.Outcome == "aborted", src.Outcome == "refused":
		if here != "running" || there != "" {
			t.Fatalf("it is told to be %s, and the source's QEMU is %q, the destination's %q",
				src.Outcome, here, there)
		}
		o = stayed
		labtest.MustCheck(t, r.vm)
	case here != "" && src.Decidable:
		if len(src.Remedy) == 0 || there != "" {
			t.Fatalf("it is frozen with the remedies %q, and the destination's QEMU is %q",
				src.Remedy, there)
		}
		r.decide(src)
		o = frozen
		labtest.MustCheck(t, r.vm)
	case here == "" && there == "" && len(twins) == 0,
		here == "" && there == "" && dst != nil && dst.Mark == string(evict.MarkNeverRan):
		o = dead
	case here == "" && there == "" && dst != nil && dst.Outcome == "shut down":
		o = off // and the source's QEMU was killed before that was heard
	case here == "" && there == "" && c.has(sourceKilled) && c.has(twinKilled):
		if src.Outcome != "lost contact" {
			t.Fatalf("both QEMUs are gone, and the source says %v", src)
		}
		o = dead
	case here == "":
		if dst == nil || dst.Outcome != "lost contact" {
			t.Fatalf("the source's QEMU is gone with pages that the destination lacks, which "+
				"says %v", dst)
		}
		o = halved
	}
	if o != moved && o != stayed && !(o == off && asked) && !c.allows(o) &&
		!(o == frozen && strings.HasSuffix(c.at, "/lost contact")) {
		t.Fatalf("the VM %s; source %v; destination %v", o, src, dst)
	}
	r.once(o)
	r.clean()
	return o
}

// decide has the VM that stands frozen go on at the source.
func (r *run) decide(e *hostv1.Eviction) {
	_, err := r.a.api.Decide(labtest.Within(r.t, time.Minute),
		connect.NewRequest(&hostv1.DecideRequest{Id: e.Id,
			Decision: hostv1.Decision_DECISION_RESUME_HERE, Confirm: e.Vm}))
	if err != nil {
		r.t.Fatal(err)
	}
	if r.domain != nil { // which virsh is asked about
		return
	}
	if here := status(r.vm); here != "running" {
		r.t.Fatalf("it was decided that the VM goes on here, and it is %q", here)
	}
}

// once checks by the guest's own reports that it never ran in two places, nor went back and forth.
func (r *run) once(o outcome) {
	changes, last := 0, r.vm.Name
	for _, s := range r.vm.Guest.Samples() {
		if s.VM != last {
			changes, last = changes+1, s.VM
		}
	}
	if most := map[outcome]int{moved: 1, frozen: 2, dead: 1, halved: 1, off: 1}[o]; changes > most {
		r.t.Errorf("the guest reported from one QEMU and the other, with %d changes", changes)
	}
}

// clean checks that the daemons leave nothing behind but what tells of the eviction.
func (r *run) clean() {
	for _, s := range []*site{r.a, r.b} {
		list, err := s.api.ListEvictions(r.t.Context(),
			connect.NewRequest(&hostv1.ListEvictionsRequest{OpenOnly: true}))
		if err != nil {
			r.t.Error(err)
		} else if len(list.Msg.Evictions) > 0 {
			r.t.Errorf("%s has open evictions: %v", s.name, list.Msg.Evictions)
		}
		left := s.leftBehind()
		// What restores the VM's huge pages may be writing to its file.
		for limit := time.Now().Add(10 * time.Second); len(left) > 0 &&
			time.Now().Before(limit); left = s.leftBehind() {
			time.Sleep(50 * time.Millisecond)
		}
		for _, f := range left {
			r.t.Errorf("%s is left behind", f)
		}
	}
}

// leftBehind returns the files of the host's journal that do not tell of an eviction.
func (s *site) leftBehind() (list []string) {
	s.t.Helper()
	files, err := filepath.Glob(filepath.Join(s.dir, "journal", "*", "*"))
	if err != nil {
		s.t.Error(err)
	}
	for _, f := range files {
		switch filepath.Base(f) {
		case "log", evict.KeptTrace, evict.KeptHeard, evict.KeptHuge, journal.Lasting + "domain":
		default:
			list = append(list, f)
		}
	}
	return list
}

// status is the run state of a VM's QEMU: empty if it has ended, "stopped" if its process is,
// "stuck" if it does not answer.
func status(vm *lab.VM) string {
	if vm == nil || !vm.Alive() {
		return ""
	}
	if p, err := process.Find(vm.PID()); err == nil {
		if stopped, err := p.Stopped(); err == nil && stopped {
			return "stopped"
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, err := vm.Status(ctx)
	if err == nil {
		return s
	}
	if vm.Ended(ctx) == nil { // one that was killed does not answer, and takes a moment to end
		return ""
	}
	return "stuck"
}

package host

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
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
	// undo ends what a fault began; the daemons are held no longer then.
	undo []func()
}

// A fault is what happens to an eviction in some state.
type fault struct {
	name string
	do   func(*run)
	// allowed are the outcomes that there may be besides moved and stayed: where physics allows no better.
	allowed []outcome
}

// outcome is where the VM is in the end.
type outcome string

const (
	moved   outcome = "runs on the destination"
	stayed  outcome = "runs on the source"
	frozen  outcome = "frozen on the source, resumed there by an operator"
	dead    outcome = "ended, as its QEMU was killed where it ran, whole"
	halved  outcome = "lost, as its QEMU on the source was killed while it held pages"
	off     outcome = "ended, as its guest powered itself off on the destination"
	nowhere outcome = "lost" // never allowed
)

// cutTime is how long the link is away: longer than it takes to notice.
const cutTime = 4 * time.Second

// later undoes a fault.
func (r *run) later(after time.Duration, f func() error) {
	r.undo = append(r.undo, func() {
		time.Sleep(after)
		if err := f(); err != nil {
			r.t.Error(err)
		}
	})
}

func (r *run) cut(aToB, bToA bool) {
	if err := r.lab.SetLink(aToB, bToA); err != nil {
		r.t.Fatal(err)
	}
	r.later(cutTime, func() error { return r.lab.SetLink(true, true) })
}

func (r *run) restart(s *site) {
	s.kill()
	r.later(100*time.Millisecond, func() error { s.start(); return nil })
}

func (r *run) fill(s *site) {
	if err := r.disks[s].Fill(); err != nil {
		r.t.Fatal(err)
	}
	r.later(3*time.Second, func() error { return r.disks[s].Free() })
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
		for limit := time.Now().Add(30 * time.Second); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
			samples, vms := r.vm.Guest.Samples(), r.expected.VMs()
			if n := len(vms); n > 0 && samples[len(samples)-1].VM == vms[n-1].Name {
				r.vm.Guest.PowerOff(vms[n-1]) // it may have ended since
				return
			}
			if e, err := r.a.api.GetEviction(r.t.Context(), connect.NewRequest(&hostv1.GetEvictionRequest{Id: r.eviction})); err == nil && e.Msg.Outcome != "" {
				return
			}
		}
	}()
	r.undo = append(r.undo, func() { <-done })
}

// slow is how many bytes a second are pushed where the guest is to power itself off before the end.
const slow = 4 << 20

func (c cell) rate() uint64 {
	if c.fault.name == powersOff || strings.HasSuffix(c.at, "/shut down") {
		return slow
	}
	return 0
}

const powersOff = "guest powers off"

// faults are what may happen.
var faults = []fault{
	{"source daemon killed", func(r *run) { r.restart(r.a) }, nil},
	{"destination daemon killed", func(r *run) { r.restart(r.b) }, nil},
	{"both daemons killed", func(r *run) { r.restart(r.a); r.restart(r.b) }, nil},
	{"source QEMU killed", func(r *run) { r.vm.Kill() }, []outcome{dead, halved}},
	{"destination QEMU killed", func(r *run) { r.killTwin() }, []outcome{frozen, dead}},
	{"link cut", func(r *run) { r.cut(false, false) }, nil},
	{"link cut to the destination", func(r *run) { r.cut(false, true) }, nil},
	{"link cut to the source", func(r *run) { r.cut(true, false) }, nil},
	{"link stalled", func(r *run) {
		if err := r.lab.Stall(true); err != nil {
			r.t.Fatal(err)
		}
		r.later(cutTime, func() error { return r.lab.Stall(false) })
	}, nil},
	{"source journal full", func(r *run) { r.fill(r.a) }, nil},
	{"destination journal full", func(r *run) { r.fill(r.b) }, nil},
	{powersOff, (*run).powerOff, []outcome{off, dead}},
}

// A way leads to a state that no undisturbed eviction comes to: something is done in a state before it.
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
	cutPushing   = way{"source/pushing", func(r *run) { r.cut(false, false) }}
	twinDies     = way{"source/pushing", (*run).killTwin}
	guestEnds    = way{"source/pushing", (*run).powerOff}
)

// ways are those to the states that want one; of the destination they begin at the source, which is where an eviction is led.
var ways = map[string]way{
	"source/in doubt":          {"destination/running", func(r *run) { r.cut(false, false) }},
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

// cell is a state and what happens in it.
type cell struct {
	at    string
	fault fault
}

func (c cell) String() string { return c.at + ": " + c.fault.name }

// TestChaos has something happen in states of an eviction, and looks what becomes of the VM. By default it takes a sample by
// chance; VACATE_CHAOS=N has it take all cells N times, and VACATE_CHAOS_RESULT=FILE a table written.
func TestChaos(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e8})
	var cells []cell
	for _, at := range points() {
		for _, f := range faults {
			cells = append(cells, cell{at, f})
		}
	}
	rounds, err := strconv.Atoi(os.Getenv("VACATE_CHAOS"))
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("VACATE_CHAOS_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	random.Shuffle(len(cells), func(i, j int) { cells[i], cells[j] = cells[j], cells[i] })
	if only := os.Getenv("VACATE_CHAOS_ONLY"); only != "" {
		cells = slices.DeleteFunc(cells, func(c cell) bool { return !strings.Contains(c.String(), only) })
		rounds, err = max(rounds, 1), nil
	}
	if err != nil {
		cells, rounds = cells[:12], 1
	}
	table := map[string]map[string][]string{}
	file := os.Getenv("VACATE_CHAOS_RESULT")
	for round := range rounds {
		for _, c := range cells {
			t.Run(strings.ReplaceAll(fmt.Sprintf("%v/%d", c, round), " ", "_"), func(t *testing.T) {
				result := "FAILED"
				defer func() {
					if table[c.at] == nil {
						table[c.at] = map[string][]string{}
					}
					table[c.at][c.fault.name] = append(table[c.at][c.fault.name], result)
					if file != "" {
						writeTable(t, file, table)
					}
				}()
				o := disturb(t, l, c)
				if !t.Failed() {
					result = string(o)
				}
			})
		}
	}
}

// disturb evicts a VM, has the fault happen in the state, and returns where the VM is when all has settled.
func disturb(t *testing.T, l *lab.Lab, c cell) outcome {
	r := &run{t: t, lab: l, disks: map[*site]*lab.SmallDisk{}}
	r.vm = boot(t, l.A, lab.Spec{MemoryMiB: 192, Load: lab.Load{HotMiB: 16, IdleMiB: 48}})
	t.Cleanup(func() {
		r.vm.Kill()
		if r.expected != nil {
			for _, vm := range r.expected.VMs() {
				vm.Kill()
			}
		}
	})
	r.a, r.b = sites(t, l)
	for _, s := range []*site{r.a, r.b} {
		if strings.Contains(c.fault.name, "journal full") {
			disk, err := l.SmallDisk(64 << 20)
			if err != nil {
				t.Fatal(err)
			}
			r.disks[s] = disk
			if err := os.Symlink(disk.Dir, filepath.Join(s.dir, "journal")); err != nil {
				t.Fatal(err)
			}
		}
	}
	r.a.describe("web1", r.vm.QMP, r.vm.Args)
	twin := &lab.VM{Spec: r.vm.Spec, Guest: r.vm.Guest}
	if refusal(c.at) {
		twin.Spec.MemoryMiB /= 2
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
	e, err := r.a.evictAt("web1", "hostb", c.rate())
	if err != nil {
		t.Fatal(err)
	}
	r.eviction = e.Id
	if detour {
		if !r.at(w.at).reach(w.at, 30*time.Second) {
			t.Fatalf("the eviction did not come to %s", w.at)
		}
		w.do(r)
		r.at(w.at).release(w.at)
	}
	if !at.reach(c.at, 30*time.Second) {
		t.Fatalf("the eviction did not come to %s", c.at)
	}
	c.fault.do(r)
	at.release(c.at)
	for _, undo := range r.undo {
		undo()
	}
	return r.settle(c)
}

func (r *run) at(point string) *site {
	if strings.HasPrefix(point, "source/") {
		return r.a
	}
	return r.b
}

// look returns the eviction as a daemon sees it; nil if it knows of none.
func (r *run) look(s *site) *hostv1.Eviction {
	e, err := s.api.GetEviction(labtest.Within(r.t, 10*time.Second), connect.NewRequest(&hostv1.GetEvictionRequest{Id: r.eviction}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return e.Msg
}

// settle waits until both sides are done, and checks all that must be true then.
func (r *run) settle(c cell) outcome {
	t := r.t
	var src, dst *hostv1.Eviction
	limit := time.Now().Add(60 * time.Second)
	for {
		src, dst = r.look(r.a), r.look(r.b)
		if src == nil {
			t.Fatal("the source does not know of the eviction")
		}
		if src.Outcome != "" && (src.EndedAt != nil || src.Decidable) && (dst == nil || dst.EndedAt != nil) {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("it does not come to an end: source %v; destination %v", src, dst)
		}
		time.Sleep(50 * time.Millisecond)
	}
	twins := r.expected.VMs()
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
	t.Logf("source: %q, %q, mark %q, QEMU %q; destination: QEMU %q", src.Outcome, src.Reason, src.Mark, here, there)
	if here == "running" && there == "running" {
		t.Fatal("TWO COPIES RUN")
	}
	o := nowhere
	switch {
	case src.Outcome == "shut down":
		if here != "" || there != "" {
			t.Fatalf("it is told to be shut down, and the source's QEMU is %q, the destination's %q", here, there)
		}
		o = off
	case here == "" && there == "" && c.fault.name == powersOff && src.Outcome == "completed":
		o = dead // just after the end
	case here == "" && there == "" && ((src.Outcome == "refused" || src.Outcome == "aborted") && c.fault.name == "source QEMU killed" || src.Outcome == "completed" && src.Mark == string(evict.MarkCompleted) && c.fault.name == "destination QEMU killed"):
		o = dead // after the end, or as good as
	case src.Outcome == "completed":
		if there != "running" || here != "" {
			t.Fatalf("it is told to be complete, and the source's QEMU is %q, the destination's %q", here, there)
		}
		o = moved
		labtest.MustCheck(t, twin)
	case src.Outcome == "aborted", src.Outcome == "refused":
		if here != "running" || there != "" {
			t.Fatalf("it is told to be %s, and the source's QEMU is %q, the destination's %q", src.Outcome, here, there)
		}
		o = stayed
		labtest.MustCheck(t, r.vm)
	case here != "" && src.Decidable:
		if len(src.Remedy) == 0 || there != "" {
			t.Fatalf("it is frozen with the remedies %q, and the destination's QEMU is %q", src.Remedy, there)
		}
		r.decide(src)
		o = frozen
		labtest.MustCheck(t, r.vm)
	case here == "" && there == "" && len(twins) == 0, here == "" && there == "" && dst != nil && dst.Mark == string(evict.MarkNeverRan):
		o = dead
	case here == "":
		if dst.Outcome != "lost contact" {
			t.Fatalf("the source's QEMU is gone with pages that the destination lacks, which says %v", dst)
		}
		o = halved
	}
	asked := c.fault.name == powersOff || strings.HasSuffix(c.at, "/shut down")
	if o != moved && o != stayed && !(o == off && asked) && !slices.Contains(c.fault.allowed, o) && !(o == frozen && strings.HasSuffix(c.at, "/lost contact")) {
		t.Fatalf("the VM %s; source %v; destination %v", o, src, dst)
	}
	r.once(o)
	r.clean()
	return o
}

// decide has the VM that stands frozen go on at the source.
func (r *run) decide(e *hostv1.Eviction) {
	_, err := r.a.api.Decide(labtest.Within(r.t, time.Minute), connect.NewRequest(&hostv1.DecideRequest{Id: e.Id, Decision: hostv1.Decision_DECISION_RESUME_HERE, Confirm: "web1"}))
	if err != nil {
		r.t.Fatal(err)
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
		list, err := s.api.ListEvictions(r.t.Context(), connect.NewRequest(&hostv1.ListEvictionsRequest{OpenOnly: true}))
		if err != nil {
			r.t.Error(err)
		} else if len(list.Msg.Evictions) > 0 {
			r.t.Errorf("%s has open evictions: %v", s.name, list.Msg.Evictions)
		}
		files, err := filepath.Glob(filepath.Join(s.dir, "journal", "*", "*"))
		if err != nil {
			r.t.Error(err)
		}
		for _, f := range files {
			if name := filepath.Base(f); name != "log" && name != evict.KeptTrace && name != evict.KeptHeard {
				r.t.Errorf("%s is left behind", f)
			}
		}
	}
}

// status is the run state of a VM's QEMU: empty if it has ended, "stopped" if its process is, "stuck" if it does not answer.
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
	if err != nil {
		if !vm.Alive() {
			return ""
		}
		return "stuck"
	}
	return s
}

// writeTable writes what came of each cell.
func writeTable(t *testing.T, file string, table map[string]map[string][]string) {
	b, err := json.MarshalIndent(table, "", " ")
	if err == nil {
		err = os.WriteFile(file+".json", b, 0o644)
	}
	if err != nil {
		t.Error(err)
	}
	var out strings.Builder
	letters := map[string]string{"FAILED": "**FAILED**", string(moved): "D", string(stayed): "S", string(frozen): "F", string(dead): "K", string(halved): "L", string(off): "O"}
	out.WriteString("| state |")
	for _, f := range faults {
		fmt.Fprintf(&out, " %s |", f.name)
	}
	out.WriteString("\n|---|" + strings.Repeat("---|", len(faults)) + "\n")
	runs := 0
	for _, at := range points() {
		fmt.Fprintf(&out, "| %s |", at)
		for _, f := range faults {
			counts := map[string]int{}
			for _, o := range table[at][f.name] {
				counts[letters[o]]++
				runs++
			}
			var parts []string
			for _, l := range slices.Sorted(maps.Keys(counts)) {
				parts = append(parts, fmt.Sprintf("%s×%d", l, counts[l]))
			}
			fmt.Fprintf(&out, " %s |", strings.Join(parts, " "))
		}
		out.WriteString("\n")
	}
	fmt.Fprintf(&out, "\n%d runs\n", runs)
	if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
		t.Error(err)
	}
}

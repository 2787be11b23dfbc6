package host

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"

	"connectrpc.com/connect"
)

// The outcomes that a domain has besides those of other VMs.
const (
	stood  outcome = "stands on the source, as an operator suspended it"
	stands outcome = "stands on the destination, as an operator suspended it"
	taken  outcome = "runs on the destination, by virsh migrate"
	back   outcome = "runs on the source, by virsh migrate from the destination"
)

// restartLibvirt kills libvirt's daemon on a host, and starts another.
func (r *run) restartLibvirt(h *libvirtlab.Host) {
	h.Kill()
	r.later(200*time.Millisecond, func() error {
		if err := h.Start(); err != nil {
			return err
		}
		return h.Ready(labtest.Within(r.t, time.Minute))
	})
}

// virsh has an operator type a command. It may have to wait for libvirt's job.
func (r *run) virsh(h *libvirtlab.Host, args ...string) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		out, err := h.Virsh(labtest.Within(r.t, 2*time.Minute), args...)
		r.t.Logf("virsh %q on %s: %q, %v", args, h.Name, out, err)
	}()
	r.waits = append(r.waits, done)
	select {
	case <-done:
	case <-time.After(time.Second):
	}
}

// What software emulation notes of the pages that a guest changes while it is copied has gaps. So
// an operator's virsh migrate is not live: the guest stands until it is on the other host.

// aborts is `vacate abort` on the source.
const aborts = "vacate abort"

// abortTold aborts the eviction, and remembers what the daemon said.
func (r *run) abortTold() {
	done := make(chan struct{})
	go func() { // it answers when the eviction has ended
		defer close(done)
		e, err := r.a.api.Abort(labtest.Within(r.t, 2*time.Minute),
			connect.NewRequest(&hostv1.AbortRequest{Id: r.eviction}))
		r.t.Logf("vacate abort: %v, %v", e, err)
		r.granted = err == nil && e.Msg.Outcome != string(evict.Completed)
	}()
	r.waits = append(r.waits, done)
	select {
	case <-done:
	case <-time.After(300 * time.Millisecond): // it has been taken by then
	}
}

// verb is what an operator types on the source or on the destination.
func verb(source bool, allowed []outcome, words ...string) fault {
	name := "virsh " + words[0] + " on the destination"
	if source {
		name = "virsh " + words[0] + " on the source"
	}
	return fault{name, func(r *run) {
		here, there := r.domain.Hosts.A, r.domain.Hosts.B
		if !source {
			here, there = there, here
		}
		args := append(slices.Clone(words), r.domain.Domain.Name)
		if words[0] == "migrate" {
			args = append(args, there.URI, "--migrateuri",
				"unix://"+filepath.Join(r.lab.RunDir(), "op-"+r.domain.Domain.Name))
		}
		r.virsh(here, args...)
	}, allowed}
}

// domainFaults are what may happen to a domain.
var domainFaults = []fault{
	{"vacated killed on the source", func(r *run) { r.restart(r.a) }, nil},
	{"vacated killed on the destination", func(r *run) { r.restart(r.b) }, nil},
	{"vacated killed on both", func(r *run) { r.restart(r.a); r.restart(r.b) }, nil},
	{"libvirtd killed on the source", func(r *run) { r.restartLibvirt(r.domain.Hosts.A) }, nil},
	{"libvirtd killed on the destination", func(r *run) { r.restartLibvirt(r.domain.Hosts.B) },
		[]outcome{frozen}},
	{"libvirtd killed on both", func(r *run) {
		r.restartLibvirt(r.domain.Hosts.A)
		r.restartLibvirt(r.domain.Hosts.B)
	}, []outcome{frozen}},
	{sourceKilled, func(r *run) { r.vm.Kill() }, []outcome{dead, halved}},
	{twinKilled, (*run).killTwin, []outcome{frozen, dead}},
	{"link cut", func(r *run) { r.cut(true, true) }, nil},
	{aborts, (*run).abortTold, nil},
	verb(true, nil, "resume"), verb(false, nil, "resume"),
	verb(true, []outcome{stood}, "suspend"), verb(false, []outcome{stands}, "suspend"),
	verb(true, []outcome{dead, halved}, "destroy"),
	verb(false, []outcome{frozen, dead}, "destroy"),
	verb(true, nil, "shutdown"), verb(false, nil, "shutdown"),
	verb(true, nil, "domjobabort"), verb(false, nil, "domjobabort"),
	verb(true, []outcome{taken}, "migrate", "--unsafe", "--persistent", "--undefinesource"),
	verb(false, []outcome{back}, "migrate", "--unsafe", "--persistent", "--undefinesource"),
}

// uninteresting are states in which nothing of a domain is touched, or that come of a fault of
// their own.
var uninteresting = []evict.State{evict.Waiting, evict.Refused, evict.Aborted, evict.Lost,
	evict.ShutDown}

// domainCells are all cells of domains.
func domainCells() (cells []cell) {
	for _, at := range points() {
		_, s, _ := strings.Cut(at, "/")
		if slices.Contains(uninteresting, evict.State(s)) {
			continue
		}
		for _, f := range domainFaults {
			cells = append(cells, cell{at: at, fault: f})
		}
	}
	return cells
}

// telling are the cells of `make test`.
var telling = []string{
	"source/loading: libvirtd killed on the destination",
	"source/switching: " + sourceKilled,
	"destination/cut off: " + sourceKilled,
}

// TestDomainFaults is TestChaos for a domain of libvirt's. By default it takes a few telling cells.
// VACATE_DOMAINS=N has it take all cells N times, VACATE_DOMAINS_WORKERS=N so many at a time, and
// VACATE_DOMAINS_RESULT=FILE tables written. What FILE.json has already is not run again.
// VACATE_DOMAINS_ONLY=TEXT[;TEXT…] has it take the cells with that in their names.
func TestDomainFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	labtest.Need(t, libvirtlab.Probe())
	if setting("VACATE_CHAOS_WORKER", 0) != 0 {
		runDomains(t)
		return
	}
	c := newCampaign(t, "TestDomainFaults", "VACATE_DOMAINS", (*campaign).domainTables)
	runs := map[string]int{}
	if c.file != "" {
		if b, err := os.ReadFile(c.file + ".json"); err == nil {
			if err := json.Unmarshal(b, &c.results); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range c.results {
			runs[r.Cell]++
		}
	}
	only, rounds := os.Getenv("VACATE_DOMAINS_ONLY"), int(setting("VACATE_DOMAINS", 0))
	names := slices.Clone(telling)
	if rounds > 0 || only != "" {
		names = nil
		for _, c := range domainCells() {
			if only != "" && !slices.ContainsFunc(strings.Split(only, ";"),
				func(text string) bool { return strings.Contains(c.String(), text) }) {
				continue
			}
			for range max(rounds, 1) - runs[c.String()] {
				names = append(names, c.String())
			}
		}
	}
	shuffle(c.random(), names)
	c.run(t, names)
}

// runDomains is TestDomainFaults in a worker.
func runDomains(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e8, NoPin: true})
	hosts, err := libvirtlab.New(labtest.Within(t, 2*time.Minute), l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hosts.Close)
	cells := domainCells()
	for in, n := bufio.NewScanner(os.Stdin), 1; in.Scan(); n++ {
		i := slices.IndexFunc(cells, func(c cell) bool { return c.String() == in.Text() })
		if i < 0 {
			t.Fatalf("there is no cell %q", in.Text())
		}
		report(t, cells[i], func(t *testing.T, r *result) {
			name := fmt.Sprintf("web%d-%d", os.Getpid(), n)
			r.Outcome, r.Shown = disturbDomain(t, l, hosts, name, cells[i])
		})
	}
}

// shown is what was seen of a domain when all had settled.
type shown struct{ Source, Destination, Guest string }

// disturbDomain evicts a domain, has the fault happen in the state, and returns where the domain is
// when all has settled.
func disturbDomain(t *testing.T, l *lab.Lab, hosts *libvirtlab.Hosts, name string,
	c cell) (outcome, shown) {
	ctx := labtest.Within(t, 3*time.Minute)
	d, err := hosts.Start(ctx, name, libvirtlab.Spec{VM: lab.Spec{MemoryMiB: 192, Load: load,
		Devices: lab.Full}})
	if err != nil {
		t.Fatal(err)
	}
	m := manage(&libvirttest.Managed{T: t, Lab: l, Hosts: hosts, Domain: d}, false)
	r := &run{t: t, lab: l, a: m.a, b: m.b, vm: d.VM, expected: d.B, domain: m}
	t.Cleanup(func() {
		if err := l.SetLink(true, true); err != nil {
			t.Error(err)
		}
		for _, vm := range slices.Concat(d.A.VMs(), d.B.VMs()) {
			vm.Kill()
		}
		for _, h := range []*libvirtlab.Host{hosts.A, hosts.B} { // it may be there or not
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			h.Virsh(ctx, "undefine", name)
			cancel()
		}
	})
	t.Cleanup(func() { // before the daemons end
		if t.Failed() {
			for s, h := range map[*site]*libvirtlab.Host{r.a: hosts.A, r.b: hosts.B} {
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				out, err := h.Virsh(ctx, "domstate", "--reason", name)
				cancel()
				t.Logf("%s is %q; libvirt: %q, %v", s.name, r.state(s), out, err)
				b, _ := os.ReadFile(filepath.Join(h.Dir, "daemon.log"))
				lines := slices.DeleteFunc(strings.SplitAfter(string(b), "\n"),
					func(line string) bool { return strings.Contains(line, "ethtool ioctl") })
				t.Logf("libvirtd of %s:\n%s", s.name,
					strings.Join(lines[max(0, len(lines)-40):], ""))
			}
		}
	})
	w, detour := ways[c.at]
	at := r.at(c.at)
	hold := map[*site][]string{at: {c.at}}
	if detour {
		hold[r.at(w.at)] = append(hold[r.at(w.at)], w.at)
	}
	r.a.start(hold[r.a]...)
	r.b.start(hold[r.b]...)
	e, err := r.a.evictWith(name, "hostb", &hostv1.EvictOptions{SkipChecks: true,
		LoadTimeoutMs: 60_000})
	m.Check(err)
	r.eviction = e.Id
	if detour {
		if !r.at(w.at).reach(w.at, time.Minute) {
			t.Fatalf("the eviction did not come to %s", w.at)
		}
		w.do(r)
		r.at(w.at).release(w.at)
	}
	if !at.reach(c.at, time.Minute) {
		t.Fatalf("the eviction did not come to %s", c.at)
	}
	c.fault.do(r)
	at.release(c.at)
	r.mend()
	return r.judge(c)
}

// living returns the QEMU of those that lives, nil if none does.
func (r *run) living(vms []*lab.VM) (vm *lab.VM) {
	for _, other := range vms {
		switch {
		case !other.Alive():
		case vm != nil:
			r.t.Fatal("two QEMUs of the domain are alive on a host")
		default:
			vm = other
		}
	}
	return vm
}

// silent is what virsh shows of a domain whose QEMU waits for memory that nobody has any more: it
// waits, too.
const silent = "no answer"

// shows is what virsh says of the domain on a host; "" if it has none.
func (r *run) shows(h *libvirtlab.Host) string {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	names, err := h.Virsh(ctx, "list", "--all", "--name")
	if err == nil && !slices.Contains(strings.Fields(names), r.domain.Domain.Name) {
		return ""
	}
	state, err := h.Virsh(ctx, "domstate", "--reason", r.domain.Domain.Name)
	if ctx.Err() != nil {
		return silent
	}
	if err != nil { // it has gone since
		return ""
	}
	return state
}

// judge waits until all has settled, and checks all that must be true then.
func (r *run) judge(c cell) (o outcome, s shown) {
	t, m := r.t, r.domain
	src, dst := r.ended()
	why := ""
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		s = shown{Source: r.shows(m.Hosts.A), Destination: r.shows(m.Hosts.B)}
		if o, why = r.verdict(c, src, dst, s); why == "" {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("%s: source %v; destination %v; virsh says %q and %q", why, src, dst,
				s.Source, s.Destination)
		}
	}
	t.Logf("source: %q, %q; destination: %v; virsh says %q and %q", src.Outcome, src.Reason, dst,
		s.Source, s.Destination)
	if o != moved && o != stayed && !c.allows(o) {
		t.Fatalf("the domain %s; source %v; destination %v", o, src, dst)
	}
	// What is rolling back already cannot be aborted.
	if c.has(aborts) && r.granted != (o == stayed) && c.at != "source/rolling back" {
		t.Fatalf("the abort was granted: %t; and the domain %s", r.granted, o)
	}
	if o == frozen && strings.HasPrefix(c.fault.name, "libvirtd") &&
		!strings.Contains(dst.Reason, "reason=daemon") {
		t.Fatalf("no libvirtd ended the twin: %v", dst)
	}
	r.turns(map[outcome]int{moved: 1, frozen: 1, dead: 1, halved: 1, stands: 1, taken: 1,
		back: 2}[o])
	s.Guest = r.proceed(o, src, s)
	r.leaveNothing()
	return o, s
}

// verdict says where the domain is, or what is wrong.
func (r *run) verdict(c cell, src, dst *hostv1.Eviction, s shown) (o outcome, why string) {
	m := r.domain
	here, there := r.living(m.Domain.A.VMs()), r.living(m.Domain.B.VMs())
	is := func(state, prefix string) bool { return strings.HasPrefix(state, prefix) }
	failed := src.Outcome == "aborted" || src.Outcome == "refused"
	at := "none"
	switch {
	case here != nil && there != nil:
		at = "both"
	case here != nil:
		at = "source"
	case there != nil:
		at = "destination"
	}
	switch {
	case at == "both":
		return "", "a QEMU of the domain lives on both hosts"
	case at == "source" && src.Decidable:
		return frozen, ""
	case at == "source" && is(s.Source, "running") && s.Destination == "":
		if o = stayed; src.Outcome == "completed" {
			o = back
		}
		return o, ""
	case at == "source" && is(s.Source, "paused") && s.Destination == "" && failed:
		return stood, ""
	case at == "destination" && is(s.Destination, "running") && s.Source == "":
		if o = moved; failed {
			o = taken
		}
		return o, ""
	case at == "destination" && is(s.Destination, "paused (user)") && s.Source == "" &&
		src.Outcome == "completed":
		return stands, ""
	case at == "destination" && src.Outcome == "lost contact" && dst != nil &&
		dst.Outcome == "lost contact":
		return halved, ""
	case at == "none" && dst != nil && dst.Outcome == "lost contact" && src.Outcome != "completed":
		return "", "both QEMUs have ended"
	case at == "none":
		return dead, ""
	}
	return "", "its QEMU lives on: " + at
}

// proceed has the domain go on after the eviction: what stayed is evicted once more, or moved by
// virsh. It returns what the guest said of its memory.
func (r *run) proceed(o outcome, src *hostv1.Eviction, s shown) string {
	t, m := r.t, r.domain
	name := m.Domain.Name
	h, other, vms := m.Hosts.A, m.Hosts.B, m.Domain.A
	switch o {
	case dead:
		if s.Source != "" && !m.starts(m.Hosts.A) {
			t.Error("the domain that was never elsewhere does not start with host a")
		}
		return "ended"
	case halved:
		r.living(m.Domain.B.VMs()).Kill()
		return "waits for memory"
	case moved, stands, taken:
		h, other, vms = m.Hosts.B, m.Hosts.A, m.Domain.B
	case frozen:
		r.decide(src)
		if s := m.Virsh(h, "domstate", "--reason", name); !strings.HasPrefix(s, "running") {
			t.Fatalf("it was decided that the domain goes on here, and virsh says %q", s)
		}
	}
	if o == stood || o == stands {
		m.Virsh(h, "resume", name)
	}
	vm := r.living(vms.VMs())
	if vm == nil {
		t.Fatal("the domain's QEMU has ended")
	}
	m.Check(m.Domain.VM.Guest.WaitOps(labtest.Within(t, time.Minute), 100))
	if all := m.Domain.VM.Guest.Samples(); all[len(all)-1].VM != vm.Name {
		t.Fatalf("the guest reports from %s, and not from %s", all[len(all)-1].VM, vm.Name)
	}
	if out := m.Virsh(other, "list", "--all", "--name"); out != "" {
		t.Errorf("host %s still has %q", other.Name, out)
	}
	if o != taken && o != back { // virsh migrate does not keep all
		if now := m.Virsh(h, "dumpxml", "--inactive", name); now != m.inactive {
			t.Errorf("the domain is defined as\n%s\nand was\n%s", now, m.inactive)
		}
		if !m.starts(h) {
			t.Errorf("the domain does not start with host %s", h.Name)
		}
	}
	if h == m.Hosts.A { // it must be able to leave, by whatever way
		if src.Id[0]%2 == 0 {
			e := m.evict(0)
			if end, err := m.a.watch(e.Id, 2*time.Minute); err != nil ||
				end.Outcome != string(evict.Completed) {
				t.Fatalf("it cannot be evicted again: %v, %v", end, err)
			}
		} else {
			m.Virsh(h, "migrate", "--unsafe", "--persistent", "--undefinesource", name,
				other.URI, "--migrateuri", "unix://"+filepath.Join(r.lab.RunDir(), "on-"+name))
		}
		var err error
		vm, err = m.Domain.Came(labtest.Within(t, time.Minute))
		m.Check(err)
		m.Check(vm.Guest.WaitOps(labtest.Within(t, time.Minute), 100))
	}
	check, err := vm.Guest.Check(labtest.Within(t, 2*time.Minute), vm)
	m.Check(err)
	said := fmt.Sprintf("%d bad pages", check.Bad)
	if check.Bad != 0 || check.Pages == 0 {
		t.Fatalf("%s of %d", said, check.Pages)
	}
	return said
}

// turns checks by the guest's own reports that it never ran in two places.
func (r *run) turns(most int) {
	changes, last := 0, r.vm.Name
	for _, s := range r.vm.Guest.Samples() {
		if s.VM != last {
			changes, last = changes+1, s.VM
		}
	}
	if changes > most {
		r.t.Errorf("the guest reported from one QEMU and the other, with %d changes", changes)
	}
}

// leaveNothing checks that nothing is left behind but what tells of the eviction.
func (r *run) leaveNothing() {
	r.clean()
	left := r.holders()
	for limit := time.Now().Add(20 * time.Second); len(left) > 0 &&
		time.Now().Before(limit); left = r.holders() {
		time.Sleep(50 * time.Millisecond)
	}
	if len(left) > 0 {
		r.t.Errorf("these processes hold what no eviction needs any more: %v", left)
	}
}

// holders are the processes that keep something open for evictions of the domain.
func (r *run) holders() (pids []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		b, _ := os.ReadFile(file)
		args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if len(args) == 3 && args[1] == "hold" && args[2] == r.domain.Domain.Name {
			pids = append(pids, filepath.Base(filepath.Dir(file)))
		}
	}
	return pids
}

var domainLetters = map[outcome]string{"": "**FAILED**", moved: "D", stayed: "S", frozen: "F",
	dead: "K", halved: "L", stood: "P", stands: "Q", taken: "M", back: "B"}

// domainTables are what came of all runs, in Markdown.
func (c *campaign) domainTables() string {
	var states, events []string
	for _, c := range domainCells() {
		if !slices.Contains(states, c.at) {
			states = append(states, c.at)
		}
		if !slices.Contains(events, c.fault.name) {
			events = append(events, c.fault.name)
		}
	}
	by, sums := map[string][]result{}, map[string]int{}
	for _, r := range c.results {
		by[r.Cell] = append(by[r.Cell], r)
		sums[domainLetters[r.Outcome]]++
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%d runs, %d at a time. Failed: %d. Outcomes: %s.\n", len(c.results),
		c.workers, sums[domainLetters[""]], cellText(sums))
	for _, event := range events {
		if !slices.ContainsFunc(c.results,
			func(r result) bool { return strings.HasSuffix(r.Cell, ": "+event) }) {
			continue
		}
		fmt.Fprintf(&out, "\n### %s\n\n| in the state | outcome | virsh on the source | virsh on "+
			"the destination | the guest |\n|---|---|---|---|---|\n",
			event)
		for _, state := range states {
			rows := map[string]int{}
			for _, r := range by[state+": "+event] {
				rows[fmt.Sprintf("%s | %s | %s | %s", domainLetters[r.Outcome],
					cmp.Or(r.Shown.Source, "—"), cmp.Or(r.Shown.Destination, "—"),
					cmp.Or(r.Shown.Guest, "—"))]++
			}
			for _, row := range slices.Sorted(maps.Keys(rows)) {
				letter, rest, _ := strings.Cut(row, " | ")
				fmt.Fprintf(&out, "| %s | %s×%d | %s |\n", state, letter, rows[row], rest)
			}
		}
	}
	return out.String()
}

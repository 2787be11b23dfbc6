package evict_test

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/pushorder"
	"vacate/internal/guest/agent"
	"vacate/internal/guest/pageclass"
	"vacate/lab"
	"vacate/lab/labtest"
)

// A bareCase is a VM with the bare guest.
type bareCase struct {
	machine string
	vcpus   int
	memfd   bool
	async   bool
	mib     int // of memory; default 256
}

func (c bareCase) String() string {
	s := fmt.Sprintf("%s, vCPUs: %d", c.machine, c.vcpus)
	if c.memfd {
		s += ", memfd"
	}
	if c.async {
		s += ", async"
	}
	if c.mib != 0 {
		s += fmt.Sprintf(", %d MiB", c.mib)
	}
	return s
}

func (c bareCase) spec(q lab.QEMU) lab.Spec {
	s := lab.Spec{
		QEMU: q, BareMetal: true, Machine: c.machine, VCPUs: c.vcpus, Memfd: c.memfd,
		MemoryMiB: cmp.Or(c.mib, 256),
		Load:      lab.Load{Zipf: c.vcpus%2 == 0, Mixed: c.memfd},
	}
	s.Load.HotMiB, s.Load.IdleMiB, s.Load.OtherMiB = s.MemoryMiB/4, s.MemoryMiB/4, s.MemoryMiB/8
	if c.async {
		s.Cmdline = "vacate.async=1"
	}
	return s
}

// bareCases cover each number of CPUs, machine and kind of memory, with and without asynchronous
// page faults.
var bareCases = []bareCase{
	{machine: "pc", vcpus: 1},
	{machine: "pc", vcpus: 2, async: true},
	{machine: "q35", vcpus: 3, memfd: true},
	{machine: "q35", vcpus: 4, async: true},
	{machine: "pc", vcpus: 4, memfd: true, async: true},
	{machine: "q35", vcpus: 1, async: true},
}

// clockReports is how many reports judge the clocks.
const clockReports = 6

// evictBare evicts a bare guest, and then judges its memory, ticks and clocks.
func evictBare(t *testing.T, l *lab.Lab, spec lab.Spec) (last lab.Clocks, accel string) {
	t.Helper()
	vm := boot(t, l, spec)
	defer vm.Kill()
	twin := incoming(t, l, vm)
	defer twin.Kill()
	if twin.Spec.Accel == "kvm" {
		defer underKVM(t, twin)
	}
	r := evictVM(labtest.Within(t, 2*time.Minute), t, l, vm, twin)
	r.mustComplete(t)
	if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 10_000); err != nil {
		t.Error(err)
	}
	t.Logf("%+v", r.report)
	first, last := clocksOn(labtest.Within(t, time.Minute), t, twin)
	judgeClocks(t, vm.Guest.Clocks(), twin.Spec.Accel, first, last)
	labtest.MustCheck(t, twin)
	t.Logf("%+v", last)
	return last, twin.Spec.Accel
}

// clocksOn waits for reports from the twin, and returns the second and the last of them. The guest
// may have read what is in the first before the freeze.
func clocksOn(ctx context.Context, t *testing.T, twin *lab.VM) (first, last lab.Clocks) {
	t.Helper()
	for {
		n := 0
		for _, c := range twin.Guest.Clocks() {
			if c.VM != twin.Name {
				continue
			}
			if n++; n == 2 {
				first = c
			}
			last = c
		}
		if n >= clockReports {
			return first, last
		}
		if err := twin.Guest.WaitOps(ctx, 1); err != nil {
			t.Fatal(err)
		}
	}
}

func judgeClocks(t *testing.T, all []lab.Clocks, accel string, first, last lab.Clocks) {
	t.Helper()
	if last.Back != 0 {
		t.Errorf("a clock went back %d times", last.Back)
	}
	for i, c := range all[1:] {
		if c.TSC <= all[i].TSC || c.Ticks < all[i].Ticks {
			t.Errorf("the TSC or the ticks went from %+v to %+v", all[i], c)
		}
	}
	if last.Ticks == first.Ticks {
		t.Errorf("a CPU's timer stands: %+v, %+v", first, last)
	}
	if accel != "kvm" {
		return
	}
	// On the new host, the guest's clocks must go at the same rates as before, relative to one
	// another. The guest measures the rate of its TSC itself, and on a busy host it gets that
	// wrong.
	left := slices.IndexFunc(all, func(c lab.Clocks) bool { return c.VM == last.VM })
	if left < 2 {
		t.Fatalf("there are %d reports from before", left)
	}
	rates := func(a, b lab.Clocks) float64 {
		return (float64(b.KVMClock) - float64(a.KVMClock)) / float64(b.TSC-a.TSC)
	}
	before, after := rates(all[0], all[left-1]), rates(first, last)
	if after < before*0.99 || after > before*1.01 {
		t.Errorf("KVM's clock went at %.3f of the TSC's rate before, and at %.3f after", before,
			after)
		for _, c := range all {
			t.Logf("%+v", c)
		}
	}
}

// underKVM proves by QEMU's counters that the VM's CPUs ran under KVM.
func underKVM(t *testing.T, vm *lab.VM) {
	t.Helper()
	var stats []struct {
		Stats []struct {
			Name  string
			Value any
		}
	}
	err := vm.Execute(t.Context(), "query-stats", map[string]any{
		"target":    "vcpu",
		"providers": []any{map[string]any{"provider": "kvm", "names": []string{"exits"}}},
	}, &stats)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range stats {
		if len(s.Stats) == 1 && s.Stats[0].Value != float64(0) {
			return
		}
	}
	t.Errorf("QEMU counts no exits from KVM: %+v", stats)
}

// A guest at native speed moves on hosts with KVM, whatever its machine and memory, and its clocks
// go on.
func TestBareGuest(t *testing.T) {
	t.Parallel()
	l := labtest.New(t, lab.Options{Rate: 2e9})
	for _, c := range bareCases {
		t.Run(c.String(), func(t *testing.T) {
			c.mib = 96 // under emulation all of it is slow
			_, accel := evictBare(t, l, c.spec(lab.QEMU{}))
			t.Log("under", accel)
		})
	}
}

// A guest at native speed tells by its virtio port what each of its pages is used for, before an
// eviction and after: so its hot memory comes first, however scattered.
func TestBareGuestAgent(t *testing.T) {
	t.Parallel()
	defer evict.SetAgentTime(20 * time.Second)()
	l := labtest.New(t, lab.Options{Rate: 2e9})
	for i, machine := range []string{"pc", "q35"} {
		t.Run(machine, func(t *testing.T) {
			vm := boot(t, l, lab.Spec{BareMetal: true, Agent: true, Machine: machine, VCPUs: 1 + i,
				MemoryMiB: 128, Load: lab.Load{HotMiB: 20, IdleMiB: 30, OtherMiB: 40, Mixed: true}})
			defer vm.Kill()
			t.Log("under", vm.Spec.Accel)
			tellsPages(t, vm)
			twin := incoming(t, l, vm)
			defer twin.Kill()
			r := evictVM(labtest.Within(t, 2*time.Minute), t, l, vm, twin)
			r.mustComplete(t)
			know := r.report.Enlightenment
			t.Logf("%+v", know)
			if know.Source != evict.Agent {
				t.Fatalf("what is known comes of %q, want the agent: %s", know.Source, know.Doubts)
			}
			if err := vm.Guest.WaitOps(labtest.Within(t, time.Minute), 10_000); err != nil {
				t.Error(err)
			}
			tellsPages(t, twin)
			labtest.MustCheck(t, twin)
		})
	}
}

// tellsPages checks what the bare guest tells of its load.
func tellsPages(t *testing.T, vm *lab.VM) {
	t.Helper()
	ctx := labtest.Within(t, time.Minute)
	client, err := agent.Dial(ctx, vm.AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	options := agent.Options{Frames: uint64(vm.Spec.MemoryMiB) << 8, Deadline: 20 * time.Second}
	if _, err := client.Prepare(ctx, options); err != nil {
		t.Fatal(err)
	}
	s, stats, err := client.Ask(ctx, options)
	if err != nil {
		t.Fatal(err)
	}
	if stats.Prepared < 0 || stats.Incomplete || !s.Fresh {
		t.Errorf("the agent's answer: %+v, fresh: %v", stats, s.Fresh)
	}
	const perMiB = 256
	counts, hot := map[pageclass.Page]int{}, pushorder.Hot(s)
	for _, p := range s.Pages {
		counts[p]++
	}
	load := &vm.Spec.Load
	for _, want := range []struct {
		page       pageclass.Page
		mib, spare int
	}{
		{pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData, Owner: 1,
			Flags: pageclass.Mapped | pageclass.Accessed}, load.HotMiB, 2},
		{pageclass.Page{Kind: pageclass.Anon, Class: pageclass.UserData, Owner: 1,
			Flags: pageclass.Mapped}, load.IdleMiB, 4},
		{pageclass.Page{Kind: pageclass.Anon, Class: pageclass.Other, Owner: 2,
			Flags: pageclass.Mapped}, load.OtherMiB, 0},
	} {
		got := counts[want.page]
		if got < want.mib*perMiB || got > (want.mib+want.spare)*perMiB {
			t.Errorf("%d pages are %+v, want those of %d MiB", got, want.page, want.mib)
		}
	}
	if len(s.Sequence) != load.HotMiB*perMiB {
		t.Fatalf("the sequence has %d pages, want those of %d MiB", len(s.Sequence), load.HotMiB)
	}
	beside := 0
	for i, f := range s.Sequence {
		if !hot(s.Pages[f]) {
			t.Fatalf("frame %d is in the sequence, and told as %+v", f, s.Pages[f])
		}
		if i > 0 && f == s.Sequence[i-1]+1 {
			beside++
		}
	}
	if beside > len(s.Sequence)/10 {
		t.Errorf("%d of %d hot pages follow one another in memory: they are not scattered", beside,
			len(s.Sequence))
	}
}

// TestKVM is the campaign of `make kvm`: VACATE_KVM rounds of evictions of the bare guest with each
// QEMU. It writes a table to the file VACATE_KVM_RESULT.
func TestKVM(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("VACATE_KVM"))
	if err != nil || rounds < 1 {
		t.Skip("make kvm runs it")
	}
	l := labtest.New(t, lab.Options{Rate: 10e9})
	cases := append(bareCases[:len(bareCases):len(bareCases)],
		bareCase{machine: "pc", vcpus: 2, memfd: true},
		bareCase{machine: "q35", vcpus: 2, memfd: true, async: true},
		bareCase{machine: "pc", vcpus: 3, async: true},
		bareCase{machine: "q35", vcpus: 1, memfd: true})
	var table strings.Builder
	table.WriteString("| QEMU | VM | accelerator | evictions | without a fault | async page " +
		"faults |\n|---|---|---|---|---|---|\n")
	for _, find := range []func(context.Context) (lab.QEMU, error){
		lab.StockQEMU, cached(t, lab.Backports12QEMU), cached(t, lab.BackportsQEMU),
	} {
		q, err := find(labtest.Within(t, 5*time.Minute))
		labtest.Need(t, err)
		for _, c := range cases {
			good, async, accel := 0, uint64(0), ""
			for range rounds {
				ok := t.Run(q.Version+" "+c.String(), func(t *testing.T) {
					var last lab.Clocks
					last, accel = evictBare(t, l, c.spec(q))
					async += last.Async
				})
				if ok {
					good++
				}
			}
			fmt.Fprintf(&table, "| %s | %s | %s | %d | %d | %d |\n", q.Version, c, accel, rounds,
				good, async)
		}
	}
	t.Log("\n" + table.String())
	if name := os.Getenv("VACATE_KVM_RESULT"); name != "" {
		if err := os.WriteFile(name, []byte(table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

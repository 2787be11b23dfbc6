package host

import (
	"fmt"
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
)

// What docs/results has of daemons is measured here: go test -run '^$' -bench NAME -benchtime 3x
// ./internal/host

// reportOf is the report of an eviction that is complete.
func reportOf(t testing.TB, e *hostv1.Eviction) (r evict.Report) {
	t.Helper()
	if e.GetOutcome() != "completed" {
		t.Fatalf("the eviction: %v", e)
	}
	r, err := e.Report.Engine()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// move evicts VMs of host a, all at once, and returns their reports. meanwhile is called when all
// have begun.
func move(t testing.TB, a *site, names []string, meanwhile func()) []evict.Report {
	t.Helper()
	var ids []string
	for _, name := range names {
		e, err := a.evict(name, "hostb")
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, e.Id)
	}
	if meanwhile != nil {
		meanwhile()
	}
	reports := make([]evict.Report, len(ids))
	for i, id := range ids {
		e, err := a.watch(id, 3*time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		reports[i] = reportOf(t, e)
	}
	return reports
}

// putVMs boots VMs on host a and gets host b ready for them.
func putVMs(t testing.TB, l *lab.Lab, a, b *site, names []string, spec lab.Spec) (remove func()) {
	t.Helper()
	var vms []*lab.VM
	var expected []*lab.Expected
	for i, name := range names {
		spec.Load.Seed = uint64(i + 1)
		vm := bootBusy(t, l.A, spec)
		a.describe(name, vm.QMP, vm.Args)
		vms, expected = append(vms, vm), append(expected, b.expect(name, vm))
	}
	return func() {
		for i, vm := range vms {
			for _, twin := range expected[i].VMs() {
				if twin.Alive() {
					labtest.MustCheck(t, twin)
				}
				twin.Kill()
			}
			vm.Kill()
		}
	}
}

// A link that is cut for ten seconds in mid-push costs its eviction those, and little more.
func BenchmarkLinkCut(b *testing.B) {
	const cut = 10 * time.Second
	l := labtest.New(b, lab.Options{Rate: 1e9})
	hosta, hostb := sites(b, l)
	hosta.start()
	hostb.start()
	spec := lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 50, IdleMiB: 700}}
	var ratios []float64
	for b.Loop() {
		remove := putVMs(b, l, hosta, hostb, []string{"web1"}, spec)
		whole := move(b, hosta, []string{"web1"}, nil)[0]
		remove()
		remove = putVMs(b, l, hosta, hostb, []string{"web1"}, spec)
		halved := move(b, hosta, []string{"web1"}, func() {
			time.Sleep(2500 * time.Millisecond)
			if err := l.SetLinkUp(false); err != nil {
				b.Fatal(err)
			}
			time.Sleep(cut)
			if err := l.SetLinkUp(true); err != nil {
				b.Fatal(err)
			}
		})[0]
		remove()
		if len(halved.Gaps) == 0 {
			b.Fatal("the link was cut, and the report has no gap")
		}
		again := 0
		for _, g := range halved.Gaps {
			again += g.Again
		}
		ratio := (*halved.Total - cut.Seconds()) / *whole.Total
		ratios = append(ratios, ratio)
		fmt.Fprintf(os.Stderr,
			"uncut %.2f s; cut for 10 s %.2f s, gap %.2f s, %d pages sent again of %d; less the "+
				"cut: %.3f times\n",
			*whole.Total, *halved.Total, halved.Gaps[0].For, again, halved.Pages.Total, ratio)
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "ratio")
}

// Four evictions at once over one link: how long fetches take in each, against one alone.
func BenchmarkFour(b *testing.B) {
	l := labtest.New(b, lab.Options{Rate: 1e9})
	hosta, hostb := sites(b, l)
	hosta.start()
	hostb.start()
	spec := lab.Spec{MemoryMiB: 288, Load: lab.Load{HotMiB: 24, IdleMiB: 120, Workers: 1}}
	names := []string{"web1", "web2", "web3", "web4"}
	var ratios []float64
	for b.Loop() {
		remove := putVMs(b, l, hosta, hostb, names[:1], spec)
		alone := move(b, hosta, names[:1], nil)[0]
		remove()
		remove = putVMs(b, l, hosta, hostb, names, spec)
		four := move(b, hosta, names, nil)
		remove()
		fmt.Fprintf(os.Stderr,
			"alone: total %.2f s, %d fetches, p50 %.2f ms, p99 %.2f ms, max %.2f ms\n",
			*alone.Total, alone.Fetch.Count, 1e3*alone.Fetch.P50, 1e3*alone.Fetch.P99,
			1e3*alone.Fetch.Max)
		for _, r := range four {
			ratio := r.Fetch.P99 / alone.Fetch.P99
			ratios = append(ratios, ratio)
			fmt.Fprintf(os.Stderr,
				"one of four: total %.2f s, %d fetches, p50 %.2f ms, p99 %.2f ms, max %.2f ms: "+
					"p99 %.2f times that of one alone\n",
				*r.Total, r.Fetch.Count, 1e3*r.Fetch.P50, 1e3*r.Fetch.P99, 1e3*r.Fetch.Max, ratio)
		}
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "p99-ratio")
}

// What TLS costs: the time of an eviction, and CPU time of both daemons for a gigabyte.
func BenchmarkTLS(b *testing.B) {
	l := labtest.New(b, lab.Options{Rate: 1e9})
	spec := lab.Spec{MemoryMiB: 1024, Load: lab.Load{HotMiB: 50, IdleMiB: 700}}
	secureA, secureB := sites(b, l)
	plainA, plainB := sites(b, l)
	for _, s := range []*site{plainA, plainB} {
		file := filepath.Join(s.dir, "vacated.toml")
		config, err := os.ReadFile(file)
		if err != nil {
			b.Fatal(err)
		}
		plain := strings.Replace(string(config), `certs = "certs"`,
			fmt.Sprintf("plain = true\nname = %q", s.name), 1)
		if err := os.WriteFile(file, []byte(plain), 0o600); err != nil {
			b.Fatal(err)
		}
	}
	measure := func(hosta, hostb *site) (total, cpu float64) {
		hosta.start()
		hostb.start()
		defer hosta.stop()
		defer hostb.stop()
		remove := putVMs(b, l, hosta, hostb, []string{"web1"}, spec)
		defer remove()
		before := hosta.cpu() + hostb.cpu()
		r := move(b, hosta, []string{"web1"}, nil)[0]
		return *r.Total, (hosta.cpu() + hostb.cpu() - before) / (float64(r.LinkBytes) / 1e9)
	}
	var totals, cpus []float64
	for b.Loop() {
		plainTotal, plainCPU := measure(plainA, plainB)
		total, cpu := measure(secureA, secureB)
		fmt.Fprintf(os.Stderr,
			"plain: %.2f s, %.2f CPU s/GB; TLS: %.2f s, %.2f CPU s/GB; ratios %.3f, %.2f\n",
			plainTotal, plainCPU, total, cpu, total/plainTotal, cpu/plainCPU)
		totals, cpus = append(totals, total/plainTotal), append(cpus, cpu/plainCPU)
	}
	slices.Sort(totals)
	slices.Sort(cpus)
	b.ReportMetric(totals[len(totals)/2], "total-ratio")
	b.ReportMetric(cpus[len(cpus)/2], "cpu-ratio")
}

// cpu is the CPU time that the daemon has had, in seconds.
func (s *site) cpu() float64 {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.daemon.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	text := string(b)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	var user, system float64
	fmt.Sscan(fields[11]+" "+fields[12], &user, &system) // proc(5), fields 14 and 15
	return (user + system) / 100                         // ticks of USER_HZ
}

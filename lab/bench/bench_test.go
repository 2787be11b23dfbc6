package bench

import (
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

func needLab(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	labtest.Need(t, lab.Probe())
}

// programs is the directory of those that tests have built.
var programs string

func TestMain(m *testing.M) {
	code := m.Run()
	if programs != "" {
		os.RemoveAll(programs)
	}
	os.Exit(code)
}

// buildVacate returns the program vacate, which is built once. Those of this project that are named
// are beside it.
func buildVacate(t *testing.T, more ...string) string {
	t.Helper()
	var err error
	if programs == "" {
		if programs, err = os.MkdirTemp("", "vacate-bench"); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range append(more, "vacate") {
		if _, err := os.Stat(filepath.Join(programs, name)); err == nil {
			continue
		}
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", programs,
			"vacate/cmd/"+name).CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", name, err, out)
		}
	}
	return filepath.Join(programs, "vacate")
}

// Every strategy moves a guest, and is measured.
func TestMeasure(t *testing.T) {
	needLab(t)
	var done []string
	result, err := Measure(t.Context(), Options{
		Strategies: Strategies(), Load: "hot", Repeat: 1, PrecopyBound: 2 * time.Second,
		Vacate: buildVacate(t),
		Spec:   lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 40, IdleMiB: 20, Seed: 1}},
		Lab:    lab.Options{Dir: labtest.Dir(t), Rate: 500e6, BootOnce: true}, Hasty: true,
		Log:  slog.New(slog.NewTextHandler(t.Output(), nil)),
		Done: func(r Run) { done = append(done, r.Strategy) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := result.Table(t.Output()); err != nil {
		t.Error(err)
	}
	if got, want := strings.Join(done, " "), strings.Join(Strategies(), " "); got != want {
		t.Errorf("ran %s, want %s", got, want)
	}
	m := &result.Machine
	if m.CPU == "" || m.Cores < 1 || m.MemoryBytes == 0 || m.Kernel == "" || m.QEMU == "" ||
		m.Accel == "" || m.GuestKernel == "" || m.Link == nil || *m.Link != 500e6 {
		t.Errorf("the machine is not described: %+v", m)
	}
	for i := range result.Runs {
		checkRun(t, &result.Runs[i], false)
	}
}

// Domains of libvirt move by vacate and by virsh migrate, and both are measured alike. "make
// domainbench" takes the other strategies, too.
func TestMeasureDomains(t *testing.T) {
	needLab(t)
	labtest.Need(t, libvirtlab.Probe())
	strategies := []string{"vacate", domainBaseline}
	result, err := Measure(t.Context(), Options{
		Libvirt: true, Strategies: strategies, Load: "hot", Repeat: 1,
		PrecopyBound: 2 * time.Second, Vacate: buildVacate(t, "vacated"),
		Spec: lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 40, IdleMiB: 20, Seed: 1}},
		Lab:  lab.Options{Dir: labtest.Dir(t), Rate: 500e6}, Hasty: true,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := result.Table(t.Output()); err != nil {
		t.Error(err)
	}
	if l := result.Machine.Libvirt; l == nil || *l == "" {
		t.Errorf("the libvirt is not described: %+v", result.Machine)
	}
	if len(result.Runs) != len(strategies) {
		t.Fatalf("%d runs, want %d", len(result.Runs), len(strategies))
	}
	for i := range result.Runs {
		r := &result.Runs[i]
		checkRun(t, r, true)
		if r.Outcome == Completed && (r.Prepare == nil || *r.Prepare <= 0) {
			t.Errorf("%s: no time from the command to the begin: %v", r.Strategy, r.Prepare)
		}
	}
}

// The bare guest, under KVM where that works, is a load as any other; its agent's word orders the
// push.
func TestMeasureBareGuest(t *testing.T) {
	needLab(t)
	strategies := []string{"vacate", "qemu-precopy-multifd"}
	result, err := Measure(t.Context(), Options{
		Strategies: strategies, Load: "hot", Repeat: 1, PrecopyBound: 2 * time.Second,
		Vacate: buildVacate(t), Accel: "auto",
		Spec: lab.Spec{BareMetal: true, Agent: true, MemoryMiB: 256,
			Load: lab.Load{HotMiB: 40, IdleMiB: 20, Mixed: true, Seed: 1}},
		Lab: lab.Options{Dir: labtest.Dir(t), Rate: 1e9},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := result.Table(t.Output()); err != nil {
		t.Error(err)
	}
	t.Log("under", result.Machine.Accel)
	if g := result.Machine.GuestKernel; !strings.HasPrefix(g, "bareguest-") ||
		result.VM.Guest != "bare" || result.VM.Place != "scattered" || !result.VM.Agent {
		t.Errorf("the guest %q is not described: %+v", g, result.VM)
	}
	if len(result.Runs) != len(strategies) {
		t.Fatalf("%d runs, want %d", len(result.Runs), len(strategies))
	}
	for i := range result.Runs {
		checkRun(t, &result.Runs[i], false)
	}
	var engine struct {
		Enlightenment struct{ Source, Doubts string }
	}
	if err := json.Unmarshal(result.Runs[0].Engine, &engine); err != nil {
		t.Fatal(err)
	}
	// On a busy machine the agent may answer too late, which the report then says.
	if e := engine.Enlightenment; e.Source != "agent" && !strings.Contains(e.Doubts, "in time") {
		t.Errorf("what is known of the guest comes of %q, want its agent: %s", e.Source, e.Doubts)
	}
}

// What cannot be measured is said before a guest boots.
func TestBareGuestLoads(t *testing.T) {
	for _, name := range Loads() {
		s, err := Spec(name)
		if err != nil {
			t.Fatal(err)
		}
		lacks := name == "hot-process" || name == "freed"
		if err := fitsBare(&s); (err != nil) != lacks {
			t.Errorf("load %s: %v", name, err)
		}
	}
}

// checkRun makes sure that a run has all figures. daemons says that daemons evicted, whose CPU time
// is not that of an eviction.
func checkRun(t *testing.T, r *Run, daemons bool) {
	t.Helper()
	if r.Outcome == Unsupported && r.Strategy == "qemu-postcopy-preempt" {
		return
	}
	moved := r.Outcome == Completed
	if !moved && !(r.Outcome == NotConverged && strings.HasPrefix(r.Strategy, "qemu-precopy")) {
		t.Errorf("%s: outcome %s: %s", r.Strategy, r.Outcome, r.Reason)
		return
	}
	missing := func(what string, is bool) {
		if is {
			t.Errorf("%s: no %s", r.Strategy, what)
		}
	}
	missing("total", r.Total == nil)
	missing("pages", (r.Pages == nil) != strings.HasPrefix(r.Strategy, "virsh-"))
	missing("stalls", r.Stall == nil)
	missing("check", r.Bad == nil)
	missing("rate before", r.Before == nil)
	missing("work lost", r.WorkLost == nil)
	missing("bytes", r.LinkBytes == nil || *r.LinkBytes < 1<<20)
	missing("series", len(r.Throughput) < 20 || r.Throughput[0][0] != -2)
	missing("engines' CPU time", r.Strategy == "vacate" && !daemons && r.EngineCPU == nil)
	missing("fetches", r.Strategy == "vacate" && r.Fetch == nil)
	missing("engine's report", (r.Strategy == "vacate") != (r.Engine != nil))
	if moved {
		missing("transfer", r.Transfer == nil)
		missing("down time", r.Down == nil)
		// All of the load crossed.
		missing("memory on the link", r.LinkBytes != nil && *r.LinkBytes < 60<<20)
	}
	if r.Transfer != nil && r.Down != nil && r.Total != nil &&
		!(0 < *r.Down && *r.Down <= *r.Transfer && *r.Transfer <= *r.Total) {
		t.Errorf("%s: down %v s, transfer %v s, total %v s", r.Strategy, *r.Down, *r.Transfer,
			*r.Total)
	}
}

func TestBadOptions(t *testing.T) {
	good := Options{Strategies: []string{"vacate"}, Load: "hot", Repeat: 1,
		PrecopyBound: time.Second}
	for want, spoil := range map[string]func(*Options){
		"no strategy given":   func(o *Options) { o.Strategies = nil },
		`no strategy "magic"`: func(o *Options) { o.Strategies = []string{"vacate", "magic"} },
		`no load "none"`:      func(o *Options) { o.Load = "none" },
		"repetitions":         func(o *Options) { o.Repeat = 0 },
		"bound":               func(o *Options) { o.PrecopyBound = 0 },
		"leave out --chain":   func(o *Options) { o.Libvirt, o.Chain = true, true },
		`accelerator "xen"`:   func(o *Options) { o.Accel = "xen" },
	} {
		o := good
		spoil(&o)
		if _, err := Measure(t.Context(), o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

// One guest serves strategies of all kinds, to and fro, and is whole in the end.
func TestChain(t *testing.T) {
	needLab(t)
	spec, err := Spec("zipf")
	if err != nil {
		t.Fatal(err)
	}
	spec.MemoryMiB, spec.Load.HotMiB = 256, 64
	strategies := []string{"vacate", "qemu-postcopy", "stop-and-copy"}
	result, err := Measure(t.Context(), Options{
		Strategies: strategies, Load: "zipf", Repeat: 2, PrecopyBound: time.Second,
		Vacate: buildVacate(t), Chain: true,
		Spec: spec, Lab: lab.Options{Dir: labtest.Dir(t), Rate: 500e6, BootOnce: true}, Hasty: true,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(result.Runs); n != 2*len(strategies) {
		t.Fatalf("%d runs, want %d", n, 2*len(strategies))
	}
	for i, r := range result.Runs {
		at := i % len(strategies)
		want := strategies[at]
		if r.Rep == 2 {
			want = strategies[len(strategies)-1-at]
		}
		if r.Strategy != want || r.EvictedBefore != at {
			t.Errorf("run %d is %s on a guest evicted %d times, want %s and %d", i, r.Strategy,
				r.EvictedBefore, want, at)
		}
		checkRun(t, &result.Runs[i], false)
	}
}

func TestLoads(t *testing.T) {
	for _, name := range Loads() {
		spec, err := Spec(name)
		if err != nil || spec.MemoryMiB == 0 || spec.Load.HotMiB == 0 || spec.Load.Seed == 0 {
			t.Errorf("load %s: %+v, %v", name, spec, err)
		}
	}
}

func TestAlike(t *testing.T) {
	for names, want := range map[string]bool{
		"vacate":                               true,
		"vacate vacate:address vacate:reverse": true,
		"vacate vacate:address:all":            false,
		"vacate:off vacate:address:all":        true,
		"vacate:address qemu-postcopy":         false,
	} {
		if got := Alike(strings.Fields(names)); got != want {
			t.Errorf("%s: %v", names, got)
		}
	}
}

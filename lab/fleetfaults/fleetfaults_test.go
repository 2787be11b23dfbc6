package fleetfaults

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// One run of the campaign, with the programs as they are installed. The campaign itself is `make
// fleetfaults`.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	labtest.Need(t, lab.Probe())
	bin := t.TempDir()
	build := exec.Command("go", "build", "-o", bin+"/", "vacate/cmd/vacate", "vacate/cmd/vacated",
		"vacate/cmd/vacate-fleet")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	results, err := Run(t.Context(), Options{Lab: lab.Options{Dir: labtest.Dir(t)},
		Vacate: filepath.Join(bin, "vacate"), Runs: 1, Seed: labtest.Seed(t),
		Only: []string{"leader and source's vacated killed"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		t.Logf("%s, %s: %s after %.0f s", r.Fault, r.When, r.Outcome, r.Seconds)
		if r.Bad != "" {
			t.Errorf("%s: %s\n%s", r.Fault, r.Bad, strings.Join(r.Notes, "\n"))
		}
	}
	if len(results) != 1 {
		t.Errorf("%d runs", len(results))
	}
}

// What must not be is seen.
func TestRanOnce(t *testing.T) {
	samples := func(text string) (list []lab.Sample) {
		for i, word := range strings.Fields(text) {
			vm, ops, _ := strings.Cut(word, ":")
			n := uint64(0)
			for _, d := range ops {
				n = 10*n + uint64(d-'0')
			}
			list = append(list, lab.Sample{VM: vm, Ops: n, At: time.Unix(int64(i), 0)})
		}
		return list
	}
	for _, c := range []struct {
		samples string
		moves   int
		ok      bool
	}{
		{"a:1 a:2 b:3 b:4", 1, true},
		{"a:1 a:3 b:4 a:2 b:5", 1, true}, // one came late
		{"a:1 a:2 b:3 b:4", 0, false},
		{"a:1 a:2 b:2 b:3", 1, true},
		{"a:1 a:5 b:2 b:6 a:7", 1, false},
		{"a:1 b:2 a:3", 2, true},
		{"a:1 b:2 a:3", 1, false},
	} {
		if err := ranOnce("web1", samples(c.samples), c.moves); (err == nil) != c.ok {
			t.Errorf("%s, moved %d times: %v", c.samples, c.moves, err)
		}
	}
}

func TestOrderly(t *testing.T) {
	at := func(s int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(s, 0)) }
	decision := func(id, eviction, vm, to, state string, from, until int64) *fleetv1.Decision {
		return &fleetv1.Decision{Id: id, EvictionId: eviction, Vm: vm, To: to, State: state,
			At: at(from), EndedAt: at(until)}
	}
	eviction := func(id, vm, to, outcome string) *hostv1.Eviction {
		return &hostv1.Eviction{Id: id, Vm: vm, Peer: to, Outcome: outcome}
	}
	one := decision("p1", "e1", "web1", "hostb", "completed", 10, 20)
	first := eviction("e1", "web1", "hostb", "completed")
	for what, c := range map[string]struct {
		decisions []*fleetv1.Decision
		evictions []*hostv1.Eviction
		clocks    bool
		bad       string
	}{
		"well": {[]*fleetv1.Decision{one}, []*hostv1.Eviction{first}, false, ""},
		"one that the leader does not know of": {nil, []*hostv1.Eviction{first}, false,
			"of no plan"},
		"another target": {[]*fleetv1.Decision{one},
			[]*hostv1.Eviction{eviction("e1", "web1", "hostc", "completed")}, false, "is not what"},
		"another outcome": {[]*fleetv1.Decision{one},
			[]*hostv1.Eviction{eviction("e1", "web1", "hostb", "aborted")}, false,
			"the leader says completed"},
		"two plans": {[]*fleetv1.Decision{one,
			decision("p2", "e1", "web1", "hostb", "completed", 30, 40)},
			[]*hostv1.Eviction{first}, false, "of two plans"},
		"at once": {[]*fleetv1.Decision{one,
			decision("p2", "e2", "web1", "hostc", "completed", 15, 40)},
			[]*hostv1.Eviction{first, eviction("e2", "web1", "hostc", "completed")}, false,
			"at once"},
		"at once, by clocks that jump": {[]*fleetv1.Decision{one,
			decision("p2", "e2", "web1", "hostc", "completed", 15, 40)},
			[]*hostv1.Eviction{first, eviction("e2", "web1", "hostc", "completed")}, true, ""},
		"one after the other": {[]*fleetv1.Decision{one,
			decision("p2", "e2", "web1", "hostc", "aborted", 20, 40)},
			[]*hostv1.Eviction{first, eviction("e2", "web1", "hostc", "aborted")}, false, ""},
		"a deposed leader's": {[]*fleetv1.Decision{one,
			decision(deposedID, "", "web1", "hostc", "goes on", 20, 40)}, nil, false, "deposed"},
	} {
		err := orderly(c.decisions, c.evictions, c.clocks)
		if (err == nil) != (c.bad == "") || err != nil && !strings.Contains(err.Error(), c.bad) {
			t.Errorf("%s: %v, want %q", what, err, c.bad)
		}
	}
}

package fleetsim

import (
	"strings"
	"testing"
	"time"
)

// TestDays has small fleets live through two days: by the planner, VMs starve less, few move, no
// host is overfilled and no rule broken.
func TestDays(t *testing.T) {
	o := Options{Hosts: 15, VMs: 20, For: 24 * time.Hour, Step: 30 * time.Second, Seed: 3,
		Load:   1.3,
		Faults: true}
	results := map[string]Result{}
	for _, b := range Balancers {
		o.Balancer = b
		if o.Drains = 0; b == "vacate" {
			o.Drains = 5 * time.Hour
		}
		r, err := Run(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		results[b] = r
		t.Logf("%s: starved %.0f h, steal %.3f %%, %d moves, %d failed, %d refused, %d again, %d "+
			"overfilled, %d broken; %d orders of %d; %+v", b, r.Starved, 100*r.Lacked/r.Wanted,
			r.Moves, r.Failed, r.Refused, r.Again, r.Overfilled, r.Broken, len(r.Orders),
			r.Episodes, r.Drained)
	}
	v, none := results["vacate"], results["none"]
	if v.Overfilled > 0 || v.Broken > 0 {
		t.Errorf("%d hosts overfilled, %d rules broken", v.Overfilled, v.Broken)
	}
	if v.Starved > none.Starved/2 || v.Lacked > none.Lacked {
		t.Errorf("VMs starve for %.0f h, for %.0f without: %.1f core hours, %.1f", v.Starved,
			none.Starved, v.Lacked, none.Lacked)
	}
	if v.Moves == 0 || len(v.Drained) < 3 {
		t.Errorf("%d moves, %d drains", v.Moves, len(v.Drained))
	}
	var table strings.Builder
	if err := Write(&table, []Result{none, v}); err != nil ||
		!strings.Contains(table.String(), "vacate") {
		t.Errorf("%s, %v", &table, err)
	}
}

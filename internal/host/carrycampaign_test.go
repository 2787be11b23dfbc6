package host

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
	"vacate/lab/libvirttest"
)

// carryRate is that of the link in the campaign, in bits per second: a domain of 256 MiB is to it
// as one of 1.3 GiB is to a link of 1 Gbit/s.
const carryRate = 200_000_000

// carryRow is what the campaign found with a release of Debian.
type carryRow struct {
	name          string
	moves, guests int
	pages, bad    uint64
	down, total   []float64
	p99, most     []float64 // of the guest's stalls in each move, in ms
}

// TestCarryCampaign is "make carrycampaign": VACATE_MOVES migrations by libvirt itself that the
// daemons carry, of domains under load, for each of VACATE_RELEASES (12 and 13).
func TestCarryCampaign(t *testing.T) {
	moves, wanted := int(setting("VACATE_MOVES", 2)), os.Getenv("VACATE_RELEASES")
	var rows []*carryRow
	for _, c := range releases {
		if wanted != "" && !slices.Contains(strings.Fields(wanted), c.name) {
			continue
		}
		row := &carryRow{name: c.name}
		rows = append(rows, row)
		t.Run(c.name, func(t *testing.T) {
			inGuests(t, moves, &row.moves, func(t *testing.T, n int) {
				row.run(t, n, libvirtlab.Setup{Release: c.codename})
			})
		})
		writeCarryRows(t, rows)
	}
}

func (r *carryRow) run(t *testing.T, n int, setup libvirtlab.Setup) {
	m := manage(libvirttest.Start(t, lab.Options{Rate: carryRate}, managedSpec, setup), false)
	_, err := m.Lab.UseCubic()
	m.Check(err)
	m.a.start()
	m.b.start()
	r.guests++
	hosts, sites := []*libvirtlab.Host{m.Hosts.A, m.Hosts.B}, []*site{m.a, m.b}
	here := []*lab.Expected{m.Domain.A, m.Domain.B}
	guest := m.Domain.VM.Guest
	for i := range n {
		at, to := i%2, 1-i%2
		began := time.Now()
		m.Check(m.moveBetween(hosts[at], hosts[to], sites[to].name, "--postcopy"))
		r.total = append(r.total, time.Since(began).Seconds())
		e := m.last(sites[at])
		if e.Outcome != string(evict.Completed) || e.Report == nil {
			t.Fatalf("migration %d: %v", r.moves+1, e)
		}
		r.down = append(r.down, 1e3*e.Report.GetDownTimeS())
		vm, err := here[to].Came(labtest.Within(t, time.Minute))
		m.Check(err)
		m.Check(guest.WaitOps(labtest.Within(t, time.Minute), 100))
		r.moves++
		s := guest.Stalls(began, time.Now())
		t.Logf("move %d: %.1f s, down %.0f ms, longest stall %v, p99 %v", r.moves,
			r.total[len(r.total)-1], r.down[len(r.down)-1], s.Max, s.P99)
		r.p99 = append(r.p99, float64(s.P99.Microseconds())/1e3)
		r.most = append(r.most, float64(s.Max.Microseconds())/1e3)
		if i < n-1 {
			continue
		}
		check, err := guest.Check(labtest.Within(t, 2*time.Minute), vm)
		m.Check(err)
		r.pages, r.bad = r.pages+check.Pages, r.bad+check.Bad
		if check.Bad != 0 || check.Pages == 0 {
			t.Errorf("%d bad pages of %d", check.Bad, check.Pages)
		}
	}
}

func writeCarryRows(t *testing.T, rows []*carryRow) {
	t.Helper()
	var b strings.Builder
	b.WriteString("| Debian | moves | guests | pages checked | bad | down time, median | at most " +
		"| whole, median | at most | stalls p99, median of moves | longest |\n" +
		"|---|---|---|---|---|---|---|---|---|---|---|\n")
	most := func(list []float64) float64 { return slices.Max(append([]float64{0}, list...)) }
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %.0f ms | %.0f ms | %.1f s | %.1f s | %.1f ms "+
			"| %.0f ms |\n", r.name, r.moves, r.guests, r.pages, r.bad, median(r.down),
			most(r.down), median(r.total), most(r.total), median(r.p99), most(r.most))
	}
	writeMoves(t, b.String())
}

package host

import (
	"fmt"
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

// carryRow is what the campaign found in one way with two releases of Debian.
type carryRow struct {
	name, way            string
	moves, guests        int
	lost                 int // the guest did not come through
	pages, bad           uint64
	down, total          []float64
	p50, p99, most, sums []float64 // of the guest's stalls in each move, in ms
}

// TestCarryCampaign is "make carrycampaign": VACATE_MOVES migrations by libvirt itself that the
// daemons carry, and VACATE_PLAIN by post-copy as QEMU does it, of domains under load.
func TestCarryCampaign(t *testing.T) {
	moves, plain := int(setting("VACATE_MOVES", 2)), int(setting("VACATE_PLAIN", 1))
	var rows []*carryRow
	for _, c := range []struct{ name, release string }{{"12", "bookworm"}, {"13", "trixie"}} {
		for _, w := range []struct {
			way string
			n   int
			one int // moves of one guest
		}{{"carried", moves, perGuest}, {"plain", plain, 1}} {
			row := &carryRow{name: c.name, way: w.way}
			rows = append(rows, row)
			t.Run(c.name+"/"+w.way, func(t *testing.T) {
				for before := -1; before < row.guests && row.moves+row.lost < w.n && !t.Failed(); {
					before = row.guests // where none is added, the guest was skipped
					t.Run(fmt.Sprintf("guest %d", row.guests+1), func(t *testing.T) {
						row.run(t, min(w.one, w.n-row.moves-row.lost),
							libvirtlab.Setup{Release: c.release})
					})
				}
			})
			writeCarryRows(t, rows)
		}
	}
}

func (r *carryRow) run(t *testing.T, n int, setup libvirtlab.Setup) {
	m := manage(libvirttest.Start(t, lab.Options{Rate: carryRate}, managedSpec, setup), false)
	m.a.start()
	m.b.start()
	r.guests++
	hosts, sites := []*libvirtlab.Host{m.Hosts.A, m.Hosts.B}, []*site{m.a, m.b}
	here := []*lab.Expected{m.Domain.A, m.Domain.B}
	guest := m.Domain.VM.Guest
	for i := range n {
		at, to := i%2, 1-i%2
		began := time.Now()
		if r.way == "plain" {
			if err := m.movePlainly(hosts[at], hosts[to]); err != nil {
				t.Log(err)
				r.lost++
				return
			}
		} else {
			m.Check(m.moveBetween(hosts[at], hosts[to], sites[to].name, "--postcopy"))
			e := m.last(sites[at])
			if e.Outcome != string(evict.Completed) {
				t.Fatalf("migration %d: %v", r.moves+1, e)
			}
			if e.Report == nil {
				t.Fatalf("migration %d has no report", r.moves+1)
			}
			r.down = append(r.down, 1e3*e.Report.GetDownTimeS())
		}
		r.total = append(r.total, time.Since(began).Seconds())
		vm, err := here[to].Came(labtest.Within(t, time.Minute))
		m.Check(err)
		if err := guest.WaitOps(labtest.Within(t, time.Minute), 100); err != nil {
			if r.way != "plain" {
				t.Fatal(err)
			}
			t.Log(err)
			r.lost++
			return
		}
		r.moves++
		s := guest.Stalls(began, time.Now())
		t.Logf("move %d: down %.0f ms, longest stall %v, p99 %v", r.moves, r.down[max(0,
			len(r.down)-1):], s.Max, s.P99)
		for _, x := range []struct {
			to *[]float64
			d  time.Duration
		}{{&r.p50, s.P50}, {&r.p99, s.P99}, {&r.most, s.Max}, {&r.sums, s.Sum}} {
			*x.to = append(*x.to, float64(x.d.Microseconds())/1e3)
		}
		if i < n-1 {
			continue
		}
		check, err := guest.Check(labtest.Within(t, 2*time.Minute), vm)
		if err != nil && r.way == "plain" {
			t.Log(err)
			return
		}
		m.Check(err)
		r.pages, r.bad = r.pages+check.Pages, r.bad+check.Bad
		if r.way != "plain" && (check.Bad != 0 || check.Pages == 0) {
			t.Errorf("%d bad pages of %d", check.Bad, check.Pages)
		}
	}
}

// movePlainly has libvirt move the domain by post-copy, and switch to it at once.
func (m *managed) movePlainly(from, to *libvirtlab.Host) error {
	moved := make(chan error, 1)
	ctx := labtest.Within(m.T, 4*time.Minute)
	go func() {
		_, err := from.Virsh(ctx, "migrate", "--live", "--p2p", "--unsafe", "--persistent",
			"--undefinesource", "--postcopy", "--migrateuri", "tcp://"+to.Addr+":49200", "web1",
			to.URI)
		moved <- err
	}()
	for {
		from.Virsh(ctx, "migrate-postcopy", "web1") // it may be too early, or over
		select {
		case err := <-moved:
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func writeCarryRows(t *testing.T, rows []*carryRow) {
	t.Helper()
	var b strings.Builder
	b.WriteString(
		"| Debian | post-copy | moves | guests | lost | pages checked | bad | down time, " +
			"median | whole, median | stalls p50 | p99 | longest | sum |\n" +
			"|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	ms := func(list []float64) string {
		if len(list) == 0 {
			return "–"
		}
		return fmt.Sprintf("%.1f ms", median(list))
	}
	for _, r := range rows {
		longest := "–"
		if len(r.most) > 0 {
			longest = fmt.Sprintf("%.0f ms", slices.Max(r.most))
		}
		fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %d | %d | %s | %.1f s | %s | %s | %s | %s |\n",
			r.name, r.way, r.moves, r.guests, r.lost, r.pages, r.bad, ms(r.down), median(r.total),
			ms(r.p50), ms(r.p99), longest, ms(r.sums))
	}
	writeMoves(t, b.String())
}

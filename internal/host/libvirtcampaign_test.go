package host

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
	"vacate/lab/libvirtlab"
)

// perGuest is how many evictions a guest goes through before it checks all of its memory, which
// ends its work. They are there and back in turns.
const perGuest = 10

// domainRow is what a campaign found with two releases of Debian.
type domainRow struct {
	name                          string
	evictions, guests, migrations int
	pages, bad                    uint64
	down, total                   []float64
}

// TestDomainCampaign is "make domaincampaign": VACATE_MOVES evictions of domains under load, there
// and back, for each two of Debian's releases.
func TestDomainCampaign(t *testing.T) {
	n := int(setting("VACATE_MOVES", 2))
	var rows []*domainRow
	for _, c := range []struct{ name, a, b string }{
		{"12 to 12", "bookworm", "bookworm"},
		{"13 to 13", "trixie", "trixie"},
		{"12 to 13", "bookworm", "trixie"},
	} {
		row := &domainRow{name: c.name}
		rows = append(rows, row)
		t.Run(c.name, func(t *testing.T) {
			inGuests(t, n, &row.evictions, func(t *testing.T, n int) {
				row.run(t, n, libvirtlab.Setup{Release: c.a}, libvirtlab.Setup{Release: c.b})
			})
		})
		writeDomainRows(t, rows)
	}
}

// inGuests calls run, which counts moves, until n of them were made: perGuest at most in a guest.
func inGuests(t *testing.T, n int, moves *int, run func(t *testing.T, n int)) {
	before := -1
	for guest := 1; before < *moves && *moves < n && !t.Failed(); guest++ {
		before = *moves // where none is added, the guest was skipped
		t.Run(fmt.Sprintf("guest %d", guest), func(t *testing.T) {
			run(t, min(perGuest, n-*moves))
		})
	}
}

func (r *domainRow) run(t *testing.T, n int, a, b libvirtlab.Setup) {
	m := startManaged(t, managedSpec, a, b)
	r.guests++
	hosts, sites := []*libvirtlab.Host{m.Hosts.A, m.Hosts.B}, []*site{m.a, m.b}
	here := []*lab.Expected{m.Domain.A, m.Domain.B}
	at := 0
	definitions := []string{m.inactive, ""}
	for range n {
		from, to := sites[at], sites[1-at]
		e, err := from.evictWith("web1", to.name, &hostv1.EvictOptions{LoadTimeoutMs: 60_000})
		m.Check(err)
		end, err := from.watch(e.Id, 3*time.Minute)
		if err != nil || end.Outcome != string(evict.Completed) {
			t.Fatalf("eviction %d: %v, %v", r.evictions+1, end, err)
		}
		if there, err := to.watch(e.Id, time.Minute); err != nil ||
			there.Outcome != string(evict.Completed) {
			t.Fatalf("eviction %d, there: %v, %v", r.evictions+1, there, err)
		}
		r.evictions++
		if out := m.Virsh(hosts[at], "list", "--all", "--name"); out != "" {
			t.Errorf("the source still has %q", out)
		}
		at = 1 - at
		if s := m.Virsh(hosts[at], "domstate", "--reason", "web1"); s != "running (migrated)" {
			t.Errorf("it is %s", s)
		}
		now := m.Virsh(hosts[at], "dumpxml", "--inactive", "web1")
		if definitions[at] == "" && a != b {
			definitions[at] = now // another libvirt may write the same otherwise
			t.Logf("the definition is the same there: %t", now == m.inactive)
		} else if definitions[at] == "" {
			definitions[at] = m.inactive
		}
		if now != definitions[at] {
			t.Errorf("the domain is defined as\n%s\nand was\n%s", now, definitions[at])
		}
		if rep := end.Report; rep != nil {
			r.down = append(r.down, rep.GetDownTimeS())
			r.total = append(r.total, rep.GetTotalS())
		}
		vm, err := here[at].Came(labtest.Within(t, time.Minute))
		m.Check(err)
		m.Check(vm.Guest.WaitOps(labtest.Within(t, time.Minute), 100))
		if bad := vm.Guest.Bad(); bad != nil {
			t.Fatalf("eviction %d: the guest finds %v", r.evictions, bad)
		}
	}
	vm, err := here[at].Came(labtest.Within(t, time.Minute))
	m.Check(err)
	check, err := vm.Guest.Check(labtest.Within(t, 2*time.Minute), vm)
	m.Check(err)
	r.pages, r.bad = r.pages+check.Pages, r.bad+check.Bad
	if check.Bad != 0 || check.Pages == 0 {
		t.Errorf("%d bad pages of %d", check.Bad, check.Pages)
	}
	for range 2 { // there and back
		m.migrate(hosts[at], hosts[1-at])
		r.migrations++
		at = 1 - at
	}
}

func writeDomainRows(t *testing.T, rows []*domainRow) {
	t.Helper()
	var b strings.Builder
	b.WriteString("| Debian | evictions | guests | pages checked | bad | plain migrations " +
		"afterwards | down time, median | at most | whole eviction, median |\n" +
		"|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %.0f ms | %.0f ms | %.1f s |\n", r.name,
			r.evictions, r.guests, r.pages, r.bad, r.migrations, 1e3*median(r.down),
			1e3*slices.Max(append([]float64{0}, r.down...)), median(r.total))
	}
	writeMoves(t, b.String())
}

// writeMoves tells what a campaign of moves found, and writes it to the file that
// VACATE_MOVES_RESULT names.
func writeMoves(t *testing.T, text string) {
	t.Helper()
	t.Log("\n" + text)
	if file := os.Getenv("VACATE_MOVES_RESULT"); file != "" {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Error(err)
		}
	}
}

func median(list []float64) float64 {
	if len(list) == 0 {
		return math.NaN()
	}
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

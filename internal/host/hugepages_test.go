package host

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/lab"
	"vacate/lab/labtest"
)

// hugeUnits returns how many huge pages a process has by the kernel's own count.
func hugeUnits(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "AnonHugePages:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib / 2048
}

// A VM that came has its huge pages back when its daemon says so, also if the daemon was killed
// before it began with that; and none where that is off.
func TestHugePages(t *testing.T) {
	l := labtest.New(t, lab.Options{})
	for name, c := range map[string]struct {
		line string // of the configuration
		kill bool
	}{
		"done":   {},
		"killed": {kill: true},
		"off":    {line: "huge_pages = false"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &run{t: t, lab: l, vm: boot(t, l.A, lab.Spec{BareMetal: true, MemoryMiB: 160,
				Load: lab.Load{HotMiB: 32, IdleMiB: 96}})}
			before := hugeUnits(t, r.vm.PID())
			if before < 50 {
				labtest.Need(t, fmt.Errorf("the VM has only %d huge pages before", before))
			}
			r.a, r.b = sites(t, l)
			r.b.set(c.line)
			r.a.describe("web1", r.vm.QMP, r.vm.Args)
			r.expected = r.b.expect("web1", r.vm)
			r.a.start()
			const whole = "destination/completed"
			r.b.start(whole)
			e, err := r.a.evict("web1", "hostb")
			if err != nil {
				t.Fatal(err)
			}
			r.eviction = e.Id
			if !r.b.reach(whole, time.Minute) {
				t.Fatalf("the VM did not come: %v", r.look(r.b))
			}
			// The source waits for none of it.
			if end, err := r.a.watch(r.eviction, time.Minute); err != nil ||
				end.Outcome != string(evict.Completed) {
				t.Fatalf("%v, %v", end, err)
			}
			twin, err := r.expected.Started(labtest.Within(t, time.Minute))
			if err != nil {
				t.Fatal(err)
			}
			if n := hugeUnits(t, twin.PID()); n > before/10 {
				t.Errorf("the twin has %d huge pages before anything is done", n)
			}
			if c.kill {
				r.b.kill()
				r.b.start()
			} else {
				r.b.release(whole)
			}
			r.wait(r.b, "the end", func(e *hostv1.Eviction) bool { return e.Outcome != "" })
			if c.line != "" {
				if h := r.look(r.b).HugePages; h != nil {
					t.Errorf("it is off, and the daemon tells of %v", h)
				}
				return
			}
			end := r.wait(r.b, "the huge pages", func(e *hostv1.Eviction) bool {
				return e.HugePages != nil && !e.HugePages.UnderWay
			})
			h, after := end.HugePages, hugeUnits(t, twin.PID())
			t.Logf("%d huge pages before, %d after: %v", before, after, h)
			if h.Reason != "" || h.Restored == 0 || h.Restored+h.Sparse != h.Huge {
				t.Errorf("not all huge pages are there again: %v", h)
			}
			if after < int(h.Restored)*9/10 || after+int(h.Sparse) < before*9/10 {
				t.Errorf("the VM had %d huge pages, and has %d", before, after)
			}
			r.metrics(r.b, "at the end", map[string]float64{
				"vacate_huge_pages_restored_total":     float64(h.Restored),
				`vacate_huge_pages_missing{vm="web1"}`: -1,
			})
			labtest.MustCheck(t, twin)
			// What is done is not done again.
			r.b.kill()
			r.b.start()
			if again := r.look(r.b).HugePages; again.GetRestored() != h.Restored ||
				again.GetUnderWay() {
				t.Errorf("after a restart it is %v, and was %v", again, h)
			}
			r.clean()
		})
	}
}

package guestlinux

import (
	"bufio"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/pageclass"
)

// kpageflags has the guest tell of its pages.
func (m *machine) kpageflags(t testing.TB) []uint64 {
	t.Helper()
	m.port.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintln(m.port, "flags"); err != nil {
		t.Fatal(err)
	}
	var all []uint64
	lines := bufio.NewScanner(m.port)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == "end" {
			return all
		}
		var flags uint64
		var n int
		if _, err := fmt.Sscanf(lines.Text(), "%x %d", &flags, &n); err != nil {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		all = append(all, slices.Repeat([]uint64{flags}, n)...)
	}
	t.Fatalf("guest's answer is cut short: %v", lines.Err())
	return nil
}

func kinds(s *pageclass.Survey) (n [pageclass.Kinds]int) {
	for _, p := range s.Pages {
		n[p.Kind]++
	}
	return n
}

func describe(r *Result) string {
	var b strings.Builder
	for k, n := range kinds(&r.Survey) {
		if n > 0 && k > 0 {
			fmt.Fprintf(&b, "%v %d, ", pageclass.Kind(k), n)
		}
	}
	return fmt.Sprintf("%sfree %d, skippable %d, %+v, notes %q", b.String(), r.Free, r.Skippable, r.Timings, r.Notes)
}

func TestSurvey(t *testing.T) {
	forKernels(t, func(t *testing.T, kernel string) {
		m := boot(t, spec{kernel: kernel, mib: 384, cpus: 2})
		g, err := Attach(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		for range 5 {
			told := m.kpageflags(t)
			m.stop(t)
			r, err := g.Survey(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m.cont(t)
			t.Log(describe(r))
			compare(t, told, r)
		}
	})
}

// compare prints how kinds and /proc/kpageflags go together.
func compare(t *testing.T, told []uint64, r *Result) {
	names := []struct {
		bit  int
		name string
	}{{20, "nopage"}, {10, "buddy"}, {23, "offline"}, {26, "pgtable"}, {24, "zero"}, {17, "hugetlb"}, {7, "slab"}, {32, "reserved"}, {12, "anon"}, {14, "swapbacked"}, {5, "lru"}}
	matrix := map[string]int{}
	for i, p := range r.Pages {
		what := "0"
		if i >= len(told) {
			what = "beyond"
		} else if told[i] != 0 {
			what = "other"
			for _, n := range names {
				if told[i]>>n.bit&1 != 0 {
					what = n.name
					break
				}
			}
		}
		matrix[what+" = "+p.Kind.String()]++
	}
	keys := make([]string, 0, len(matrix))
	for k := range matrix {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var b strings.Builder
	for _, k := range keys {
		fmt.Fprintf(&b, "%s %d; ", k, matrix[k])
	}
	t.Log(b.String())
}

func BenchmarkSurvey(b *testing.B) {
	for _, memfd := range []bool{false, true} {
		b.Run(map[bool]string{false: "anonymous", true: "memfd"}[memfd], func(b *testing.B) {
			m := boot(b, spec{kernel: kernels(b)[0], mib: 1024, cpus: 2, memfd: memfd})
			g, err := Attach(b.Context(), m)
			if err != nil {
				b.Fatal(err)
			}
			m.stop(b)
			var all []Timings
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				r, err := g.Survey(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				all = append(all, r.Timings)
			}
			slices.SortFunc(all, func(x, y Timings) int { return int(x.Total - y.Total) })
			b.Logf("best %+v, median %+v, worst %+v", all[0], all[len(all)/2], all[len(all)-1])
		})
	}
}

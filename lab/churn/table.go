package churn

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"vacate/internal/guest/pageclass"
)

// table writes a table of Markdown.
func table(w io.Writer, rows ...[]string) {
	for i, row := range rows {
		fmt.Fprintf(w, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			fmt.Fprintf(w, "|%s\n", strings.Repeat("---|", len(row)))
		}
	}
}

// WriteOverwrites writes a table of results by name.
func WriteOverwrites(w io.Writer, names []string, results []*OverwriteResult) {
	rows := [][]string{{"guest", "stops", "pages overwritten", "share of memory", "pages verified",
		"corruptions and alarms", "oracle's stops", "events", "pages in use it knew",
		"contradictions", "stop+cont", "survey", "fill"}}
	for i, r := range results {
		n := time.Duration(max(1, r.Stops))
		var all, known uint64 // in use
		for k, c := range r.Kinds {
			if k := pageclass.Kind(k); k > pageclass.Offline {
				all, known = all+c.Pages, known+c.Known
			}
		}
		rows = append(rows, []string{
			names[i], fmt.Sprint(r.Stops), fmt.Sprint(r.Overwritten),
			percent(r.Overwritten, r.Memory), fmt.Sprint(r.Verified), fmt.Sprint(len(r.Problems)),
			fmt.Sprint(r.OracleStops), fmt.Sprint(r.Events), percent(known, all),
			fmt.Sprint(len(r.Contradictions)),
			ms(r.Stop / n), ms(r.Look / n), ms(r.Fill / n),
		})
	}
	table(w, rows...)
	fmt.Fprintf(w, "\nWhat the oracle knew to be allocated, by kind:\n\n")
	rows = [][]string{{"kind", "pages a stop", "known to be allocated"}}
	for k := range pageclass.Kinds {
		var c Coverage
		stops := 0
		for _, r := range results {
			c.Pages += r.Kinds[k].Pages
			c.Known += r.Kinds[k].Known
			stops += r.OracleStops
		}
		if c.Pages > 0 && k != pageclass.None {
			rows = append(rows,
				[]string{k.String(), fmt.Sprint(c.Pages / uint64(max(1, stops))),
					percent(c.Known, c.Pages)})
		}
	}
	table(w, rows...)
	for i, r := range results {
		var did []string
		for _, c := range counters {
			n := uint64(0)
			for _, name := range c.names {
				n += r.Vmstat[name]
			}
			did = append(did, fmt.Sprintf("%s %d", c.what, n))
		}
		fmt.Fprintf(w, "\n- %s, by its own counters: %s; out of memory on purpose %d", names[i],
			strings.Join(did, ", "), r.OOM)
		for _, p := range r.Problems {
			fmt.Fprintf(w, "\n- %s: %s", names[i], oneLine(p.String()))
		}
		for _, c := range r.Contradictions {
			fmt.Fprintf(w, "\n- %s: %s", names[i], c)
		}
		if r.Failed+r.Empty+r.Belated > 0 {
			fmt.Fprintf(w,
				"\n- %s: %d stops without a survey, %d at which nothing was skippable; %d pages "+
					"whose freeing was published late", names[i], r.Failed, r.Empty, r.Belated)
		}
		for _, note := range keys(r.Notes) {
			fmt.Fprintf(w, "\n- %s: %d × %s", names[i], r.Notes[note], oneLine(note))
		}
	}
	fmt.Fprintln(w)
}

// counters are those of /proc/vmstat that show what the guests went through.
var counters = []struct {
	what  string
	names []string
}{
	{"pages allocated", []string{"pgalloc_dma", "pgalloc_dma32", "pgalloc_normal",
		"pgalloc_movable"}},
	{"swapped out", []string{"pswpout"}},
	{"swapped in", []string{"pswpin"}},
	{"reclaimed", []string{"pgsteal_kswapd", "pgsteal_direct"}},
	{"migrated", []string{"pgmigrate_success"}},
	{"compactions", []string{"compact_success", "compact_fail"}},
	{"huge pages faulted", []string{"thp_fault_alloc"}},
	{"split", []string{"thp_split_page"}},
	{"hugetlb pages", []string{"htlb_buddy_alloc_success"}},
	{"balloon pages", []string{"balloon_inflate"}},
}

func keys(m map[string]int) (all []string) {
	for k := range m {
		all = append(all, k)
	}
	slices.Sort(all)
	return all
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return s[:min(len(s), 400)]
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1000) }

func percent(n, of uint64) string {
	if of == 0 {
		return "–"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(n)/float64(of))
}

// WriteTrials writes a table: how often overwritten pages of each target were noticed, and by what.
func WriteTrials(w io.Writer, trials []Trial) {
	rows := [][]string{{"pages falsely called free", "pages a trial", "trials", "noticed",
		"median time", "by content", "by a process's death", "by the kernel",
		"by silence or a halt"}}
	for _, t := range Targets {
		sizes := map[int][]Trial{}
		for _, r := range trials {
			if r.Target == t.Name {
				sizes[r.Pages] = append(sizes[r.Pages], r)
			}
		}
		var order []int
		for n := range sizes {
			order = append(order, n)
		}
		slices.Sort(order)
		for _, n := range order {
			by := map[string]int{}
			var times []time.Duration
			for _, r := range sizes[n] {
				by[r.Noticed]++
				if r.Noticed != "" {
					times = append(times, r.After)
				}
			}
			median := "–"
			if slices.Sort(times); len(times) > 0 {
				median = fmt.Sprintf("%.1f s", times[len(times)/2].Seconds())
			}
			rows = append(rows,
				[]string{t.Name, fmt.Sprint(n), fmt.Sprint(len(sizes[n])), fmt.Sprint(len(times)),
					median,
					fmt.Sprint(by["bad"]), fmt.Sprint(by["death"]), fmt.Sprint(by["kernel"]),
					fmt.Sprint(by["silent"] + by["stuck"] + by["gone"] + by["halt"])})
		}
	}
	table(w, rows...)
}

// WriteComparison writes what snapshots have shown of a guest.
func WriteComparison(w io.Writer, name string, c *Comparison) {
	fmt.Fprintf(w, "## %s\n\n", name)
	table(w, [][]string{
		{"", ""},
		{"snapshots", fmt.Sprint(c.Snapshots)},
		{"pages compared", fmt.Sprint(c.Pages)},
		{"left out, as they changed meanwhile",
			fmt.Sprintf("%d; %d of them skippable and in use before or after", c.Moving,
				c.MovingInUse)},
		{"in use, and called skippable", fmt.Sprint(len(c.Wrong))},
		{"free pages found skippable", percent(c.Found, c.Free)},
		{"greatest difference to the kernel's count of free pages", fmt.Sprint(c.CounterOff)},
		{"kinds agree", fmt.Sprintf("%.3f %%", 100*c.Agreement())},
		{"file pages on the active list agree", percent(c.ActiveAgree, c.ActiveSaid)},
		{"file pages on the inactive list agree", percent(c.InactiveAgree, c.InactiveSaid)},
		{"mapped pages agree", percent(c.MappedAgree, c.MappedPages)},
	}...)
	fmt.Fprintln(w)
	rows := [][]string{{"kpageflags \\ survey"}}
	var kinds []pageclass.Kind
	for k := range pageclass.Kinds {
		n := uint64(0)
		for s := SaidFree; s < Saids; s++ {
			n += c.Matrix[s][k]
		}
		if n > 0 {
			kinds = append(kinds, k)
			rows[0] = append(rows[0], k.String())
		}
	}
	for s := SaidFree; s < Saids; s++ {
		row, n := []string{s.String()}, uint64(0)
		for _, k := range kinds {
			text := ""
			if v := c.Matrix[s][k]; v > 0 {
				text = fmt.Sprint(v)
				if !agrees(s, k) {
					text = "**" + text + "**"
				}
				n += v
			}
			row = append(row, text)
		}
		if n > 0 {
			rows = append(rows, row)
		}
	}
	table(w, rows...)
	for _, x := range c.Wrong[:min(len(c.Wrong), 50)] {
		fmt.Fprintf(w, "\n- %s", x)
	}
	fmt.Fprintln(w)
}

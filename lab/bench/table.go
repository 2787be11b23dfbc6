package bench

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// baseline is the strategy that all others are compared with, where VMs are not domains.
const baseline = "qemu-postcopy"

func (r *Result) baseline() string {
	if r.Machine.Libvirt != nil {
		return domainBaseline
	}
	return baseline
}

// A figure is one column: a number of a run, and how it is shown.
type figure struct {
	title string
	unit  string
	show  func(float64) string
	get   func(*Run) *float64
	ratio bool // of interest as a ratio; less is better
}

func ms(x float64) string    { return fmt.Sprintf("%.0f", x*1e3) }
func secs(x float64) string  { return fmt.Sprintf("%.2f", x) }
func whole(x float64) string { return fmt.Sprintf("%.0f", x) }
func mib(x float64) string   { return fmt.Sprintf("%.0f", x/(1<<20)) }

func number(n *uint64) *float64 {
	if n == nil {
		return nil
	}
	return ptr(float64(*n))
}

// ofQuantiles takes a figure that needs at least one event.
func ofQuantiles(q func(*Run) *Quantiles, f func(*Quantiles) float64) func(*Run) *float64 {
	return func(r *Run) *float64 {
		if v := q(r); v != nil && v.Count > 0 {
			return ptr(f(v))
		}
		return nil
	}
}

func ofPages(f func(*Pages) *uint64) func(*Run) *float64 {
	return func(r *Run) *float64 {
		if r.Pages == nil {
			return nil
		}
		return number(f(r.Pages))
	}
}

// engineCPU is the CPU time of both engines for each 10⁹ bytes on the link.
func engineCPU(r *Run) *float64 {
	if r.EngineCPU == nil || r.LinkBytes == nil || *r.LinkBytes == 0 {
		return nil
	}
	return ptr((r.EngineCPU.Source + r.EngineCPU.Destination) / (float64(*r.LinkBytes) / 1e9))
}

func stallCount(r *Run) *float64 {
	if r.Stall == nil {
		return nil
	}
	return number(&r.Stall.Count)
}

func stall(r *Run) *Quantiles { return r.Stall }
func fetch(r *Run) *Quantiles { return r.Fetch }

var (
	times = []figure{
		{"prepare", "ms", ms, func(r *Run) *float64 { return r.Prepare }, false},
		{"transfer", "ms", ms, func(r *Run) *float64 { return r.Transfer }, true},
		{"down", "ms", ms, func(r *Run) *float64 { return r.Down }, true},
		{"total", "s", secs, func(r *Run) *float64 { return r.Total }, true},
		{"link", "MiB", mib, func(r *Run) *float64 { return number(r.LinkBytes) }, true},
		{"engines", "CPU s/GB", secs, engineCPU, true},
		{"recovery 90", "s", secs, func(r *Run) *float64 { return r.Recovery }, true},
		{"work lost", "s", secs, func(r *Run) *float64 { return r.WorkLost }, true},
		{"bad", "pages", whole, func(r *Run) *float64 { return number(r.Bad) }, false},
	}
	stalls = []figure{
		{"stalls", "", whole, stallCount, true},
		{"stall p50", "ms", ms1, ofQuantiles(stall, func(q *Quantiles) float64 { return q.P50 }),
			true},
		{"p99", "ms", ms1, ofQuantiles(stall, func(q *Quantiles) float64 { return q.P99 }), true},
		{"max", "ms", ms, ofQuantiles(stall, func(q *Quantiles) float64 { return q.Max }), true},
		{"sum", "s", secs, ofQuantiles(stall, func(q *Quantiles) float64 { return q.Sum }), true},
		{"fetch p50", "ms", ms1, ofQuantiles(fetch, func(q *Quantiles) float64 { return q.P50 }),
			false},
		{"p99", "ms", ms1, ofQuantiles(fetch, func(q *Quantiles) float64 { return q.P99 }), false},
	}
	pages = []figure{
		{"pushed", "pages", whole, ofPages(func(p *Pages) *uint64 { return p.Pushed }), false},
		{"fetched", "pages", whole, ofPages(func(p *Pages) *uint64 { return p.Fetched }), false},
		{"zero", "pages", whole, ofPages(func(p *Pages) *uint64 { return p.Zero }), false},
		{"skipped", "pages", whole, ofPages(func(p *Pages) *uint64 { return p.Skipped }), false},
		{"twice", "pages", whole, ofPages(func(p *Pages) *uint64 { return p.Duplicate }), false},
		{"before", "ops/s", whole, func(r *Run) *float64 { return r.Before }, false},
	}
)

// fromCommand is the time from the command until the VM runs on the destination. With libvirt all
// strategies are one command, which also has the twin started.
var fromCommand = figure{"from command", "ms", ms, func(r *Run) *float64 {
	if r.Prepare == nil || r.Transfer == nil {
		return nil
	}
	return ptr(*r.Prepare + *r.Transfer)
}, true}

func (r *Result) times() []figure {
	if r.Machine.Libvirt == nil {
		return times
	}
	return slices.Insert(slices.Clone(times), 1, fromCommand)
}

func ms1(x float64) string { return fmt.Sprintf("%.1f", x*1e3) }

func (s spread) format(show func(float64) string) string {
	switch s.n {
	case 0:
		return "-"
	case 1:
		return show(s.median)
	}
	return fmt.Sprintf("%s (%s–%s)", show(s.median), show(s.min), show(s.max))
}

// Table writes the result for people: medians over repetitions, with their
// ranges, and ratios to QEMU's post-copy.
func (r *Result) Table(w io.Writer) error {
	fmt.Fprintln(w, r.title())
	fmt.Fprintln(w, r.subtitle())
	for _, f := range [][]figure{r.times(), stalls, pages} {
		fmt.Fprintln(w)
		if err := r.table(w, f); err != nil {
			return err
		}
	}
	for _, run := range r.Runs {
		if run.Reason != "" {
			fmt.Fprintf(w, "\n%s, repetition %d: %s: %s\n", run.Strategy, run.Rep, run.Outcome,
				run.Reason)
		}
	}
	baseline := r.baseline()
	if !slices.Contains(r.strategies(), baseline) || len(r.strategies()) < 2 {
		return nil
	}
	fmt.Fprintf(w, "\nRatios to %s of the same repetition; less than 1 is better\n", baseline)
	return r.ratios(w)
}

// strategies returns the names of those that ran, in their order.
func (r *Result) strategies() []string {
	var names []string
	for _, run := range r.Runs {
		if !slices.Contains(names, run.Strategy) {
			names = append(names, run.Strategy)
		}
	}
	return names
}

func header(w io.Writer, figures []figure) {
	fmt.Fprint(w, "strategy")
	for _, f := range figures {
		fmt.Fprintf(w, "\t%s", f.title)
		if f.unit != "" {
			fmt.Fprintf(w, " [%s]", f.unit)
		}
	}
	fmt.Fprintln(w)
}

func (r *Result) table(out io.Writer, figures []figure) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	header(w, figures)
	for _, name := range r.strategies() {
		fmt.Fprint(w, name)
		for _, f := range figures {
			var values []float64
			for i := range r.Runs {
				if run := &r.Runs[i]; run.Strategy == name {
					if v := f.get(run); v != nil {
						values = append(values, *v)
					}
				}
			}
			fmt.Fprintf(w, "\t%s", spreadOf(values).format(f.show))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func (r *Result) ratios(out io.Writer) error {
	var figures []figure
	for _, f := range slices.Concat(r.times(), stalls) {
		if f.ratio {
			f.unit = ""
			figures = append(figures, f)
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	header(w, figures)
	for _, name := range r.strategies() {
		if name == r.baseline() {
			continue
		}
		fmt.Fprint(w, name)
		for _, f := range figures {
			fmt.Fprintf(w, "\t%s", spreadOf(r.ratio(name, f)).format(secs))
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

// ratio returns a strategy's figure over that of the baseline, for every
// repetition that has both.
func (r *Result) ratio(name string, f figure) []float64 {
	var ratios []float64
	for i := range r.Runs {
		a := &r.Runs[i]
		if a.Strategy != name {
			continue
		}
		for j := range r.Runs {
			b := &r.Runs[j]
			if b.Strategy != r.baseline() || b.Rep != a.Rep {
				continue
			}
			if x, y := f.get(a), f.get(b); x != nil && y != nil && *y > 0 {
				ratios = append(ratios, *x / *y)
			}
		}
	}
	return ratios
}

func (r *Result) title() string {
	link := "unshaped link"
	if r.Machine.Link != nil {
		link = bits(*r.Machine.Link) + " link"
	}
	load := ""
	if len(r.Runs) > 0 {
		load = ", load " + r.Runs[0].Load
	}
	v := &r.VM
	if v.Place == "scattered" {
		load += ", hot memory scattered"
	}
	if v.Agent {
		load += ", with an agent"
	}
	cpus := "1 CPU"
	if v.VCPUs != 1 {
		cpus = fmt.Sprintf("%d CPUs", v.VCPUs)
	}
	return fmt.Sprintf("VM of %d MiB, %s, %d MiB hot, %d MiB idle%s; %s", v.MemoryMiB, cpus,
		v.HotMiB, v.IdleMiB+v.OtherMiB, load, link)
}

func (r *Result) subtitle() string {
	m := &r.Machine
	qemu, guest := "QEMU "+m.QEMU, "guest Linux "+m.GuestKernel
	if m.Libvirt != nil {
		qemu = "libvirt " + *m.Libvirt + ", " + qemu
	}
	if r.VM.Guest == bareGuest {
		guest = "bare guest"
	}
	return fmt.Sprintf("%s, %d cores, %.0f GiB, Linux %s; %s (%s, %s, %s devices), %s",
		m.CPU, m.Cores, float64(m.MemoryBytes)/(1<<30), m.Kernel, qemu, m.Accel, r.VM.Machine,
		r.VM.Devices, guest)
}

func bits(n uint64) string {
	for _, u := range []struct {
		name string
		n    uint64
	}{{"Gbit/s", 1e9}, {"Mbit/s", 1e6}, {"kbit/s", 1e3}} {
		if n >= u.n {
			return fmt.Sprintf("%g %s", float64(n)/float64(u.n), u.name)
		}
	}
	return fmt.Sprintf("%d bit/s", n)
}

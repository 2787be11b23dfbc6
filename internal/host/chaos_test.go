package host

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/lab"
	"vacate/lab/labtest"
)

// cell is a state and the fault that happens in it; and maybe a second one while the eviction
// recovers from the first.
type cell struct {
	at     string
	fault  fault
	when   strike
	second *fault
}

// strike is when a second fault happens.
type strike string

const (
	// when a machine comes to a state of recovery, while the first fault lasts
	inRecovery strike = ", in recovery: "
	onceMended strike = ", once mended: " // soon after the first fault is over
)

func (c cell) String() string {
	s := c.at + ": " + c.fault.name
	if c.second != nil {
		s += string(c.when) + c.second.name
	}
	return s
}

// faults are those that happen in the cell.
func (c cell) faults() []fault {
	if c.second == nil {
		return []fault{c.fault}
	}
	return []fault{c.fault, *c.second}
}

func (c cell) has(name string) bool {
	return slices.ContainsFunc(c.faults(), func(f fault) bool { return f.name == name })
}

func (c cell) allows(o outcome) bool {
	return slices.ContainsFunc(c.faults(),
		func(f fault) bool { return slices.Contains(f.allowed, o) })
}

// singles are all cells with one fault.
func singles() (cells []cell) {
	for _, at := range points() {
		for _, f := range faults {
			cells = append(cells, cell{at: at, fault: f})
		}
	}
	return cells
}

// doubles are cells with a second fault: one for each with a single fault, so that each fault has
// each as its second in two states, by chance, once in recovery and once after it was mended.
func doubles(random *rand.Rand) (cells []cell) {
	for _, f := range faults {
		var kinds []cell
		for _, when := range []strike{inRecovery, onceMended} {
			for i := range faults {
				kinds = append(kinds, cell{fault: f, when: when, second: &faults[i]})
			}
		}
		random.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
		for i, at := range points() {
			c := kinds[i%len(kinds)]
			c.at = at
			cells = append(cells, c)
		}
	}
	return cells
}

// every is all cells that there may be.
func every() (cells []cell) {
	cells = singles()
	for _, c := range singles() {
		for _, when := range []strike{inRecovery, onceMended} {
			for i := range faults {
				cells = append(cells, cell{c.at, c.fault, when, &faults[i]})
			}
		}
	}
	return cells
}

// result is what came of a run of a cell.
type result struct {
	Cell    string
	Outcome outcome // empty: the run failed
	Seconds float64
	Log     string `json:",omitempty"` // file with all that a run that failed said
	Shown   shown  `json:",omitzero"`
}

// campaign is many runs, several at a time, each in a process and a lab of its own.
type campaign struct {
	test    string // the worker's
	seed    uint64
	workers int
	file    string // of the tables; empty: none
	begun   time.Time
	tables  func(*campaign) string

	mu      sync.Mutex
	results []result // guarded by mu
}

// TestChaos has something happen in states of an eviction, and looks what becomes of the VM. By
// default it takes a sample by chance. VACATE_CHAOS=N has it take all cells N times,
// VACATE_CHAOS_WORKERS=N so many at a time, and VACATE_CHAOS_RESULT=FILE tables written.
// VACATE_CHAOS_GUEST=kvm has it take the bare guest, under KVM, in place of Linux.
// VACATE_CHAOS_ONLY=TEXT has it take the cells with that in their names: those with a second fault
// if TEXT names one.
func TestChaos(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	labtest.Need(t, lab.Probe())
	if g := os.Getenv("VACATE_CHAOS_GUEST"); g != "" && g != "linux" && g != "kvm" {
		t.Fatalf("VACATE_CHAOS_GUEST is %q: want linux or kvm", g)
	}
	if seed, err := strconv.ParseUint(os.Getenv("VACATE_CHAOS_WORKER"), 10, 64); err == nil {
		runCells(t, seed)
		return
	}
	rounds := setting("VACATE_CHAOS", 0)
	c := newCampaign(t, "TestChaos", "VACATE_CHAOS", (*campaign).chaosTables)
	random := c.random()
	var names []string
	if only := os.Getenv("VACATE_CHAOS_ONLY"); only != "" {
		for _, c := range every() {
			if strings.Contains(c.String(), only) &&
				(c.second == nil || strings.Contains(only, ",")) {
				names = append(names, c.String())
			}
		}
	} else {
		for range max(rounds, 1) {
			for _, c := range slices.Concat(singles(), doubles(random)) {
				names = append(names, c.String())
			}
		}
	}
	shuffle(random, names)
	if rounds == 0 && os.Getenv("VACATE_CHAOS_ONLY") == "" {
		names = names[:12]
	}
	c.run(t, names)
}

// setting reads a number from the environment, which need not have it.
func setting(name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		panic(fmt.Sprintf("%s=%s: %v", name, text, err))
	}
	return n
}

// newCampaign makes the campaign of a test whose settings have a prefix.
func newCampaign(t *testing.T, test, prefix string, tables func(*campaign) string) *campaign {
	c := &campaign{
		test: test, seed: setting(prefix+"_SEED", labtest.Seed(t)),
		workers: int(setting(prefix+"_WORKERS", 2)),
		file:    os.Getenv(prefix + "_RESULT"), begun: time.Now(), tables: tables,
	}
	t.Logf("%s_SEED=%d", prefix, c.seed)
	return c
}

func (c *campaign) random() *rand.Rand { return rand.New(rand.NewPCG(c.seed, 0)) }

func shuffle(random *rand.Rand, names []string) {
	random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
}

// run runs cells, and fails the test where one does.
func (c *campaign) run(t *testing.T, names []string) {
	before := len(c.results)
	cells := make(chan string)
	var all sync.WaitGroup
	for range c.workers {
		all.Go(func() { c.work(t, cells) })
	}
	for _, name := range names {
		cells <- name
	}
	close(cells)
	all.Wait()
	if n := len(c.results) - before; n != len(names) {
		t.Errorf("%d runs of %d", n, len(names))
	}
}

// work has processes run cells, one at a time, until there are no more. One that ends too early, or
// hangs, is followed by another.
func (c *campaign) work(t *testing.T, cells <-chan string) {
	var w *worker
	for name := range cells {
		if w == nil {
			var err error
			if w, err = startWorker(t.Context(), c.test, c.seed); err != nil {
				t.Error(err)
				c.note(t, result{Cell: name}, err.Error())
				continue
			}
		}
		r, log, ok := w.run(name)
		c.note(t, r, log)
		if !ok || r.Outcome == "" { // what is left of a run that failed must not fail the next
			w.end()
			w = nil
		}
	}
	if w != nil {
		w.end()
	}
}

var noName = regexp.MustCompile(`[^a-z]+`)

// note keeps a result, and writes the tables anew.
func (c *campaign) note(t *testing.T, r result, log string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case r.Outcome != "":
		t.Logf("%4d %5.1fs %s: %s", len(c.results)+1, r.Seconds, r.Cell, r.Outcome)
	case c.file == "":
		t.Errorf("%s:\n%s", r.Cell, log)
	default:
		name := fmt.Sprintf("%s-%d.log",
			strings.Trim(noName.ReplaceAllString(strings.ToLower(r.Cell), "-"), "-"),
			len(c.results)+1)
		r.Log = filepath.Join(filepath.Dir(c.file),
			strings.ToLower(strings.TrimPrefix(c.test, "Test")), name)
		err := os.MkdirAll(filepath.Dir(r.Log), 0o755)
		if err == nil {
			err = os.WriteFile(r.Log, []byte(log), 0o644)
		}
		t.Errorf("%s: failed: see %s (%v)", r.Cell, r.Log, err)
	}
	c.results = append(c.results, r)
	if c.file == "" {
		return
	}
	b, err := json.MarshalIndent(c.results, "", " ")
	if err == nil {
		err = os.WriteFile(c.file+".json", b, 0o644)
	}
	if err == nil {
		err = os.WriteFile(c.file, []byte(c.tables(c)), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

var letters = map[outcome]string{"": "**FAILED**", moved: "D", stayed: "S", frozen: "F", dead: "K",
	halved: "L", off: "O"}

// chaosTables are what came of all runs so far, in Markdown.
func (c *campaign) chaosTables() string {
	known := map[string]cell{}
	for _, c := range every() {
		known[c.String()] = c
	}
	counts := map[[3]string]map[string]int{} // of letters, by table, row and column
	sums, failed := map[string]int{}, []result{}
	for _, r := range c.results {
		at := known[r.Cell]
		key := [3]string{"", at.at, at.fault.name}
		if at.second != nil {
			key = [3]string{string(at.when), at.fault.name, at.second.name}
		}
		if counts[key] == nil {
			counts[key] = map[string]int{}
		}
		counts[key][letters[r.Outcome]]++
		sums[letters[r.Outcome]]++
		if r.Outcome == "" {
			failed = append(failed, r)
		}
	}
	var out strings.Builder
	guest := "Linux guests"
	if bareGuests() {
		guest = "bare guests under KVM"
	}
	fmt.Fprintf(&out, "%d runs with %s in %d minutes, %d at a time, seed %d. Failed: %d. "+
		"Outcomes: %s.\n", len(c.results), guest, int(time.Since(c.begun).Minutes()), c.workers,
		c.seed, len(failed), cellText(sums))
	var columns []string
	for _, f := range faults {
		columns = append(columns, f.name)
	}
	table := func(kind, head string, rows []string) {
		fmt.Fprintf(&out, "\n| %s | %s |\n|---|%s\n", head, strings.Join(columns, " | "),
			strings.Repeat("---|", len(columns)))
		for _, row := range rows {
			fmt.Fprintf(&out, "| %s |", row)
			for _, f := range columns {
				fmt.Fprintf(&out, " %s |", cellText(counts[[3]string{kind, row, f}]))
			}
			out.WriteString("\n")
		}
	}
	out.WriteString("\n## One fault\n")
	table("", "state", points())
	out.WriteString("\n## A second fault, when a machine comes to a state of recovery\n")
	table(string(inRecovery), "first \\ second", columns)
	out.WriteString("\n## A second fault, just after the first was mended\n")
	table(string(onceMended), "first \\ second", columns)
	if len(failed) > 0 {
		out.WriteString("\n| failed | log |\n|---|---|\n")
		for _, r := range failed {
			fmt.Fprintf(&out, "| %s | %s |\n", r.Cell, r.Log)
		}
	}
	return out.String()
}

func cellText(counts map[string]int) string {
	var parts []string
	for _, l := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%s×%d", l, counts[l]))
	}
	return strings.Join(parts, " ")
}

// worker is a process that runs cells.
type worker struct {
	cmd   *exec.Cmd
	input io.WriteCloser
	lines chan string
	stop  context.CancelFunc
}

// told begins the line in which a worker tells the result of a run.
const told = "chaos result: "

// cellTime is how long a run may take.
const cellTime = 6 * time.Minute

func startWorker(ctx context.Context, test string, seed uint64) (*worker, error) {
	ctx, stop := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run", "^"+test+"$", "-test.v",
		"-test.timeout", "0")
	cmd.Env = append(os.Environ(), fmt.Sprintf("VACATE_CHAOS_WORKER=%d", max(seed, 1)))
	input, err := cmd.StdinPipe()
	if err == nil {
		var output io.ReadCloser
		if output, err = cmd.StdoutPipe(); err == nil {
			cmd.Stderr = cmd.Stdout
			if err = cmd.Start(); err == nil {
				w := &worker{cmd, input, make(chan string), stop}
				go func() {
					defer close(w.lines)
					for in := bufio.NewReader(output); ; {
						line, err := in.ReadString('\n')
						if err != nil {
							return
						}
						select {
						case w.lines <- line:
						case <-ctx.Done():
						}
					}
				}()
				return w, nil
			}
		}
	}
	stop()
	return nil, err
}

// run has the worker run a cell. It returns the result, all that the worker said, and whether the
// worker can go on.
func (w *worker) run(name string) (r result, log string, ok bool) {
	r.Cell = name
	var said bytes.Buffer
	fmt.Fprintln(w.input, name)
	limit := time.NewTimer(cellTime)
	defer limit.Stop()
	for {
		select {
		case line, open := <-w.lines:
			if !open {
				said.WriteString("the process ended\n")
				return r, said.String(), false
			}
			if text, is := strings.CutPrefix(line, told); is {
				err := json.Unmarshal([]byte(text), &r)
				return r, said.String(), err == nil
			}
			said.WriteString(line)
		case <-limit.C:
			fmt.Fprintf(&said, "the run did not end within %v\n", cellTime)
			return r, said.String(), false
		}
	}
}

// end ends the worker: by itself, if it does nothing.
func (w *worker) end() {
	w.input.Close()
	kill := time.AfterFunc(30*time.Second, w.stop)
	for range w.lines {
	}
	w.cmd.Wait()
	kill.Stop()
	w.stop()
}

// bareGuests reports whether the guests of the campaign are bare ones, under KVM.
func bareGuests() bool { return os.Getenv("VACATE_CHAOS_GUEST") == "kvm" }

// runCells is TestChaos in a worker: it runs the cells that the parent names.
func runCells(t *testing.T, seed uint64) {
	known := map[string]cell{}
	for _, c := range every() {
		known[c.String()] = c
	}
	l := labtest.New(t, lab.Options{Rate: 4e8, NoPin: true})
	spec := lab.Spec{MemoryMiB: 192, Load: load}
	if bareGuests() {
		spec.BareMetal, spec.Accel = true, "kvm" // where there is no KVM, this fails
	}
	vm := boot(t, l.A, spec)
	t.Logf("guests run under %s", vm.Spec.Accel)
	saved, err := vm.Save(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		c, ok := known[in.Text()]
		if !ok {
			t.Fatalf("there is no cell %q", in.Text())
		}
		report(t, c, func(t *testing.T, r *result) {
			hash := fnv.New64()
			io.WriteString(hash, c.String())
			delay := time.Millisecond +
				time.Duration(rand.New(rand.NewPCG(seed, hash.Sum64())).IntN(400))*time.Millisecond
			r.Outcome = disturb(t, l, saved, c, delay)
		})
	}
}

// report runs a cell as a subtest, and prints its result for the parent.
func report(t *testing.T, c cell, run func(*testing.T, *result)) {
	t.Run(c.String(), func(t *testing.T) {
		r, begun := result{Cell: c.String()}, time.Now()
		t.Cleanup(func() { // when all others have said what they know
			if t.Failed() {
				r.Outcome = ""
			}
			r.Seconds = time.Since(begun).Seconds()
			b, _ := json.Marshal(r)
			fmt.Printf("\n%s%s\n", told, b)
		})
		run(t, &r)
	})
}

package evict

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// states lists the constants of type State that the source declares.
func states(t *testing.T) (all []State) {
	file, err := parser.ParseFile(token.NewFileSet(), "state.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if kind, ok := spec.Type.(*ast.Ident); ok && kind.Name == "State" {
			name, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, State(name))
		}
		return true
	})
	if len(all) < 10 {
		t.Fatalf("found the states %q only", all)
	}
	return all
}

// Every state is in the table, can be reached on one side, and leads to an end.
func TestStates(t *testing.T) {
	all := states(t)
	final := []State{Refused, Aborted, Completed, ShutDown, Lost}
	reach := func(from State) map[State]bool {
		seen := map[State]bool{from: true}
		for todo := []State{from}; len(todo) > 0; todo = todo[1:] {
			for _, s := range next[todo[0]] {
				if !seen[s] {
					seen[s] = true
					todo = append(todo, s)
				}
			}
		}
		return seen
	}
	source, destination := reach(Preparing), reach(Waiting)
	for _, s := range all {
		if !source[s] && !destination[s] {
			t.Errorf("%s is never reached", s)
		}
		if isFinal := slices.Contains(final, s); isFinal != (len(next[s]) == 0) {
			t.Errorf("%s leads to %q", s, next[s])
		}
		if ends := reach(s); !slices.ContainsFunc(final, func(f State) bool { return ends[f] }) {
			t.Errorf("%s leads to no end", s)
		}
	}
	for s := range maps.Keys(next) {
		if !slices.Contains(all, s) {
			t.Errorf("the table has %q, which is no state", s)
		}
	}
	// Once the VM may run on the destination, only the destination's answer leads back to where it
	// runs here.
	for _, s := range []State{Pushing, Retiring, Completing} {
		if r := reach(s); r[Aborted] || r[RollingBack] || r[Refused] {
			t.Errorf("%s leads back", s)
		}
	}
}

// A machine moves along the table only, reports each move, and keeps its time.
func TestMachine(t *testing.T) {
	all := states(t)
	for _, from := range all {
		for _, to := range all {
			var told []State
			m := newMachine(from, func(s State) { told = append(told, s) })
			err := m.enter(to)
			allowed := slices.Contains(next[from], to)
			if allowed != (err == nil) {
				t.Errorf("from %s to %s: %v", from, to, err)
			}
			if want := map[bool]State{true: to, false: from}[allowed]; m.current() != want {
				t.Errorf("from %s to %s: it is %s", from, to, m.current())
			}
			if allowed != slices.Equal(told, []State{to}) ||
				allowed == m.at(to).IsZero() && from != to || m.at(from).IsZero() {
				t.Errorf("from %s to %s: told of %q", from, to, told)
			}
		}
	}
	m := newMachine(Preparing, func(State) {})
	for _, s := range []State{Switching, Loading, Committing, Pushing, Retiring, Completed} {
		if err := m.enter(s); err != nil {
			t.Fatal(err)
		}
	}
	before := 0.0
	for _, p := range m.phases() {
		if p.At < before {
			t.Errorf("phases %+v are not in order", m.phases())
		}
		before = p.At
	}
	if n := len(m.phases()); n != 7 {
		t.Errorf("%d phases", n)
	}
}

// A state that is entered again keeps its first time, and each of its periods; the history has an
// end.
func TestMachineAgain(t *testing.T) {
	m := newMachine(Pushing, func(State) {})
	first := m.at(Pushing)
	for range maxHistory {
		for _, s := range []State{Reconnecting, Pushing} {
			time.Sleep(time.Microsecond)
			if err := m.enter(s); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !m.at(Pushing).Equal(first) {
		t.Errorf("it was entered first at %v, not %v", first, m.at(Pushing))
	}
	list := m.phases()
	if len(list) != maxHistory || list[0].State != Pushing || list[0].At != 0 ||
		list[maxHistory-1].State != Pushing || list[maxHistory-1].For != 0 {
		t.Fatalf("%d phases, from %+v to %+v", len(list), list[0], list[len(list)-1])
	}
	sum := 0.0
	for i, p := range list {
		if i > 0 && (p.At <= list[i-1].At || p.State == list[i-1].State && i != maxHistory/2) {
			t.Errorf("phase %d is %+v, behind %+v", i, p, list[i-1])
		}
		sum += p.For
	}
	both := m.spent(Pushing) + m.spent(Reconnecting)
	if all := time.Since(first); both > all || both.Seconds() < sum || m.spent(Retiring) != 0 {
		t.Errorf("%v in the two states, %.6f s by the phases, of %v", both, sum, all)
	}
}

// The report leaves out what is not known about an eviction that another engine began. What a
// destination says about the time before cannot be true of a time before the commit.
func TestReportOfResumed(t *testing.T) {
	e := Source{}.engine(InDoubt)
	e.halted.at.Store(&e.started)
	e.heard.noteRan(time.Hour, e.machine)
	r, _ := e.done(nil)
	if r.Down != nil || r.Transfer != nil || r.Begun != nil || r.Total != nil {
		t.Errorf("%+v", r)
	}
	if e.heard.ranSince.Before(e.started) {
		t.Errorf("it ran since %v, before %v", e.heard.ranSince, e.started)
	}
	e = Source{}.engine(Preparing)
	for _, s := range []State{Switching, Loading, Committing} {
		if err := e.machine.enter(s); err != nil {
			t.Fatal(err)
		}
	}
	told := e.machine.at(Committing)
	e.heard.noteRan(time.Hour, e.machine)
	if !e.heard.ranSince.Equal(told) {
		t.Errorf("it ran since %v, and was told to at %v", e.heard.ranSince, told)
	}
	e.heard.noteRan(0, e.machine)
	if !e.heard.ranSince.Equal(told) {
		t.Error("a later word counts")
	}
	e.done(nil)
}

// The engines do what the model tries: they call each function of decide.go.
func TestDecisionsAreMade(t *testing.T) {
	fset := token.NewFileSet()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	decisions, called := map[string]bool{}, map[string]bool{}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				if name == "decide.go" && n.Recv == nil {
					decisions[n.Name.Name] = true
				}
			case *ast.CallExpr:
				if f, ok := n.Fun.(*ast.Ident); ok {
					called[f.Name] = true
				}
			}
			return true
		})
	}
	if !decisions["mayCommit"] || !decisions["mayCont"] {
		t.Fatalf("found the functions %v only", slices.Sorted(maps.Keys(decisions)))
	}
	for name := range decisions {
		if !called[name] && !ast.IsExported(name) { // the daemon calls those
			t.Errorf("%s is called by nobody", name)
		}
	}
}

// The clock may be set after the freeze: the down time is the same.
func TestByOurClock(t *testing.T) {
	started := time.Now()
	time.Sleep(2 * time.Millisecond)
	wall := time.Now().Round(0) // QEMU's times have no reading of a steady clock
	time.Sleep(2 * time.Millisecond)
	for _, at := range []time.Time{wall, {}, started.Add(-time.Hour), started.Add(time.Hour)} {
		got := byOurClock(at, started)
		if at == wall && got.Round(0) != wall || got.Before(started) || got.After(time.Now()) {
			t.Errorf("%v, of %v", got, at)
		}
		if got == got.Round(0) {
			t.Errorf("%v is of the wall clock", got)
		}
	}
}

// A reason that stays is told once, whatever port each attempt to connect had.
func TestNoteApart(t *testing.T) {
	var h heard
	const first = "read tcp 10.0.0.1:4711->10.0.0.2:7601: reset"
	for _, test := range []struct{ why, told string }{
		{first, first}, {"read tcp 10.0.0.1:52->10.0.0.2:7601: reset", first},
		{"no such eviction", "no such eviction"},
	} {
		if h.noteApart(test.why); h.apart.get() != test.told {
			t.Errorf("%q is told as %q", test.why, h.apart.get())
		}
	}
}

package store

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"vacate/internal/fleet/member"
	"vacate/internal/fleet/view"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// open starts an etcd of its own, with one member.
func open(t *testing.T, dir string, generation uint64) (*Store, *member.Member) {
	t.Helper()
	m, err := member.Start(t.Context(), member.Config{Name: "brain1", Dir: dir},
		slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(m.Client, generation)
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

func campaign(t *testing.T, s *Store, me string) *Candidacy {
	t.Helper()
	c, err := s.Campaign(t.Context(), me)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func decision(at time.Time) view.Decision {
	return view.Decision{At: at, Cause: view.Relieve, VM: "web1", Incarnation: "x", From: "hosta",
		To: "hostb", Reasons: []string{"it starves"}}
}

func settings(m view.Mode) Settings {
	p := view.DefaultPolicy()
	p.Mode = m
	return Settings{&p}
}

const anID = "0123456789abcdef0123456789abcdef"

// What was written is there after a restart, and numbers only grow.
func TestStore(t *testing.T) {
	dir := t.TempDir()
	s, m := open(t, dir, 0)
	c := campaign(t, s, "brain1@host:1")
	at := time.Now().UTC().Truncate(time.Second)
	p, err := s.Begin(t.Context(), c.Term, Plan{ID: anID, Mode: view.Auto, Decision: decision(at)})
	if err != nil {
		t.Fatal(err)
	}
	if p.Epoch != c.Epoch || p.Number <= p.Epoch {
		t.Errorf("epoch %d, plan %d of %d", c.Epoch, p.Number, p.Epoch)
	}
	want := Everything{
		Hosts: []Host{{Name: "hosta", Labels: map[string]string{"rack": "r1"}, Added: at}},
		Rules: []Rule{{Name: "apart", Text: "vms db must run apart", By: "admin"}},
		Maintenance: []Maintenance{
			{Maintenance: view.Maintenance{Host: "hosta", Phase: view.Draining, Asked: at,
				Left: []string{"web1"}}, Who: "admin"}},
		Plans:    []Plan{p},
		Settings: settings(view.Ask),
	}
	if err := errors.Join(s.PutHost(t.Context(), c.Term, want.Hosts[0]),
		s.PutRule(t.Context(), c.Term, want.Rules[0]),
		s.PutMaintenance(t.Context(), c.Term, want.Maintenance[0]),
		s.PutSettings(t.Context(), c.Term, want.Settings)); err != nil {
		t.Fatal(err)
	}
	if who, err := s.Leader(t.Context()); err != nil || who != "brain1@host:1" {
		t.Errorf("%q leads, %v", who, err)
	}
	m.Close()

	s, m = open(t, dir, 1)
	defer func() { m.Close() }()
	later := campaign(t, s, "brain1@host:1")
	if later.Epoch <= p.Number {
		t.Errorf("epoch %d after plan %d", later.Epoch, p.Number)
	}
	got, err := s.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// The number is of the generation in which it is read: only its own one is sent again.
	got.Plans[0].Number = p.Number
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	// The term of before is over.
	if _, err := s.Begin(t.Context(), c.Term, p); !errors.Is(err, ErrDeposed) {
		t.Errorf("a plan of a term that is over: %v", err)
	}
	d := Decision{Plan: p, Number: p.Number, Outcome: "completed", Ended: at}
	if err := s.End(t.Context(), later.Term, d, 0); err != nil {
		t.Fatal(err)
	}
	if got, err = s.ReadAll(t.Context()); err != nil || len(got.Plans) != 0 ||
		len(got.Decisions) != 1 || got.Decisions[0].Plan.Decision.VM != "web1" {
		t.Errorf("%+v, %v", got, err)
	}
	next := d
	next.Number++
	if err := s.End(t.Context(), later.Term, next, next.Number); err != nil {
		t.Fatal(err)
	}
	if got, err = s.ReadAll(t.Context()); err != nil || len(got.Decisions) != 1 ||
		got.Decisions[0].Number != next.Number {
		t.Errorf("old decisions stay: %+v, %v", got.Decisions, err)
	}
}

// Who has led writes nothing once another leads.
func TestElection(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	first := campaign(t, s, "one")
	elected := make(chan *Candidacy)
	go func() {
		c, err := s.Campaign(t.Context(), "two")
		if err != nil {
			t.Error(err)
		}
		elected <- c
	}()
	if err := s.PutSettings(t.Context(), first.Term, settings(view.Auto)); err != nil {
		t.Fatal(err)
	}
	first.Leave(t.Context())
	second := <-elected
	if second == nil || second.Epoch <= first.Epoch {
		t.Fatalf("%+v after %+v", second, first)
	}
	err := s.PutSettings(t.Context(), first.Term, settings(view.Watch))
	if !errors.Is(err, ErrDeposed) {
		t.Errorf("the first still writes: %v", err)
	}
	got, err := s.ReadAll(t.Context())
	if err != nil || got.Settings.Policy.Mode != view.Auto {
		t.Errorf("%+v, %v", got.Settings, err)
	}
	select {
	case <-first.Over():
	case <-time.After(time.Minute):
		t.Error("the first does not hear that its term is over")
	}
}

// A member that was killed and stands for election anew waits for nobody: what it began before is
// over.
func TestStandsAnew(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	first := campaign(t, s, "one") // whose lease is kept for as long as the test runs
	defer first.Leave(t.Context())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	second, err := s.Campaign(ctx, "one")
	if err != nil {
		t.Fatal(err)
	}
	defer second.Leave(t.Context())
	if err := s.PutHost(t.Context(), first.Term, Host{Name: "a"}); !errors.Is(err, ErrDeposed) {
		t.Errorf("who it was before still writes: %v", err)
	}
	if err := s.PutHost(t.Context(), second.Term, Host{Name: "a"}); err != nil {
		t.Error(err)
	}
}

// A leader that is told to end makes room for the next one.
func TestLeaves(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	for range 5 {
		ctx, cancel := context.WithCancel(t.Context())
		c, err := s.Campaign(ctx, "one")
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		c.Leave(ctx)
		if who, err := s.Leader(t.Context()); who != "" || err != nil {
			t.Fatalf("%q leads, %v", who, err)
		}
	}
}

// A candidate whose lease is gone does not wait on: others would wait for it in vain, or it for
// them.
func TestOverslept(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	defer campaign(t, s, "one").Leave(t.Context())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := s.Campaign(ctx, "two")
		ended <- err
	}()
	var two *mvccpb.KeyValue
	for two == nil && ctx.Err() == nil {
		r, err := m.Client.Get(ctx, root+"leader/", clientv3.WithLastCreate()...)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Kvs) > 0 && string(r.Kvs[0].Value) == "two" {
			two = r.Kvs[0]
		}
	}
	if _, err := m.Client.Revoke(ctx, clientv3.LeaseID(two.Lease)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, errOverslept) {
		t.Errorf("a candidate without a lease: %v", err)
	}
}

// Decisions that never became plans have numbers that no plan has, and are forgotten as others are.
func TestNext(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	c := campaign(t, s, "one")
	seen := map[Number]bool{}
	for i := range 6 {
		p := Plan{ID: anID, Epoch: c.Epoch, Mode: view.Watch, Decision: decision(time.Now().UTC())}
		d := Decision{Plan: p, Number: s.Next(), Outcome: "watched"}
		if i%2 == 0 {
			var err error
			if d.Plan, err = s.Begin(t.Context(), c.Term, p); err != nil {
				t.Fatal(err)
			}
			d.Number = d.Plan.Number
		}
		if seen[d.Number] || d.Number <= c.Epoch {
			t.Errorf("decision %d has the number %d in epoch %d", i, d.Number, c.Epoch)
		}
		seen[d.Number] = true
		before := Number(0)
		if i == 5 {
			before = d.Number
		}
		if err := s.End(t.Context(), c.Term, d, before); err != nil {
			t.Fatal(err)
		}
		got, err := s.ReadAll(t.Context())
		want := i + 1
		if before > 0 {
			want = 1
		}
		if err != nil || len(got.Decisions) != want || len(got.Problems) != 0 {
			t.Errorf("after %d there are %v, %v, %v", i, got.Decisions, got.Problems, err)
		}
	}
}

// What somebody else has put there is told, and nothing else is lost.
func TestForeign(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	c := campaign(t, s, "one")
	for _, name := range []string{"a", "b", "c"} {
		if err := s.PutHost(t.Context(), c.Term, Host{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	for key, value := range map[string]string{
		"hosts/d": `{`, "hosts/e": `{"name":"a"}`, "hosts/f": `{"name":"f","x":1}`,
		"hosts/g": strings.Repeat(" ", maxValue) + `{"name":"g"}`, "hosts/../h": `{"name":"../h"}`,
		"rules/r": `{"name":"r"}`, "plans/x": `{"id":"x"}`,
		"settings": `{"policy":{"mode":"maybe"}}`,
	} {
		if _, err := m.Client.Put(t.Context(), root+key, value); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Hosts) != 3 || len(got.Problems) != 8 || got.Settings.Policy != nil {
		t.Errorf("%+v", got)
	}
}

// More keys than are read at once.
func TestPages(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	defer m.Close()
	c := campaign(t, s, "one")
	var want []string
	for i := range pageSize + 2 {
		name := "h" + numbered(Number(i))
		want = append(want, name)
		if err := s.PutHost(t.Context(), c.Term, Host{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.ReadAll(t.Context())
	var names []string
	for _, h := range got.Hosts {
		names = append(names, h.Name)
	}
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("%d hosts, %v", len(names), err)
	}
}

// A write without etcd ends.
func TestUnreachable(t *testing.T) {
	s, m := open(t, t.TempDir(), 0)
	c := campaign(t, s, "one")
	m.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := s.PutHost(ctx, c.Term, Host{Name: "a"}); err == nil {
		t.Error("it was written")
	}
}

func FuzzDecode(f *testing.F) {
	for _, v := range []checker{&Host{Name: "a"}, &Rule{Name: "r", Text: "x"},
		&Maintenance{Maintenance: view.Maintenance{Host: "a", Phase: view.Closed}, Who: "admin"},
		new(settings(view.Ask)),
		&Plan{ID: anID, Decision: decision(time.Unix(0, 0).UTC())},
		&Decision{Plan: Plan{ID: anID, Decision: decision(time.Unix(0, 0).UTC())}}} {
		text, err := encode(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again(t, b, decode[Host])
		again(t, b, decode[Rule])
		again(t, b, decode[Maintenance])
		again(t, b, decode[Settings])
		again(t, b, decode[Plan])
		again(t, b, decode[Decision])
	})
}

// again writes what was read, and reads it.
func again[T any](t *testing.T, b []byte, read func([]byte) (T, error)) {
	v, err := read(b)
	if err != nil {
		return
	}
	text, err := encode(any(&v).(checker))
	if err != nil {
		return // it is too long when it is written without abbreviations
	}
	w, err := read([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	if second, err := encode(any(&w).(checker)); err != nil || second != text {
		t.Fatalf("%s became %s, %v", text, second, err)
	}
}

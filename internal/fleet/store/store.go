// Package store is what a fleet remembers: which hosts it has, rules, maintenance, settings, the
// plans that are carried out, and what came of earlier ones. It is in etcd:
//
//	/vacate/leader/LEASE      who leads, by NAME@HOST:PORT; etcd's election
//	/vacate/hosts/NAME        a host that has reported once (Host)
//	/vacate/rules/NAME        a rule (Rule)
//	/vacate/maintenance/HOST  the host is emptied, or stays empty (Maintenance)
//	/vacate/settings          how the fleet decides (Settings)
//	/vacate/plans/ID          an order that was decided and has not ended (Plan)
//	/vacate/decisions/NUMBER  one that has (Decision)
//
// Values are JSON. Loads are never written here: they live in the leader's memory. A decision costs
// two writes, one when it is taken and one when it has ended.
//
// Each write is a transaction that asks for the leader's own key at its create revision. So one who
// leads no longer writes nothing, whatever it believes (F1 in docs/protocol.md).
//
// All that is read is checked, as an operator's own etcd may hold anything. What does not pass is
// told, and left where it is.
package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"vacate/internal/fleet/view"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	root      = "/vacate/"
	maxValue  = 64 << 10 // bytes of a value
	pageSize  = 500      // keys that are read at once
	maxText   = 4096     // bytes of a text in a value
	maxList   = 4096     // entries of a list in a value
	maxHosts  = 20_000
	maxPlans  = 10_000
	maxLabels = 64

	// MaxRules is how many rules are read: a leader takes no more.
	MaxRules = 1_000

	// KeepDecisions is how many decisions stay.
	KeepDecisions = 1_000

	// writeTime is how long etcd may take for one request: longer than etcd itself tries within
	// vacate-fleet, so that it can say what came of it.
	writeTime = 20 * time.Second
)

// ErrDeposed: another member leads, or may.
var ErrDeposed = errors.New("this member does not lead the fleet any more: nothing was written")

// ErrUnclear: it is not known whether a write was done. One that gets it must not go on as if it
// had not been: it leads no longer (F1).
var ErrUnclear = errors.New("the fleet's store did not say whether it wrote")

// generationBits leaves etcd 2^40 revisions for each generation.
const generationBits = 40

// MaxGeneration bounds a store's generation.
const MaxGeneration = 1 << 20

// Number is an epoch, or the number of a plan: a revision of etcd, in a generation of the store.
// Later ones are higher, also after a store was lost, if its operator raised the generation.
type Number uint64

// number is that of a revision.
func (s *Store) number(revision int64) Number {
	return Number(s.generation<<generationBits | uint64(revision))
}

// A Store is a fleet's. Its methods may be called by several goroutines.
type Store struct {
	client     *clientv3.Client
	generation uint64
	last       atomic.Int64 // the latest revision that this member has written
}

// New is a store in the etcd that a client reaches. Close does not close the client.
func New(client *clientv3.Client, generation uint64) (*Store, error) {
	if generation > MaxGeneration {
		return nil, fmt.Errorf("generation = %d: want %d at most", generation, MaxGeneration)
	}
	return &Store{client: client, generation: generation}, nil
}

// A checker says what is wrong with itself.
type checker interface{ check() error }

// Host is a host that belongs to the fleet.
type Host struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels,omitempty"`
	Added  time.Time         `json:"added"`
}

// Rule is a rule by its name.
type Rule struct {
	Name string `json:"name"`
	Text string `json:"text"` // as view.ParseRule takes it
	By   string `json:"by"`   // the operator who made it
}

// Maintenance has a host emptied, kept empty, or filled again.
type Maintenance struct {
	view.Maintenance
	Who string `json:"who"` // the operator
	// Takes is how long the drain would take, as was said when it was asked for; nil: not known.
	Takes *time.Duration `json:"takes_ns,omitempty"`
}

// Settings are how the fleet decides.
type Settings struct {
	Policy *view.Policy `json:"policy,omitempty"` // nil: the usual one
}

// Plan is the decision to evict a VM. It is written before its order is sent.
type Plan struct {
	ID       string        `json:"id"` // 32 digits in hex
	Number   Number        `json:"-"`  // of its order, by etcd's revision
	Epoch    Number        `json:"epoch"`
	Mode     view.Mode     `json:"mode"`
	By       string        `json:"by,omitempty"`   // the operator who approved it
	Rate     uint64        `json:"rate,omitempty"` // bytes per second at most
	Decision view.Decision `json:"decision"`
}

// Decision is a plan, and what came of it.
type Decision struct {
	Plan   Plan   `json:"plan"`
	Number Number `json:"number"` // the plan's
	// Outcome is completed, aborted, refused and so on, as the host has it; "never began"; or
	// "watched", where the fleet only decides.
	Outcome  string    `json:"outcome"`
	Reason   string    `json:"reason,omitempty"`
	Eviction string    `json:"eviction,omitempty"` // its ID
	Ended    time.Time `json:"ended"`
	// What came; not set where it did not.
	DownS  *float64 `json:"down_s,omitempty"`
	TotalS *float64 `json:"total_s,omitempty"`
}

var nameForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,252}$`)

// CheckName reports why a name cannot be one of a host, a VM or a rule.
func CheckName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("%.64q is no name: want letters, digits, \"_\", \".\", \":\" and \"-\", "+
			"253 at most", name)
	}
	return nil
}

func checkTexts(texts ...string) error {
	for _, t := range texts {
		if len(t) > maxText {
			return fmt.Errorf("a text has %d bytes: want %d at most", len(t), maxText)
		}
	}
	return nil
}

func checkList(list []string) error {
	if len(list) > maxList {
		return fmt.Errorf("a list has %d entries: want %d at most", len(list), maxList)
	}
	return checkTexts(list...)
}

func (h *Host) check() error {
	if len(h.Labels) > maxLabels {
		return fmt.Errorf("host %s has %d labels: want %d at most", h.Name, len(h.Labels),
			maxLabels)
	}
	for k, v := range h.Labels {
		if err := CheckName(k); err != nil {
			return fmt.Errorf("label: %w", err)
		}
		if err := CheckName(v); err != nil {
			return fmt.Errorf("label %s: %w", k, err)
		}
	}
	return CheckName(h.Name)
}

func (r *Rule) check() error {
	if r.Text == "" {
		return fmt.Errorf("rule %s is empty", r.Name)
	}
	return errors.Join(CheckName(r.Name), checkTexts(r.Text, r.By))
}

func (m *Maintenance) check() error {
	switch m.Phase {
	case view.Planned, view.Closed, view.Draining, view.Drained, view.Restoring:
	default:
		return fmt.Errorf("phase %.64q is none of a maintenance", m.Phase)
	}
	if !(m.Rate >= 0 && m.Rate < 1e15) {
		return fmt.Errorf("a rate of %v", m.Rate)
	}
	return errors.Join(CheckName(m.Host), checkTexts(m.Who, m.Reason), checkList(m.Left))
}

func (s *Settings) check() error {
	if s.Policy == nil {
		return nil
	}
	return s.Policy.Check()
}

var idForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

func (p *Plan) check() error {
	if !idForm.MatchString(p.ID) {
		return fmt.Errorf("%.64q is no ID of a plan: that has 32 digits in hex", p.ID)
	}
	d := &p.Decision
	if d.From == d.To || d.VM == "" {
		return fmt.Errorf("plan %s takes %.64q from %.64q to %.64q", p.ID, d.VM, d.From, d.To)
	}
	return errors.Join(CheckName(d.From), CheckName(d.To),
		checkTexts(d.VM, d.Incarnation, string(p.Mode), p.By), checkList(d.Reasons))
}

func (d *Decision) check() error {
	return errors.Join(d.Plan.check(), checkTexts(d.Outcome, d.Reason, d.Eviction))
}

// decode reads a value that anybody may have written. It must have nothing that this program does
// not know, as that may change what it means.
func decode[T any, P interface {
	*T
	checker
}](b []byte) (v T, err error) {
	if len(b) > maxValue {
		return v, fmt.Errorf("it has %d bytes: want %d at most", len(b), maxValue)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		return v, err
	}
	if d.More() {
		return v, errors.New("something follows the JSON")
	}
	return v, P(&v).check()
}

func encode(v checker) (string, error) {
	if err := v.check(); err != nil {
		return "", err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	if len(b) > maxValue {
		return "", fmt.Errorf("it has %d bytes: want %d at most", len(b), maxValue)
	}
	return string(b), nil
}

// list reads all keys of a directory, at one revision. named returns the last part of the key that
// a value belongs under, which must be the one that it is under.
func list[T any, P interface {
	*T
	checker
}](ctx context.Context, s *Store, dir string, most int,
	named func(P, *mvccpb.KeyValue) string) (values []T, problems []error, err error) {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	from, end, revision := root+dir, clientv3.GetPrefixRangeEnd(root+dir), int64(0)
	for {
		r, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize),
			clientv3.WithRev(revision))
		if err != nil {
			return nil, nil, fmt.Errorf("read %s from the fleet's store: %w", dir, err)
		}
		revision = r.Header.Revision
		for _, kv := range r.Kvs {
			v, err := decode[T, P](kv.Value)
			if err == nil {
				if name := named(&v, kv); name != path.Base(string(kv.Key)) {
					err = fmt.Errorf("it is of %.64q", name)
				}
			}
			if err == nil && len(values) == most {
				err = fmt.Errorf("there are more than %d", most)
			}
			if err != nil {
				problems = append(problems, fmt.Errorf("%.128q in the fleet's store is ignored: "+
					"%w", kv.Key, err))
				continue
			}
			values = append(values, v)
		}
		if !r.More || len(problems) > most {
			return values, problems, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// Everything is all that a leader begins with.
type Everything struct {
	Hosts       []Host
	Rules       []Rule
	Maintenance []Maintenance
	Plans       []Plan
	Decisions   []Decision // the latest last
	Settings    Settings
	// Problems are values that were not read.
	Problems []error
}

// ReadAll reads all. A leader reads after it was elected, so it sees all that any leader before has
// written.
func (s *Store) ReadAll(ctx context.Context) (e Everything, err error) {
	var problems [5][]error
	if e.Hosts, problems[0], err = list(ctx, s, "hosts/", maxHosts,
		func(h *Host, _ *mvccpb.KeyValue) string { return h.Name }); err != nil {
		return e, err
	}
	if e.Rules, problems[1], err = list(ctx, s, "rules/", MaxRules,
		func(r *Rule, _ *mvccpb.KeyValue) string { return r.Name }); err != nil {
		return e, err
	}
	if e.Maintenance, problems[2], err = list(ctx, s, "maintenance/", maxHosts,
		func(m *Maintenance, _ *mvccpb.KeyValue) string { return m.Host }); err != nil {
		return e, err
	}
	if e.Plans, problems[3], err = list(ctx, s, "plans/", maxPlans,
		func(p *Plan, kv *mvccpb.KeyValue) string {
			p.Number = s.number(kv.CreateRevision)
			return p.ID
		}); err != nil {
		return e, err
	}
	if e.Decisions, problems[4], err = list(ctx, s, "decisions/", 2*KeepDecisions,
		func(d *Decision, _ *mvccpb.KeyValue) string { return numbered(d.Number) }); err != nil {
		return e, err
	}
	e.Problems = slices.Concat(problems[:]...)
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	r, err := s.client.Get(ctx, root+"settings")
	if err != nil {
		return e, fmt.Errorf("read the settings from the fleet's store: %w", err)
	}
	if len(r.Kvs) > 0 {
		set, err := decode[Settings](r.Kvs[0].Value)
		if err != nil {
			e.Problems = append(e.Problems,
				fmt.Errorf("the settings in the fleet's store are ignored: %w", err))
		} else {
			e.Settings = set
		}
	}
	return e, nil
}

// numbered is a number as keys have it: they sort as the numbers do.
func numbered(n Number) string { return fmt.Sprintf("%020d", uint64(n)) }

// Term is the time for which one member leads.
type Term struct {
	key      string
	revision int64
	Epoch    Number
}

// Key is the leader's own key, whose create revision guards its writes.
func (t Term) Key() string { return t.key }

// write does all of ops, or nothing if the term is over.
func (s *Store) write(ctx context.Context, t Term, ops ...clientv3.Op) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTime)
	defer cancel()
	r, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(t.key), "=",
		t.revision)).Then(ops...).Commit()
	switch {
	case err != nil:
		return 0, fmt.Errorf("%w: %w", ErrUnclear, err)
	case !r.Succeeded:
		return 0, ErrDeposed
	}
	s.wrote(r.Header.Revision)
	return r.Header.Revision, nil
}

func (s *Store) wrote(revision int64) {
	for {
		last := s.last.Load()
		if revision <= last || s.last.CompareAndSwap(last, revision) {
			return
		}
	}
}

// Next is a number for a decision that has no plan. It is above all that this member has written,
// and at most what the next write gets: so no plan has it, and no other decision if this one is
// written next.
func (s *Store) Next() Number { return s.number(s.last.Load() + 1) }

// put writes one value.
func (s *Store) put(ctx context.Context, t Term, key string, v checker) error {
	text, err := encode(v)
	if err != nil {
		return err
	}
	_, err = s.write(ctx, t, clientv3.OpPut(root+key, text))
	return err
}

// remove removes one key.
func (s *Store) remove(ctx context.Context, t Term, dir, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	_, err := s.write(ctx, t, clientv3.OpDelete(root+dir+name))
	return err
}

// PutHost writes a host.
func (s *Store) PutHost(ctx context.Context, t Term, h Host) error {
	return s.put(ctx, t, "hosts/"+h.Name, &h)
}

// RemoveHost forgets a host.
func (s *Store) RemoveHost(ctx context.Context, t Term, name string) error {
	return s.remove(ctx, t, "hosts/", name)
}

// PutRule writes a rule.
func (s *Store) PutRule(ctx context.Context, t Term, r Rule) error {
	return s.put(ctx, t, "rules/"+r.Name, &r)
}

// RemoveRule removes a rule.
func (s *Store) RemoveRule(ctx context.Context, t Term, name string) error {
	return s.remove(ctx, t, "rules/", name)
}

// PutMaintenance writes that a host is emptied.
func (s *Store) PutMaintenance(ctx context.Context, t Term, m Maintenance) error {
	return s.put(ctx, t, "maintenance/"+m.Host, &m)
}

// RemoveMaintenance writes that a host is restored.
func (s *Store) RemoveMaintenance(ctx context.Context, t Term, host string) error {
	return s.remove(ctx, t, "maintenance/", host)
}

// PutSettings writes the settings.
func (s *Store) PutSettings(ctx context.Context, t Term, set Settings) error {
	return s.put(ctx, t, "settings", &set)
}

// Begin writes a plan, and returns it with its number. Only then may its order be sent (F1).
func (s *Store) Begin(ctx context.Context, t Term, p Plan) (Plan, error) {
	p.Epoch = t.Epoch
	text, err := encode(&p)
	if err != nil {
		return p, err
	}
	revision, err := s.write(ctx, t, clientv3.OpPut(root+"plans/"+p.ID, text))
	if err != nil {
		return p, err
	}
	p.Number = s.number(revision)
	return p, nil
}

// End writes what came of a plan in place of the plan, and forgets decisions before a number. A
// decision that never became a plan has a number of Next.
func (s *Store) End(ctx context.Context, t Term, d Decision, before Number) error {
	text, err := encode(&d)
	if err != nil {
		return err
	}
	ops := []clientv3.Op{clientv3.OpPut(root+"decisions/"+numbered(d.Number), text),
		clientv3.OpDelete(root + "plans/" + d.Plan.ID)}
	if before > 0 && before <= d.Number {
		ops = append(ops, clientv3.OpDelete(root+"decisions/"+numbered(0),
			clientv3.WithRange(root+"decisions/"+numbered(before))))
	}
	_, err = s.write(ctx, t, ops...)
	return err
}

// Snapshot is all of etcd's data, with a checksum, as `etcdutl snapshot restore` takes it.
func (s *Store) Snapshot(ctx context.Context) (io.ReadCloser, error) {
	r, err := s.client.Snapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("copy the fleet's store: %w", err)
	}
	return r, nil
}

package leader

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/place"
	"vacate/internal/fleet/store"
	"vacate/internal/fleet/view"
	"vacate/internal/link/certs"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Config is who a member is, and who may ask it for what.
type Config struct {
	// Me is what hosts, operators and other members are told of this one: NAME@HOST:PORT.
	Me      string
	Version string
	// View, Act and Admin are operators by the names in their certificates. Those of each may do
	// what those before may, too.
	View, Act, Admin []string
	// Members are the names of all members, which are no hosts.
	Members []string
	// Hosts are patterns (path.Match) of names that hosts have. Empty: any.
	Hosts []string
	Hooks Hooks
}

// role is what an operator may do.
type role int

const (
	nobody role = iota
	viewer
	actor
	admin
)

func (r role) String() string { return [...]string{"nobody", "view", "act", "admin"}[r] }

func (c Config) roleOf(name string) role {
	switch {
	case slices.Contains(c.Admin, name):
		return admin
	case slices.Contains(c.Act, name):
		return actor
	case slices.Contains(c.View, name):
		return viewer
	}
	return nobody
}

// mayJoin says why a certificate's name is not a host's. Operators and members are none: neither
// can speak as one.
func (c Config) mayJoin(name string) error {
	if c.roleOf(name) != nobody || slices.Contains(c.Members, name) {
		return fmt.Errorf("%q is an operator, or a member of the fleet's brain, and no host", name)
	}
	if len(c.Hosts) == 0 || slices.ContainsFunc(c.Hosts, func(p string) bool {
		ok, _ := path.Match(p, name) // the pattern was checked when it was read
		return ok
	}) {
		return nil
	}
	return fmt.Errorf("%q is no host of this fleet: hosts in vacate-fleet.toml does not name it",
		name)
}

// roles has what each call needs. What is not here nobody may call.
var roles = map[string]role{
	fleetv1.FleetStatusProcedure: viewer, fleetv1.FleetListHostsProcedure: viewer,
	fleetv1.FleetListDecisionsProcedure: viewer, fleetv1.FleetPlaceProcedure: viewer,
	fleetv1.FleetListRulesProcedure: viewer, fleetv1.FleetDrainProcedure: actor,
	fleetv1.FleetRestoreProcedure: actor, fleetv1.FleetApproveProcedure: actor,
	fleetv1.FleetPutRuleProcedure: admin, fleetv1.FleetRemoveRuleProcedure: admin,
	fleetv1.FleetSetModeProcedure: admin, fleetv1.FleetForgetProcedure: admin,
	fleetv1.FleetGetPolicyProcedure: viewer, fleetv1.FleetSetPolicyProcedure: admin,
	fleetv1.FleetBackupProcedure: admin,
}

// maxMessage bounds what a host or an operator says at once, in bytes.
const maxMessage = 4 << 20

type connKey struct{}

// WithConn is for http.Server's ConnContext: calls then know who asks.
func WithConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// asker is the name in the certificate of the one who asks; empty if there is none.
func asker(ctx context.Context) (name, from string) {
	c, ok := ctx.Value(connKey{}).(*tls.Conn)
	if !ok {
		return "", "unknown"
	}
	from = c.RemoteAddr().String()
	state := c.ConnectionState()
	if len(state.PeerCertificates) == 0 {
		return "", from
	}
	name, err := certs.NameOf(state.PeerCertificates[0])
	if err != nil {
		return "", from
	}
	return name, from
}

// Handler serves hosts and operators. Its server needs WithConn.
func (b *Brain) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewHostsHandler(hosts{b}, connect.WithReadMaxBytes(maxMessage)))
	path, fleet := fleetv1.NewFleetHandler(operators{b}, connect.WithReadMaxBytes(maxMessage),
		connect.WithInterceptors(gate{b}))
	mux.Handle(path, patient(fleet))
	return mux
}

// gate lets operators do what their roles have, and logs what changes something or is refused. It
// implements connect.Interceptor.
type gate struct{ *Brain }

// check returns an error if the one who asks may not.
func (b gate) check(ctx context.Context, procedure string) (log *slog.Logger, need role,
	err error) {
	name, from := asker(ctx)
	log = b.log.With("operator", name, "from", from, "asks", path.Base(procedure))
	need, known := roles[procedure]
	if has := b.config.roleOf(name); !known || name == "" || has < need {
		b.metrics.refused.WithLabelValues("operator").Inc()
		log.Warn("refused what somebody asked, for want of a role", "role", has, "needs", need)
		return log, need, connect.NewError(connect.CodePermissionDenied,
			fmt.Errorf("%q may not do that: it needs the role %v in vacate-fleet.toml", name, need))
	}
	return log, need, nil
}

// did logs what came of something that an operator asked.
func (b gate) did(log *slog.Logger, err error) {
	if err != nil {
		log.Warn("refused what an operator asked", "error", err)
	} else {
		log.Info("did what an operator asked")
	}
}

// WrapUnary implements connect.Interceptor.
func (b gate) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		log, need, err := b.check(ctx, req.Spec().Procedure)
		if err != nil {
			return nil, err
		}
		resp, err := next(ctx, req)
		if need > viewer {
			m := req.Any()
			if m, ok := m.(interface{ GetHost() string }); ok {
				log = log.With("host", m.GetHost())
			}
			if m, ok := m.(interface{ GetName() string }); ok {
				log = log.With("name", m.GetName())
			}
			if m, ok := m.(interface{ GetDryRun() bool }); ok {
				log = log.With("dry_run", m.GetDryRun())
			}
			switch m := m.(type) {
			case *fleetv1.DrainRequest:
				log = log.With("reason", m.Reason)
			case *fleetv1.ApproveRequest:
				log = log.With("id", m.Id, "reject", m.Reject)
			case *fleetv1.PutRuleRequest:
				log = log.With("rule", m.Rule)
			case *fleetv1.SetModeRequest:
				log = log.With("mode", m.Mode)
			case *fleetv1.SetPolicyRequest:
				log = log.With("fields", m.Fields, "policy", m.Policy)
			}
			b.did(log, err)
		}
		return resp, err
	}
}

// WrapStreamingHandler implements connect.Interceptor.
func (b gate) WrapStreamingHandler(
	next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, stream connect.StreamingHandlerConn) error {
		log, _, err := b.check(ctx, stream.Spec().Procedure)
		if err != nil {
			return err
		}
		err = next(ctx, stream)
		b.did(log, err)
		return err
	}
}

// WrapStreamingClient implements connect.Interceptor.
func (b gate) WrapStreamingClient(
	next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// hosts implements fleetv1.HostsHandler.
type hosts struct{ *Brain }

// session is a host's stream.
type session struct {
	cancel context.CancelCauseFunc
	out    chan *fleetv1.LeaderSays
	heeds  bool // the host heeds Standing
}

// say has something sent, and reports whether that is so. A host that does not read loses its
// session.
func (s *session) say(m *fleetv1.LeaderSays) bool {
	select {
	case s.out <- m:
		return true
	default:
		s.cancel(errors.New("the host does not read what it is told"))
		return false
	}
}

// Join implements fleetv1.HostsHandler.
func (b hosts) Join(ctx context.Context,
	stream *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	name, from := asker(ctx)
	err := errors.New("a host needs a certificate")
	if name != "" {
		err = b.config.mayJoin(name)
	}
	if err != nil {
		b.metrics.refused.WithLabelValues("join").Inc()
		b.log.Warn("refused one who wants to join as a host", "name", name, "from", from, "error",
			err)
		return connect.NewError(connect.CodePermissionDenied, err)
	}
	first, err := receiveSoon(stream)
	if err != nil {
		return err
	}
	hello := first.GetHello()
	if hello == nil || len(hello.Version) > 256 {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("a host says hello first"))
	}
	t := b.leads()
	if t == nil {
		return stream.Send(&fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Elsewhere{
			Elsewhere: &fleetv1.Elsewhere{Leader: b.who(ctx)}}})
	}
	return t.join(ctx, name, hello, stream)
}

// receiveSoon is what a host says first, which must not take long.
func receiveSoon(stream *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) (
	*fleetv1.HostSays, error) {
	type said struct {
		m   *fleetv1.HostSays
		err error
	}
	heard := make(chan said, 1)
	go func() { // which ends with the stream
		m, err := stream.Receive()
		heard <- said{m, err}
	}()
	select {
	case s := <-heard:
		return s.m, s.err
	case <-time.After(requestTime):
		return nil, connect.NewError(connect.CodeDeadlineExceeded,
			fmt.Errorf("the host has said nothing for %v", requestTime))
	}
}

// join has a host be part of the fleet for as long as its stream lasts.
func (t *term) join(ctx context.Context, name string, hello *fleetv1.Hello,
	stream *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	if err := t.enrol(name); err != nil {
		return connect.NewError(connect.CodeUnavailable, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := &session{cancel: cancel, out: make(chan *fleetv1.LeaderSays, 256),
		heeds: hello.HeedsStanding}
	s.out <- &fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Welcome{
		Welcome: &fleetv1.Welcome{Epoch: uint64(t.Epoch)}}}
	t.mu.Lock()
	h := t.hosts[name]
	if t.over || h == nil {
		t.mu.Unlock()
		return connect.NewError(connect.CodeUnavailable, errElsewhere)
	}
	if h.session != nil {
		h.session.cancel(errors.New("the host has joined anew"))
	}
	h.session, h.version = s, hello.Version
	t.tellStanding(h)
	t.mu.Unlock()
	t.log.Info("a host has joined", "host", name, "version", hello.Version)
	defer func() {
		t.mu.Lock()
		if h.session == s {
			h.session = nil
		}
		t.mu.Unlock()
		t.log.Info("a host is not connected any more", "host", name, "error", context.Cause(ctx))
	}()
	heard := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Receive()
			if err == nil {
				err = t.hear(h, s, m)
			}
			if err != nil {
				heard <- err
				return
			}
		}
	}()
	for {
		select {
		case m := <-s.out:
			if err := stream.Send(m); err != nil {
				cancel(err)
				return err
			}
		case err := <-heard:
			cancel(err)
			return err
		case <-ctx.Done():
			return connect.NewError(connect.CodeUnavailable, context.Cause(ctx))
		}
	}
}

// hear takes what a host says. The name is that in its certificate, whatever it says.
func (t *term) hear(h *hostState, s *session, m *fleetv1.HostSays) error {
	switch w := m.What.(type) {
	case *fleetv1.HostSays_Report:
		if err := t.reported(h, s, w.Report); err != nil {
			if !errors.Is(err, errElsewhere) {
				t.metrics.refused.WithLabelValues("report").Inc()
				t.log.Warn("refused a host's report", "host", h.Name, "error", err)
			}
			return connect.NewError(connect.CodeInvalidArgument, err)
		}
	case *fleetv1.HostSays_Answer:
		t.answered(h, w.Answer)
	default:
		return connect.NewError(connect.CodeInvalidArgument,
			errors.New("a host says what this member does not know"))
	}
	return nil
}

// enrol has the store know a host.
func (t *term) enrol(name string) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	known := t.hosts[name] != nil
	t.mu.Unlock()
	if known {
		return nil
	}
	h := store.Host{Name: name, Added: time.Now().UTC()}
	if err := t.write(func(ctx context.Context) error {
		return t.store.PutHost(ctx, t.Term, h)
	}); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.hosts[name] = &hostState{Host: h}
	t.log.Info("a host belongs to the fleet from now on", "host", name)
	return nil
}

// operators implements fleetv1.FleetHandler.
type operators struct{ *Brain }

// leading is the present term, or an error that says who leads.
func (b operators) leading(ctx context.Context) (*term, error) {
	if t := b.leads(); t != nil {
		return t, nil
	}
	who := cmp.Or(b.who(ctx), "nobody")
	return nil, connect.NewError(connect.CodeFailedPrecondition,
		fmt.Errorf("member %s does not lead the fleet: %s does", b.config.Me, who))
}

func invalid(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }

func unknown(format string, args ...any) error {
	return connect.NewError(connect.CodeNotFound, fmt.Errorf(format, args...))
}

// Status implements fleetv1.FleetHandler.
func (b operators) Status(ctx context.Context, _ *connect.Request[fleetv1.StatusRequest]) (
	*connect.Response[fleetv1.StatusResponse], error) {
	name, _ := asker(ctx)
	r := &fleetv1.StatusResponse{Member: b.config.Me, Version: b.config.Version,
		Leader: b.who(ctx), Role: b.config.roleOf(name).String()}
	t := b.leads()
	if t == nil {
		return connect.NewResponse(r), nil
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r.Leads, r.Epoch, r.Since = true, uint64(t.Epoch), timestamppb.New(t.since)
	r.Mode, r.Moving, r.Waiting = string(t.policy.Mode), uint32(len(t.plans)),
		uint32(len(t.waiting))
	states, vms, starving := t.count(now)
	r.Hosts, r.Late = uint32(len(t.hosts)), uint32(len(t.hosts)-states["reporting"])
	r.Vms, r.Starving = uint32(vms), uint32(starving)
	r.Troubles = troubles(t.planner.Troubles(now), "")
	return connect.NewResponse(r), nil
}

// mostTroubles bounds how many are told at once.
const mostTroubles = 50

func troubles(all []place.Trouble, rule string) (list []string) {
	for _, x := range all {
		if rule != "" && x.Rule == "" {
			continue
		}
		text := x.Why
		for _, part := range []string{x.Rule, x.Host} {
			if part != "" {
				text = part + ": " + text
			}
		}
		if len(x.VMs) > 0 {
			text += fmt.Sprintf(" (%v)", x.VMs)
		}
		if len(list) == mostTroubles {
			return append(list, fmt.Sprintf("and %d more", len(all)-len(list)))
		}
		list = append(list, text)
	}
	return list
}

// state is how a host is: one whose reports are late is late, and nothing else.
func (t *term) state(h *hostState, now time.Time) string {
	switch {
	case h.report == nil:
		return "new"
	case now.Sub(h.told.Seen) > t.policy.Late:
		return "late"
	}
	return "reporting"
}

// count tells how many hosts there are in each state, how many VMs, and how many of these starve.
func (t *term) count(now time.Time) (states map[string]int, vms, starving int) {
	states = map[string]int{"reporting": 0, "late": 0, "new": 0}
	for _, h := range t.hosts {
		states[t.state(h, now)]++
		vms += len(h.told.VMs)
		for _, v := range h.told.VMs {
			if v.Steal() > 1-t.policy.Starving {
				starving++
			}
		}
	}
	return states, vms, starving
}

// ListHosts implements fleetv1.FleetHandler.
func (b operators) ListHosts(ctx context.Context, _ *connect.Request[fleetv1.ListHostsRequest]) (
	*connect.Response[fleetv1.ListHostsResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	r := &fleetv1.ListHostsResponse{}
	for _, name := range slices.Sorted(maps.Keys(t.hosts)) {
		h := t.hosts[name]
		m := &fleetv1.Host{Name: name, State: t.state(h, now), Version: h.version,
			Guard: h.report.GetGuard(), Load: h.report.GetLoad(), Vms: h.report.GetVms()}
		if h.report != nil {
			silent := now.Sub(h.told.Seen).Seconds()
			m.SilentS = &silent
		}
		if x, ok := t.maintenance[name]; ok {
			m.Maintenance, m.MaintenanceReason = string(x.Phase), x.Reason
			m.MaintenanceWho, m.MaintenanceAskedAt = x.Who, timestamppb.New(x.Asked)
			m.MaintenanceVms = uint32(len(x.Left))
			if x.Takes != nil {
				takes := x.Takes.Seconds()
				m.MaintenanceTakesS = &takes
			}
			if !x.By.IsZero() {
				m.MaintenanceBy = timestamppb.New(x.By)
			}
			if x.Phase == view.Planned {
				m.MaintenanceAt = timestamppb.New(x.From)
			}
			var stay []place.Stay
			m.Going, stay = t.planner.Remaining(now, name)
			for _, vm := range h.report.GetHere() {
				if x.Phase == view.Draining && !slices.Contains(m.Going, vm) &&
					!slices.ContainsFunc(h.told.VMs, func(v view.VM) bool { return v.Name == vm }) {
					m.Going = append(m.Going, vm)
				}
			}
			m.Staying = staying(stay)
		}
		r.Hosts = append(r.Hosts, m)
	}
	return connect.NewResponse(r), nil
}

func staying(list []place.Stay) (text []string) {
	for _, s := range list {
		if s.VM == "" { // the host is not known any more
			s.VM = s.Host
		}
		text = append(text, s.VM+": "+s.Why)
	}
	return text
}

// pick returns the hosts that a name or a selector names, in order of name.
func (t *term) pick(text string) ([]*hostState, error) {
	if h := t.hosts[text]; h != nil {
		return []*hostState{h}, nil
	}
	if !strings.ContainsAny(text, "=!,") {
		return nil,
			unknown("the fleet has no host %q: see vacate fleet hosts. A selector, such as "+
				"rack=r1, names hosts by their labels", text)
	}
	sel, err := view.ParseSelector(text)
	if err != nil {
		return nil, invalid(err)
	}
	var picked []*hostState
	for _, name := range slices.Sorted(maps.Keys(t.hosts)) {
		if h := t.hosts[name]; sel.Picks(name, h.told.Host.Labels) {
			picked = append(picked, h)
		}
	}
	if len(picked) == 0 {
		return nil, unknown("no host of the fleet is as %q says: a host's labels are in its "+
			"vacated.toml, and are known once it has reported", text)
	}
	return picked, nil
}

// Drain implements fleetv1.FleetHandler.
func (b operators) Drain(ctx context.Context, req *connect.Request[fleetv1.DrainRequest]) (
	*connect.Response[fleetv1.DrainResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	who, _ := asker(ctx)
	if len(req.Msg.Reason) > maxReason {
		return nil, invalid(fmt.Errorf("the reason has more than %d bytes", maxReason))
	}
	if req.Msg.At != nil && req.Msg.By != nil && req.Msg.By.AsTime().Before(req.Msg.At.AsTime()) {
		return nil, invalid(errors.New("it would end before it begins"))
	}
	t.mu.Lock()
	picked, err := t.pick(req.Msg.Host)
	if err != nil {
		t.mu.Unlock()
		return nil, err
	}
	names, known := make([]string, len(picked)), true
	drains := make([]store.Maintenance, len(picked))
	for i, h := range picked {
		if m := t.maintenance[h.Name]; req.Msg.At != nil && !m.Open() {
			t.mu.Unlock()
			return nil, connect.NewError(connect.CodeFailedPrecondition,
				fmt.Errorf("host %s is %s already: `vacate fleet restore %[1]s` first", h.Name,
					m.Phase))
		}
		names[i], known = h.Name, known && h.report != nil
		drains[i] = t.drainOf(h, req.Msg, who, now)
	}
	// The next round comes in half of the time between two, as the mean.
	f := t.planner.Forecast(now, place.Rounds{First: t.apart / 2, Every: t.apart},
		float64(req.Msg.Rate), names...)
	for i, h := range picked {
		if h.report != nil {
			takes, ok := f.Empty[h.Name]
			if !ok { // some stay: until the last has left that can
				takes = f.Takes
			}
			drains[i].Takes = &takes
		}
	}
	t.mu.Unlock()
	r := forecast(f, names)
	if known {
		takes := f.Takes.Seconds()
		r.TakesS = &takes
	}
	if !req.Msg.DryRun {
		r.Warnings = t.tellHooks(drains)
		for _, m := range drains {
			if err := t.setMaintenance(m); err != nil {
				return nil, connect.NewError(connect.CodeUnavailable, err)
			}
		}
	}
	return connect.NewResponse(r), nil
}

// tellHooks tells the hook of drains that begin, and waits for that. It returns what went wrong.
func (t *term) tellHooks(drains []store.Maintenance) (warnings []string) {
	errs := make([]error, len(drains))
	var calls sync.WaitGroup
	for i, m := range drains {
		if m.Phase == view.Draining {
			calls.Go(func() { errs[i] = t.tellHook(t.life, m) })
		}
	}
	calls.Wait()
	for _, err := range errs {
		if err != nil {
			warnings = append(warnings, err.Error())
		}
	}
	return warnings
}

// drainOf is the maintenance that an operator asks for.
func (t *term) drainOf(h *hostState, q *fleetv1.DrainRequest, who string,
	now time.Time) store.Maintenance {
	m := store.Maintenance{Maintenance: view.Maintenance{Host: h.Name, Phase: view.Draining,
		Reason: q.Reason, Asked: now.UTC(), Rate: float64(q.Rate)}, Who: who}
	if q.By != nil {
		m.By = q.By.AsTime()
	}
	if before, ok := t.maintenance[h.Name]; ok { // those that have left already count, too
		m.Left = before.Left
	}
	if q.At != nil && q.At.AsTime().After(now) {
		m.Phase, m.From = view.Planned, q.At.AsTime()
		return m
	}
	return t.drainNow(h, m)
}

// forecast is what comes of a drain as operators are told.
func forecast(f place.Forecast, names []string) *fleetv1.DrainResponse {
	r := &fleetv1.DrainResponse{Staying: staying(f.Stay), Pace: f.Pace}
	for _, s := range f.Steps {
		r.Steps = append(r.Steps, &fleetv1.Step{Vm: s.VM, From: s.From, To: s.To,
			DoneS: s.End.Seconds()})
	}
	for _, name := range names {
		e := &fleetv1.Emptied{Host: name}
		if at, ok := f.Empty[name]; ok {
			s := at.Seconds()
			e.DoneS = &s
		}
		r.Hosts = append(r.Hosts, e)
	}
	slices.SortStableFunc(r.Hosts, func(a, b *fleetv1.Emptied) int {
		last := math.Inf(1)
		return cmp.Compare(*cmp.Or(a.DoneS, &last), *cmp.Or(b.DoneS, &last))
	})
	return r
}

// Restore implements fleetv1.FleetHandler.
func (b operators) Restore(ctx context.Context, req *connect.Request[fleetv1.RestoreRequest]) (
	*connect.Response[fleetv1.RestoreResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	picked, err := t.pick(req.Msg.Host)
	var restored []store.Maintenance
	for _, h := range picked {
		if m, ok := t.maintenance[h.Name]; ok {
			if m.Phase == view.Planned { // it never began
				m.Phase, m.Left = "", nil
			} else {
				m.Phase = view.Restoring
			}
			restored = append(restored, m)
		}
	}
	t.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if len(restored) == 0 {
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("host %q is not emptied: there is nothing to restore", req.Msg.Host))
	}
	r := &fleetv1.RestoreResponse{}
	for _, m := range restored {
		if !req.Msg.DryRun {
			if m.Phase == view.Restoring {
				t.announce(m) // and nobody waits for that
			}
			if err := t.setMaintenance(m); err != nil {
				return nil, connect.NewError(connect.CodeUnavailable, err)
			}
		}
		r.Hosts, r.Vms = append(r.Hosts, m.Host), append(r.Vms, m.Left...)
	}
	return connect.NewResponse(r), nil
}

// ListDecisions implements fleetv1.FleetHandler.
func (b operators) ListDecisions(ctx context.Context,
	req *connect.Request[fleetv1.ListDecisionsRequest]) (
	*connect.Response[fleetv1.ListDecisionsResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	most := int(cmp.Or(req.Msg.Most, 50))
	t.mu.Lock()
	defer t.mu.Unlock()
	r := &fleetv1.ListDecisionsResponse{}
	for _, w := range t.waiting {
		m := message(w.Plan)
		m.State = "waits"
		r.Decisions = append(r.Decisions, m)
	}
	for _, p := range t.plans {
		m := message(p.Plan)
		m.State = "goes on"
		if p.eviction != nil {
			m.EvictionId, m.Reason = p.eviction.EvictionId, p.eviction.Reason
		}
		r.Decisions = append(r.Decisions, m)
	}
	for _, d := range t.noted { // which are about to be written
		r.Decisions = append(r.Decisions, ended(d))
	}
	slices.SortFunc(r.Decisions, func(a, b *fleetv1.Decision) int {
		return cmp.Or(b.At.AsTime().Compare(a.At.AsTime()), cmp.Compare(a.Id, b.Id))
	})
	for _, d := range slices.Backward(t.decisions) {
		if len(r.Decisions) >= most {
			break
		}
		r.Decisions = append(r.Decisions, ended(d))
	}
	r.Decisions = r.Decisions[:min(len(r.Decisions), most)]
	return connect.NewResponse(r), nil
}

// ended is a decision that has ended as operators are told.
func ended(d store.Decision) *fleetv1.Decision {
	m := message(d.Plan)
	m.Plan, m.State, m.Reason, m.EvictionId = uint64(d.Number), d.Outcome, d.Reason, d.Eviction
	m.EndedAt, m.CameDownS, m.CameTotalS = timestamppb.New(d.Ended), d.DownS, d.TotalS
	return m
}

// message is a plan as operators are told.
func message(p store.Plan) *fleetv1.Decision {
	d := p.Decision
	m := &fleetv1.Decision{Id: p.ID, Cause: string(d.Cause), Vm: d.VM, From: d.From, To: d.To,
		At: timestamppb.New(d.At), Reasons: d.Reasons, Mode: string(p.Mode), By: p.By,
		GainCores: d.Predicted.Gain, TransferS: d.Predicted.Transfer.Seconds(),
		BackS: d.Predicted.Back.Seconds(), TotalS: d.Predicted.Total.Seconds(),
		Epoch: uint64(p.Epoch), Plan: uint64(p.Number)}
	for _, a := range d.Alternatives {
		m.Beaten = append(m.Beaten, fmt.Sprintf("%s to %s: %s", a.VM, a.To, a.Beaten))
	}
	return m
}

// Approve implements fleetv1.FleetHandler.
func (b operators) Approve(ctx context.Context, req *connect.Request[fleetv1.ApproveRequest]) (
	*connect.Response[fleetv1.Decision], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	name, _ := asker(ctx)
	now := time.Now()
	t.mu.Lock()
	w := t.waiting[req.Msg.Id]
	if w == nil {
		t.mu.Unlock()
		return nil, unknown("no decision %.32q waits for approval: see vacate fleet decisions",
			req.Msg.Id)
	}
	if req.Msg.Reject {
		t.reject(w.ID, name+" said no", now)
		m := message(w.Plan)
		m.State = "rejected"
		t.mu.Unlock()
		return connect.NewResponse(m), nil
	}
	delete(t.waiting, w.ID)
	t.mu.Unlock()
	w.By = name
	p, err := t.begin(w.Plan)
	if err != nil {
		t.mu.Lock()
		t.planner.Ended(w.Decision.VM, now, err.Error())
		t.mu.Unlock()
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	m := message(p)
	m.State = "goes on"
	return connect.NewResponse(m), nil
}

// Place implements fleetv1.FleetHandler.
func (b operators) Place(ctx context.Context, req *connect.Request[fleetv1.PlaceRequest]) (
	*connect.Response[fleetv1.PlaceResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	q := req.Msg
	if q.Memory == 0 || q.Memory > 1<<50 || !(q.Cpu >= 0 && q.Cpu <= 1<<16) || len(q.Name) > 253 {
		return nil,
			invalid(errors.New("a VM has some memory, up to 65536 cores, and a name of 253 " +
				"bytes at most"))
	}
	labels := view.Labels(q.Labels)
	if err := labels.Check(); err != nil {
		return nil, invalid(err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	best, why := t.planner.Where(time.Now(),
		place.Ask{Name: q.Name, Labels: labels, Memory: q.Memory, CPU: q.Cpu},
		int(cmp.Or(min(q.Most, 100), 3)))
	r := &fleetv1.PlaceResponse{Why: why}
	for _, c := range best {
		text := ""
		for i, reason := range c.Reasons {
			if i > 0 {
				text += "; "
			}
			text += reason
		}
		r.Choices = append(r.Choices, &fleetv1.Choice{Host: c.Host, Why: text})
	}
	return connect.NewResponse(r), nil
}

// ListRules implements fleetv1.FleetHandler.
func (b operators) ListRules(ctx context.Context, _ *connect.Request[fleetv1.ListRulesRequest]) (
	*connect.Response[fleetv1.ListRulesResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	return t.listRules(), nil
}

func (t *term) listRules() *connect.Response[fleetv1.ListRulesResponse] {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tellRules("")
}

// tryRule tells what the rules would be with one more, and what would be in the way of that.
func (t *term) tryRule(x store.Rule) *connect.Response[fleetv1.ListRulesResponse] {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.rules
	t.rules = maps.Clone(before)
	t.rules[x.Name] = x
	t.planner.SetRules(t.parseRules(t.rules))
	r := t.tellRules(x.Name)
	t.rules = before
	t.planner.SetRules(t.parseRules(t.rules))
	return r
}

// tellRules lists the rules, and what is in the way of them, or of one. It is called with mu held.
func (t *term) tellRules(only string) *connect.Response[fleetv1.ListRulesResponse] {
	all := slices.DeleteFunc(t.planner.Troubles(time.Now()), func(x place.Trouble) bool {
		return only != "" && !strings.HasPrefix(x.Rule, only+": ")
	})
	r := &fleetv1.ListRulesResponse{Troubles: troubles(all, "rules")}
	for _, name := range slices.Sorted(maps.Keys(t.rules)) {
		x := t.rules[name]
		r.Rules = append(r.Rules, &fleetv1.Rule{Name: name, Rule: x.Text, By: x.By})
	}
	return connect.NewResponse(r)
}

// PutRule implements fleetv1.FleetHandler.
func (b operators) PutRule(ctx context.Context, req *connect.Request[fleetv1.PutRuleRequest]) (
	*connect.Response[fleetv1.ListRulesResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	rule, err := view.ParseRule(req.Msg.Rule)
	if err == nil {
		err = store.CheckName(req.Msg.Name)
	}
	if err == nil && rule.Name != "" {
		err = errors.New("the rule has its name twice")
	}
	if err != nil {
		return nil, invalid(err)
	}
	by, _ := asker(ctx)
	x := store.Rule{Name: req.Msg.Name, Text: rule.String(), By: by}
	t.writes.Lock()
	defer t.writes.Unlock() // what is in memory changes in the same order as what is written
	t.mu.Lock()
	_, known := t.rules[x.Name]
	full := !known && len(t.rules) >= store.MaxRules
	t.mu.Unlock()
	if full {
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("there are %d rules, and no more can be kept", store.MaxRules))
	}
	if req.Msg.DryRun {
		return t.tryRule(x), nil
	}
	err = t.write(func(ctx context.Context) error { return t.store.PutRule(ctx, t.Term, x) })
	if err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	t.mu.Lock()
	t.rules[x.Name] = x
	t.setRules()
	t.mu.Unlock()
	return t.listRules(), nil
}

// RemoveRule implements fleetv1.FleetHandler.
func (b operators) RemoveRule(ctx context.Context,
	req *connect.Request[fleetv1.RemoveRuleRequest]) (
	*connect.Response[fleetv1.ListRulesResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	_, ok := t.rules[req.Msg.Name]
	t.mu.Unlock()
	if !ok {
		return nil, unknown("there is no rule %q", req.Msg.Name)
	}
	t.writes.Lock()
	defer t.writes.Unlock()
	err = t.write(func(ctx context.Context) error {
		return t.store.RemoveRule(ctx, t.Term, req.Msg.Name)
	})
	if err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	t.mu.Lock()
	delete(t.rules, req.Msg.Name)
	t.setRules()
	t.mu.Unlock()
	return t.listRules(), nil
}

// SetMode implements fleetv1.FleetHandler.
func (b operators) SetMode(ctx context.Context, req *connect.Request[fleetv1.SetModeRequest]) (
	*connect.Response[fleetv1.StatusResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := t.setPolicy(func(p view.Policy) (view.Policy, error) {
		p.Mode = view.Mode(req.Msg.Mode)
		return p, nil
	}); err != nil {
		return nil, err
	}
	return b.Status(ctx, connect.NewRequest(&fleetv1.StatusRequest{}))
}

// setPolicy changes the policy, which holds from now on. What others change meanwhile holds, too.
func (t *term) setPolicy(change func(view.Policy) (view.Policy, error)) (view.Policy, error) {
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	policy := t.policy
	t.mu.Unlock()
	policy, err := change(policy)
	if err == nil {
		err = policy.Check()
	}
	if err != nil {
		return policy, invalid(err)
	}
	if err := t.write(func(ctx context.Context) error {
		return t.store.PutSettings(ctx, t.Term, store.Settings{Policy: &policy})
	}); err != nil {
		return policy, connect.NewError(connect.CodeUnavailable, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.policy = policy
	t.planner.SetPolicy(policy)
	if policy.Mode != view.Ask {
		for id := range t.waiting {
			t.reject(id, "the fleet does not ask any more", time.Now())
		}
	}
	return policy, nil
}

// GetPolicy implements fleetv1.FleetHandler.
func (b operators) GetPolicy(ctx context.Context, _ *connect.Request[fleetv1.GetPolicyRequest]) (
	*connect.Response[fleetv1.Policy], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return connect.NewResponse(policyMessage(t.policy)), nil
}

// SetPolicy implements fleetv1.FleetHandler.
func (b operators) SetPolicy(ctx context.Context, req *connect.Request[fleetv1.SetPolicyRequest]) (
	*connect.Response[fleetv1.Policy], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	policy, err := t.setPolicy(func(p view.Policy) (view.Policy, error) {
		m := policyMessage(p)
		from, to := req.Msg.GetPolicy().ProtoReflect(), m.ProtoReflect()
		for _, name := range req.Msg.Fields {
			f := to.Descriptor().Fields().ByName(protoreflect.Name(name))
			if f == nil {
				return p, fmt.Errorf("a policy has no field %.40q", name)
			}
			if from.Has(f) {
				to.Set(f, from.Get(f))
			} else {
				to.Clear(f)
			}
		}
		return policyOf(m)
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(policyMessage(policy)), nil
}

func policyMessage(p view.Policy) *fleetv1.Policy {
	m := &fleetv1.Policy{Mode: string(p.Mode), Starving: p.Starving, Free: p.Free,
		SustainS: p.Sustain.Seconds(), SettleS: p.Settle.Seconds(), CoolDownS: p.CoolDown.Seconds(),
		MinGain: p.MinGain, MaxLoad: p.MaxLoad, Reserve: p.Reserve, Overcommit: p.Overcommit,
		PerHost: uint32(p.PerHost), PerLink: uint32(p.PerLink), InAll: uint32(p.InAll),
		LateS: p.Late.Seconds()}
	for _, h := range p.Quiet {
		m.Quiet = append(m.Quiet, h.String())
	}
	return m
}

// mostQuiet is how many quiet hours there may be.
const mostQuiet = 100

func policyOf(m *fleetv1.Policy) (p view.Policy, err error) {
	p = view.Policy{Mode: view.Mode(m.Mode), Starving: m.Starving, Free: m.Free,
		MinGain: m.MinGain, MaxLoad: m.MaxLoad, Reserve: m.Reserve, Overcommit: m.Overcommit,
		PerHost: int(m.PerHost), PerLink: int(m.PerLink), InAll: int(m.InAll)}
	for _, d := range []struct {
		name string
		s    float64
		to   *time.Duration
	}{{"sustain", m.SustainS, &p.Sustain}, {"settle", m.SettleS, &p.Settle},
		{"cool_down", m.CoolDownS, &p.CoolDown}, {"late", m.LateS, &p.Late}} {
		if !(d.s >= 0 && d.s <= (365*24*time.Hour).Seconds()) {
			return p, fmt.Errorf("%s is %g s: want from 0 to a year", d.name, d.s)
		}
		*d.to = time.Duration(d.s * float64(time.Second))
	}
	if len(m.Quiet) > mostQuiet {
		return p, fmt.Errorf("there are %d quiet hours: want %d at most", len(m.Quiet), mostQuiet)
	}
	for _, text := range m.Quiet {
		h, err := view.ParseHours(text)
		if err != nil {
			return p, err
		}
		p.Quiet = append(p.Quiet, h)
	}
	return p, nil
}

// partSize is how much of a backup goes at once, in bytes.
const partSize = 256 << 10

// Backup implements fleetv1.FleetHandler.
func (b operators) Backup(ctx context.Context, _ *connect.Request[fleetv1.BackupRequest],
	stream *connect.ServerStream[fleetv1.BackupPart]) error {
	snapshot, err := b.store.Snapshot(ctx)
	if err != nil {
		return connect.NewError(connect.CodeUnavailable, err)
	}
	defer snapshot.Close()
	for part := make([]byte, partSize); ; {
		n, err := io.ReadFull(snapshot, part)
		if n > 0 {
			if err := stream.Send(&fleetv1.BackupPart{Data: part[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return stream.Send(&fleetv1.BackupPart{Whole: true})
		case err != nil:
			return connect.NewError(connect.CodeUnavailable, err)
		}
	}
}

// Forget implements fleetv1.FleetHandler.
func (b operators) Forget(ctx context.Context, req *connect.Request[fleetv1.ForgetRequest]) (
	*connect.Response[fleetv1.ForgetResponse], error) {
	t, err := b.leading(ctx)
	if err != nil {
		return nil, err
	}
	t.writes.Lock()
	defer t.writes.Unlock()
	t.mu.Lock()
	h := t.hosts[req.Msg.Host]
	connected := h != nil && h.session != nil
	t.mu.Unlock()
	switch {
	case h == nil:
		return nil, unknown("the fleet has no host %q", req.Msg.Host)
	case connected:
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("host %s is "+
			"connected: remove [fleet] from its vacated.toml, and restart vacated there, first",
			h.Name))
	}
	if err := t.write(func(ctx context.Context) error {
		return t.store.RemoveHost(ctx, t.Term, h.Name)
	}); err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	if err := t.write(func(ctx context.Context) error {
		return t.store.RemoveMaintenance(ctx, t.Term, h.Name)
	}); err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.hosts, h.Name)
	delete(t.maintenance, h.Name)
	for _, p := range t.plans {
		if p.Decision.From == h.Name && !p.ending {
			t.finish(p, "forgotten", "its host was forgotten by an operator's word")
		}
	}
	t.planner.Forget(h.Name)
	return connect.NewResponse(&fleetv1.ForgetResponse{}), nil
}

package host

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/hypervisor"
	"vacate/internal/host/relief"
	"vacate/internal/qemu/qmp"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Errors whose kind the API tells.
type (
	argumentError struct{ error }
	stateError    struct{ error }
	unknownError  struct{ error }
)

func (e *argumentError) Unwrap() error { return e.error }
func (e *stateError) Unwrap() error    { return e.error }
func (e *unknownError) Unwrap() error  { return e.error }

// coded gives an error the code of its kind.
func coded(err error) error {
	if err == nil {
		return nil
	}
	var argument *argumentError
	var state *stateError
	var unknown *unknownError
	var taken *takenError
	var present *hypervisor.PresentError
	code := connect.CodeInternal
	switch {
	case errors.As(err, &argument):
		code = connect.CodeInvalidArgument
	case errors.As(err, &unknown), errors.Is(err, hypervisor.ErrUnknown):
		code = connect.CodeNotFound
	case errors.As(err, &taken), errors.Is(err, fs.ErrExist):
		code = connect.CodeAlreadyExists
	case errors.As(err, &state), errors.As(err, &present):
		code = connect.CodeFailedPrecondition
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		code = connect.CodeResourceExhausted
	case errors.Is(err, errStopping):
		code = connect.CodeUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	}
	return connect.NewError(code, err)
}

// operators is TLS for the API: the peer's certificate must be of the host's CA and have the name
// of an operator.
func (h *Host) operators() *tls.Config {
	return h.identity.Web(func(name string) error {
		if !slices.Contains(h.config.API.Operators, name) {
			return fmt.Errorf("%q is no operator", name)
		}
		return nil
	})
}

// maxRequest bounds a message of the API, in bytes.
const maxRequest = 1 << 20

// handler serves the API, and /metrics.
func (h *Host) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h.metrics.handler())
	mux.Handle(hostv1.NewHostHandler(api{h}, connect.WithReadMaxBytes(maxRequest), hostv1.Strict(),
		connect.WithInterceptors(h.audit())))
	return mux
}

// api implements hostv1.HostHandler.
type api struct{ *Host }

// Status implements hostv1.HostHandler.
func (h api) Status(context.Context,
	*connect.Request[hostv1.StatusRequest]) (*connect.Response[hostv1.StatusResponse], error) {
	r := &hostv1.StatusResponse{
		Host: h.name(), Version: h.version, ListenAddress: addrOf(h.link),
		Counters: h.metrics.counters(), StartedAt: timestamppb.New(h.started),
	}
	for _, name := range slices.Sorted(maps.Keys(h.config.Peers)) {
		p := h.config.Peers[name]
		r.Peers = append(r.Peers, &hostv1.Peer{Name: name, Address: p.Address, MaySend: p.MaySend})
	}
	if h.identity != nil {
		r.CertificateExpiresAt = timestamppb.New(h.identity.Info().NotAfter)
	}
	h.mu.Lock()
	r.Stopping, r.Guard = h.stopping, h.verdict
	h.mu.Unlock()
	return connect.NewResponse(r), nil
}

// ListVMs implements hostv1.HostHandler.
func (h api) ListVMs(ctx context.Context,
	_ *connect.Request[hostv1.ListVMsRequest]) (*connect.Response[hostv1.ListVMsResponse], error) {
	vms, err := h.vms().All(ctx)
	r := &hostv1.ListVMsResponse{}
	if err != nil {
		r.Problems = problems(err)
	}
	for _, vm := range vms {
		r.Vms = append(r.Vms, h.look(ctx, vm))
	}
	return connect.NewResponse(r), nil
}

// problems are the errors of a joined one.
func problems(err error) []string {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		var list []string
		for _, e := range j.Unwrap() {
			list = append(list, problems(e)...)
		}
		return list
	}
	return []string{err.Error()}
}

// look tells what there is of a VM. One that an engine works on is not asked: its monitor is taken.
func (h *Host) look(ctx context.Context, vm hypervisor.VM) *hostv1.VM {
	out := &hostv1.VM{Name: vm.Name, Libvirt: vm.Libvirt != ""}
	if vm.Unfit != nil {
		out.Problem = vm.Unfit.Error()
	}
	if v := h.openFor(vm.Name); v != nil {
		r := v.entry.Record()
		out.EvictionId, out.Pid = r.ID.String(), int32(r.PID)
		v.mu.Lock()
		state, stands, working := v.state, v.progress.Stands, v.cancel != nil
		v.mu.Unlock()
		if working {
			out.State = string(vmState(r.Role, state, stands))
			return out
		}
	}
	seen, err := hypervisor.Look(ctx, vm)
	if err != nil {
		out.State, out.Problem = string(hypervisor.Silent), err.Error()
		return out
	}
	out.State, out.QemuStatus, out.Pid = string(seen.State), seen.Status, int32(seen.Process.PID)
	out.MemoryBytes, out.Vcpus = seen.Memory, uint32(seen.VCPUs)
	if seen.Version != (qmp.Version{}) {
		out.QemuVersion = seen.Version.String()
	}
	return out
}

// vmState is what there is of a VM here whose eviction is in a state. stands is what QEMU called
// the state that it stood in, if it did.
func vmState(role journal.Role, s evict.State, stands string) hypervisor.State {
	running := hypervisor.Running
	if stands != "" {
		running = hypervisor.Paused
	}
	switch s {
	case evict.Preparing, evict.Running, evict.CutOff, evict.Completing:
		return running
	case evict.ShutDown:
		return hypervisor.None
	case evict.Completed:
		if role == journal.Source {
			return hypervisor.None
		}
		return running
	}
	if role == journal.Source {
		return hypervisor.Frozen
	}
	return hypervisor.Incoming
}

// list returns all evictions, the earliest first.
func (h *Host) list() []*eviction {
	h.mu.Lock()
	list := slices.Collect(maps.Values(h.evictions))
	h.mu.Unlock()
	slices.SortFunc(list, func(a, b *eviction) int {
		return a.entry.Record().Begun.Compare(b.entry.Record().Begun)
	})
	return list
}

// ListEvictions implements hostv1.HostHandler.
func (h api) ListEvictions(_ context.Context,
	req *connect.Request[hostv1.ListEvictionsRequest]) (
	*connect.Response[hostv1.ListEvictionsResponse], error) {
	r := &hostv1.ListEvictionsResponse{}
	for _, v := range h.list() {
		if req.Msg.OpenOnly && v.ended() || req.Msg.Vm != "" && v.entry.Record().VM != req.Msg.Vm {
			continue
		}
		r.Evictions = append(r.Evictions, v.message())
	}
	return connect.NewResponse(r), nil
}

// get finds the eviction of an ID in text.
func (h *Host) get(id string) (*eviction, error) {
	parsed, err := journal.ParseID(id)
	if err != nil {
		return nil, &argumentError{err}
	}
	if v := h.find(parsed); v != nil {
		return v, nil
	}
	return nil, &unknownError{fmt.Errorf("host %s knows of no eviction %s", h.name(), id)}
}

// GetEviction implements hostv1.HostHandler.
func (h api) GetEviction(_ context.Context,
	req *connect.Request[hostv1.GetEvictionRequest]) (*connect.Response[hostv1.Eviction], error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(v.message()), nil
}

// GetTrace implements hostv1.HostHandler.
func (h api) GetTrace(_ context.Context,
	req *connect.Request[hostv1.GetTraceRequest]) (*connect.Response[hostv1.GetTraceResponse],
	error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	b, err := v.entry.Blob(evict.KeptTrace)
	if errors.Is(err, fs.ErrNotExist) {
		err = &unknownError{
			fmt.Errorf("nothing is kept of what eviction %s did: that is so only on the host "+
				"that the VM left, once it has ended", v.entry.ID())}
	}
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(&hostv1.GetTraceResponse{Trace: b}), nil
}

// Limits of a map's parts.
const (
	usualParts = 4096
	mostParts  = 1 << 16
)

// GetMap implements hostv1.HostHandler.
func (h api) GetMap(_ context.Context,
	req *connect.Request[hostv1.GetMapRequest]) (*connect.Response[hostv1.GetMapResponse], error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	parts := cmp.Or(req.Msg.Parts, usualParts)
	if parts > mostParts {
		return nil,
			coded(&argumentError{fmt.Errorf("parts = %d: want %d at most", parts, mostParts)})
	}
	s, ok := v.memory.Squares(int(parts))
	if !ok {
		return nil,
			coded(&unknownError{fmt.Errorf("nothing is known of the memory of eviction %s: that "+
				"is so only on the host that the VM leaves, while pages go", v.entry.ID())})
	}
	return connect.NewResponse(&hostv1.GetMapResponse{PagesPerPart: uint32(s.Pages), Came: s.Came,
		Why: s.Why, Class: s.Class, Reasons: s.Reasons, Classes: s.Classes}), nil
}

// watchPause is the least time between two messages of a watch.
const watchPause = 100 * time.Millisecond

// WatchEviction implements hostv1.HostHandler.
func (h api) WatchEviction(ctx context.Context, req *connect.Request[hostv1.WatchEvictionRequest],
	stream *connect.ServerStream[hostv1.Eviction]) error {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return coded(err)
	}
	for {
		v.mu.Lock()
		changed := v.changed
		v.mu.Unlock()
		m := v.message()
		if err := stream.Send(m); err != nil {
			return err
		}
		if m.Outcome != "" && m.State == "" {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-h.life.Done():
			return coded(errStopping)
		}
		select {
		case <-time.After(watchPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Evict implements hostv1.HostHandler.
func (h api) Evict(ctx context.Context,
	req *connect.Request[hostv1.EvictRequest]) (*connect.Response[hostv1.Eviction], error) {
	var o options
	m := req.Msg.GetOptions()
	if m != nil {
		o = options{
			Order: m.Order, Enlightenment: m.Enlightenment, SendFree: m.SendFree,
			RateLimit: m.RateLimit, Yield: m.Yield, LoadTimeout: m.LoadTimeoutMs,
			Force: m.Force,
		}
	}
	v, err := h.evict(ctx, req.Msg.Vm, req.Msg.To, o, m.GetSkipChecks())
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(v.message()), nil
}

// Abort implements hostv1.HostHandler.
func (h api) Abort(ctx context.Context,
	req *connect.Request[hostv1.AbortRequest]) (*connect.Response[hostv1.Eviction], error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	if !v.abortable() {
		return nil, coded(&stateError{errors.New(v.unabortable())})
	}
	cause := fmt.Errorf("%w by an operator", evict.ErrAbort)
	if req.Msg.Reason != "" {
		cause = fmt.Errorf("%w: %s", cause, req.Msg.Reason)
	}
	cancel, idle := v.engine()
	if cancel != nil {
		cancel(cause)
	}
	// It may be too late: then it goes on to its end.
	for {
		v.mu.Lock()
		changed, state := v.changed, v.state
		v.mu.Unlock()
		switch state {
		case evict.Pushing, evict.InDoubt, evict.Reconnecting, evict.Running, evict.CutOff,
			evict.Completing, evict.Retiring:
			return nil,
				coded(&stateError{errors.New("the abort came too late: " + v.unabortable())})
		}
		select {
		case <-idle:
			return connect.NewResponse(v.message()), nil
		case <-changed:
		case <-ctx.Done():
			return nil, coded(ctx.Err())
		}
	}
}

// Decide implements hostv1.HostHandler.
func (h api) Decide(ctx context.Context,
	req *connect.Request[hostv1.DecideRequest]) (*connect.Response[hostv1.Eviction], error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	d, ok := map[hostv1.Decision]evict.Decision{
		hostv1.Decision_DECISION_RESUME_HERE: evict.ResumeHere,
		hostv1.Decision_DECISION_DISCARD:     evict.Discard}[req.Msg.Decision]
	if !ok {
		return nil, coded(&argumentError{errors.New("no such decision")})
	}
	if err := v.entry.Err(); err != nil {
		return nil, coded(&stateError{err}) // not even its VM is known
	}
	if !v.decidable() {
		return nil, coded(&stateError{errors.New(v.undecidable())})
	}
	if vm := v.entry.Record().VM; req.Msg.Confirm != vm {
		return nil,
			coded(&argumentError{fmt.Errorf("confirm is %q, and the VM of this eviction is %q",
				req.Msg.Confirm, vm)})
	}
	if d == evict.Discard && (req.Msg.Fenced != "" || req.Msg.Fence) {
		return nil,
			coded(&argumentError{
				errors.New("fenced and fence are for the decision to resume the VM here alone")})
	}
	if d == evict.ResumeHere && req.Msg.Lose != "" {
		return nil,
			coded(&argumentError{
				errors.New("lose is for the decision to discard the copy here alone")})
	}
	if err := v.decide(ctx, word{decision: d, lose: req.Msg.Lose, fenced: req.Msg.Fenced,
		fence: req.Msg.Fence, by: askerOf(ctx)}); err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(v.message()), nil
}

// Export implements hostv1.HostHandler.
func (h api) Export(ctx context.Context,
	req *connect.Request[hostv1.ExportRequest]) (*connect.Response[hostv1.ExportResponse], error) {
	v, err := h.get(req.Msg.Id)
	if err != nil {
		return nil, coded(err)
	}
	file := req.Msg.Path
	if !filepath.IsAbs(file) || filepath.Clean(file) != file {
		return nil, coded(&argumentError{fmt.Errorf("%q is no absolute path", file)})
	}
	if err := v.export(ctx, file); err != nil {
		return nil, coded(err)
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(&hostv1.ExportResponse{Path: file, Bytes: uint64(info.Size()),
		Usage: []string{
			"It holds memory and devices as they were when the VM was frozen, not its disks. If " +
				"it ran on elsewhere, the disks are ahead of it. Never run two copies.",
			fmt.Sprintf("QEMU OF THE SAME VERSION AND OPTIONS -S -incoming \"exec:cat '%s'\"",
				file),
			"then, at its monitor, once `info status` says paused: cont",
		}}), nil
}

// Start implements hostv1.HostHandler.
func (h api) Start(ctx context.Context,
	req *connect.Request[hostv1.StartRequest]) (*connect.Response[hostv1.VM], error) {
	if err := h.startVM(ctx, req.Msg.Vm, req.Msg.Fenced); err != nil {
		return nil, coded(err)
	}
	return h.lookAt(ctx, req.Msg.Vm)
}

// Stop implements hostv1.HostHandler.
func (h api) Stop(ctx context.Context,
	req *connect.Request[hostv1.StopRequest]) (*connect.Response[hostv1.VM], error) {
	limit := time.Duration(req.Msg.TimeoutMs) * time.Millisecond
	if limit == 0 && !req.Msg.Force {
		limit = usualStop
	}
	if limit > mostStop {
		return nil, coded(&argumentError{fmt.Errorf("timeout_ms = %d: want %d at most",
			req.Msg.TimeoutMs, mostStop.Milliseconds())})
	}
	if err := h.stopVM(ctx, req.Msg.Vm, limit, req.Msg.Force); err != nil {
		return nil, coded(err)
	}
	return h.lookAt(ctx, req.Msg.Vm)
}

// lookAt answers with what there is of a VM.
func (h api) lookAt(ctx context.Context, name string) (*connect.Response[hostv1.VM], error) {
	vm, err := hypervisor.Find(h.config.VMs, name)
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(h.look(ctx, vm)), nil
}

// ShowVM implements hostv1.HostHandler.
func (h api) ShowVM(ctx context.Context,
	req *connect.Request[hostv1.ShowVMRequest]) (*connect.Response[hostv1.ShowVMResponse], error) {
	if err := hypervisor.CheckName(req.Msg.Vm); err != nil {
		return nil, coded(&argumentError{err})
	}
	vm, err := h.described(ctx, req.Msg.Vm, "dumpxml")
	if err != nil {
		return nil, coded(err)
	}
	return connect.NewResponse(&hostv1.ShowVMResponse{
		Command: vm.Args(false), IncomingCommand: vm.Args(true), Qmp: vm.QMP, User: vm.User,
		Log: vm.Log, Env: vm.Env,
		File: hypervisor.File(h.config.VMs, vm.Name),
	}), nil
}

// message is the eviction as the API tells it.
func (v *eviction) message() *hostv1.Eviction {
	r := v.entry.Record()
	m := &hostv1.Eviction{
		Id: r.ID.String(), Vm: r.VM, Role: string(r.Role), Peer: r.Peer, PeerAddress: r.PeerAddr,
		Mark:      r.Mark,
		StartedAt: timestamppb.New(r.Begun), Abortable: v.abortable(), Decidable: v.decidable(),
		Untold:  r.Untold,
		Options: optionsMessage(r.Options),
	}
	m.Advice, m.Remedy = v.prospects()
	m.LastCopy = m.Decidable && v.last()
	m.NeedsFencing = m.Decidable && r.Role == journal.Source && !v.dead()
	m.CanFence = m.NeedsFencing && len(v.host.config.Peers[r.Peer].Fence) > 0
	if err := v.entry.Err(); err != nil {
		m.Damage = err.Error()
		return m
	}
	if !r.Ended.IsZero() {
		m.EndedAt = timestamppb.New(r.Ended)
	}
	if r.Role == journal.Source {
		m.Report = v.report(r.Report)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	m.Outcome, m.Reason = v.outcome, v.reason
	m.HugePages = v.huge.message()
	if v.cancel != nil { // else nothing goes on with it, whatever an engine said last
		m.State = string(v.state)
	}
	if p := v.progress; m.State != "" {
		m.Progress = hostv1.NewProgress(p)
		m.Progress.State, m.Progress.Reconnects = m.State, v.reconnects
		if !v.alone.IsZero() {
			m.Progress.SilentS = time.Since(v.alone).Seconds()
		}
	}
	return m
}

// report is the report that the journal keeps of an eviction; nil if there is none that can be
// read.
func (v *eviction) report(b json.RawMessage) *hostv1.Report {
	var r evict.Report
	if len(b) == 0 || string(b) == "null" {
		return nil
	}
	err := json.Unmarshal(b, &r)
	if err == nil {
		var m *hostv1.Report
		if m, err = hostv1.NewReport(r); err == nil {
			return m
		}
	}
	v.host.log.Warn("cannot read the report in the journal", "eviction", v.entry.ID(), "error", err)
	return nil
}

func optionsMessage(b json.RawMessage) *hostv1.EvictOptions {
	var o options
	if len(b) == 0 || json.Unmarshal(b, &o) != nil {
		return nil
	}
	return &hostv1.EvictOptions{Order: o.Order, Enlightenment: o.Enlightenment,
		SendFree: o.SendFree, RateLimit: o.RateLimit, Yield: o.Yield, LoadTimeoutMs: o.LoadTimeout,
		Force: o.Force}
}

// overOf is the time of a request to measure.
func overOf(ms uint32) (time.Duration, error) {
	over := time.Duration(cmp.Or(ms, uint32(usualOver.Milliseconds()))) * time.Millisecond
	if over < leastOver || over > mostOver {
		return 0, &argumentError{fmt.Errorf("over_ms = %d: want %d to %d", ms,
			leastOver.Milliseconds(), mostOver.Milliseconds())}
	}
	return over, nil
}

// Pressure implements hostv1.HostHandler.
func (h api) Pressure(ctx context.Context,
	req *connect.Request[hostv1.PressureRequest]) (*connect.Response[hostv1.PressureResponse],
	error) {
	over, err := overOf(req.Msg.OverMs)
	if err != nil {
		return nil, coded(err)
	}
	p, err := h.measure(ctx, over)
	if err != nil {
		return nil, coded(err)
	}
	l := p.load
	r := &hostv1.PressureResponse{
		OverS: l.Over.Seconds(), Cpus: uint32(l.CPUs), CpuCores: l.CPU,
		WaitingCores: p.answer(0).Waiting, Stalls: stallsMessage(l.Some, l.Full),
		MemoryBytes: l.Memory.Total, AvailableBytes: l.Memory.Available,
		SwapUsedBytes: l.Memory.SwapTotal - l.Memory.SwapFree,
		RefaultsPerS:  l.Refaults, SwappedInPerS: l.SwappedIn, Links: l.Links,
	}
	for _, v := range p.vms {
		r.Vms = append(r.Vms, &hostv1.VMPressure{
			Name: v.vm.Name, CpuCores: v.load.CPU, WaitingCores: v.load.Waiting,
			Steal: v.load.Steal(), OverheadCores: v.load.Overhead,
			ResidentBytes: v.load.Resident, SwappedBytes: v.load.Swapped,
			MajorFaultsPerS: v.load.MajorFaults,
			Stalls:          stallsMessage(v.load.Some, v.load.Full), Throttled: v.load.Throttled,
			RefaultsPerS: v.load.Refaults, Problem: v.problem,
		})
	}
	return connect.NewResponse(r), nil
}

func stallsMessage(some, full map[string]float64) map[string]*hostv1.Stall {
	m := map[string]*hostv1.Stall{}
	for what, share := range some {
		m[what] = &hostv1.Stall{Some: share, Full: full[what]}
	}
	return m
}

// Plan implements hostv1.HostHandler.
func (h api) Plan(ctx context.Context,
	req *connect.Request[hostv1.PlanRequest]) (*connect.Response[hostv1.PlanResponse], error) {
	over, err := overOf(req.Msg.OverMs)
	if err != nil {
		return nil, coded(err)
	}
	goal := relief.DefaultGoal
	if req.Msg.Goal != "" {
		if req.Msg.All {
			return nil, coded(&argumentError{errors.New("goal does not go together with all")})
		}
		if goal, err = relief.ParseGoal(req.Msg.Goal); err != nil {
			return nil, coded(&argumentError{err})
		}
	}
	if !req.Msg.All && (req.Msg.To != "" || len(req.Msg.Except) > 0 || req.Msg.Force) {
		return nil,
			coded(&argumentError{errors.New("to, except and force need all")})
	}
	if to := req.Msg.To; to != "" {
		if _, err := h.dialer(to); err != nil {
			return nil, coded(&unknownError{err})
		}
	}
	for _, name := range req.Msg.Except {
		if err := hypervisor.CheckName(name); err != nil {
			return nil, coded(&argumentError{fmt.Errorf("except: %w", err)})
		}
		// One that stays by a slip of the pen would leave, and be noticed too late.
		if _, err := h.vms().Find(ctx, name); err != nil {
			return nil, coded(fmt.Errorf("except: %w", err))
		}
	}
	s, err := h.survey(ctx, over, req.Msg.To)
	if err != nil {
		return nil, coded(err)
	}
	r := &hostv1.PlanResponse{}
	for _, o := range append([]relief.Host{s.here}, s.others...) {
		r.Hosts = append(r.Hosts, &hostv1.HostLoad{
			Name: o.Name, Cpus: o.CPUs, CpuCores: o.Used, WaitingCores: o.Waiting,
			MemoryBytes: o.Total, AvailableBytes: o.Available, Rate: o.Rate, Barred: o.Barred,
		})
	}
	var list []relief.Candidate
	if req.Msg.All {
		list = relief.Evacuate(s.here, s.vms, s.others, s.limits,
			relief.Evacuation{Except: req.Msg.Except, Force: req.Msg.Force})
	} else {
		r.Goal, r.Met = goal.String(), goal.Met(s.here)
		list = relief.Choose(s.here, s.vms, s.others, goal, s.limits)
	}
	for _, c := range list {
		r.Candidates = append(r.Candidates, &hostv1.Candidate{
			Vm: c.VM, To: c.To, GainCores: c.Gain, LoadHere: c.LoadHere, LoadThere: c.LoadThere,
			FreedBytes: c.Freed,
			TransferS:  c.Transfer.Seconds(), BackS: c.Back.Seconds(), TotalS: c.Total.Seconds(),
			Meets: c.Meets, Refused: c.Refused, Beyond: c.Beyond,
		})
	}
	return connect.NewResponse(r), nil
}

package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/doctor"
	"vacate/internal/host/hypervisor"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/internal/qemu/qmp"

	"connectrpc.com/connect"
)

// question is what one daemon asks another.
type question struct {
	Facts *factsQuestion `json:"facts,omitempty"`
	Load  *loadQuestion  `json:"load,omitempty"`
	VM    *vmQuestion    `json:"vm,omitempty"`
	// Domain asks whether a domain of libvirt's may come.
	Domain *domainQuestion `json:"domain,omitempty"`

	Ping bool `json:"ping,omitempty"` // answered at once, to measure the link
}

type factsQuestion struct {
	VM string `json:"vm,omitempty"` // that may come; empty: none
}

// facts is the answer to a factsQuestion.
type facts struct {
	Host json.RawMessage `json:"host"`           // doctor.HostFacts
	Twin json.RawMessage `json:"twin,omitempty"` // doctor.TwinFacts
	// KeptOff is why the fleet keeps the VM off the host; nil: it does not.
	KeptOff *keptOff `json:"kept_off,omitempty"`
}

// The link is measured with so many bytes, and if it took no longer than a moment with more.
const (
	fewBytes  = 256 << 10
	manyBytes = 4 << 20
	moment    = 50 * time.Millisecond
)

// askTime is how long a host may take to gather its facts.
const askTime = 20 * time.Second

// asked answers a peer's question.
func (h *Host) asked(r *evict.Request, peer string) (any, error) {
	var q question
	d := json.NewDecoder(bytes.NewReader(r.Question))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return nil, fmt.Errorf("host %s does not understand the question: %w", h.name(), err)
	}
	switch {
	case q.Ping:
		return true, nil
	case q.VM != nil:
		ctx, cancel := context.WithTimeout(h.life, clearTime)
		defer cancel()
		return h.vmHere(ctx, q.VM.Name, false), nil
	case q.Load != nil:
		if err := h.config.mayCome(peer, h.name()); err != nil {
			return nil, err
		}
		over := min(max(time.Duration(q.Load.OverMS)*time.Millisecond, leastOver), mostOver)
		p, err := h.measure(h.life, over)
		if err != nil {
			return nil, err
		}
		a := p.answer(h.arriving(p.vms))
		if m := maintained(h.told()); m != "" {
			a.Closed = "it is " + m
		}
		return a, nil
	case q.Domain != nil:
		if err := h.config.mayCome(peer, h.name()); err != nil {
			return nil, err
		}
		return h.mayTake(h.life, *q.Domain), nil
	case q.Facts != nil:
		if err := h.config.mayCome(peer, h.name()); err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(h.life, askTime)
		defer cancel()
		var f facts
		var err error
		if f.Host, err = json.Marshal(h.facts(ctx)); err == nil && q.Facts.VM != "" {
			f.Twin, err = json.Marshal(h.twinFacts(ctx, q.Facts.VM))
		}
		f.KeptOff = h.admit(ctx, q.Facts.VM)
		return f, err
	}
	return nil, errors.New("an empty question")
}

// facts are those of this host.
func (h *Host) facts(ctx context.Context) doctor.HostFacts {
	o := doctor.HostOptions{Name: h.name(), Journal: h.config.Journal, Promised: h.promised.Others}
	vms, _ := hypervisor.Load(h.config.VMs)
	for _, vm := range vms {
		if p := vm.Command[0]; !slices.Contains(o.QEMUs, p) && filepath.IsAbs(p) &&
			len(o.QEMUs) < 8 {
			o.QEMUs = append(o.QEMUs, p)
		}
	}
	if h.identity != nil {
		info, err := certs.Inspect(h.config.Certs)
		if err != nil && info.Name == "" {
			info = h.identity.Info()
		}
		o.Certificate = doctor.CertFacts{Name: info.Name, Expires: info.NotAfter, CA: info.CA}
	}
	return doctor.Host(ctx, o)
}

// twinFacts are those of a VM that may come.
func (h *Host) twinFacts(ctx context.Context, name string) doctor.TwinFacts {
	o := doctor.TwinOptions{Name: name}
	err := hypervisor.CheckName(name)
	if err != nil {
		return doctor.Twin(ctx, doctor.TwinOptions{Error: err.Error()})
	}
	vm, err := hypervisor.Find(h.config.VMs, name)
	if err != nil {
		o.Error = err.Error()
		return doctor.Twin(ctx, o)
	}
	o.Args, o.Dir, o.User = vm.Args(true), "/", vm.User
	o.Running = h.openFor(name) != nil
	if !o.Running {
		seen, err := hypervisor.Look(ctx, vm)
		if err != nil {
			o.Error = err.Error()
		}
		o.Running = seen.State != hypervisor.None
	}
	return doctor.Twin(ctx, o)
}

// examine finds what would block the eviction of a VM to another host; either may be empty.
func (h *Host) examine(ctx context.Context, name, to string) ([]doctor.Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*askTime)
	defer cancel()
	var vm *doctor.VMFacts
	if name != "" {
		described, err := hypervisor.Find(h.config.VMs, name)
		if errors.Is(err, hypervisor.ErrUnknown) {
			return h.examineDomain(ctx, name, to, err)
		} else if err != nil {
			return nil, err
		}
		if v := h.openFor(name); v != nil {
			return nil, &takenError{name, h.name(), v.entry.ID()}
		}
		if vm, err = lookAt(ctx, described); err != nil {
			return nil, &stateError{err}
		}
	}
	here := h.facts(ctx)
	if to == "" {
		return doctor.Inspect(here, vm), nil
	}
	if _, ok := h.config.Peers[to]; !ok {
		_, err := h.dialer(to)
		return nil, &unknownError{err}
	}
	there, twin, link, off, err := h.ask(ctx, to, name)
	if err != nil {
		return append(doctor.Inspect(here, vm), h.silent(to, err)), nil
	}
	if vm == nil {
		found := append(doctor.Inspect(here, nil), doctor.Inspect(there, nil)...)
		return append(append(found, off...), answers(to, link)), nil
	}
	return append(doctor.Compare(here, *vm, there, twin, link), off...), nil
}

// answers is the finding of a host that can be asked.
func answers(host string, link doctor.LinkFacts) doctor.Finding {
	return doctor.Finding{Host: host, Check: "link", Level: doctor.OK,
		Text: fmt.Sprintf("it answers in %v", link.RoundTrip.Round(10*time.Microsecond))}
}

// silent is the finding of a host that cannot be asked.
func (h *Host) silent(to string, err error) doctor.Finding {
	return doctor.Finding{
		Host: to, Check: "link", Level: doctor.Fatal,
		Text: fmt.Sprintf("it cannot be asked: %v", err),
		Remedy: fmt.Sprintf("see that vacated runs there (`systemctl status vacated`), that "+
			"%s is its address, and that each host has the other under [peers]",
			h.config.Peers[to].Address),
	}
}

// lookAt asks a VM's QEMU what matters of it.
func lookAt(ctx context.Context, vm hypervisor.VM) (*doctor.VMFacts, error) {
	q, err := qmp.Dial(ctx, vm.QMP)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil,
			fmt.Errorf("VM %s does not run here: no QEMU listens at %s. If it was evicted, "+
				"`vacate status %[1]s` says where to. Otherwise `vacate start %[1]s` starts it",
				vm.Name,
				vm.QMP)
	} else if err != nil {
		return nil, fmt.Errorf("VM %s cannot be looked at: %w", vm.Name, err)
	}
	defer q.Close()
	facts, err := doctor.VM(ctx, q)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", vm.Name, err)
	}
	facts.Trusted = vm.TrustDisks
	return &facts, nil
}

// putTo puts a question to another host, behind so many bytes, and returns how long the answer
// took.
func putTo(ctx context.Context, d link.Dialer, fill int, q question,
	answer any) (time.Duration, error) {
	s, err := d.Session(ctx)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	err = evict.Ask(ctx, s, fill, q, answer)
	return time.Since(start), err
}

// measureLink finds the round trip to another host, and the rate.
func measureLink(ctx context.Context, d link.Dialer) (facts doctor.LinkFacts, err error) {
	var pong bool
	for range 3 {
		took, err := putTo(ctx, d, 0, question{Ping: true}, &pong)
		if err != nil {
			return facts, err
		}
		if facts.RoundTrip == 0 || took < facts.RoundTrip {
			facts.RoundTrip = took
		}
	}
	for _, n := range []int{fewBytes, manyBytes} {
		took, err := putTo(ctx, d, n, question{Ping: true}, &pong)
		if err != nil {
			return facts, err
		}
		facts.Rate = float64(n) / max(took-facts.RoundTrip, time.Microsecond).Seconds()
		if took > moment {
			break
		}
	}
	return facts, nil
}

// ask gathers the facts of another host and of the link to it.
func (h *Host) ask(ctx context.Context,
	to, vm string) (there doctor.HostFacts, twin doctor.TwinFacts, link doctor.LinkFacts,
	off []doctor.Finding, err error) {
	d, err := h.dialer(to)
	if err != nil {
		return
	}
	var f facts
	if _, err = putTo(ctx, d, 0, question{Facts: &factsQuestion{vm}}, &f); err != nil {
		return
	}
	arrived := time.Now()
	if there, err = doctor.Decode[doctor.HostFacts](f.Host); err != nil {
		return
	}
	if vm != "" {
		if twin, err = doctor.Decode[doctor.TwinFacts](f.Twin); err != nil {
			return
		}
	}
	if link, err = measureLink(ctx, d); err != nil {
		return
	}
	link.Plain = h.identity == nil
	link.ClockOffset = there.Time.Sub(arrived.Add(-link.RoundTrip / 2))
	if k := f.KeptOff; k != nil {
		off = append(off, doctor.Finding{Host: to, Check: doctor.Fleet, Level: doctor.Fatal,
			Text:   k.Problem[:min(len(k.Problem), mostClosed)],
			Remedy: k.Remedy[:min(len(k.Remedy), mostClosed)]})
	}
	return there, twin, link, off, nil
}

// checks refuses an eviction that could not succeed. With force, that the fleet keeps the VM off
// the other host does not count.
func (h *Host) checks(ctx context.Context, vm, to string, force bool) error {
	found, err := h.examine(ctx, vm, to)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range found {
		if f.Level == doctor.Fatal && !(force && f.Check == doctor.Fleet) {
			errs = append(errs, fmt.Errorf("%s: %s; remedy: %s", f.Check, f.Text, f.Remedy))
		}
	}
	if len(errs) > 0 {
		return &stateError{errors.Join(errs...)}
	}
	return nil
}

var levels = map[doctor.Level]hostv1.Level{
	doctor.OK: hostv1.Level_LEVEL_OK, doctor.Note: hostv1.Level_LEVEL_NOTE,
	doctor.Warning: hostv1.Level_LEVEL_WARNING, doctor.Fatal: hostv1.Level_LEVEL_FATAL,
}

// Doctor implements hostv1.HostHandler.
func (h api) Doctor(ctx context.Context,
	req *connect.Request[hostv1.DoctorRequest]) (*connect.Response[hostv1.DoctorResponse], error) {
	found, err := h.examine(ctx, req.Msg.Vm, req.Msg.To)
	if err != nil {
		return nil, coded(err)
	}
	r := &hostv1.DoctorResponse{}
	for _, f := range found {
		r.Findings = append(r.Findings,
			&hostv1.Finding{Check: f.Check, Level: levels[f.Level], Text: f.Text, Remedy: f.Remedy,
				Host: f.Host})
	}
	return connect.NewResponse(r), nil
}

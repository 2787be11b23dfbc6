package ui

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
)

// An order is what the page asks for: first what would come of it, then to do it.
type order struct {
	// Kind is evict, abort, relieve, evacuate, resume-here, discard, start or stop; or one of
	// ofFleet.
	Kind string `json:"kind"`
	Host string `json:"host"` // key
	VM   string `json:"vm"`
	ID   string `json:"id"` // of an eviction
	// To is where to; of an evacuation, empty is anywhere.
	To     string   `json:"to"`
	Goal   string   `json:"goal"`
	Except []string `json:"except"`
	Force  bool     `json:"force"`
	Fence  bool     `json:"fence"`
	// Of orders to a fleet. ID is a decision's then.
	At     string  `json:"at"` // HH:MM
	By     string  `json:"by"` // HH:MM
	Reason string  `json:"reason"`
	Mode   string  `json:"mode"`
	Name   string  `json:"name"`
	Rule   string  `json:"rule"`
	Memory uint64  `json:"memory_mib"`
	CPU    float64 `json:"cpu"`
	// Answers are to the questions, by field.
	Answers map[string]string `json:"answers"`
}

// preview is what would come of an order.
type preview struct {
	// Command is what does the same on that host.
	Command string `json:"command"`
	// Text says what will be done.
	Text string `json:"text"`
	// Refused says why it would not be done; empty if it would.
	Refused   string     `json:"refused"`
	Findings  []finding  `json:"findings"`
	Plan      *plan      `json:"plan"`
	Questions []Question `json:"questions"`
	CanFence  bool       `json:"can_fence"`
	// Of a fleet: sentences, and of a drain, who leaves when, and who stays and why.
	Lines   []string `json:"lines"`
	Steps   []step   `json:"steps"`
	Staying []string `json:"staying"`
}

type finding struct {
	Host   string `json:"host"`
	Check  string `json:"check"`
	Level  string `json:"level"`
	Text   string `json:"text"`
	Remedy string `json:"remedy"`
}

// plan is a choice, and what it was made from.
type plan struct {
	Goal       string      `json:"goal"`
	Met        bool        `json:"met"`
	Candidates []candidate `json:"candidates"`
}

type candidate struct {
	VM      string  `json:"vm"`
	To      string  `json:"to"`
	Gain    float64 `json:"gain_cores"`
	Here    float64 `json:"load_here"`
	There   float64 `json:"load_there"`
	Freed   uint64  `json:"freed_bytes"`
	Back    float64 `json:"back_s"`
	Total   float64 `json:"total_s"`
	Refused string  `json:"refused"`
	Beyond  string  `json:"beyond"`
	Meets   bool    `json:"meets"`
}

// name is what a host is called.
func (s *Server) name(key string) string {
	if h := s.Hub.Host(key); h != nil {
		return h.Name
	}
	return key
}

func (s *Server) planOf(ctx context.Context, d Remote, o order) (*hostv1.PlanResponse, error) {
	q := &hostv1.PlanRequest{Goal: o.Goal}
	if o.Kind == "evacuate" {
		q = &hostv1.PlanRequest{All: true, To: o.To, Except: o.Except, Force: o.Force}
	}
	r, err := d.Plan(ctx, connect.NewRequest(q))
	if err != nil {
		return nil, d.Explain(err)
	}
	return r.Msg, nil
}

// ask says what would come of an order, and touches nothing.
func (s *Server) ask(ctx context.Context, o order) (any, error) {
	if s.Brain != nil && slices.Contains(ofFleet, o.Kind) {
		return s.askFleet(ctx, o)
	}
	d, err := s.remote(o.Host)
	if err != nil {
		return nil, err
	}
	host := s.name(o.Host)
	p := &preview{}
	switch o.Kind {
	case "evict":
		p.Command = fmt.Sprintf("vacate evict %s --to %s", o.VM, o.To)
		p.Text = fmt.Sprintf("VM %s leaves host %s and runs on host %s. Until it runs there, "+
			"this can be aborted.", o.VM, host, o.To)
		r, err := d.Doctor(ctx, connect.NewRequest(&hostv1.DoctorRequest{Vm: o.VM, To: o.To}))
		if err != nil {
			return nil, d.Explain(err)
		}
		for _, f := range r.Msg.Findings {
			level := strings.ToLower(strings.TrimPrefix(f.Level.String(), "LEVEL_"))
			p.Findings = append(p.Findings, finding{f.Host, f.Check, level, f.Text, f.Remedy})
			if f.Level == hostv1.Level_LEVEL_FATAL {
				p.Refused = "An eviction would fail: see what was found."
			}
		}
	case "abort":
		e, err := eviction(ctx, d, o.ID)
		if err != nil {
			return nil, err
		}
		p.Command = fmt.Sprintf("vacate abort %.8s", o.ID)
		p.Text = Abort(e, host)
		if !e.Abortable {
			p.Refused = "The VM was told to run on the destination: the eviction cannot be " +
				"aborted any more."
		}
	case "relieve", "evacuate":
		r, err := s.planOf(ctx, d, o)
		if err != nil {
			return nil, err
		}
		s.preview(p, o, host, r)
	case "resume-here", "discard":
		e, err := eviction(ctx, d, o.ID)
		if err != nil {
			return nil, err
		}
		p.Command = fmt.Sprintf("vacate decide %.8s %s", o.ID, o.Kind)
		p.Text = e.Advice
		p.CanFence = o.Kind == "resume-here" && e.NeedsFencing && e.CanFence
		if !e.Decidable {
			p.Refused = "This eviction is not for an operator to decide."
			break
		}
		p.Questions = Questions(e, o.Kind == "resume-here", false)
	case "start":
		p.Command = "vacate start " + o.VM
		p.Text = fmt.Sprintf("VM %s starts on host %s, from its disks. It is refused where any "+
			"other host has the VM, or does not say that it has not.", o.VM, host)
	case "stop":
		p.Command = "vacate stop " + o.VM
		p.Text = fmt.Sprintf("Presses the power button of VM %s on host %s. A guest that does "+
			"not heed it runs on.", o.VM, host)
	default:
		return nil, fmt.Errorf("no order %q", o.Kind)
	}
	return p, nil
}

// Abort is the question before an abort.
func Abort(e *hostv1.Eviction, here string) string {
	stays := here
	if e.Role == "destination" {
		stays = e.Peer
	}
	return fmt.Sprintf("Abort the eviction? The VM stays on host %s.", stays)
}

// Assertion is what an operator asserts with --fenced.
func Assertion(vm, host string) string {
	return fmt.Sprintf("host %[2]s is powered off, or cut off from the disks of VM %[1]s and "+
		"from the network, or the QEMU process of VM %[1]s there has ended; and VM %[1]s was not "+
		"moved on from there", vm, host)
}

// Questions are what an operator has to answer before a decision about an eviction. With fence,
// vacated fences the other host first.
func Questions(e *hostv1.Eviction, resume, fence bool) (list []Question) {
	vm, peer := e.Vm, e.Peer
	if resume && e.NeedsFencing && !fence {
		what := fmt.Sprintf(
			"VM %s may run on host %s, which has not said that it does not. If it does, two "+
				"copies of it will spoil their disks.\n"+
				"With --fenced %[2]s you assert: %s.", vm, peer, Assertion(vm, peer))
		if e.CanFence {
			what += fmt.Sprintf("\nWith --fence, vacated fences host %s first, by its command.",
				peer)
		}
		list = append(list, Question{Field: "fenced", Text: what, Want: peer})
	}
	if !resume && e.LastCopy {
		list = append(list, Question{Field: "lose", Want: vm, Text: fmt.Sprintf(
			"The copy of VM %[1]s on this host may be the last one: host %[2]s has not said "+
				"that it has all of the VM's memory.\n"+
				"With --lose %[1]s you accept that the VM is lost, with its memory and what it "+
				"had not written to its disks.", vm, peer)})
	}
	what := fmt.Sprintf("The copy of VM %s on this host will be ended.", vm)
	if resume {
		what = fmt.Sprintf("VM %s will run on this host again, from when it was frozen.", vm)
	}
	return append(list, Question{Field: "confirm", Text: what, Want: vm})
}

// preview says what a plan comes to.
func (s *Server) preview(p *preview, o order, host string, r *hostv1.PlanResponse) {
	p.Command = "vacate " + o.Kind
	if o.Goal != "" {
		p.Command += fmt.Sprintf(" --goal '%s'", o.Goal)
	}
	if o.To != "" {
		p.Command += " --to " + o.To
	}
	for _, vm := range o.Except {
		p.Command += " --except " + vm
	}
	if o.Force {
		p.Command += " --force"
	}
	p.Plan = &plan{Goal: r.Goal, Met: r.Met}
	going := 0
	for _, c := range r.Candidates {
		p.Plan.Candidates = append(p.Plan.Candidates, candidate{c.Vm, c.To, c.GainCores, c.LoadHere,
			c.LoadThere, c.FreedBytes, c.BackS, c.TotalS, c.Refused, c.Beyond, c.Meets})
		if c.Refused == "" {
			going++
		}
	}
	switch {
	case o.Kind == "evacuate" && going == 0:
		p.Refused = "No VM can leave: the table says why."
	case o.Kind == "evacuate":
		p.Text = fmt.Sprintf("%d of the VMs of host %s leave, one after the other.", going, host)
	case r.Met:
		p.Refused = fmt.Sprintf("The goal is met: %s.", r.Goal)
	case len(r.Candidates) == 0:
		p.Refused = "No VM can go, or there is no host to go to."
	case r.Candidates[0].Refused != "":
		p.Refused = fmt.Sprintf("No eviction helps to reach %s: the table says why.", r.Goal)
	default:
		p.Text = fmt.Sprintf("VM %s leaves host %s for host %s first. Then it is looked at again, "+
			"until the goal, %s, is met or no eviction helps.", r.Candidates[0].Vm, host,
			r.Candidates[0].To, r.Goal)
	}
}

// do does what an order asks for.
func (s *Server) do(ctx context.Context, o order) (any, error) {
	if s.Brain != nil && slices.Contains(ofFleet, o.Kind) {
		said, err := s.doFleet(ctx, o)
		s.Log.Info("the page orders", "kind", o.Kind, "host", o.Host, "decision", o.ID, "mode",
			o.Mode, "rule", o.Name, "error", err)
		if err != nil {
			return nil, err
		}
		return map[string]string{"said": said}, nil
	}
	d, err := s.remote(o.Host)
	if err != nil {
		return nil, err
	}
	s.Log.Info("the page orders", "kind", o.Kind, "host", s.name(o.Host), "vm", o.VM,
		"eviction", o.ID, "to", o.To)
	said := ""
	switch o.Kind {
	case "evict":
		_, err = d.Evict(ctx, connect.NewRequest(&hostv1.EvictRequest{Vm: o.VM, To: o.To}))
		said = fmt.Sprintf("The eviction of VM %s has begun.", o.VM)
	case "abort":
		var r *connect.Response[hostv1.Eviction]
		r, err = d.Abort(ctx, connect.NewRequest(&hostv1.AbortRequest{Id: o.ID,
			Reason: "by `vacate ui`"}))
		if err == nil {
			said = "Aborted: " + r.Msg.Reason
		}
	case "resume-here", "discard":
		decision := hostv1.Decision_DECISION_DISCARD
		if o.Kind == "resume-here" {
			decision = hostv1.Decision_DECISION_RESUME_HERE
		}
		var r *connect.Response[hostv1.Eviction]
		r, err = d.Decide(ctx, connect.NewRequest(&hostv1.DecideRequest{Id: o.ID,
			Decision: decision, Confirm: o.Answers["confirm"], Fenced: o.Answers["fenced"],
			Lose: o.Answers["lose"], Fence: o.Fence}))
		if err == nil {
			said = fmt.Sprintf("%s: %s", r.Msg.Vm, r.Msg.Outcome)
		}
	case "start":
		_, err = d.Start(ctx, connect.NewRequest(&hostv1.StartRequest{Vm: o.VM}))
		said = fmt.Sprintf("VM %s is started.", o.VM)
	case "stop":
		_, err = d.Stop(ctx, connect.NewRequest(&hostv1.StopRequest{Vm: o.VM}))
		said = fmt.Sprintf("VM %s has shut down.", o.VM)
	case "relieve", "evacuate":
		j := &Job{Host: o.Host, Kind: o.Kind}
		s.Hub.putJob(j, "", false)
		s.jobs.Go(func() {
			err := s.run(s.life, d, o, j)
			line := "Done."
			if err != nil {
				line = err.Error()
			}
			s.Hub.putJob(j, line, true)
		})
		said = "It has begun; the page shows how it goes on. It ends with `vacate ui`."
	default:
		err = fmt.Errorf("no order %q", o.Kind)
	}
	if err != nil {
		return nil, d.Explain(err)
	}
	return map[string]string{"said": said}, nil
}

// run relieves or evacuates a host, one eviction after the other, as the command does.
func (s *Server) run(ctx context.Context, d Remote, o order, j *Job) error {
	p, err := s.planOf(ctx, d, o)
	if err != nil {
		return err
	}
	if o.Kind == "evacuate" {
		for _, c := range p.Candidates {
			if c.Refused != "" {
				s.Hub.putJob(j, fmt.Sprintf("VM %s stays: %s", c.Vm, c.Refused), false)
				continue
			}
			s.Hub.putJob(j, s.move(ctx, d, c), false)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
		}
		return nil
	}
	for round := 0; ; round++ {
		switch {
		case p.Met:
			s.Hub.putJob(j, fmt.Sprintf("The goal is met: %s.", p.Goal), false)
			return nil
		case len(p.Candidates) == 0:
			return errors.New("no VM can go, or there is no host to go to")
		case p.Candidates[0].Refused != "":
			return fmt.Errorf("the goal, %s, is not met, and no further eviction helps", p.Goal)
		case round > len(p.Hosts)+len(p.Candidates):
			return fmt.Errorf("%d VMs have left, and the goal is not met: the load grows as fast",
				round)
		}
		s.Hub.putJob(j, s.move(ctx, d, p.Candidates[0]), false)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if p, err = s.planOf(ctx, d, o); err != nil {
			return err
		}
	}
}

// patience is how long an eviction that makes no progress is waited for.
const patience = 20 * time.Second

// move evicts a VM, waits until that has ended, and says what came of it.
func (s *Server) move(ctx context.Context, d Remote, c *hostv1.Candidate) string {
	r, err := d.Evict(ctx, connect.NewRequest(&hostv1.EvictRequest{Vm: c.Vm, To: c.To}))
	if err != nil {
		return fmt.Sprintf("VM %s stays: %v", c.Vm, d.Explain(err))
	}
	last, err := watch(ctx, d, r.Msg.Id)
	switch {
	case err != nil:
		return fmt.Sprintf("VM %s: %v", c.Vm, err)
	case last.Outcome == "completed":
		return fmt.Sprintf("VM %s runs on host %s.", c.Vm, c.To)
	}
	return fmt.Sprintf("VM %s: %s: %s", c.Vm, last.Outcome, last.Reason)
}

// watch follows an eviction to its end, or until it makes no progress for long.
func watch(ctx context.Context, d Remote, id string) (*hostv1.Eviction, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	idle := time.AfterFunc(patience, func() {
		cancel(errors.New("its eviction makes no progress, and goes on without being waited for"))
	})
	defer idle.Stop()
	stream, err := d.WatchEviction(ctx,
		connect.NewRequest(&hostv1.WatchEvictionRequest{Id: id}))
	if err != nil {
		return nil, d.Explain(err)
	}
	defer stream.Close()
	var last *hostv1.Eviction
	for stream.Receive() {
		e := stream.Msg()
		if last == nil || last.State != e.State ||
			last.GetProgress().GetPagesSent() != e.GetProgress().GetPagesSent() {
			idle.Reset(patience)
		}
		last = e
	}
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case last == nil || last.Outcome == "":
		return nil, errors.New("the daemon ended before the eviction did, which goes on")
	}
	return last, nil
}

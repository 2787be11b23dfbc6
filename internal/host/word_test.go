package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/sys/process"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// wait looks at the eviction on a host until it is as wanted.
func (r *run) wait(s *site, what string, wanted func(*hostv1.Eviction) bool) *hostv1.Eviction {
	r.t.Helper()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		e := r.look(s)
		if e != nil && wanted(e) {
			return e
		}
		if time.Now().After(limit) {
			r.t.Fatalf("%s: never %s: %v", s.name, what, e)
		}
	}
}

// newRun boots a VM on host a that both hosts know. Their daemons are not started yet.
func newRun(t *testing.T, l *lab.Lab, spec lab.Spec) *run {
	r := &run{t: t, lab: l, vm: boot(t, l.A, spec)}
	r.a, r.b = sites(t, l)
	r.a.describe("web1", r.vm.QMP, r.vm.Args)
	r.expected = r.b.expect("web1", r.vm)
	return r
}

// begin evicts the VM until it runs on the other host, with most of its memory still here.
func (r *run) begin() {
	r.t.Helper()
	e, err := r.a.evict("web1", "hostb")
	if err != nil {
		r.t.Fatal(err)
	}
	r.eviction = e.Id
	r.wait(r.a, "pushing", func(e *hostv1.Eviction) bool {
		if e.Outcome != "" {
			r.t.Fatalf("it is over: %v", e)
		}
		return e.State == string(evict.Pushing)
	})
}

func (r *run) say(s *site, d hostv1.Decision, fenced string, fence bool) error {
	_, err := s.api.Decide(labtest.Within(r.t, time.Minute), connect.NewRequest(
		&hostv1.DecideRequest{Id: r.eviction, Decision: d, Confirm: "web1", Fenced: fenced,
			Fence: fence}))
	return err
}

// discard gives up the copy on a host.
func (r *run) discard(s *site, lose string) error {
	_, err := s.api.Decide(labtest.Within(r.t, time.Minute), connect.NewRequest(
		&hostv1.DecideRequest{Id: r.eviction, Decision: hostv1.Decision_DECISION_DISCARD,
			Confirm: "web1", Lose: lose}))
	return err
}

// refused makes sure that a word was not heeded, and that what was said has some texts.
func (r *run) refused(err error, code connect.Code, texts ...string) {
	r.t.Helper()
	if connect.CodeOf(err) != code || err == nil {
		r.t.Errorf("decided: %v", err)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			r.t.Errorf("refused without %q: %v", text, err)
		}
	}
	if s := status(r.vm); s == "running" || s == "" {
		r.t.Errorf("the VM at the source is %q", s)
	}
}

// over follows an eviction that is over: that must not take long.
func (r *run) over(s *site, outcome string) *hostv1.Eviction {
	r.t.Helper()
	e, err := s.watch(r.eviction, 20*time.Second)
	if err != nil || e.Outcome != outcome || e.State != "" {
		r.t.Errorf("%s: it ended as %v, %v; want %q", s.name, e, err, outcome)
	}
	return e
}

// The destination is fenced, as an operator truly asserts, and the VM has moved on from there to a
// third host: it is not resumed here.
func TestMovedOn(t *testing.T) {
	h, _ := measured(t)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
		VM: "db1", Peer: "hostb", QMP: filepath.Join(t.TempDir(), "none"), PID: os.Getpid(),
		Boot: process.BootID(), Mark: string(evict.MarkMayRun)})
	if err != nil {
		t.Fatal(err)
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log = slog.New(slog.DiscardHandler)
	life, leave := context.WithCancelCause(context.Background())
	h.life = life
	t.Cleanup(h.tasks.Wait)
	t.Cleanup(func() { leave(evict.ErrLeave) })
	h.config = Config{Name: "hosta", Peers: map[string]Peer{"hostb": {Address: "127.0.0.1:1"},
		"hostc": answering(t, func() vmAnswer { return vmAnswer{Why: "it is there, running"} }),
		"hostd": {Address: "127.0.0.1:1"}}}
	err = v.decide(labtest.Within(t, time.Minute),
		word{decision: evict.ResumeHere, fenced: "hostb", by: "an operator"})
	var refusal *stateError
	if !errors.As(err, &refusal) || !strings.Contains(err.Error(),
		"may have moved on from host hostb: on host hostc it is there, running") {
		t.Errorf("it runs on hostc: %v", err)
	}
	if v.mark() != evict.MarkMayRun {
		t.Errorf("the mark is %q", v.mark())
	}
}

// An operator's word about a VM that may run on two hosts is hard to give wrongly; and where it was
// wrong, the copy that the operator did not mean ends as soon as either host hears of the other.
func TestWord(t *testing.T) {
	const resume = hostv1.Decision_DECISION_RESUME_HERE
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 320, Load: lab.Load{HotMiB: 32, IdleMiB: 128}})
	script, code := filepath.Join(r.a.dir, "fence"), filepath.Join(r.a.dir, "code")
	hold, started := filepath.Join(r.a.dir, "hold"), filepath.Join(r.a.dir, "started")
	if err := os.WriteFile(script,
		[]byte("#!/bin/sh\ntouch "+started+"\nwhile test -e "+hold+
			"; do sleep 0.05; done\necho \"$1 is not off yet\"\nexit $(cat "+code+")\n"),
		0o755); err != nil {
		t.Fatal(err)
	}
	config, err := os.OpenFile(filepath.Join(r.a.dir, "vacated.toml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(config, "fence = [%q, \"{host}\"]\n", script)
	config.Close()
	r.a.start()
	r.b.start()

	// While all goes well, nothing can be aborted or decided, and both ends say the same of where
	// the VM is.
	r.begin()
	r.wait(r.b, "running", func(e *hostv1.Eviction) bool {
		return e.State == string(evict.Running)
	})
	for s, says := range map[*site]string{r.a: "VM web1 runs on host hostb",
		r.b: "VM web1 runs on host hostb, and"} {
		_, err := s.api.Abort(labtest.Within(t, time.Minute),
			connect.NewRequest(&hostv1.AbortRequest{Id: r.eviction}))
		if said := fmt.Sprint(err); !strings.Contains(said, says) ||
			!strings.Contains(said, "Nothing need be done") {
			t.Errorf("abort on %s: %v", s.name, err)
		}
		r.refused(r.say(s, resume, "", false), connect.CodeFailedPrecondition, says,
			"goes on by itself")
	}

	// The destination's daemon dies, and its twin lives.
	r.b.kill()
	e := r.wait(r.a, "out of reach", func(e *hostv1.Eviction) bool { return e.Decidable })
	if len(e.Remedy) > 0 || !e.NeedsFencing || !e.CanFence || !strings.Contains(e.Advice, "hostb") {
		t.Errorf("what may be done at once: %q, %q, %v, %v", e.Advice, e.Remedy, e.NeedsFencing,
			e.CanFence)
	}
	r.refused(r.say(r.a, resume, "", false), connect.CodeFailedPrecondition, "VM web1",
		"--fenced hostb", "--fence has", "goes on by itself")
	r.refused(r.say(r.a, resume, "hosta", false), connect.CodeInvalidArgument, `"hostb"`)
	r.refused(r.say(r.a, resume, "hostb", true), connect.CodeInvalidArgument, "exclude each other")
	r.refused(r.say(r.a, hostv1.Decision_DECISION_DISCARD, "hostb", false),
		connect.CodeInvalidArgument, "resume")
	r.refused(r.discard(r.a, ""), connect.CodeFailedPrecondition, "may be the last one",
		"hostb has not said", "vacate export "+r.eviction, "--lose web1")
	r.refused(r.discard(r.a, "hostb"), connect.CodeInvalidArgument, `"web1"`)
	os.WriteFile(code, []byte("3\n"), 0o644)
	r.refused(r.say(r.a, resume, "", true), connect.CodeFailedPrecondition,
		"hostb could not be fenced", "hostb is not off yet", "exit status 3")
	r.wait(r.a, "asking again",
		func(e *hostv1.Eviction) bool { return e.Decidable && e.State != "" })

	// The command says that the destination is fenced, which answers all the same.
	os.Remove(started)
	os.WriteFile(hold, nil, 0o644)
	os.WriteFile(code, []byte("0\n"), 0o644)
	said := make(chan error, 1)
	go func() { said <- r.say(r.a, resume, "", true) }()
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(started); err == nil {
			break
		} else if time.Now().After(limit) {
			t.Fatal("the command was not run")
		}
	}
	r.b.start()
	os.Remove(hold)
	r.refused(<-said, connect.CodeFailedPrecondition, "host hostb answers for VM web1", `"running"`,
		"Nothing was decided")
	r.wait(r.a, "pushing again",
		func(e *hostv1.Eviction) bool { return e.State == string(evict.Pushing) })
	r.b.kill()
	r.wait(r.a, "out of reach again", func(e *hostv1.Eviction) bool { return e.Decidable })
	vms := r.expected.VMs()
	twin := vms[len(vms)-1] // which may not answer, as it lacks nearly all pages

	// The operator is wrong.
	if err := r.say(r.a, resume, "hostb", false); err != nil {
		t.Fatal(err)
	}
	if s := status(r.vm); s != "running" || !twin.Alive() {
		t.Errorf("the VM is %q, and its twin lives: %v", s, twin.Alive())
	}
	if e := r.over(r.a, "resumed here"); !e.Untold ||
		!strings.Contains(e.Advice, "hostb has not heard") ||
		!strings.Contains(e.Reason, "asserted that host hostb is fenced") {
		t.Errorf("what is told of the word: %v", e)
	}
	if _, err := r.a.evict("web1", "hostb"); err != nil {
		t.Errorf("a second eviction: %v", err)
	} else {
		first := r.eviction
		r.eviction = latest(t, r.a)
		r.over(r.a, "refused")
		r.eviction = first
	}
	r.a.kill()
	r.a.start()
	r.b.start()
	r.wait(r.a, "heard", func(e *hostv1.Eviction) bool { return !e.Untold })
	if err := twin.Ended(labtest.Within(t, time.Minute)); err != nil {
		t.Error("the destination has heard, and its copy runs on:", err)
	}
	if e := r.over(r.b, "lost contact"); !strings.Contains(e.Reason,
		"an operator resumed VM web1 on host hosta") || e.EndedAt == nil {
		t.Errorf("the destination: %v", e)
	}
	labtest.MustCheck(t, r.vm)

	// The source's daemon dies, and an operator ends the copy at the destination: then there is
	// nothing to assert.
	r.begin()
	r.a.kill()
	e = r.wait(r.b, "cut off", func(e *hostv1.Eviction) bool { return e.Decidable })
	if len(e.Remedy) > 0 || e.NeedsFencing || !strings.Contains(e.Advice, "two copies") {
		t.Errorf("the destination may at once: %q, %q", e.Advice, e.Remedy)
	}
	r.refused(r.say(r.b, resume, "hosta", false), connect.CodeFailedPrecondition, "discard",
		"hosta")
	if err := r.discard(r.b, ""); err == nil || !strings.Contains(err.Error(), "newest copy") ||
		!strings.Contains(err.Error(), "--lose web1") {
		t.Errorf("the copy at the destination is given up: %v", err)
	}
	if err := r.discard(r.b, "web1"); err != nil {
		t.Fatal(err)
	}
	r.over(r.b, "lost contact")
	r.a.start()
	e = r.wait(r.a, "lost", func(e *hostv1.Eviction) bool {
		return e.Mark == "lost" && e.Decidable
	})
	if e.NeedsFencing || !e.LastCopy || len(e.Remedy) != 3 ||
		!strings.HasSuffix(e.Remedy[1], "resume-here --confirm web1") ||
		!strings.Contains(e.Reason, "gave up the copy of VM web1 on host hostb") {
		t.Errorf("the source: %v", e)
	}
	if err := r.say(r.a, resume, "", false); err != nil {
		t.Fatal(err)
	}
	if e := r.over(r.a, "resumed here"); e.Untold {
		t.Errorf("it is to be told what it said: %v", e)
	}

	// Fenced by the command; and a host that comes back then has its copy ended.
	r.begin()
	r.b.kill()
	r.wait(r.a, "out of reach", func(e *hostv1.Eviction) bool { return e.Decidable })
	os.WriteFile(code, []byte("0\n"), 0o644)
	if err := r.say(r.a, resume, "", true); err != nil {
		t.Fatal(err)
	}
	if e := r.over(r.a, "resumed here"); !strings.Contains(e.Reason,
		"hostb was fenced, by its command") {
		t.Errorf("what is told of the word: %v", e)
	}
	r.b.start()
	r.wait(r.a, "heard", func(e *hostv1.Eviction) bool { return !e.Untold })
	r.over(r.b, "lost contact")
	for _, vm := range r.expected.VMs() {
		if vm.Alive() {
			t.Error("a copy lives on at the destination")
		}
	}

	// All that was left as it should be: it can be moved.
	labtest.MustCheck(t, r.vm)
	r.begin()
	if err := l.SetRate(4e8); err != nil {
		t.Fatal(err)
	}
	e, err = r.a.watch(r.eviction, time.Minute)
	if err != nil || e.Outcome != "completed" {
		t.Fatalf("%v, %v", e, err)
	}
	vms = r.expected.VMs()
	labtest.MustCheck(t, vms[len(vms)-1])
}

// A word is carried out in the end, and an eviction goes on: whether the operator still listens,
// others have the QEMU's monitor, or it is not there for a while.
func TestWordCarriedOutLater(t *testing.T) {
	const resume, held = hostv1.Decision_DECISION_RESUME_HERE, "source/reconnecting"
	l := labtest.New(t, lab.Options{Rate: 4e7})
	r := newRun(t, l,
		lab.Spec{MemoryMiB: 320, Load: lab.Load{HotMiB: 32, IdleMiB: 128}})
	lose := func() {
		t.Helper()
		r.b.kill()
		r.wait(r.a, "out of reach", func(e *hostv1.Eviction) bool { return e.Decidable })
	}
	runs := func() {
		t.Helper()
		r.over(r.a, "resumed here")
		if s := status(r.vm); s != "running" {
			t.Errorf("the VM is %q", s)
		}
	}

	// The operator hangs up while the engine is asked to leave the eviction. That has an engine
	// again, or has ended.
	for _, request := range []func(ctx context.Context){
		func(ctx context.Context) {
			r.a.api.Export(ctx,
				connect.NewRequest(&hostv1.ExportRequest{Id: r.eviction,
					Path: filepath.Join(r.a.dir, "saved")}))
		},
		func(ctx context.Context) {
			r.a.api.Decide(ctx,
				connect.NewRequest(&hostv1.DecideRequest{Id: r.eviction, Decision: resume,
					Confirm: "web1", Fenced: "hostb"}))
		},
	} {
		r.a.start(held)
		r.b.start()
		r.begin()
		lose()
		ctx, hangUp := context.WithCancel(labtest.Within(t, time.Minute))
		left := make(chan struct{})
		go func() {
			defer close(left)
			request(ctx)
		}()
		time.Sleep(time.Second) // the engine cannot leave meanwhile
		hangUp()
		<-left
		time.Sleep(time.Second)
		r.a.release(held)
		r.b.start()
		e := r.wait(r.a, "going on",
			func(e *hostv1.Eviction) bool {
				return e.State == string(evict.Pushing) || e.Outcome != ""
			})
		if e.Outcome == "" {
			lose()
			if err := r.say(r.a, resume, "hostb", false); err != nil {
				t.Fatal(err)
			}
			r.b.start()
		}
		runs()
		r.wait(r.a, "heard", func(e *hostv1.Eviction) bool { return !e.Untold })
		r.a.kill()
		r.b.kill()
	}

	// Somebody came to the monitor while the QEMU's process was stopped, and stays for a while.
	r.a.start()
	r.b.start()
	r.begin()
	lose()
	client, err := net.Dial("unix", r.vm.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	said := make(chan error, 1)
	go func() { said <- r.say(r.a, resume, "hostb", false) }()
	client.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := client.Read(make([]byte, 1)); err != nil {
		t.Errorf("a client that came first is not served: %v", err)
	}
	time.Sleep(7 * time.Second) // longer than one attempt to reach the monitor
	client.Close()
	if err := <-said; err != nil {
		t.Errorf("resume here: %v", err)
	}
	runs()
	r.b.start()
	r.wait(r.a, "heard", func(e *hostv1.Eviction) bool { return !e.Untold })

	// The monitor cannot be reached.
	r.begin()
	lose()
	if err := os.Rename(r.vm.QMP, r.vm.QMP+"-"); err != nil {
		t.Fatal(err)
	}
	if err := r.say(r.a, resume, "hostb", false); err == nil {
		t.Error("a VM was resumed whose monitor is not there")
	}
	time.Sleep(3 * time.Second)
	if e := r.look(r.a); e.Mark != "resumed here" || e.Outcome != "" {
		t.Errorf("a word that could not be carried out yet: %v", e)
	}
	if err := os.Rename(r.vm.QMP+"-", r.vm.QMP); err != nil {
		t.Fatal(err)
	}
	runs()
	labtest.MustCheck(t, r.vm)
}

// latest is the eviction that a host began last.
func latest(t *testing.T, s *site) string {
	t.Helper()
	list, err := s.api.ListEvictions(t.Context(),
		connect.NewRequest(&hostv1.ListEvictionsRequest{}))
	if err != nil || len(list.Msg.Evictions) == 0 {
		t.Fatal(err, list)
	}
	return list.Msg.Evictions[len(list.Msg.Evictions)-1].Id
}

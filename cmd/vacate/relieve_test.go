package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
)

func TestPlanText(t *testing.T) {
	var b strings.Builder
	p := &hostv1.PlanResponse{
		Goal: "cpu<111%",
		Hosts: []*hostv1.HostLoad{
			{Name: "hosta", Cpus: 1, CpuCores: 1, WaitingCores: 1, AvailableBytes: 8 << 30},
			{Name: "hostb", Cpus: 1, CpuCores: 0.02, AvailableBytes: 9 << 30, Rate: 125e6},
			{Name: "hostc", Barred: "hostc cannot be asked: \x1b[31mno"},
		},
		Candidates: []*hostv1.Candidate{
			{Vm: "small", To: "hostb", GainCores: 0.98, LoadHere: 1, LoadThere: 1.02,
				FreedBytes: 1 << 30, TransferS: 0.15, BackS: 4.2, TotalS: 8.7, Meets: true},
			{Vm: "big", To: "hostb", GainCores: 0.98, LoadHere: 1, LoadThere: 1.02,
				FreedBytes: 3 << 30, TransferS: 0.15, BackS: 17, TotalS: 26, Meets: true},
			{Vm: "big", To: "hostc", Refused: "hostc cannot be asked"},
			{Vm: "pin", Refused: "the VM is pinned"},
			{Vm: "forced", To: "hostb", Beyond: "hostb would starve"},
		},
	}
	if err := planText(&b, p); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"hosta  1.00", "this host", "1000 Mbit/s", "+0.98", "102 %",
		"best: it reaches the goal", "reaches the goal\n", "3 GiB", "4.2 s", "the VM is pinned",
		"goes by force: hostb would starve"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "\x1b") {
		t.Errorf("a peer's words are not cleaned:\n%s", b.String())
	}
}

// Of an evacuation users hear which VMs stayed and why, and the exit code is the worst VM's.
func TestSummary(t *testing.T) {
	var b strings.Builder
	if err := summary(&b, nil); err != nil || !strings.Contains(b.String(), "All VMs have left") {
		t.Errorf("%q, %v", b.String(), err)
	}
	stayed := map[string]stay{"db1": {why: "it is excepted"}}
	b.Reset()
	if err := summary(&b, stayed); err != nil ||
		!strings.Contains(b.String(), "db1  it is excepted") {
		t.Errorf("%q, %v", b.String(), err)
	}
	stayed["pin"] = stay{"the VM is pinned", refused(errors.New("the VM is pinned"))}
	err := summary(&b, stayed)
	if exitCode(err) != exitRefused ||
		explain(err) != "vacate: 1 of the VMs did not leave: see the list above" {
		t.Errorf("%d, %q", exitCode(err), explain(err))
	}
	stayed["web1"] = stay{"lost contact",
		&evict.Error{Outcome: evict.ErrLost, Err: errors.New("x")}}
	if err := summary(&b, stayed); exitCode(err) != exitLost {
		t.Errorf("%v: exit code %d", err, exitCode(err))
	}
}

// hanging is a daemon with evictions that do not get on, but for that of VM good.
type hanging struct {
	hostv1.UnimplementedHostHandler
	moments map[string]*hostv1.Eviction // by VM
}

func (h *hanging) Plan(context.Context,
	*connect.Request[hostv1.PlanRequest]) (*connect.Response[hostv1.PlanResponse], error) {
	p := &hostv1.PlanResponse{}
	for _, vm := range slices.Sorted(maps.Keys(h.moments)) {
		p.Candidates = append(p.Candidates, &hostv1.Candidate{Vm: vm, To: "hostb"})
	}
	return connect.NewResponse(p), nil
}

func (h *hanging) Doctor(context.Context,
	*connect.Request[hostv1.DoctorRequest]) (*connect.Response[hostv1.DoctorResponse], error) {
	return connect.NewResponse(&hostv1.DoctorResponse{}), nil
}

func (h *hanging) Evict(_ context.Context,
	r *connect.Request[hostv1.EvictRequest]) (*connect.Response[hostv1.Eviction], error) {
	return connect.NewResponse(h.moments[r.Msg.Vm]), nil
}

func (h *hanging) get(id string) *hostv1.Eviction {
	for _, e := range h.moments {
		if e.Id == id {
			return e
		}
	}
	return nil
}

func (h *hanging) GetEviction(_ context.Context,
	r *connect.Request[hostv1.GetEvictionRequest]) (*connect.Response[hostv1.Eviction], error) {
	e := proto.Clone(h.get(r.Msg.Id)).(*hostv1.Eviction)
	if e.Vm == "late" { // it ended while others left
		e.Outcome, e.State = "completed", ""
	}
	return connect.NewResponse(e), nil
}

func (h *hanging) WatchEviction(ctx context.Context,
	r *connect.Request[hostv1.WatchEvictionRequest],
	s *connect.ServerStream[hostv1.Eviction]) error {
	e := h.get(r.Msg.Id)
	for e.Outcome == "" && ctx.Err() == nil {
		s.Send(e)
		time.Sleep(10 * time.Millisecond)
	}
	return s.Send(e)
}

// In an evacuation an eviction that does not get on keeps no other VM from leaving. The list at the
// end says what it does, and what to type.
func TestEvacuateStuck(t *testing.T) {
	dir, err := os.MkdirTemp("", "vacate") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	id := func(n int) string { return fmt.Sprintf("%032d", n) }
	fake := &hanging{moments: map[string]*hostv1.Eviction{
		"cut": {Id: id(1), Vm: "cut", Peer: "hostb", State: "reconnecting",
			Progress: &hostv1.Progress{PagesSent: 3, PagesTotal: 10, SilentS: 25}},
		"early": {Id: id(2), Vm: "early", Peer: "hostb", State: "preparing", Abortable: true,
			Progress: &hostv1.Progress{Awaits: "hostb starts a QEMU for VM early", AwaitedS: 40}},
		"good": {Id: id(3), Vm: "good", Peer: "hostb", Outcome: "completed"},
		"late": {Id: id(4), Vm: "late", Peer: "hostb", State: "reconnecting"},
	}}
	socket := filepath.Join(dir, "sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(hostv1.NewHostHandler(fake))
	server := &http.Server{Handler: mux}
	var serving sync.WaitGroup
	serving.Go(func() { server.Serve(ln) })
	defer serving.Wait()
	defer server.Close()

	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	stdout := os.Stdout
	os.Stdout = out
	o := relieveOptions{all: true, daemon: daemon{socket: socket}, patience: 200 * time.Millisecond}
	err = o.evacuate(t.Context())
	os.Stdout = stdout
	b, readErr := os.ReadFile(out.Name())
	if readErr != nil {
		t.Fatal(readErr)
	}
	_, list, _ := strings.Cut(string(b), "Not moved:")
	for _, want := range []string{
		`cut    its eviction to hostb goes on in the daemon, and is "reconnecting", with 30.0 % of its memory done; nothing came from hostb for 25 s`,
		"vacate watch cut", "vacate status cut",
		`early  its eviction to hostb goes on in the daemon, and is "preparing; hostb starts a QEMU for VM early: 40 s"`, "vacate abort early",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("no %q in:\n%s", want, b)
		}
	}
	if strings.Contains(list, "good") || strings.Contains(list, "late") ||
		!strings.Contains(string(b), "vacate evict good --to hostb") {
		t.Errorf("what left is not as it should be:\n%s", b)
	}
	if exitCode(err) != exitDetached {
		t.Errorf("%v: exit code %d", err, exitCode(err))
	}
}

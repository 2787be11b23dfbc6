package main

import (
	"errors"
	"strings"
	"testing"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
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
			{Vm: "small", To: "hostb", GainCores: 0.98, LoadHere: 1, LoadThere: 1.02, FreedBytes: 1 << 30, TransferS: 0.15, BackS: 4.2, TotalS: 8.7, Meets: true},
			{Vm: "big", To: "hostb", GainCores: 0.98, LoadHere: 1, LoadThere: 1.02, FreedBytes: 3 << 30, TransferS: 0.15, BackS: 17, TotalS: 26, Meets: true},
			{Vm: "big", To: "hostc", Refused: "hostc cannot be asked"},
			{Vm: "pin", Refused: "the VM is pinned"},
			{Vm: "forced", To: "hostb", Beyond: "hostb would starve"},
		},
	}
	if err := planText(&b, p); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"hosta  1.00", "this host", "1000 Mbit/s", "+0.98", "102 %", "best: it reaches the goal", "reaches the goal\n", "3 GiB", "4.2 s", "the VM is pinned", "goes by force: hostb would starve"} {
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
	if err := summary(&b, stayed); err != nil || !strings.Contains(b.String(), "db1  it is excepted") {
		t.Errorf("%q, %v", b.String(), err)
	}
	stayed["pin"] = stay{"the VM is pinned", refused(errors.New("the VM is pinned"))}
	err := summary(&b, stayed)
	if exitCode(err) != exitRefused || explain(err) != "vacate: 1 of the VMs did not leave: see the list above" {
		t.Errorf("%d, %q", exitCode(err), explain(err))
	}
	stayed["web1"] = stay{"lost contact", &evict.Error{Outcome: evict.ErrLost, Err: errors.New("x")}}
	if err := summary(&b, stayed); exitCode(err) != exitLost {
		t.Errorf("%v: exit code %d", err, exitCode(err))
	}
}

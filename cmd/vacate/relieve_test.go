package main

import (
	"strings"
	"testing"

	hostv1 "vacate/hostapi/v1"
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
		},
	}
	if err := planText(&b, p); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"hosta  1.00", "this host", "1000 Mbit/s", "+0.98", "102 %", "best: it reaches the goal", "reaches the goal\n", "3.0 GiB", "4.2 s", "the VM is pinned"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "\x1b") {
		t.Errorf("a peer's words are not cleaned:\n%s", b.String())
	}
}

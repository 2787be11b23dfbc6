package main

import (
	"strings"
	"testing"

	hostv1 "vacate/internal/host/api/v1"
)

// What a decision lacks is asked for, spelled out; without a terminal it is refused.
func TestDecider(t *testing.T) {
	unsure := &hostv1.Eviction{Vm: "web1", Peer: "hostb", Decidable: true, NeedsFencing: true}
	sure := &hostv1.Eviction{Vm: "web1", Peer: "hostb", Decidable: true}
	last := &hostv1.Eviction{Vm: "web1", Peer: "hostb", Decidable: true, LastCopy: true}
	fences := &hostv1.Eviction{Vm: "web1", Peer: "hostb", Decidable: true, NeedsFencing: true,
		CanFence: true}
	over := &hostv1.Eviction{Vm: "web1", Peer: "hostb"}
	for _, test := range []struct {
		name    string
		e       *hostv1.Eviction
		resume  bool
		told    decider
		answers []string // nil: no terminal
		said    []string // by the error or the questions
		fails   bool
	}{
		{"flags", unsure, true, decider{confirm: "web1", fenced: "hostb"}, nil, nil, false},
		{"nothing asserted", unsure, true, decider{confirm: "web1"}, nil,
			[]string{"--fenced hostb is missing", "host hostb is powered off", "disks of VM web1"},
			true},
		{"not confirmed", sure, true, decider{}, nil, []string{"--confirm web1 is missing"}, true},
		{"said to be lost", sure, true, decider{confirm: "web1"}, nil, nil, false},
		{"by command", fences, true, decider{confirm: "web1", fence: true}, nil, nil, false},
		{"asked", unsure, true, decider{}, []string{"hostb", "web1"},
			[]string{"powered off, or cut off", "Type hostb if so", "Type web1 if so"}, false},
		{"denied", unsure, true, decider{confirm: "web1"}, []string{"y"},
			[]string{"nothing was decided"}, true},
		{"told of the command", fences, true, decider{}, []string{""}, []string{"With --fence"},
			true},
		{"discarded", unsure, false, decider{}, []string{"web1"}, []string{"will be ended"}, false},
		{"the last copy discarded", last, false, decider{confirm: "web1", lose: "web1"}, nil, nil,
			false},
		{"the last copy not meant", last, false, decider{confirm: "web1"}, nil,
			[]string{"--lose web1 is missing", "may be the last one", "hostb has not said"}, true},
		{"the last copy, asked", last, false, decider{}, []string{"web1", "web1"},
			[]string{"you accept that the VM is lost", "will be ended"}, false},
		{"the last copy, denied", last, false, decider{confirm: "web1"}, []string{"y"},
			[]string{"nothing was decided"}, true},
		{"the last copy resumed", last, true, decider{confirm: "web1"}, nil, nil, false},
		{"over", over, true, decider{}, nil, nil, false},
		{"over, at a terminal", over, false, decider{}, []string{}, nil, false},
		{"not discarded", unsure, false, decider{}, []string{""}, []string{"nothing was decided"},
			true},
	} {
		t.Run(test.name, func(t *testing.T) {
			var said strings.Builder
			o := test.told
			if test.answers != nil {
				o.ask = func(question string) (string, error) {
					said.WriteString(question)
					answer := test.answers[0]
					test.answers = test.answers[1:]
					return answer, nil
				}
			}
			err := o.complete(test.e, test.resume)
			if err != nil {
				said.WriteString(err.Error())
			}
			if (err != nil) != test.fails {
				t.Errorf("%v", err)
			}
			if err == nil && test.e.Decidable && (o.confirm != "web1" ||
				test.resume && test.e.NeedsFencing && !o.fence && o.fenced != "hostb") {
				t.Errorf("it is taken for complete: %+v", o)
			}
			for _, text := range test.said {
				if !strings.Contains(said.String(), text) {
					t.Errorf("nothing says %q: %s", text, said.String())
				}
			}
			if len(test.answers) > 0 {
				t.Errorf("%q was not asked for", test.answers)
			}
		})
	}
}

// Texts of several lines, such as what a decision lacks, become one sentence after the other.
func TestCleanJoinsSentences(t *testing.T) {
	if got := clean("One ends.\nTwo\nthree"); got != "One ends. Two; three" {
		t.Errorf("%q", got)
	}
}

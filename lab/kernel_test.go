package lab

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"vacate/internal/guest/agent"
)

// Every kernel boots with every device, and an agent's port.
func TestKernels(t *testing.T) {
	l := newTestLab(t, Options{})
	for _, k := range Kernels {
		t.Run(k.Name, func(t *testing.T) {
			start := time.Now()
			vm, err := l.A.Boot(deadline(t, 5*time.Minute),
				Spec{Kernel: k, Devices: Full, Load: Load{HotMiB: 16, CacheMiB: 4, Slow: true}})
			if err != nil {
				t.Fatal(err)
			}
			defer vm.Kill()
			t.Logf("booted in %v", time.Since(start))
			mustCheck(t, vm.Guest, vm, (16+4)*pagesPerMiB)
		})
	}
}

func TestKernelThatIsNotThere(t *testing.T) {
	needLab(t)
	log := slog.New(slog.DiscardHandler)
	_, err := FetchKernel(t.Context(), t.TempDir(), Kernel{"none", "no-such-suite"}, log)
	if err == nil || !strings.Contains(err.Error(), "no-such-suite") {
		t.Errorf("a kernel of no suite: %v", err)
	}
	t.Log(err)
	if k, err := FindKernel("2.6"); err == nil || !strings.Contains(err.Error(), "6.12") {
		t.Errorf("kernel 2.6: %v, %v", k, err)
	}
	if k, err := FindKernel(""); err != nil || k != (Kernel{}) {
		t.Errorf("kernel of no name: %v, %v", k, err)
	}
}

// Programs run beside the load, and instead of it.
func TestPrograms(t *testing.T) {
	l := newTestLab(t, Options{})
	for _, test := range []struct {
		spec Spec
		says string
	}{
		{Spec{Run: []string{"guestload"}, Cmdline: "quiet", Load: Load{Slow: true}},
			"runs as process 1 of a lab guest only"},
		{Spec{Init: guestAgent, Cmdline: "quiet"}, guestAgent + ": "},
	} {
		s, says := test.spec, test.says
		vm, err := l.A.Boot(deadline(t, 2*time.Minute), s)
		if err != nil {
			t.Fatal(err)
		}
		ctx := deadline(t, time.Minute)
		for {
			console, err := os.ReadFile(vm.Console)
			if err != nil {
				t.Fatal(err)
			}
			if text := string(console); strings.Contains(text, says) {
				if strings.Contains(text, "Command line:") {
					t.Errorf("the kernel's command line lacks %q:\n%s", s.Cmdline, text)
				}
				break
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-vm.Done():
				t.Fatal(vm.explain(errors.New("the VM is gone")))
			case <-ctx.Done():
				t.Fatal(vm.explain(ctx.Err()))
			}
		}
		vm.Kill()
	}
}

// The agent runs beside the load, and answers at its socket.
func TestAgent(t *testing.T) {
	l := newTestLab(t, Options{})
	for _, d := range []Devices{Bare, Full} {
		vm, err := l.A.Boot(deadline(t, 2*time.Minute),
			Spec{Agent: true, Devices: d, Load: Load{HotMiB: 16, Slow: true}})
		if err != nil {
			t.Fatal(err)
		}
		client, err := agent.Dial(t.Context(), vm.AgentSocket)
		if err != nil {
			t.Fatal(vm.explain(err))
		}
		survey, stats, err := client.Ask(deadline(t, time.Minute),
			agent.Options{Frames: 1 << 20, Deadline: 30 * time.Second})
		if err != nil {
			t.Fatal(vm.explain(err))
		}
		if len(survey.Pages) == 0 {
			t.Errorf("%s: the agent knows of no page: %+v", d, stats)
		}
		client.Close()
		vm.Kill()
	}
}

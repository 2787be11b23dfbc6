package host

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"vacate/internal/evict/journal"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/fleet/orders"
	"vacate/internal/fleet/place"
	"vacate/internal/fleet/view"
	"vacate/internal/host/hypervisor"
)

// readStanding reads what the host was told before the daemon started. What cannot be read is told,
// and does not count: the next leader tells it anew.
func (m *fleetMember) readStanding() {
	s, err := orders.ReadStanding(m.standingFile())
	if err != nil {
		m.log.Error("what the fleet's leader told this host of maintenance and rules cannot be "+
			"read: it is heeded again when a leader tells it", "error", err)
		s = orders.Standing{}
	}
	m.mu.Lock()
	m.standing = s
	m.mu.Unlock()
}

func (m *fleetMember) standingFile() string {
	return filepath.Join(m.Host.config.Journal, journal.StandingFile)
}

// heed takes what a leader tells of this host's place in the fleet (F6).
func (m *fleetMember) heed(told *fleetv1.Standing) error {
	m.orders.Lock()
	defer m.orders.Unlock()
	if _, err := m.file.Mark().Hear(told.Epoch); err != nil {
		return err
	}
	s := orders.Standing{Epoch: told.Epoch, Phase: told.Maintenance, Reason: told.Reason,
		Rules: told.Rules}
	// What cannot be written holds until the daemon ends.
	err := orders.WriteStanding(m.standingFile(), s)
	m.mu.Lock()
	before := m.standing.Phase
	m.standing = s
	m.mu.Unlock()
	if before != s.Phase {
		m.log.Info("the fleet tells of this host's maintenance", "phase", s.Phase, "reason",
			s.Reason, "epoch", s.Epoch)
	}
	return err
}

// keptOff is why a VM may not come to a host, by the word of its fleet.
type keptOff struct {
	Problem string `json:"problem"`
	Remedy  string `json:"remedy"`
}

func (k *keptOff) Error() string { return k.Problem + ". " + k.Remedy }

// admit says why a VM may not come to this host, by the word of its fleet: the host is in
// maintenance, or a rule that the host can hold by itself forbids it. Nobody else is asked. With no
// name, only maintenance counts.
func (h *Host) admit(ctx context.Context, name string) *keptOff {
	s := h.told()
	if m := maintained(s); m != "" {
		return &keptOff{fmt.Sprintf("host %s is %s, and takes no VM", h.name(), m),
			fmt.Sprintf("`vacate fleet restore %s` ends that, and --force of vacate evict sends "+
				"one all the same", h.name())}
	}
	var rules []view.Rule
	for _, text := range s.Rules {
		// A later leader may know rules that this daemon does not.
		if r, err := view.ParseRule(text); err == nil {
			rules = append(rules, r)
		}
	}
	if len(rules) == 0 || name == "" {
		return nil
	}
	vm, _ := hypervisor.Find(h.config.VMs, name) // a domain's labels come with it
	guest := view.VM{Name: name, Labels: vm.Labels}
	here := view.Report{Seen: time.Now(), Host: view.Host{Name: h.name(),
		Labels: h.fleet.config.Labels, CPUs: 1}}
	for _, p := range h.portraits(ctx) {
		if p.vm.Name == name {
			continue
		}
		v := h.openFor(p.vm.Name)
		coming := v != nil && v.entry.Record().Role == journal.Destination
		if coming || h.fleet.tell(p) != nil {
			here.VMs = append(here.VMs, view.VM{Name: p.vm.Name, Labels: p.vm.Labels})
		}
	}
	// Whether there is room is found with the offer itself.
	policy := view.DefaultPolicy()
	policy.Reserve = 0
	if why := place.Admit(here.Seen, here, guest, nil, rules, policy); why != "" {
		return &keptOff{fmt.Sprintf("host %s does not take VM %s: %s", h.name(), name, why),
			"--force of vacate evict sends it all the same"}
	}
	return nil
}

// told is what the fleet has told of this host; nothing without a fleet.
func (h *Host) told() orders.Standing {
	if h.fleet == nil {
		return orders.Standing{}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fleet.standing
}

// maintained is the maintenance that keeps all VMs off a host, and its reason; empty: some may
// come.
func maintained(s orders.Standing) string {
	if (view.Maintenance{Phase: view.Phase(s.Phase)}).Open() {
		return ""
	}
	if s.Reason == "" {
		return s.Phase
	}
	return fmt.Sprintf("%s (%s)", s.Phase, s.Reason)
}

package host

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict/journal"
	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/link/certs"

	"connectrpc.com/connect"
)

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(3 * time.Minute); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: that never came", what)
		}
	}
}

// A host reports to a leader, takes each order once, and none of a leader whose epoch is over; also
// after a restart, and when what it has heard is damaged.
func TestFleetOrders(t *testing.T) {
	dir, err := os.MkdirTemp("", "vacate") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := certs.Init(path("ca")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hosta", "brain1", "hostb"} {
		if err := certs.Issue(path("ca"), name, path(name), certs.DefaultDays, false); err != nil {
			t.Fatal(err)
		}
	}
	says := make(chan *fleetv1.LeaderSays, 10)
	said := make(chan *fleetv1.HostSays, 1000)
	brain := &script{says, said}
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewHostsHandler(brain))
	serve := func(name string) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		identity, err := certs.Load(path(name), nil)
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: mux, TLSConfig: identity.Web(func(string) error {
			return nil
		}), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
		go server.ServeTLS(ln, "", "")
		t.Cleanup(func() { server.Close() })
		return ln.Addr().String()
	}
	right, wrong := serve("brain1"), serve("hostb")
	var log words
	var h *Host
	begin := func(address string) (end func()) {
		text := fmt.Sprintf("certs = \"hosta\"\nsocket = \"sock\"\njournal = \"journal\"\n"+
			"vms = \"vms\"\n[fleet]\nbrains = [%q]\ninterval = \"500ms\"\n"+
			"[peers.hostb]\naddress = \"127.0.0.1:1\"\n", "brain1@"+address)
		if err := os.WriteFile(path("vacated.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := ReadConfig(path("vacated.toml"))
		if err != nil {
			t.Fatal(err)
		}
		if h, err = Open(c, "test", slog.New(slog.NewTextHandler(&log, nil))); err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(context.Background())
		ran := make(chan error, 1)
		go func() { ran <- h.Run(ctx) }()
		return func() {
			stop()
			if err := <-ran; err != nil {
				t.Error(err)
			}
		}
	}
	welcome := func(epoch uint64) {
		says <- &fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Welcome{
			Welcome: &fleetv1.Welcome{Epoch: epoch}}}
	}
	// order orders, and returns why that was refused.
	orderOf := func(vm string, epoch, plan uint64) string {
		says <- &fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Order{Order: &fleetv1.Order{
			Epoch: epoch, Plan: plan, PlanId: fmt.Sprint(plan), Vm: vm, To: "hostb"}}}
		for m := range said {
			if a := m.GetAnswer(); a != nil && a.Plan == plan {
				return a.Refused
			}
		}
		return ""
	}
	order := func(epoch, plan uint64) string { return orderOf("web1", epoch, plan) }
	if err := os.Mkdir(path("vms"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("vms/pinned.toml"),
		[]byte("pinned = true\ncommand = [\"/bin/qemu\", "+
			"\"-qmp\", \"unix:{qmp}\"]\nqmp = \"/run/none\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	report := func() *fleetv1.Report {
		for m := range said {
			if r := m.GetReport(); r != nil {
				return r
			}
		}
		return nil
	}
	is := func(got, want string) {
		t.Helper()
		if !strings.Contains(got, want) {
			t.Errorf("refused with %q, want %q", got, want)
		}
	}
	end := begin(right)
	welcome(10)
	if r := report(); r.Mark.Epoch != 10 || r.Load.Cpus == 0 || r.Load.Total == 0 ||
		!strings.Contains(r.Load.Closed, "listen is not set") {
		t.Errorf("it reports %v", r)
	}
	is(order(10, 5), "web1")
	is(order(10, 5), "told before")
	is(order(10, 4), "told before")
	is(order(9, 6), "a later leader")
	is(order(10, 6), "web1")
	is(orderOf("pinned", 10, 7), "VM pinned is pinned on host hosta")
	standing := func(epoch uint64, phase string, rules ...string) {
		says <- &fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Standing{Standing: &fleetv1.Standing{
			Epoch: epoch, Maintenance: phase, Reason: "new memory", Rules: rules}}}
	}
	// off reports whether a VM is kept off this host, with these words; none: it may come.
	off := func(vm, words string) bool {
		err := h.admit(t.Context(), vm)
		return err == nil && words == "" || err != nil && words != "" &&
			strings.Contains(err.Error(), words)
	}
	standing(10, "", "gpu: vms name=ml* never run on hosts name=host*", "what comes later")
	until(t, "a rule keeps a VM off", func() bool { return off("ml1", `rule "gpu"`) })
	if !off("web1", "") {
		t.Errorf("a rule keeps others off: %v", h.admit(t.Context(), "web1"))
	}
	standing(10, "draining")
	until(t, "maintenance keeps VMs off", func() bool {
		return off("web1", "draining (new memory), and takes no VM")
	})
	if maintained(h.told()) == "" {
		t.Error("it does not tell others that it takes no VM")
	}
	end()

	end = begin(right)
	if !off("web1", "draining") {
		t.Error("after a restart, what the leader told does not count any more")
	}
	welcome(9)
	until(t, "the deposed leader is refused", func() bool {
		return strings.Contains(log.String(), "refused a leader of the fleet")
	})
	welcome(10)
	is(order(10, 6), "told before")
	is(order(11, 8), "web1")
	said10 := func() int { return strings.Count(log.String(), "a later leader of the fleet was") }
	before := said10()
	standing(10, "")
	until(t, "a deposed leader's word of maintenance is refused",
		func() bool { return said10() > before })
	if !off("web1", "draining") {
		t.Error("a deposed leader opens the host")
	}
	welcome(11)
	standing(11, "")
	until(t, "the present leader opens the host", func() bool { return off("web1", "") })
	if r := report(); r.Mark.Epoch != 11 || r.Mark.Plan != 8 {
		// One was on its way.
		if r = report(); r.Mark.Epoch != 11 || r.Mark.Plan != 8 {
			t.Errorf("it reports %v", r.Mark)
		}
	}
	end()

	// A host is no brain.
	end = begin(wrong)
	until(t, "one with a host's certificate is refused", func() bool {
		return strings.Contains(log.String(), "no leader of the fleet hears this host")
	})
	end()
	if len(says) != 0 {
		t.Error("it was listened to")
	}

	if err := os.WriteFile(path("journal/"+journal.OrdersFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := ReadConfig(path("vacated.toml"))
	if err == nil {
		_, err = Open(c, "test", slog.New(slog.DiscardHandler))
	}
	if err == nil || !strings.Contains(err.Error(), "No order was heeded") {
		t.Errorf("with a damaged file: %v", err)
	}
}

// script is a brain that says what a test wants it to.
type script struct {
	says chan *fleetv1.LeaderSays
	said chan *fleetv1.HostSays
}

func (b *script) Join(ctx context.Context,
	s *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	if _, err := s.Receive(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer func() { <-ended }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer close(ended)
		defer cancel()
		for {
			m, err := s.Receive()
			if err != nil {
				return
			}
			select {
			case b.said <- m:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		select {
		case m := <-b.says:
			if err := s.Send(m); err != nil {
				return err
			}
		case <-ctx.Done():
			return nil
		}
	}
}

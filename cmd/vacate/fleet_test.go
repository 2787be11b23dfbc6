package main

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/link/certs"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// standIn stands for a member of a brain.
type standIn struct {
	fleetv1.UnimplementedFleetHandler
	status *fleetv1.StatusResponse // nil: it refuses to say
	drains chan *fleetv1.DrainRequest
}

func (s standIn) Status(context.Context, *connect.Request[fleetv1.StatusRequest]) (
	*connect.Response[fleetv1.StatusResponse], error) {
	if s.status == nil {
		return nil, connect.NewError(connect.CodePermissionDenied, nil)
	}
	return connect.NewResponse(s.status), nil
}

func (s standIn) Drain(_ context.Context, q *connect.Request[fleetv1.DrainRequest]) (
	*connect.Response[fleetv1.DrainResponse], error) {
	s.drains <- q.Msg
	return connect.NewResponse(&fleetv1.DrainResponse{}), nil
}

// members is a brain that a command may ask.
type members struct {
	t     *testing.T
	certs string // of an operator, and of all members
	list  []string
}

func newMembers(t *testing.T) *members {
	dir := t.TempDir()
	m := &members{t: t, certs: filepath.Join(dir, "certs")}
	ca := filepath.Join(dir, "ca")
	for _, err := range []error{certs.Init(ca), certs.Issue(ca, "brain1", m.certs, 1, false)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// listen makes a place for one more member, which does not answer yet.
func (m *members) listen() (net.Listener, string) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { ln.Close() })
	name := "brain1@" + ln.Addr().String()
	m.list = append(m.list, name)
	return ln, name
}

// serve makes a member answer.
func (m *members) serve(ln net.Listener, s standIn) {
	identity, err := certs.Load(m.certs, func(error) {})
	if err != nil {
		m.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewFleetHandler(s))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute,
		TLSConfig: identity.Web(func(string) error { return nil }),
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	go server.ServeTLS(ln, "", "") // which ends with the test
	m.t.Cleanup(func() { server.Close() })
}

// run runs a command of vacate fleet, and returns what it says and fails with.
func (m *members) run(args ...string) (string, error) {
	var out strings.Builder
	c := fleetCommand()
	c.SilenceUsage, c.SilenceErrors = true, true
	c.SetOut(&out)
	c.SetArgs(append(args, "--fleet", strings.Join(m.list, ","), "--operator-certs", m.certs))
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	err := c.ExecuteContext(ctx)
	return out.String(), err
}

func leading(name string) *fleetv1.StatusResponse {
	return &fleetv1.StatusResponse{Leader: name, Leads: true, Since: timestamppb.Now()}
}

// A member that is stopped keeps nobody from asking the others.
func TestFleetPassesMembersThatHang(t *testing.T) {
	m := newMembers(t)
	m.listen()
	ln, name := m.listen()
	m.serve(ln, standIn{status: leading(name)})
	out, err := m.run("status")
	if err != nil || !strings.Contains(out, name) {
		t.Errorf("%v: %s", err, out)
	}
}

func TestFleetSaysWhyItIsNotAnswered(t *testing.T) {
	for what, x := range map[string]struct {
		status *fleetv1.StatusResponse
		want   string
	}{
		"a certificate without a role": {nil, "the fleet's brain refuses"},
		"nobody leads": {&fleetv1.StatusResponse{},
			"no member leads the fleet at the moment"},
	} {
		m := newMembers(t)
		ln, _ := m.listen()
		m.serve(ln, standIn{status: x.status})
		if _, err := m.run("status"); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// It has not noticed yet that the leader does not answer any more.
	m := newMembers(t)
	ln, name := m.listen()
	m.serve(ln, standIn{status: &fleetv1.StatusResponse{Leader: name}})
	_, err := m.run("status")
	if err == nil || !strings.Contains(err.Error(), name+" leads, as far as it has heard") {
		t.Error(err)
	}
}

// A script's variable that is empty must not make a drain begin at once, nor a list of a removal.
func TestFleetRefusesEmptyFlags(t *testing.T) {
	m := newMembers(t)
	ln, name := m.listen()
	drains := make(chan *fleetv1.DrainRequest, 10)
	m.serve(ln, standIn{status: leading(name), drains: drains})
	for _, args := range [][]string{{"drain", "hosta", "--at", ""}, {"drain", "hosta", "--by", ""},
		{"rules", "--remove", "", "--set", ""}, {"rules", "--set", ""}} {
		if _, err := m.run(args...); err == nil || strings.Contains(err.Error(), "unimplemented") {
			t.Errorf("%q: %v", args, err)
		}
	}
	if _, err := m.run("rules", "--remove", ""); err == nil ||
		!strings.Contains(err.Error(), "RemoveRule") {
		t.Errorf("it did not ask to remove a rule: %v", err)
	}
	if len(drains) > 0 {
		t.Errorf("a drain was asked for: %v", <-drains)
	}
}

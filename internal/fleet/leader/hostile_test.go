package leader

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/link/certs"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// forged makes TLS of a client whose certificate Issue would not make, by the CA in a directory.
func (s *site) forged(ca string, change func(*x509.Certificate)) *tls.Config {
	s.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(ca, "ca.pem"), filepath.Join(ca, "ca.key"))
	if err != nil {
		s.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		s.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"boss"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	change(c)
	der, err := x509.CreateCertificate(nil, c, pair.Leaf, key.Public(), pair.PrivateKey)
	if err != nil {
		s.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der},
		PrivateKey: key}}, InsecureSkipVerify: true, ServerName: "brain1"} // #nosec G402 -- a test
}

// Strangers on the port learn nothing, are logged, and keep nobody from being served.
func TestStrangers(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a := s.host("hosta", "web1")
	a.join(one)
	other := filepath.Join(s.dir, "other")
	if err := certs.Init(other); err != nil {
		t.Fatal(err)
	}
	ours := filepath.Join(s.dir, "ca")
	same := func(*x509.Certificate) {}
	none := &tls.Config{InsecureSkipVerify: true} // #nosec G402 -- a test
	for name, c := range map[string]*tls.Config{
		"without a certificate": none,
		"of another CA":         s.forged(other, same),
		"an expired one": s.forged(ours, func(c *x509.Certificate) {
			c.NotAfter = time.Now().Add(-time.Minute)
		}),
		"one not for clients": s.forged(ours, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}),
		"one without a name": s.forged(ours, func(c *x509.Certificate) { c.DNSNames = nil }),
		"one of a pattern": s.forged(ours, func(c *x509.Certificate) {
			c.DNSNames = []string{"host*"}
		}),
	} {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: c,
			ForceAttemptHTTP2: true}}
		if r, err := fleetv1.NewFleetClient(client, "https://"+one.address).Status(t.Context(),
			connect.NewRequest(&fleetv1.StatusRequest{})); err == nil {
			t.Errorf("%s gets an answer: %v", name, r)
		}
		stream := fleetv1.NewHostsClient(client, "https://"+one.address).Join(t.Context())
		stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Hello{Hello: &fleetv1.Hello{}}})
		if m, err := stream.Receive(); err == nil {
			t.Errorf("%s joins: %v", name, m)
		}
		stream.CloseRequest()
		stream.CloseResponse()
		client.CloseIdleConnections()
	}
	s.until("they are logged", func() bool { return s.log.has("TLS handshake error") })

	// Some say nothing, half of something, or something else, and stay as long as they may.
	var conns []net.Conn
	for i := range 300 {
		c, err := net.Dial("tcp", one.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		io.WriteString(c, []string{"", "\x16\x03\x01", "GET / HTTP/1.1\r\n\r\n",
			strings.Repeat("garbage ", 100)}[i%4])
	}
	if _, err := boss.ListHosts(t.Context(),
		connect.NewRequest(&fleetv1.ListHostsRequest{})); err != nil {
		t.Errorf("an operator beside them: %v", err)
	}
	b := s.host("hostb")
	b.join(one)
	for i, c := range conns {
		c.SetReadDeadline(time.Now().Add(time.Minute))
		if said, err := io.ReadAll(c); len(said) > 200 || err != nil && strings.Contains(
			err.Error(), "timeout") {
			t.Errorf("stranger %d was told %q, %v", i, said, err)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended != nil {
		t.Errorf("the host that was there lost its stream: %v", a.ended)
	}
}

// One with a certificate that does not go on, or says too much, is not waited for.
func TestIdlers(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	idle := fleetv1.NewHostsClient(s.transport(one, "hostz"), "https://"+one.address).
		Join(t.Context())
	idle.Send(nil) // the head of the request alone
	ended := make(chan error, 1)
	go func() {
		_, err := idle.Receive()
		ended <- err
	}()
	// The body of what an operator asks never comes.
	body, never := io.Pipe()
	defer never.Close()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		"https://"+one.address+fleetv1.FleetStatusProcedure, body)
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Content-Type", "application/proto")
	slow := make(chan error, 1)
	go func() {
		r, err := s.transport(one, "boss").Do(q)
		if err == nil {
			r.Body.Close()
			if r.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s", r.Status)
			}
		}
		slow <- err
	}()
	if _, err := boss.PutRule(t.Context(), connect.NewRequest(&fleetv1.PutRuleRequest{Name: "x",
		Rule: strings.Repeat("x", maxMessage+1)})); connect.CodeOf(err) !=
		connect.CodeResourceExhausted {
		t.Errorf("a request of %d bytes: %v", maxMessage, err)
	}
	for what, c := range map[string]chan error{"a host that says no hello": ended,
		"an operator whose request does not come": slow} {
		select {
		case err := <-c:
			if err == nil {
				t.Errorf("%s gets an answer", what)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s is waited for", what)
		}
	}
	idle.CloseRequest()
	idle.CloseResponse()
}

// Each call of each service needs a role, and a host's certificate has none: it gives no orders.
func TestEveryCall(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	s.leads(one)
	s.host("hosta").join(one)
	fleet := fleetv1.File_internal_fleet_api_v1_fleet_proto.Services().ByName("Fleet")
	rank := map[string]role{"hosta": nobody, "brain2": nobody, "stranger": nobody,
		"viewer": viewer, "actor": actor, "boss": admin}
	methods := fleet.Methods()
	for i := range methods.Len() {
		procedure := fmt.Sprintf("/%s/%s", fleet.FullName(), methods.Get(i).Name())
		need, ok := roles[procedure]
		if !ok || need == nobody {
			t.Errorf("%s needs no role", procedure)
		}
		for who, has := range rank {
			if has == admin && need == admin { // it would be done
				continue
			}
			code := s.call(one, who, procedure, methods.Get(i))
			if denied := code == connect.CodePermissionDenied; denied != (has < need) {
				t.Errorf("%s asks for %s, which needs %v: %v", who, procedure, need, code)
			}
			if has < need && !s.log.has("refused what somebody asked", "operator="+who,
				"asks="+string(methods.Get(i).Name())) {
				t.Errorf("it is not logged that %s was refused %s", who, procedure)
			}
		}
	}
}

// call makes an empty request, and returns the code of the answer.
func (s *site) call(b *server, who, procedure string,
	m protoreflect.MethodDescriptor) connect.Code {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.Context(), time.Minute)
	defer cancel()
	if m.IsStreamingServer() {
		stream, err := s.operator(b, who).Backup(ctx, connect.NewRequest(&fleetv1.BackupRequest{}))
		if err == nil {
			for stream.Receive() {
			}
			err = errors.Join(stream.Err(), stream.Close())
		}
		return connect.CodeOf(err)
	}
	c := connect.NewClient[fleetv1.StatusRequest, fleetv1.StatusResponse](s.transport(b, who),
		"https://"+b.address+procedure)
	_, err := c.CallUnary(ctx, connect.NewRequest(&fleetv1.StatusRequest{}))
	return connect.CodeOf(err)
}

// A host speaks for itself alone: what it says of another host's VMs and orders changes nothing.
func TestOnlyForItself(t *testing.T) {
	s := newSite(t)
	one := s.serve("brain1")
	boss := s.leads(one)
	a, b, liar := s.host("hosta", "web1"), s.host("hostb"), s.host("hostc")
	for _, f := range []*fake{a, b, liar} {
		f.join(one)
	}
	s.until("the host is known", func() bool {
		_, err := boss.Drain(t.Context(), connect.NewRequest(&fleetv1.DrainRequest{Host: "hosta"}))
		return err == nil
	})
	s.until("the eviction begins", func() bool { return a.begun() == 1 })
	plan := decisions(t, boss)[0]
	// It answers for hosta's order, and reports its end.
	liar.mu.Lock()
	liar.stream.Send(&fleetv1.HostSays{What: &fleetv1.HostSays_Answer{Answer: &fleetv1.Answer{
		PlanId: plan.Id, Plan: plan.Plan, Refused: "says hostc"}}})
	a.mu.Lock()
	e := a.evictions[0]
	liar.evictions = append(liar.evictions, &fleetv1.OrderedEviction{PlanId: e.PlanId,
		EvictionId: "x", Vm: e.Vm, Outcome: "aborted", Reason: "says hostc",
		EndedAt: timestamppb.Now()})
	a.mu.Unlock()
	reported := one.leads()
	liar.mu.Unlock()
	s.until("it has been heard", func() bool {
		reported.mu.Lock()
		defer reported.mu.Unlock()
		r := reported.hosts["hostc"].report
		return r != nil && len(r.Evictions) == 1
	})
	if got := decisions(t, boss); len(got) != 1 || got[0].State != "goes on" ||
		got[0].Reason != "" {
		t.Errorf("by the word of another host it is %v", got)
	}
	r, err := boss.ListHosts(t.Context(), connect.NewRequest(&fleetv1.ListHostsRequest{}))
	if err != nil || len(r.Msg.Hosts[0].Vms) != 1 || len(r.Msg.Hosts[2].Vms) != 0 {
		t.Errorf("%v, %v", r, err)
	}
	a.end(b)
	s.until("by its own host's word it ends", func() bool {
		got := decisions(t, boss)
		return len(got) == 1 && got[0].State == "completed"
	})
}

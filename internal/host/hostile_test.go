package host

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/lab"
	"vacate/lab/labtest"

	"connectrpc.com/connect"
)

// Peers that have no business on the link are turned away and counted while a VM is moved past
// them, which takes no harm.
func TestHostilePeers(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 4e8})
	a, b := sites(t, l)
	vm := boot(t, l.A, lab.Spec{MemoryMiB: 320, Load: lab.Load{HotMiB: 32, IdleMiB: 128}})
	a.describe("web1", vm.QMP, vm.Args)
	expected := b.expect("web1", vm)
	a.start()
	b.start()

	// Certificates of another CA, of the right one for a host that is no peer, and an expired one.
	others := filepath.Join(a.dir, "others")
	if err := certs.Init(filepath.Join(others, "ca")); err != nil {
		t.Fatal(err)
	}
	identity := func(ca, name, dir string) *tls.Config {
		t.Helper()
		dir = filepath.Join(others, dir)
		if err := certs.Issue(ca, name, dir, certs.DefaultDays, false); err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "host.pem"),
			filepath.Join(dir, "host.key"))
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}
	}
	ours := filepath.Join(filepath.Dir(a.dir), "ca")
	wrongCA := identity(filepath.Join(others, "ca"), "hosta", "wrong")
	stranger := identity(ours, "hostc", "stranger")
	replay := identity(ours, "hosta", "again") // hosta itself, which says the same things twice
	addr := net.JoinHostPort(l.B.Addr, "7601")
	dial := func(ctx context.Context) (net.Conn, error) { return l.A.Dial(ctx, "tcp", addr) }
	secure := func(config *tls.Config, say []byte) func(ctx context.Context) {
		return func(ctx context.Context) {
			c, err := dial(ctx)
			if err != nil {
				return
			}
			defer c.Close()
			s := tls.Client(c, config)
			c.SetDeadline(time.Now().Add(time.Second))
			s.Write(say)
			io.Copy(io.Discard, s)
		}
	}
	plain := func(say string, stay time.Duration) func(ctx context.Context) {
		return func(ctx context.Context) {
			c, err := dial(ctx)
			if err != nil {
				return
			}
			defer c.Close()
			c.Write([]byte(say))
			c.SetDeadline(time.Now().Add(stay))
			io.Copy(io.Discard, c)
		}
	}
	hello := []byte("vacate\r\n" + string([]byte{link.Version >> 8, link.Version & 0xff}) +
		"\x00\x00sixteen bytes id" + strings.Repeat("\x00", 8))
	peers := map[string]func(context.Context){
		"unauthenticated": secure(&tls.Config{InsecureSkipVerify: true}, hello),
		"wrong CA":        secure(wrongCA, hello),
		"unauthorised":    secure(stranger, hello),
		"replaying":       secure(replay, append(append([]byte{}, hello...), hello...)),
		"garbage":         plain(strings.Repeat("garbage ", 1000), time.Second/2),
		"web client":      plain("GET / HTTP/1.1\r\nHost: b\r\n\r\n", time.Second/2),
		"slow":            plain("\x16", 8*time.Second),
		"silent":          plain("", 8*time.Second),
	}
	before := turnedAway(t, b)
	ctx := t.Context()
	var tasks sync.WaitGroup
	for name, peer := range peers {
		rounds := 10
		if name == "slow" || name == "silent" {
			rounds = 1
		}
		tasks.Go(func() {
			for range rounds {
				peer(ctx)
			}
		})
	}
	e, err := a.evict("web1", "hostb")
	if err != nil {
		t.Fatal(err)
	}
	end, err := a.watch(e.Id, time.Minute)
	if err != nil || end.Outcome != "completed" {
		t.Errorf("the eviction: %v, %v", end, err)
	}
	tasks.Wait()
	after := turnedAway(t, b)
	t.Logf("turned away: %v", after)
	for _, reason := range []string{"unauthenticated", "unauthorised", "peer", "too slow"} {
		if after[reason] <= before[reason] {
			t.Errorf("nobody was turned away as %q: %v", reason, after)
		}
	}
	twin, err := expected.Started(labtest.Within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	labtest.MustCheck(t, twin)
}

// turnedAway counts who was turned away by a host, by reason.
func turnedAway(t *testing.T, s *site) map[string]uint64 {
	t.Helper()
	r, err := s.api.Status(t.Context(), connect.NewRequest(&hostv1.StatusRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]uint64{}
	for name, n := range r.Msg.Counters {
		if reason, ok := strings.CutPrefix(name, "vacate_link_turned_away_total reason="); ok {
			counts[reason] = n
		}
	}
	return counts
}

// Over TCP only operators may ask, by their certificates.
func TestOperators(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca")
	if err := certs.Init(ca); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hosta", "admin", "hostb"} {
		if err := certs.Issue(ca, name, filepath.Join(dir, name), certs.DefaultDays,
			false); err != nil {
			t.Fatal(err)
		}
	}
	socket, err := os.MkdirTemp("", "vacate")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(socket)
	config := Config{Certs: filepath.Join(dir, "hosta"), Socket: filepath.Join(socket, "sock"),
		Journal: filepath.Join(dir, "journal"), VMs: filepath.Join(dir, "vms"),
		API: API{Listen: "127.0.0.1:0", Operators: []string{"admin"}}, Metrics: "127.0.0.1:0"}
	var log words
	h := serve(t, config, &log)
	ask := func(name string, trust bool) error {
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, name, "host.pem"),
			filepath.Join(dir, name, "host.key"))
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		pem, err := os.ReadFile(filepath.Join(ca, "ca.pem"))
		if err != nil || !roots.AppendCertsFromPEM(pem) {
			t.Fatal(err)
		}
		c := &tls.Config{RootCAs: roots, ServerName: "hosta"}
		if trust {
			c.Certificates = []tls.Certificate{pair}
		}
		transport := newTransport(c)
		defer transport.CloseIdleConnections()
		client := hostv1.NewHostClient(clientOf(transport), fmt.Sprintf("https://%s", h.tcp.Addr()))
		r, err := client.Status(t.Context(), connect.NewRequest(&hostv1.StatusRequest{}))
		if err == nil && r.Msg.Host != "hosta" {
			t.Errorf("the host is %q", r.Msg.Host)
		}
		if err == nil {
			_, abort := client.Abort(t.Context(),
				connect.NewRequest(&hostv1.AbortRequest{Id: strings.Repeat("ab", 16)}))
			if connect.CodeOf(abort) != connect.CodeNotFound {
				t.Errorf("abort of what there is not: %v", abort)
			}
			if _, evict := client.Evict(t.Context(), connect.NewRequest(
				&hostv1.EvictRequest{Vm: "web9", To: "hostb"})); evict == nil {
				t.Error("a VM that there is not is evicted")
			}
		}
		return err
	}
	if err := ask("admin", true); err != nil {
		t.Errorf("an operator is turned away: %v", err)
	}
	if err := ask("hostb", true); err == nil {
		t.Error("a host that is no operator may ask")
	}
	if err := ask("admin", false); err == nil {
		t.Error("someone without a certificate may ask")
	}
	if !regexp.MustCompile(`operator="admin from 127\.0\.0\.1:\d+" asks=Evict vm=web9 to=hostb`).
		MatchString(log.String()) {
		t.Errorf("the log does not say who asked for an eviction:\n%s", log.String())
	}
	for _, want := range []string{"operator=\"admin from 127.0.0.1:",
		"\\\"hostb\\\" is no operator", "client didn't provide a certificate"} {
		// A client hears that it is turned away before the host's log does.
		for until := time.Now().Add(10 * time.Second); !strings.Contains(log.String(), want); {
			if time.Now().After(until) {
				t.Errorf("the log does not say %s", want)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}

	// Those who say nothing are not let in without end, and an operator is heard when they have
	// left.
	var silent []net.Conn
	for range maxConnections + 10 {
		c, err := net.Dial("tcp", h.tcp.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		silent = append(silent, c)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	if most := len(silent) + maxConnections + 100; len(fds) > most {
		t.Errorf("%d descriptors are open, want %d at most", len(fds), most)
	}
	for _, c := range silent {
		c.Close()
	}
	var heard error
	for range 5 { // on a busy machine it takes a while until they have left
		if heard = ask("admin", true); heard == nil {
			break
		}
	}
	if heard != nil {
		t.Errorf("an operator is not heard any more: %v", heard)
	}
}

package link

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/link/certs"

	"golang.org/x/sys/unix"
)

// reasons are what a listener reports.
type reasons chan error

func (r reasons) note(_ string, err error) { r <- err }

// expect wants the next reason to be one.
func (r reasons) expect(t *testing.T, who string, is error, says string) {
	t.Helper()
	select {
	case err := <-r:
		if !errors.Is(err, is) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s was turned away for %q; want %q in %q", who, err, says, is)
		}
	case <-time.After(10 * time.Second):
		t.Errorf("%s was not turned away", who)
	}
}

// connect says something to a listener.
func connect(t testing.TB, addr string, say []byte) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := c.Write(say); err != nil {
		t.Fatal(err)
	}
	return c
}

// ends wants the other side to say nothing but alerts of TLS, and to close the connection.
func ends(t *testing.T, c net.Conn, who string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s is left in", who)
	}
	const alert = 21
	if len(b) > 0 && (b[0] != alert || len(b) > 7) {
		t.Errorf("%s was told %q", who, b)
	}
}

// exchange sends a frame each way.
func exchange(t *testing.T, a, b *Session) {
	t.Helper()
	for l := range lanes {
		for _, s := range [][2]*Session{{a, b}, {b, a}} {
			if err := s[0].Lane(l).Write(7, []byte("some")); err != nil {
				t.Fatal(err)
			}
			if kind, p, err := s[1].Lane(l).Read(nil, 10); err != nil || kind != 7 ||
				string(p) != "some" {
				t.Fatalf("%v lane: %d %q %v", l, kind, p, err)
			}
		}
	}
}

// otherHello is a hello with other contents than ours.
func otherHello(version uint16, l Lane, id byte, features uint64) []byte {
	b := appendHello(nil, l, [16]byte(bytes.Repeat([]byte{id}, 16)))
	b[len(mark)], b[len(mark)+1], b[helloSize-1] = byte(version>>8), byte(version), byte(features)
	return b
}

// Over a plain link, too, a stranger is turned away, and keeps nobody from a session.
func TestPlainStrangers(t *testing.T) {
	why := make(reasons, 100)
	l, addr := server(t, ListenOptions{TurnedAway: why.note, Timeout: 2 * time.Second,
		WaitingPerPeer: 2})
	refused := func(c net.Conn, who string, is error, says string) {
		t.Helper()
		b, err := io.ReadAll(c)
		c.Close()
		if err != nil || len(b) < answerHead || b[len(mark)+2] != 1 ||
			!strings.Contains(string(b[answerHead:]), says) {
			t.Errorf("%s was answered %q, %v; want %q", who, b, err, says)
		}
		why.expect(t, who, is, says)
	}
	taken := func(c net.Conn) {
		t.Helper()
		b := make([]byte, answerHead+8)
		if _, err := io.ReadFull(c, b); err != nil || b[len(mark)+2] != 0 {
			t.Fatalf("answered %q, %v", b, err)
		}
	}
	connect(t, addr, nil).Close()
	why.expect(t, "a port scan", ErrPeer, "no hello")
	connect(t, addr, otherHello(Version, 0, 1, 0)[:20]).Close()
	why.expect(t, "half a hello", ErrPeer, "no hello")
	ends(t, connect(t, addr, []byte("GET /index.html HTTP/1.1\r\nHost: b\r\n\r\n")), "a browser")
	why.expect(t, "a browser", ErrPeer, "it said \"GET ")
	silent := connect(t, addr, []byte(mark))
	ends(t, silent, "who is slow")
	why.expect(t, "who is slow", ErrTooSlow, "no hello")
	refused(connect(t, addr, otherHello(Version+1, 0, 1, 0)), "another version", ErrVersion,
		"use the same release of vacate on both hosts")
	refused(connect(t, addr, otherHello(2, 0, 1, 0)[:helloStart]), "an older version", ErrVersion,
		"the source speaks version 2")
	refused(connect(t, addr, otherHello(Version, 9, 1, 0)), "lane 9", ErrPeer, "there is no lane 9")

	half := connect(t, addr, otherHello(Version, Push, 1, 1<<7)) // of features we do not know
	taken(half)
	refused(connect(t, addr, otherHello(Version, Push, 1, 0)), "a lane twice", ErrTaken,
		"push lane")
	other := connect(t, addr, otherHello(Version, Control, 2, 0))
	taken(other)
	refused(connect(t, addr, otherHello(Version, Control, 3, 0)), "a third session", ErrTooMany,
		"try again later")
	why.expect(t, "half a session", ErrTooSlow, "did not come")
	why.expect(t, "half a session", ErrTooSlow, "did not come")
	ends(t, half, "half a session")
	ends(t, other, "half a session")

	a, b := meet(t, l, Dialer{Addr: addr})
	refused(connect(t, addr, appendHello(nil, Fetch, a.ID)), "a replay", ErrTaken, "fetch lane")
	exchange(t, a, b)
	if a.PeerName() != "" || a.Features() != 0 {
		t.Error(a.PeerName(), a.Features())
	}
}

// forged makes TLS of a client whose certificate Issue would not make, by the same CA.
func forged(t testing.TB, ca string, change func(*x509.Certificate)) *tls.Config {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(ca, "ca.pem"), filepath.Join(ca, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"hosta"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	change(c)
	der, err := x509.CreateCertificate(nil, c, pair.Leaf, key.Public(), pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der},
		PrivateKey: key}}, InsecureSkipVerify: true, ServerName: "hostb"}
}

// Nobody without a good certificate learns anything, or has any effect on a session there is.
func TestStrangers(t *testing.T) {
	ca, otherCA := newAuthority(t), newAuthority(t)
	why := make(reasons, 100)
	hostA := ca.identity("hosta")
	l, addr := server(t, ListenOptions{TLS: ca.identity("hostb").Server(), TurnedAway: why.note,
		Timeout: 2 * time.Second,
		Allow: func(peer string) error {
			if peer == "hostx" {
				return errors.New("hostx may not evict to this host")
			}
			return nil
		}})
	a, b := meet(t, l, Dialer{Addr: addr, TLS: hostA.Client("hostb")})
	if a.PeerName() != "hostb" || b.PeerName() != "hosta" {
		t.Errorf("the peers are %q and %q", a.PeerName(), b.PeerName())
	}
	good := func() { t.Helper(); exchange(t, a, b) }

	trusting := func(c *tls.Config) *tls.Config { c.VerifyConnection = nil; return c }
	for name, c := range map[string]struct {
		tls      *tls.Config
		is       error // as the listener sees it
		says     string
		dialIs   error
		dialSays string
	}{
		"no certificate": {tls: &tls.Config{InsecureSkipVerify: true}, is: ErrUnauthenticated,
			says: "didn't provide a certificate", dialIs: ErrUnauthenticated,
			dialSays: "certificate required"},
		"another CA": {tls: trusting(otherCA.identity("hosta").Client("hostb")),
			is: ErrUnauthenticated, says: "unknown authority", dialIs: ErrUnauthenticated,
			dialSays: "unknown certificate authority"},
		"itself its CA": {tls: selfSigned(t), is: ErrUnauthenticated, says: "unknown authority",
			dialIs: ErrUnauthenticated},
		"expired": {tls: forged(t, ca.dir,
			func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
			is: ErrUnauthenticated, says: "expired", dialIs: ErrUnauthenticated,
			dialSays: "expired certificate"},
		"not yet valid": {tls: forged(t, ca.dir,
			func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }),
			is: ErrUnauthenticated, says: "not yet valid", dialIs: ErrUnauthenticated},
		"for servers only": {tls: forged(t, ca.dir,
			func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }),
			is: ErrUnauthenticated, says: "incompatible key usage", dialIs: ErrUnauthenticated},
		"no name": {tls: forged(t, ca.dir, func(c *x509.Certificate) { c.DNSNames = nil }),
			is: ErrUnauthenticated, says: "no DNS name", dialIs: ErrPeer, dialSays: "no answer"},
		"wildcard": {tls: forged(t, ca.dir,
			func(c *x509.Certificate) { c.DNSNames = []string{"*.org"} }),
			is: ErrUnauthenticated, says: "is no name for a host", dialIs: ErrPeer,
			dialSays: "no answer"},
		"not allowed": {tls: ca.identity("hostx").Client("hostb"), is: ErrUnauthorised,
			says: "hostx may not evict", dialIs: ErrRefused,
			dialSays: "hostx may not evict to this host"},
		"not whom it looks for": {tls: hostA.Client("hostc"), is: ErrUnauthenticated,
			says: "bad certificate", dialIs: ErrUnauthenticated,
			dialSays: `who answers is not "hostc"`},
		"does not trust this CA": {tls: otherCA.identity("hosta").Client("hostb"),
			is: ErrUnauthenticated, says: "bad certificate", dialIs: ErrUnauthenticated,
			dialSays: "not from the CA in our ca.pem"},
		"plain": {is: ErrPeer, says: "no TLS, which this link needs", dialIs: ErrPeer,
			dialSays: "TLS or plain"},
	} {
		s, err := Dialer{Addr: addr, TLS: c.tls}.Session(t.Context())
		if !errors.Is(err, c.dialIs) || s != nil || !strings.Contains(err.Error(), c.dialSays) {
			t.Errorf("%s: dialling: %v; want %q in %v", name, err, c.dialSays, c.dialIs)
		}
		why.expect(t, name, c.is, c.says)
		good()
	}

	old := trusting(hostA.Client("hostb"))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if err := tls.Client(connect(t, addr, nil), old).Handshake(); err == nil ||
		!strings.Contains(err.Error(), "protocol version not supported") {
		t.Errorf("TLS 1.2: %v", err)
	}
	why.expect(t, "TLS 1.2", ErrUnauthenticated, "unsupported versions")
	ends(t, connect(t, addr, []byte("GET / HTTP/1.1\r\n\r\n")), "a browser")
	why.expect(t, "a browser", ErrPeer, "no TLS")
	ends(t, connect(t, addr, append([]byte{22, 3, 1, 0, 200}, make([]byte, 200)...)),
		"garbage like TLS")
	why.expect(t, "garbage like TLS", ErrUnauthenticated, "tls:")
	ends(t, connect(t, addr, []byte{22, 3, 1}), "who is slow")
	why.expect(t, "who is slow", ErrTooSlow, "TLS")

	// Inside TLS, by a host of the same CA.
	inside := func(who string, say []byte) *tls.Conn {
		t.Helper()
		c := tls.Client(connect(t, addr, nil), ca.identity(who).Client("hostb"))
		if _, err := c.Write(say); err != nil {
			t.Fatal(err)
		}
		return c
	}
	if b, err := io.ReadAll(inside("hosta", bytes.Repeat([]byte("garbage "), 100))); len(b) > 0 {
		t.Errorf("garbage was answered %q, %v", b, err)
	}
	why.expect(t, "garbage in TLS", ErrPeer, `"hosta": the peer does not speak`)
	// A hello that hostc overheard gets it into no session but one of its own.
	replay := appendHello(nil, Push, a.ID)
	answered, _ := io.ReadAll(inside("hosta", replay))
	if len(answered) < answerHead || answered[len(mark)+2] != 1 {
		t.Errorf("a replay was answered %q", answered)
	}
	why.expect(t, "a replay", ErrTaken, "push lane")
	alien := inside("hostc", replay)
	if _, err := io.ReadFull(alien, make([]byte, answerHead+8)); err != nil {
		t.Error(err)
	}
	good()
	why.expect(t, "half a session of hostc", ErrTooSlow, "did not come")

	// Garbage under a lane that stands ends that lane, and no other session.
	c, d := meet(t, l, Dialer{Addr: addr, TLS: hostA.Client("hostb")})
	if err := unix.Send(c.Lane(Push).sock.fd, []byte("garbage, and no record of TLS"),
		0); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.Lane(Push).Read(nil, 100); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("garbage reads as %v", err)
	}
	good()
}

func selfSigned(t testing.TB) *tls.Config {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"hosta"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(nil, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	// and it shows its certificate though nobody asks for such
	return &tls.Config{InsecureSkipVerify: true, ServerName: "hostb",
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		}}
}

// The other way round: TLS to a plain listener.
func TestTLSToPlain(t *testing.T) {
	why := make(reasons, 10)
	_, addr := server(t, ListenOptions{TurnedAway: why.note})
	_, err := Dialer{Addr: addr,
		TLS: newAuthority(t).identity("hosta").Client("hostb")}.Session(t.Context())
	if !errors.Is(err, ErrPeer) ||
		!strings.Contains(err.Error(), "does it listen for plain links?") {
		t.Error(err)
	}
	why.expect(t, "TLS", ErrPeer, `it said "\x16\x03`)
}

// Those who connect and never finish hold up nobody, however many there are.
func TestFlood(t *testing.T) {
	ca := newAuthority(t)
	var mu sync.Mutex
	count := map[error]int{}
	l, addr := server(t, ListenOptions{TLS: ca.identity("hostb").Server(), Pending: 20,
		PendingPerSource: 10, TurnedAway: func(_ string, err error) {
			mu.Lock()
			defer mu.Unlock()
			for _, is := range []error{ErrTooMany, ErrTooSlow, ErrPeer} {
				if errors.Is(err, is) {
					count[is]++
				}
			}
		}})
	const all = 300
	for i := range all {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%5))}}
		c, err := d.DialContext(t.Context(), "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.Write([]byte{22, 3, 1}[:i%4])
	}
	a, b := meet(t, l, Dialer{Addr: addr, TLS: ca.identity("hosta").Client("hostb")})
	exchange(t, a, b)
	l.mu.Lock()
	if n := len(l.pending); n > 20 {
		t.Errorf("%d are pending", n)
	}
	l.mu.Unlock()
	l.Close()
	mu.Lock()
	defer mu.Unlock()
	if count[ErrTooMany] < all-20 || count[ErrTooMany] > all {
		t.Errorf("turned away: %v", count)
	}
	exchange(t, a, b) // an accepted session outlives the listener
}

// Many sessions come about at the same time, and each has its own lanes.
func TestManySessions(t *testing.T) {
	ca := newAuthority(t)
	l, addr := server(t, ListenOptions{TLS: ca.identity("hostb").Server()})
	const n = 8
	host := ca.identity("hosta")
	var tasks sync.WaitGroup
	ours := make([]*Session, n)
	for i := range n {
		tasks.Go(func() {
			s, err := Dialer{Addr: addr, TLS: host.Client("hostb")}.Session(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(s.Close)
			ours[i] = s
		})
	}
	theirs := map[[16]byte]*Session{}
	for range n {
		s, err := l.Accept(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		theirs[s.ID] = s
	}
	tasks.Wait()
	for _, s := range ours {
		if s == nil || theirs[s.ID] == nil {
			t.Fatalf("%d of %d sessions", len(theirs), n)
		}
		exchange(t, s, theirs[s.ID])
	}
	for _, s := range theirs {
		s.Close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.sessions) != 0 {
		t.Errorf("%d sessions are remembered after their end", len(l.sessions))
	}
}

// Certificates are replaced under a listener and a dialler that stay.
func TestRotation(t *testing.T) {
	ca := newAuthority(t)
	dirs := map[string]string{"hosta": t.TempDir(), "hostb": t.TempDir()}
	ids := map[string]*certs.Identity{}
	for name, dir := range dirs {
		if err := certs.Issue(ca.dir, name, dir, 1, false); err != nil {
			t.Fatal(err)
		}
		var err error
		if ids[name], err = certs.Load(dir, func(err error) { t.Error(err) }); err != nil {
			t.Fatal(err)
		}
	}
	l, addr := server(t, ListenOptions{TLS: ids["hostb"].Server()})
	d := Dialer{Addr: addr, TLS: ids["hosta"].Client("hostb")}
	a, b := meet(t, l, d)
	for name, dir := range dirs {
		if err := certs.Issue(ca.dir, name, dir, 2, true); err != nil {
			t.Fatal(err)
		}
	}
	c, e := meet(t, l, d)
	exchange(t, a, b)
	exchange(t, c, e)
	state := c.Lane(Push).s.(*secret).conn.ConnectionState()
	block, _ := pem.Decode(must(os.ReadFile(filepath.Join(dirs["hostb"], "host.pem"))))
	if !bytes.Equal(state.PeerCertificates[0].Raw, block.Bytes) {
		t.Error("the listener shows the certificate of before")
	}
	if state.Version != tls.VersionTLS13 || state.DidResume {
		t.Errorf("%+v", state)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// A dead address does not keep who redials waiting.
func TestDeadAddress(t *testing.T) {
	if testing.Short() {
		t.Skip("short: waits for seconds")
	}
	begun := time.Now()
	stuck := func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	_, err := Dialer{Addr: "192.0.2.1:1", Dial: stuck}.Session(t.Context())
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) < dialTimeout {
		t.Errorf("%v after %v", err, time.Since(begun))
	}
}

// A lane's options are set, and can be set on IPv4, IPv6, and IPv4 over a socket of IPv6.
func TestOptions(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "[::1]:0", ":0"} {
		ln, err := net.Listen("tcp", listen)
		if err != nil {
			t.Log(err) // no IPv6 here
			continue
		}
		l := NewListener(ln, ListenOptions{})
		t.Cleanup(func() { l.Close() })
		addr := ln.Addr().String()
		if listen == ":0" {
			addr = fmt.Sprintf("127.0.0.1:%d", ln.Addr().(*net.TCPAddr).Port)
		}
		a, b := meet(t, l, Dialer{Addr: addr})
		for _, s := range []*Session{a, b} {
			c := s.Lane(Push)
			if err := c.Background(); err != nil {
				t.Error(listen, err)
			}
			level, name := unix.IPPROTO_IP, unix.IP_TOS
			if listen == "[::1]:0" {
				level, name = unix.IPPROTO_IPV6, unix.IPV6_TCLASS
			}
			for _, o := range []struct{ level, name, want int }{{level, name, 4},
				{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 3000},
				{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1}, {unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}} {
				if v, err := unix.GetsockoptInt(c.sock.fd, o.level, o.name); err != nil ||
					v != o.want {
					t.Errorf("%s: option %d/%d is %d, %v", listen, o.level, o.name, v, err)
				}
			}
		}
	}
}

// Nothing stays behind: no descriptor, whatever came and went.
func TestDescriptors(t *testing.T) {
	ca := newAuthority(t)
	idA, idB := ca.identity("hosta"), ca.identity("hostb")
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	round := func() {
		ln := listen(t)
		l := NewListener(ln, ListenOptions{TLS: idB.Server()})
		addr := ln.Addr().String()
		connect(t, addr, []byte("GET /")).Close()
		halfway := connect(t, addr, nil)
		a, err := Dialer{Addr: addr, TLS: idA.Client("hostb")}.Session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (Dialer{Addr: addr, TLS: idA.Client("hostc")}).Session(t.Context()); err ==
			nil {
			t.Fatal("a session with another host")
		}
		l.Close() // with a session that nobody accepted
		if _, _, err := a.Lane(Control).Read(nil, 1); err == nil {
			t.Fatal("a frame that nobody sent")
		}
		a.Close()
		halfway.Close()
	}
	round()
	before := count()
	for range 5 {
		round()
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// Frames of all sizes pass through records of TLS, cut anywhere, as does a change of keys that the
// peer asks for.
func TestRecords(t *testing.T) {
	a, b := securePair(t)
	w, r := a.Lane(Push), b.Lane(Push)
	var tasks sync.WaitGroup
	sizes := []int{0, 1, 11, 12, recordSize - frameHead - 1, recordSize - frameHead,
		recordSize - frameHead + 1, recordSize, 3*recordSize + 5, receiveSize, writeSize,
		writeSize + 1, 1 << 20}
	tasks.Go(func() {
		for i, n := range sizes {
			b := bytes.Repeat([]byte{byte(i + 1)}, n)
			var parts [][]byte
			for k := 1; len(b) > 0; k = k*3 + 1 {
				parts = append(parts, b[:min(k, len(b))])
				b = b[min(k, len(b)):]
			}
			if err := w.Write(uint8(i), parts...); err != nil {
				t.Error(err)
			}
		}
	})
	for i, n := range sizes {
		kind, p, err := r.Read(nil, 1<<20)
		if err != nil || kind != uint8(i) || !bytes.Equal(p, bytes.Repeat([]byte{byte(i + 1)}, n)) {
			t.Fatalf("frame of %d bytes: %d, %d bytes, %v", n, kind, len(p), err)
		}
	}
	tasks.Wait()
	a.Close()
	if _, _, err := r.Read(nil, 10); !errors.Is(err, io.EOF) {
		t.Errorf("the end reads as %v", err)
	}
}

// Package host is the daemon of one host. It evicts VMs to other hosts and takes theirs, several at
// once. After its own death it goes on with the evictions that were under way.
//
//	operators ── API ──► Host ──► evict.Source      ── link ──► other hosts
//	                     │  ▲
//	                 journal └─── evict.Destination ◄── link ── other hosts
//
// Each eviction has an entry in the journal on both hosts, under one ID. An engine of package evict
// works on it. When the daemon starts, each entry that has not ended gets an engine again.
// docs/protocol.md says which marks an entry goes through, and what follows from each after a
// failure.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/link"
	"vacate/internal/link/certs"
	"vacate/internal/sys/room"

	"golang.org/x/net/netutil"
)

// Host is the daemon. Its methods may be called by several goroutines.
type Host struct {
	config   Config
	version  string
	log      *slog.Logger
	identity *certs.Identity // nil on a plain link
	journal  *journal.Journal
	metrics  *metrics
	paths    map[string]*evict.Path // to each peer, for the evictions that share it
	started  time.Time
	link     net.Listener // nil: no VM comes here
	socket   net.Listener
	tcp      net.Listener    // the API over TLS, or nil
	scrape   net.Listener    // /metrics, or nil
	carries  []carryListener // for libvirt's own migrations, to each peer

	// onState, of tests, is told of each state of each engine, which waits for it.
	onState func(journal.Role, journal.ID, evict.State)

	life  context.Context // of all engines; ends with evict.ErrLeave
	leave context.CancelCauseFunc
	tasks sync.WaitGroup

	mu        sync.Mutex
	evictions map[journal.ID]*eviction // guarded by mu
	relays    map[string]int           // streams of domains that are relayed; guarded by mu
	lines     map[int]*line            // of processes that connected to carries; guarded by mu
	kept      map[string]net.Conn      // to twins whose migration libvirt resumes; guarded by mu
	taken     map[string]bool          // VMs that an eviction is being set up for; guarded by mu
	stopping  bool                     // guarded by mu

	known   map[string]knownQEMU   // QEMUs of VMs, which may have ended since; guarded by mu
	ahead   map[string]lookedAhead // of VMs; guarded by mu
	verdict string                 // of the guard; guarded by mu

	fleet    *fleetMember // nil: this host belongs to none
	promised room.Ledger  // memory of this host, to VMs that are coming
}

// Open gets a host ready: it takes hold of the journal and listens, but does not touch a VM yet.
// version is told to those who ask.
func Open(c Config, version string, log *slog.Logger) (_ *Host, err error) {
	h := &Host{
		config: c, version: version, log: log, started: time.Now(),
		evictions: map[journal.ID]*eviction{}, taken: map[string]bool{},
		relays: map[string]int{}, lines: map[int]*line{}, kept: map[string]net.Conn{},
		paths: map[string]*evict.Path{},
		known: map[string]knownQEMU{}, ahead: map[string]lookedAhead{},
	}
	for name, p := range c.Peers {
		h.paths[name] = evict.NewPath(int64(p.Rate) * bytesPerMbit)
	}
	h.life, h.leave = context.WithCancelCause(context.Background())
	h.metrics = newMetrics(h)
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if !c.Plain {
		problem := func(err error) {
			log.Error("the new certificate files cannot be used; the old ones stay in use", "error",
				err)
		}
		if h.identity, err = certs.Load(c.Certs, problem); err != nil {
			return nil,
				fmt.Errorf("%w: certificates are made by vacate certs; plain = true is for a "+
					"link that nobody else reaches", err)
		}
		if _, ok := c.Peers[h.identity.Name()]; ok {
			return nil, selfPeer(h.identity.Name())
		}
	}
	if h.journal, err = journal.Open(c.Journal); err != nil {
		return nil, err
	}
	if c.Fleet != nil {
		if h.fleet, err = h.openFleet(); err != nil {
			return nil, err
		}
	}
	if h.socket, err = listenUnix(c.Socket, c.Group); err != nil {
		return nil, err
	}
	for _, l := range []struct {
		addr string
		ln   *net.Listener
	}{{c.Listen, &h.link}, {c.API.Listen, &h.tcp}, {c.Metrics, &h.scrape}} {
		if l.addr == "" {
			continue
		}
		if *l.ln, err = net.Listen("tcp", l.addr); err != nil {
			return nil, err
		}
	}
	if err := h.listenCarry(); err != nil {
		return nil, err
	}
	for _, ln := range []*net.Listener{&h.tcp, &h.scrape} {
		if *ln != nil {
			*ln = netutil.LimitListener(*ln, maxConnections)
		}
	}
	return h, nil
}

// maxConnections bounds those to each of the API's TCP port and the one for metrics. Further ones
// wait: one that does not get through TLS, or asks nothing, ends after requestTime.
const maxConnections = 256

// requestTime is how long a client of the API may take for the handshake of TLS, and for the head
// of a request.
const requestTime = 10 * time.Second

// idleTime is how long a connection to the API may stay that asks nothing.
const idleTime = time.Minute

const bytesPerMbit = 1_000_000 / 8

// listenUnix listens on a socket for this user, and a group unless that is empty. A socket that
// nobody listens on is replaced.
func listenUnix(path, group string) (net.Listener, error) {
	gid, err := groupID(group)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil { // #nosec G301 -- as /run has it; the socket in it is for one user
		return nil, err
	}
	there, err := ownSocket(path)
	if err != nil {
		return nil, err
	}
	if there {
		// The journal's lock was taken before: a socket that answers is of another configuration.
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil,
				fmt.Errorf("socket = %q: another daemon answers there: end it, or name another "+
					"path", path)
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	l, err := net.Listen("unix", path)
	if err != nil || group == "" {
		return l, err
	}
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660)); err != nil { // #nosec G302 -- as was asked for
		l.Close()
		return nil, fmt.Errorf("socket_group = %q: %w", group, err)
	}
	return l, nil
}

// groupID is the number of a group; -1 of none.
func groupID(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return -1, fmt.Errorf("socket_group = %q: there is no such group: addgroup --system %[1]s",
			name)
	}
	return strconv.Atoi(g.Gid)
}

// ownSocket reports whether the socket of a daemon of ours is at path, live or dead. It fails if
// anything else is there, as that is not ours to remove.
func ownSocket(path string) (bool, error) {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	// A daemon makes its socket for its own user, and one group at most.
	st, ok := info.Sys().(*syscall.Stat_t)
	if info.Mode().Type() != fs.ModeSocket || info.Mode().Perm()&0o017 != 0 || !ok ||
		int(st.Uid) != os.Geteuid() {
		return false,
			fmt.Errorf(
				"socket = %q: something else than a socket of vacated is there (%v): it was not "+
					"touched. "+
					"Name a path that nothing else uses", path, info.Mode())
	}
	return true, nil
}

// name is this host's.
func (h *Host) name() string {
	if h.identity == nil {
		return h.config.Name
	}
	return h.identity.Name()
}

// stopTime is how long evictions that can still be aborted may take to be, when the daemon stops.
const stopTime = 60 * time.Second

// Run takes up what an earlier daemon has left, and serves until ctx is done. Then it stops:
// evictions that were not committed are aborted, all others are left for the next daemon, with
// their VMs running or frozen as they are.
func (h *Host) Run(ctx context.Context) error {
	defer h.close()
	h.recover()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var servers sync.WaitGroup
	var open []*http.Server
	serve := func(ln net.Listener, handler http.Handler, secure bool) {
		if ln == nil {
			return
		}
		s := &http.Server{Handler: handler, ReadHeaderTimeout: requestTime, IdleTimeout: idleTime,
			MaxHeaderBytes: 64 << 10,
			ErrorLog:       slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
			Protocols:      protocols(),
			BaseContext:    func(net.Listener) context.Context { return ctx },
			ConnContext:    withAsker}
		if secure {
			// Who is refused is a matter for this host's operators.
			s.ErrorLog = slog.NewLogLogger(h.log.With("port", "api").Handler(), slog.LevelWarn)
			s.TLSConfig = h.operators()
		}
		open = append(open, s)
		servers.Go(func() {
			err := error(nil)
			if secure {
				err = s.ServeTLS(ln, "", "")
			} else {
				err = s.Serve(ln)
			}
			if !errors.Is(err, http.ErrServerClosed) {
				fail(err)
			}
		})
	}
	api := h.handler()
	serve(h.socket, api, false)
	serve(h.tcp, api, true)
	serve(h.scrape, h.metrics.handler(), false)
	stopLink := h.serveLink(ctx, fail)
	stopCarries := h.serveCarries()
	var guard sync.WaitGroup
	if h.config.Guard != nil {
		guard.Go(func() { h.guard(ctx) })
	}
	if h.fleet != nil {
		guard.Go(func() { h.fleet.run(ctx) })
	}
	if h.config.Libvirt != nil {
		h.tasks.Go(h.askEarly)
	}
	if !hypervisor.Scoped() {
		h.log.Info("no systemd runs here: VMs that this daemon starts share its control group, " +
			"its weight and its limits")
	}
	h.log.Info("serving", "host", h.name(), "listen", addrOf(h.link), "socket", h.config.Socket,
		"api", addrOf(h.tcp), "metrics", addrOf(h.scrape))
	<-ctx.Done()
	guard.Wait()

	h.log.Info("stopping")
	h.mu.Lock()
	h.stopping = true
	h.mu.Unlock()
	stopCarries()
	h.leave(evict.ErrLeave)
	left := make(chan struct{})
	go func() {
		h.tasks.Wait()
		close(left)
	}()
	select {
	case <-left:
	case <-time.After(stopTime):
		h.log.Warn("some evictions do not stop yet: waiting for them")
		<-left
	}
	stopLink()
	for _, s := range open {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if s.Shutdown(ctx) != nil {
			s.Close()
		}
		cancel()
	}
	servers.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// Settle lets no eviction begin any more, and returns when a stop would abort none of those under
// way. The caller can then end Run without an abort: the next daemon goes on with the evictions.
func (h *Host) Settle(ctx context.Context) error {
	h.mu.Lock()
	h.stopping = true
	h.mu.Unlock()
	for !h.settled() {
		select {
		case <-time.After(settlePause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// settlePause is how often evictions under way are looked at.
const settlePause = 50 * time.Millisecond

// settled reports whether a stop would abort no eviction.
func (h *Host) settled() bool {
	h.mu.Lock()
	setUp := len(h.taken) > 0
	h.mu.Unlock()
	return !setUp && !slices.ContainsFunc(h.list(), (*eviction).unsettled)
}

// protocols are those of the API: gRPC needs HTTP/2.
func protocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	return p
}

func addrOf(ln net.Listener) string {
	if ln == nil {
		return ""
	}
	return ln.Addr().String()
}

func (h *Host) close() {
	for _, ln := range []net.Listener{h.link, h.socket, h.tcp, h.scrape} {
		if ln != nil {
			ln.Close()
		}
	}
	for _, ln := range h.carries {
		ln.Close()
	}
	if h.journal != nil {
		h.journal.Close()
	}
}

// serveLink takes sessions of other hosts until what it returns is called.
func (h *Host) serveLink(ctx context.Context, fail func(error)) (stop func()) {
	if h.link == nil {
		return func() {}
	}
	o := link.ListenOptions{Allow: h.allow, TurnedAway: h.turnedAway}
	if h.identity != nil {
		o.TLS = h.identity.Server()
	}
	sessions := link.NewListener(h.link, o)
	// Beyond ctx, as engines that stop may still be asked.
	taking, done := context.WithCancel(context.WithoutCancel(ctx))
	requests, wait := evict.Requests(taking, sessions.Accept, h.turnedAway, fail)
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			select {
			case r := <-requests:
				tasks.Go(func() { h.request(r) })
			case <-taking.Done():
				return
			}
		}
	})
	return func() {
		done()
		wait()
		tasks.Wait()
		sessions.Close()
	}
}

// allow decides who may speak at all: hosts that are configured. What each may ask is decided by
// request.
func (h *Host) allow(peer string) error {
	if h.identity == nil {
		return nil // known by its address, which only the session has
	}
	if _, ok := h.config.Peers[peer]; !ok {
		return fmt.Errorf("host %q is no peer of this one", peer)
	}
	return nil
}

func (h *Host) turnedAway(from string, err error) {
	reason := "peer"
	for _, r := range []struct {
		err    error
		reason string
	}{
		{link.ErrUnauthenticated, "unauthenticated"}, {link.ErrUnauthorised, "unauthorised"},
		{link.ErrTooSlow, "too slow"},
		{link.ErrTooMany, "too many"}, {link.ErrVersion, "version"}, {link.ErrTaken, "replayed"},
	} {
		if errors.Is(err, r.err) {
			reason = r.reason
		}
	}
	h.metrics.refused.WithLabelValues(reason).Inc()
	h.log.Warn("peer turned away", "from", from, "reason", reason, "error", err)
}

// dialer makes sessions with a peer.
func (h *Host) dialer(peer string) (link.Dialer, error) {
	p, ok := h.config.Peers[peer]
	if !ok {
		return link.Dialer{}, fmt.Errorf("host %q is no peer of this one: %s", peer,
			h.config.peerNames())
	}
	if p.Address == "" {
		return link.Dialer{}, fmt.Errorf("host %q has no address: nothing can be sent there", peer)
	}
	d := link.Dialer{Addr: p.Address, Host: peer}
	if h.identity != nil {
		d.TLS = h.identity.Client(peer)
	}
	return d, nil
}

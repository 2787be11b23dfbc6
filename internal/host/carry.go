package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// Managers that move a domain by libvirt alone name a socket for the stream of the migration. With
// libvirt.migrations set, that socket is this daemon's at the source: DIR/PEER.sock. The twin at
// the destination listens at the same path there, and this daemon's counterpart connects to it.

// errCarried is why a daemon does not go on with a migration that it carried.
var errCarried = errors.New(
	"the daemon ended while it carried libvirt's own migration. Where the " +
		"domain runs is libvirt's to say: `virsh domstate --reason`. Where that says \"post-copy " +
		"failed\", the same `virsh migrate` with --postcopy-resume goes on with it")

// carrySocket is where the stream of a migration to a host passes, on both hosts.
func (l Libvirt) carrySocket(to string) string { return filepath.Join(l.Migrations, to+".sock") }

// listenCarry listens for the QEMUs of migrations to each peer.
func (h *Host) listenCarry() error {
	if !h.config.Libvirt.carries() {
		return nil
	}
	dir := h.config.Libvirt.Migrations
	err := os.MkdirAll(dir, 0o755) // #nosec G301 -- as /run has it
	if err == nil {
		// QEMUs of other users make sockets there, as in /tmp, and only who made one can remove it.
		err = os.Chmod(dir, 0o777|os.ModeSticky) // #nosec G302 -- as was said
	}
	if err != nil {
		return fmt.Errorf("libvirt.migrations: %w", err)
	}
	for peer, p := range h.config.Peers {
		if p.Address == "" {
			continue
		}
		path := h.config.Libvirt.carrySocket(peer)
		info, err := os.Lstat(path)
		if err == nil && info.Mode().Type() != fs.ModeSocket {
			return fmt.Errorf("libvirt.migrations: %s is no socket: remove it", path)
		} else if err == nil {
			err = os.Remove(path) // of a daemon that died: the journal's lock was taken before
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("libvirt.migrations: %w", err)
		}
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return fmt.Errorf("libvirt.migrations: %w", err)
		}
		h.carries = append(h.carries, carryListener{ln, peer})
		if err := os.Chmod(path, 0o666); err != nil { // #nosec G302 -- only a domain's QEMU is heard
			return fmt.Errorf("libvirt.migrations: %w", err)
		}
	}
	return nil
}

// carryListener is where QEMUs connect to whose domains libvirt moves to a peer.
type carryListener struct {
	*net.UnixListener
	peer string
}

// acceptPause is how long a listener is left alone that could take no connection.
const acceptPause = 100 * time.Millisecond

// serveCarries takes streams of migrations until what it returns is called.
func (h *Host) serveCarries() (stop func()) {
	var all sync.WaitGroup
	for _, ln := range h.carries {
		all.Go(func() {
			for {
				conn, err := ln.AcceptUnix()
				if errors.Is(err, net.ErrClosed) {
					return
				} else if err != nil { // out of descriptors, say: that may pass
					h.log.Error("cannot take a connection for libvirt's migration", "to", ln.peer,
						"error", err)
					time.Sleep(acceptPause)
					continue
				}
				cred, err := process.PeerOf(conn)
				if err != nil {
					conn.Close()
					continue
				}
				l, first := h.line(int(cred.Pid))
				h.tasks.Go(func() {
					if err := h.carry(ln.peer, conn, cred, l, first); err != nil {
						conn.Close()
						h.log.Error("libvirt's migration is not carried", "to", ln.peer, "error",
							err)
					}
				})
			}
		})
	}
	return func() {
		for _, ln := range h.carries {
			ln.Close()
		}
		all.Wait()
	}
}

// A line has all connections that one process makes for one migration. QEMU may make several. The
// first says what the others are for, and is the only one that sends by itself.
type line struct {
	known chan struct{} // closed when it is known what they are for
	// set before known is closed, and nil if the others have nothing to do with the first
	more func(conn *net.UnixConn) error
	once sync.Once
}

// line returns what the connections of a process are for, and whether this is the first one.
func (h *Host) line(pid int) (l *line, first bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if l := h.lines[pid]; l != nil {
		return l, false
	}
	l = &line{known: make(chan struct{})}
	h.lines[pid] = l
	return l, true
}

// is notes what further connections are for.
func (l *line) is(more func(*net.UnixConn) error) {
	l.once.Do(func() {
		l.more = more
		close(l.known)
	})
}

// hangUp forgets a line whose first connection has ended.
func (h *Host) hangUp(pid int, l *line) {
	h.mu.Lock()
	if h.lines[pid] == l {
		delete(h.lines, pid)
	}
	h.mu.Unlock()
	l.is(nil)
}

// carry takes a connection of a process, the first one of a line or another, by which libvirt moves
// a domain to a peer. The connection is taken over unless there is an error.
func (h *Host) carry(peer string, conn *net.UnixConn, cred *unix.Ucred, l *line,
	first bool) error {
	if first {
		return h.carryFirst(peer, conn, cred, l)
	}
	select {
	case <-l.known:
	case <-h.life.Done():
		return context.Cause(h.life)
	}
	if l.more != nil {
		return l.more(conn)
	}
	return h.carryAgain(peer, conn, cred) // it was libvirt that connected, or the first has ended
}

// carryAgain takes a connection that has nothing to do with the one before.
func (h *Host) carryAgain(peer string, conn *net.UnixConn, cred *unix.Ucred) error {
	l, first := h.line(int(cred.Pid))
	return h.carry(peer, conn, cred, l, first)
}

// helloTime is how long a QEMU may take to begin its stream.
const helloTime = 30 * time.Second

// carryFirst is carry for the first connection of a line.
func (h *Host) carryFirst(peer string, conn *net.UnixConn, cred *unix.Ucred,
	l *line) (err error) {
	pid := int(cred.Pid)
	hangUp := func() { h.hangUp(pid, l) }
	defer func() {
		if err != nil {
			hangUp()
		}
	}()
	ctx, cancel := context.WithTimeout(h.life, helloTime)
	defer cancel()
	domains, err := h.domains(ctx)
	if err != nil {
		return err
	}
	// QEMU has made the connection, or got it from libvirt.
	own := slices.IndexFunc(domains, func(d qemuOf) bool { return d.qemu.PID == pid })
	if own < 0 && cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf(
			"process %d of user %d connected, which is neither libvirt nor a domain's "+
				"QEMU", cred.Pid, cred.Uid)
	}
	conn.SetReadDeadline(time.Now().Add(helloTime))
	stop := context.AfterFunc(h.life, func() { conn.Close() })
	first, stream, err := begin(conn)
	stop()
	if err != nil {
		return fmt.Errorf("a QEMU connected, and sends nothing: %w", err)
	}
	conn.SetReadDeadline(time.Time{})
	if own < 0 {
		hangUp() // libvirt connects for other domains as well
		own = slices.IndexFunc(domains, func(d qemuOf) bool {
			return h.mayMove(d, peer, first == resumes)
		})
	}
	if own < 0 {
		return fmt.Errorf("no domain's QEMU has the connection that process %d made", cred.Pid)
	}
	d := domains[own]
	switch first {
	case resumes:
		defer hangUp()
		return h.resume(d.Name, peer, stream, l)
	case several:
		// The first of them is refused. QEMU 7.2 takes no other migration once one of these has
		// ended before that.
		hangUp()
		h.drain(conn)
		return nil
	}
	if err := known(first); err != nil {
		return fmt.Errorf("domain %s: %w", d.Name, err)
	}
	stream.over = hangUp
	if err := h.carryAway(d.Domain, d.qemu, peer, stream); err != nil {
		return err
	}
	l.is(func(conn *net.UnixConn) error {
		if hungUp(stream.UnixConn) {
			// libvirt resumes a migration that has failed, which the engine is about to notice.
			h.settle(d.Name)
			return h.carryAgain(peer, conn, cred)
		}
		// With postcopy-preempt this is for pages that QEMU is asked for. It is asked for none.
		h.drain(conn)
		return nil
	})
	return nil
}

// mayMove reports whether a domain's QEMU has a connection to a peer's socket that nobody serves
// yet.
func (h *Host) mayMove(d qemuOf, peer string, resuming bool) bool {
	if !resuming && h.carrying(d.Name) != nil || h.relaying(d.Name) {
		return false
	}
	is, err := d.qemu.Connected(h.config.Libvirt.carrySocket(peer))
	if err != nil {
		h.log.Debug("cannot tell whose migration it is", "domain", d.Name, "error", err)
	}
	return is
}

// resume passes a stream on by which libvirt resumes a migration.
func (h *Host) resume(domain, peer string, stream net.Conn, l *line) error {
	h.settle(domain)
	return h.relay(domain, peer, stream, func() {
		// With postcopy-preempt QEMU makes one more, for pages that it is asked for.
		l.is(func(conn *net.UnixConn) error { return h.relay(domain, peer, conn, nil) })
	})
}

// hungUp reports whether the other side has closed a connection from which nothing is read.
func hungUp(conn *net.UnixConn) (is bool) {
	raw, err := conn.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} // #nosec G115 -- a descriptor
			_, err := unix.Poll(fds, 0)
			is = err == nil && fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP) != 0
		})
	}
	return is || err != nil // closed here
}

// drain drops what comes by a connection, until QEMU closes it.
func (h *Host) drain(conn *net.UnixConn) {
	stop := context.AfterFunc(h.life, func() { conn.Close() })
	defer stop()
	n, err := io.Copy(io.Discard, conn)
	conn.Close()
	h.log.Debug("dropped what came by a second connection", "bytes", n, "error", err)
}

// qemuOf is a domain that is active, and its QEMU.
type qemuOf struct {
	libvirt.Domain
	qemu process.Process
}

// domains are those of this host's libvirt that are active.
func (h *Host) domains(ctx context.Context) (active []qemuOf, err error) {
	l, err := libvirt.Dial(ctx, h.config.Libvirt.uri())
	if err != nil {
		return nil, err
	}
	defer l.Close()
	all, err := l.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, d := range all {
		if d.ID < 0 {
			continue
		}
		if p, err := l.Process(d); err == nil { // else it ends, or is about to begin
			active = append(active, qemuOf{d, p})
		}
	}
	return active, nil
}

// carrying is the migration from here of a domain that an engine carries, or nil.
func (h *Host) carrying(domain string) *eviction {
	v := h.openFor(domain)
	if v == nil {
		return nil
	}
	if r := v.entry.Record(); !r.Carried || r.Role != journal.Source {
		return nil
	}
	return v
}

// settle waits until no engine carries the migration of a domain. It has failed, which the engine
// is about to notice.
func (h *Host) settle(domain string) {
	v := h.carrying(domain)
	if v == nil {
		return
	}
	_, idle := v.engine()
	select {
	case <-idle:
	case <-h.life.Done():
	}
}

// resumes is how a stream begins by which QEMU resumes a post-copy: a command that asks which pages
// are there.
var resumes = [4]byte{8, 0, 10, 0}

// several is how a connection begins that is one of several of a migration.
var several = [4]byte{0x11, 0x22, 0x33, 0x44}

// begin reads how a stream begins. What it returns has that still to be read.
func begin(conn *net.UnixConn) (first [4]byte, _ *begunConn, err error) {
	_, err = io.ReadFull(conn, first[:])
	return first, &begunConn{UnixConn: conn,
		r: io.MultiReader(bytes.NewReader(first[:]), conn)}, err
}

// relaying reports whether a stream of a domain is relayed.
func (h *Host) relaying(domain string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.relays[domain] > 0
}

// relay passes the stream by which libvirt resumes a migration on to a peer, and back. It calls
// taken, if it is not nil, as soon as the twin there has it.
func (h *Host) relay(domain, peer string, stream net.Conn, taken func()) error {
	count := func(n int) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.relays[domain] += n
	}
	count(1)
	defer count(-1)
	d, err := h.dialer(peer)
	if err != nil {
		return err
	}
	s, err := d.Session(h.life)
	if err != nil {
		return err
	}
	h.log.Info("relaying libvirt's recovery of its migration", "vm", domain, "to", peer)
	err = evict.Relay(h.life, s, domain, stream, taken)
	h.log.Info("the relayed stream has ended", "vm", domain, "to", peer, "error", err)
	return nil
}

// relayed passes the stream by which libvirt resumes a migration on to the twin here, and back.
func (h *Host) relayed(r *evict.Request, peer string) error {
	if err := h.config.mayCome(peer, h.name()); err != nil {
		return err
	}
	if !h.config.Libvirt.carries() {
		return errNoMigrations
	}
	conn := h.takeKept(r.VM)
	if conn == nil {
		ctx, cancel := context.WithTimeout(h.life, helloTime)
		defer cancel()
		_, dial, err := h.waitingTwin(ctx, r.VM)
		if err == nil {
			conn, err = dial(ctx)
		}
		if err != nil {
			return fmt.Errorf("connect to the QEMU of the domain %.40q: %w", r.VM, err)
		}
	}
	h.log.Info("taking libvirt's recovery of its migration", "vm", r.VM, "peer", peer)
	err := r.Relay(h.life, conn)
	h.log.Info("the relayed stream has ended", "vm", r.VM, "peer", peer, "error", err)
	return nil
}

// errNotListening is the error for a QEMU that does not wait for a stream.
var errNotListening = errors.New("it does not listen")

// fixedRecovery is the version of QEMU, as libvirt writes it, from which on a twin survives a
// stream that breaks before the migration was resumed.
const fixedRecovery = 8_002_000

// waitingTwin is the QEMU of a domain here, and how to connect to it.
func (h *Host) waitingTwin(ctx context.Context, vm string) (qemu process.Process,
	dial func(context.Context) (net.Conn, error), err error) {
	l, err := libvirt.Dial(ctx, h.config.Libvirt.uri())
	if err != nil {
		return qemu, nil, err
	}
	defer l.Close()
	d, err := l.Find(ctx, vm)
	if err != nil {
		return qemu, nil, err
	}
	if qemu, err = l.Process(d); err != nil {
		return qemu, nil, err
	}
	version, err := l.QEMUVersion(ctx)
	path := h.config.Libvirt.carrySocket(h.name())
	return qemu, func(ctx context.Context) (net.Conn, error) {
		// Another QEMU must not take the connection for that of its own migration.
		if is, err := qemu.Listens(filepath.Base(path)); err != nil || !is {
			return nil, errors.Join(errNotListening, err)
		}
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err == nil && version < fixedRecovery {
			conn = evict.Resuming(conn)
		}
		return conn, err
	}, err
}

// expectResume has the twin of a migration to here that has failed kept ready.
func (v *eviction) expectResume() {
	v.host.tasks.Go(func() { v.host.keepReady(v.entry.Record().VM) })
}

// keepReady connects to a twin as soon as libvirt has it listen to resume a migration that was
// carried to here. libvirt before 11.1 looks at once whether the twin has a stream. If it has none
// yet, libvirt reports a failure, though the migration goes on a moment later.
func (h *Host) keepReady(vm string) {
	ctx, cancel := context.WithCancel(h.life)
	defer cancel()
	changed, err := watchDirectory(ctx, h.config.Libvirt.Migrations)
	var qemu process.Process
	var dial func(context.Context) (net.Conn, error)
	if err == nil {
		qemu, dial, err = h.waitingTwin(ctx, vm)
	}
	if errors.Is(err, libvirt.ErrNoDomain) {
		return
	} else if err != nil {
		h.log.Warn("cannot notice when libvirt resumes a migration to here: it may report a "+
			"failure, though the migration goes on", "vm", vm, "error", err)
		return
	}
	h.tasks.Go(func() {
		if qemu.Wait(ctx) == nil {
			cancel()
		}
	})
	var ready net.Conn
	defer func() { h.dropKept(vm, ready) }()
	for range changed {
		conn, err := dial(ctx)
		for try := 0; errors.Is(err, errNotListening) && try < listenTries; try++ {
			time.Sleep(listenPause) // it is about to, or it is another QEMU's
			conn, err = dial(ctx)
		}
		if err != nil {
			h.log.Debug("the twin does not wait", "vm", vm, "error", err)
			continue
		}
		h.log.Info("libvirt resumes a migration to here", "vm", vm)
		h.dropKept(vm, ready)
		h.mu.Lock()
		h.kept[vm] = conn
		h.mu.Unlock()
		ready = conn
		time.AfterFunc(helloTime, func() { h.dropKept(vm, conn) })
	}
}

// A QEMU's socket is there a moment before it listens.
const (
	listenTries = 5
	listenPause = 2 * time.Millisecond
)

// takeKept returns the connection that keepReady made, or nil.
func (h *Host) takeKept(vm string) net.Conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	conn := h.kept[vm]
	delete(h.kept, vm)
	return conn
}

// dropKept closes a connection that nobody took; nil: none.
func (h *Host) dropKept(vm string, conn net.Conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if conn != nil && h.kept[vm] == conn {
		delete(h.kept, vm)
		conn.Close()
	}
}

// watchDirectory returns a channel that gets something when a file was made in a directory. It is
// closed when ctx has ended.
func watchDirectory(ctx context.Context, dir string) (<-chan struct{}, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	f := os.NewFile(uintptr(fd), "changes in "+dir) // #nosec G115 -- a descriptor
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		f.Close()
		return nil, os.NewSyscallError("inotify_add_watch", err)
	}
	context.AfterFunc(ctx, func() { f.Close() })
	changed := make(chan struct{}, 1)
	go func() {
		defer close(changed)
		for b := make([]byte, 4<<10); ; {
			if _, err := f.Read(b); err != nil {
				return
			}
			select {
			case changed <- struct{}{}:
			default:
			}
		}
	}()
	return changed, nil
}

var errNoMigrations = errors.New(
	"libvirt moves the domain, and [libvirt] in vacated.toml there has " +
		"no migrations: add it")

// known returns an error if a stream begins as none that can be carried.
func known(first [4]byte) error {
	switch {
	case string(first[:]) == "QEVM":
		return nil
	case first[0] == 0x16 && first[1] == 3:
		return errors.New(
			"the stream has TLS of QEMU's own, within which nobody can put pages in " +
				"order: leave --tls out, as the link between the daemons is encrypted")
	}
	return fmt.Errorf("the stream begins with % x, as none of QEMU's does", first)
}

// begunConn is a connection from which something was read.
type begunConn struct {
	*net.UnixConn
	r    io.Reader
	over func() // called when it is closed; may be nil
}

func (c *begunConn) Read(b []byte) (int, error) { return c.r.Read(b) }

func (c *begunConn) Close() error {
	if c.over != nil {
		c.over()
	}
	return c.UnixConn.Close()
}

// carryAway has an engine carry a migration from here.
func (h *Host) carryAway(d libvirt.Domain, qemu process.Process, peer string,
	stream net.Conn) error {
	if err := hypervisor.CheckName(d.Name); err != nil {
		return err
	}
	release, err := h.takeSoon(h.life, d.Name)
	if err != nil {
		return err
	}
	defer release()
	h.leaveHuge(d.Name)
	entry, err := h.journal.Create(journal.Record{ID: journal.NewID(), Role: journal.Source,
		VM: d.Name, Peer: peer, PeerAddr: h.config.Peers[peer].Address,
		Libvirt: h.config.Libvirt.uri(), Carried: true, PID: qemu.PID, StartTime: qemu.StartTime,
		Mark: string(evict.MarkBegun)})
	if err != nil {
		return err
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log.Info("carrying libvirt's migration", "eviction", entry.ID(), "vm", d.Name, "to", peer)
	v.start(false, func(ctx context.Context, resumed bool) (any, error) {
		if resumed {
			return nil, errCarried
		}
		s, err := v.source()
		if err != nil {
			stream.Close()
			return nil, &evict.Error{Outcome: evict.ErrRefused, State: evict.Preparing, Err: err}
		}
		// The journal is not the engine's: no other engine can go on.
		s.Libvirt, s.Journal, s.LoadTimeout = nil, nil, maxLoadTimeout
		s.Carried = &evict.Carried{URI: v.entry.Record().Libvirt, Domain: d.Name, Stream: stream}
		return s.Evict(ctx)
	}, v.carriedAway)
	return nil
}

// carriedAway notes the end of a migration from here.
func (v *eviction) carriedAway(report json.RawMessage, err error) {
	if err == nil || errors.Is(err, evict.ErrRefused) || errors.Is(err, evict.ErrAborted) {
		v.sent(report, err)
		return
	}
	v.finish(evict.MarkLost, evict.Lost, err, report)
}

// offeredCarried takes a domain that libvirt moves here.
func (h *Host) offeredCarried(r *evict.Request, peer string) error {
	c := h.config.Libvirt
	if !c.carries() {
		return errNoMigrations
	}
	release, err := h.reserve(r, peer)
	if err != nil {
		return err
	}
	defer release()
	entry, err := h.journal.Create(journal.Record{ID: r.Eviction, Role: journal.Destination,
		VM: r.VM, Peer: peer, PeerAddr: r.Session.Peer(), Libvirt: c.uri(), Carried: true,
		Mark: string(evict.MarkAccepted)})
	if err != nil {
		return err
	}
	v := h.newEviction(entry)
	h.add(v)
	h.log.Info("taking libvirt's migration", "eviction", entry.ID(), "vm", r.VM, "peer", peer)
	v.requests <- r
	v.start(false, func(ctx context.Context, resumed bool) (any, error) {
		if resumed {
			return nil, errCarried
		}
		d := v.destination()
		d.Libvirt, d.Journal, d.Started = nil, nil, nil
		d.Carried = &evict.Carried{URI: c.uri(), Dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.carrySocket(h.name()))
		}}
		return d.Receive(ctx, v.requests)
	}, v.carriedHere)
	return nil
}

// carriedHere notes the end of a migration to here.
func (v *eviction) carriedHere(report json.RawMessage, err error) {
	switch {
	case err == nil:
		v.taken(report, nil)
	case errors.Is(err, evict.ErrRefused):
		v.finish(evict.MarkNeverRan, evict.Aborted, err, nil)
	case errors.Is(err, evict.ErrAborted): // libvirt may have run the domain all the same
		v.expectResume()
		v.finish(evict.MarkNeverRan, evict.Aborted, err, nil)
	default:
		v.expectResume()
		v.finish(evict.MarkLost, evict.Lost, err, nil)
	}
}

// dropCarried ends a migration that another daemon carried. Its end has closed the stream here.
func (v *eviction) dropCarried() {
	r := v.entry.Record()
	if r.Role == journal.Destination {
		v.expectResume()
	}
	v.finish(evict.MarkLost, evict.Lost, errCarried, nil)
	if r.Role == journal.Source {
		v.host.tasks.Go(func() { v.giveUpThere(r.At) })
	}
}

// giveUpThere has the peer end a migration from here that was carried until then, unless it has
// lost patience by itself.
func (v *eviction) giveUpThere(then time.Time) {
	for {
		s, err := v.source()
		if err == nil {
			err = s.GiveUp(v.host.life)
		}
		if err == nil || time.Since(then) > evict.CarriedPatience {
			return
		}
		select {
		case <-time.After(retryPause):
		case <-v.host.life.Done():
			return
		}
	}
}

// giveUp ends a migration to here whose source does not carry it any more.
func (v *eviction) giveUp(r *evict.Request) {
	if err := v.stop(v.host.life); err != nil {
		r.Refuse(err)
		return
	}
	if !v.ended() {
		v.expectResume()
		v.finish(evict.MarkLost, evict.Lost, fmt.Errorf("host %s: %w", v.entry.Record().Peer,
			errCarried), nil)
	}
	r.Answer(evict.AnswerLost, v.describe(), false, nil)
}

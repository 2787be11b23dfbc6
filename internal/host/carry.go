package host

import (
	"bytes"
	"context"
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
	"vacate/internal/qemu/libvirt"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// Managers that move a domain by libvirt alone name a socket for the stream of the migration. With
// libvirt.migrations set, that socket is this daemon's at the source: DIR/PEER.sock. The twin at
// the destination listens at the same path there, and this daemon's counterpart connects to it.

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
		all.Go(func() { h.acceptCarries(ln) })
	}
	return func() {
		for _, ln := range h.carries {
			ln.Close()
		}
		all.Wait()
	}
}

// acceptCarries takes those to one peer until the listener is closed.
func (h *Host) acceptCarries(ln carryListener) {
	for {
		conn, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // out of descriptors, say: that may pass
			h.log.Error("cannot take a connection for libvirt's migration", "to", ln.peer, "error",
				err)
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
				h.log.Error("libvirt's migration is not carried", "to", ln.peer, "error", err)
			}
		})
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
		if evict.HungUp(stream) {
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

package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"vacate/internal/evict"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// resume passes a stream on by which libvirt resumes a migration.
func (h *Host) resume(domain, peer string, stream net.Conn, l *line) error {
	h.settle(domain)
	return h.relay(domain, peer, stream, func() {
		// With postcopy-preempt QEMU makes one more, for pages that it is asked for.
		l.is(func(conn *net.UnixConn) error { return h.relay(domain, peer, conn, nil) })
	})
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

// expectResume keeps the twin of a migration to here that has failed ready.
func (v *eviction) expectResume() {
	v.host.tasks.Go(func() { v.host.keepReady(v.entry.Record().VM) })
}

// keepReady connects to a twin as soon as it listens, for libvirt, to resume a migration that was
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

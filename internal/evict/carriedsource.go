package evict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
	"time"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/libvirt"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// Carried says that libvirt moves the domain by itself, and that the engines carry the stream of
// that migration. Who may run the domain is then decided by the two libvirts, as always. The
// engines run nothing, stop nothing and end nothing. They make the source's QEMU go to post-copy at
// once. From then on it stands, and they send its memory as they do in an eviction. What it sends
// itself is dropped. It is told that all went well when the twin has said so.
type Carried struct {
	URI    string // of this host's libvirt; empty: qemu:///system
	Domain string // its name
	// Stream is what QEMU at the source has connected to. Nothing of it has been read. It has a
	// descriptor (syscall.Conn).
	Stream net.Conn
	// Dial, at the destination, connects to the twin, which listens. Each call makes a connection.
	Dial func(context.Context) (net.Conn, error)
}

// carriedOffer is what the destination needs to know about a domain that libvirt moves.
type carriedOffer struct {
	Name string       `json:"name"`
	UUID libvirt.UUID `json:"uuid"`
	// Totals is the size to which each block of memory may grow, in their order.
	Totals []uint64 `json:"totals"`
	// Preempt: the twin waits for a second connection, for pages that it asks for.
	Preempt bool `json:"preempt,omitempty"`
}

// carriedSource is a domain that libvirt itself moves. Its QEMU sends the stream of the migration.
type carriedSource struct {
	libvirtSource
	stream net.Conn
	coming carriedStream // what QEMU sends in it
	early  bool          // QEMU may be told of success before it has sent all
}

func newCarriedSource(s Source) *carriedSource {
	with := s
	with.Journal = nil
	with.Libvirt = &Libvirt{URI: s.Carried.URI, Domain: s.Carried.Domain}
	return &carriedSource{libvirtSource: *newLibvirtSource(with), stream: s.Carried.Stream,
		coming: carriedStream{r: migstream.NewReader(s.Carried.Stream),
			answer: func(v uint32) error {
				_, err := s.Carried.Stream.Write(migstream.Message{Type: migstream.MsgPong,
					Value: v}.Append(nil))
				return err
			}}}
}

// lookTime is how often the engine looks whether QEMU has ended its stream.
const lookTime = time.Second

// errGivenUp: QEMU's own migration has failed.
var errGivenUp = errors.New("QEMU's own migration has failed")

// ended watches QEMU's stream, from which nothing is read. That libvirt says "post-copy failed" is
// not enough. It says so where it has lost its own connection to the other host, and QEMU goes on.
// libvirt takes notice when QEMU is done.
func (o *carriedSource) ended(ctx context.Context) error {
	for {
		select {
		case <-time.After(lookTime):
		case <-ctx.Done():
			return nil
		}
		if !HungUp(o.stream) {
			continue
		}
		s, err := o.conn.State(ctx, o.domain)
		if err == nil && s.State == libvirt.Paused && s.Reason == libvirt.PausedPostcopyFailed {
			return errGivenUp
		}
	}
}

// HungUp reports whether the other side has closed a connection from which nothing is read.
func HungUp(conn net.Conn) (is bool) {
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}} // #nosec G115 -- a descriptor
			_, err := unix.Poll(fds, 0)
			is = err == nil && fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP) != 0
		})
	}
	return is || err != nil // closed here
}

// unfitCapabilities are those of a migration whose stream cannot be carried, with what to do.
var unfitCapabilities = map[string]string{
	"multifd":        "leave --parallel out",
	"xbzrle":         "leave --compressed out",
	"compress":       "leave --compressed out",
	"zero-copy-send": "leave --zerocopy out",
}

// newest is the last version of QEMU whose post-copy begins as the engine knows it.
var newest = qmp.Version{Major: 10, Minor: 1}

func (o *carriedSource) describe(ctx context.Context) (d described, err error) {
	v := o.q.Version()
	if err := recent(v); err != nil {
		return d, err
	}
	if v.AtLeast(newest.Major, newest.Minor+1) {
		return d, fmt.Errorf("QEMU %v begins post-copy in another way than QEMU up to %d.%d, and "+
			"its migration cannot be carried: leave --migrateuri out, or `vacate evict %s`", v,
			newest.Major, newest.Minor, o.domain.Name)
	}
	caps, err := o.q.QueryMigrationCapabilities(ctx)
	if err != nil {
		return d, err
	}
	// QEMU 7.2 takes no other migration if one ends before all of its connections are made. They
	// are when the head has come.
	bounded := o.until(ctx)
	err = o.coming.head()
	bounded()
	for name, remedy := range unfitCapabilities {
		if caps[name] {
			return d, fmt.Errorf("the migration has QEMU's capability %s, and cannot be carried: "+
				"run `virsh migrate` again, and %s", name, remedy)
		}
	}
	if err != nil {
		return d, errors.Join(err, ctx.Err())
	}
	if d.status, err = o.q.QueryStatus(ctx); err != nil {
		return d, err
	}
	if d.flash, err = writableFlash(ctx, o.q); err != nil {
		return d, err
	}
	if d.mem, err = guestmem.Attach(ctx, o.q); err != nil {
		return d, err
	}
	same := slices.EqualFunc(o.coming.blocks, d.mem.Blocks(),
		func(a migstream.Block, b guestmem.Block) bool {
			return a.Name == b.Name && a.Length == b.Size && a.PageSize == b.PageSize
		})
	if !same {
		return d, errors.New("the VM's memory is not what its QEMU sends")
	}
	if caps["switchover-ack"] {
		if _, err := o.stream.Write(migstream.Message{Type: migstream.MsgSwitchoverAck}.
			Append(nil)); err != nil {
			return d, err
		}
	}
	o.early = v.AtLeast(8, 2)
	d.section = o.coming.r.SectionID() // of what QEMU sends when libvirt resumes the migration
	d.offer.QEMU, d.offer.Machine = v.String(), o.coming.machine
	offer := &carriedOffer{Name: o.domain.Name, UUID: o.domain.UUID,
		Preempt: caps["postcopy-preempt"]}
	for _, b := range d.mem.Blocks() {
		offer.Totals = append(offer.Totals, b.Total)
	}
	d.offer.Carried = offer
	return d, nil
}

// until bounds what is read of the stream.
func (o *carriedSource) until(ctx context.Context) (done func()) {
	stop := context.AfterFunc(ctx, func() { o.stream.SetReadDeadline(time.Unix(1, 0)) })
	return func() {
		if !stop() {
			o.stream.SetReadDeadline(time.Time{})
		}
	}
}

func (o *carriedSource) arm(context.Context, *guestmem.Memory) error { return nil }

// freeze makes QEMU go to post-copy, and reads its stream up to the state of the devices. libvirt
// has told QEMU before anything is read, so that QEMU cannot come to the end without it.
func (o *carriedSource) freeze(ctx context.Context, _ bool) (s saved, err error) {
	events, err := o.watch(ctx)
	if err != nil {
		return s, err
	}
	defer events.Close()
	s.was = qmp.Status{Running: true, Status: "running"}
	if err := o.conn.StartPostcopy(ctx, o.domain); err != nil {
		return s, err
	}
	defer o.until(ctx)()
	if s.load, err = o.coming.load(); err != nil {
		return s, errors.Join(err, ctx.Err())
	}
	for name, at, ok := events.next(); ok; name, at, ok = events.next() {
		if name == "STOP" {
			s.at = at
		}
	}
	return s, nil
}

// hold does nothing: QEMU in post-copy refuses to run its guest.
func (o *carriedSource) hold(context.Context, process.Process) error { return nil }

func (o *carriedSource) disarm(context.Context) error { return nil }

func (o *carriedSource) release(context.Context) error { return o.stream.Close() }

// resume ends the stream. What follows is decided by libvirt.
func (o *carriedSource) resume(ctx context.Context, _ bool, _ string) (now qmp.Status, err error) {
	o.stream.Close()
	for {
		s, err := o.conn.State(ctx, o.domain)
		switch {
		case err != nil:
			return now, err
		case s.State == libvirt.Running:
			return qmp.Status{Running: true, Status: "running"}, nil
		case s.State == libvirt.Paused && s.Reason == libvirt.PausedPostcopyFailed:
			return now, fmt.Errorf("libvirt says %q", s)
		}
		select {
		case <-time.After(firstPause):
		case <-ctx.Done():
			return now, fmt.Errorf("libvirt says %q: %w", s, context.Cause(ctx))
		}
	}
}

// silentTime is how long QEMU may send nothing while the rest of its stream is read.
const silentTime = time.Minute

// discard tells QEMU that all went well, and drops what it still sends. libvirt ends it: it may do
// so before all was read.
func (o *carriedSource) discard(ctx context.Context, qemu process.Process) error {
	err := o.drop()
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), quitTime) // the rest took long
	defer cancel()
	if qemu.Wait(ctx) == nil {
		return nil
	}
	return err
}

// drop reads the stream to its end. From QEMU 8.2 on it first says that all went well. Such a QEMU
// would run the guest if the stream broke between its end and that word. Older ones never do, and
// would take the word for the end of the connection.
func (o *carriedSource) drop() error {
	success := migstream.Message{Type: migstream.MsgShut}.Append(nil)
	if o.early {
		if _, err := o.stream.Write(success); err != nil {
			return err
		}
	}
	err := o.coming.rest(func() { o.stream.SetReadDeadline(time.Now().Add(silentTime)) })
	if err != nil {
		return err
	}
	if !o.early {
		if _, err := o.stream.Write(success); err != nil {
			return err
		}
	}
	_, err = io.Copy(io.Discard, o.stream) // until QEMU has taken it
	return err
}

func (o *carriedSource) ownRemedy() string { return carriedRemedy(o.Domain) }

// carriedRemedy says what an operator does about a migration that was not carried to its end.
func carriedRemedy(domain string) string {
	return fmt.Sprintf("libvirt decides about the domain: `virsh domstate --reason %s` on both "+
		"hosts. Where that says \"post-copy failed\", the same `virsh migrate` with "+
		"--postcopy-resume goes on", domain)
}

func (o *carriedSource) close() {
	o.stream.Close()
	o.libvirtSource.close()
}

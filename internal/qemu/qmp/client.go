// Package qmp speaks the QEMU Machine Protocol to a running QEMU over a unix
// socket, as specified in docs/interop/qmp-spec.txt of QEMU 7.2; tried with 7.2
// and 10.0. Messages are JSON objects, one a line, in both directions:
//
//	S: {"QMP": {"version": {…}, "capabilities": ["oob"]}}       greeting
//	C: {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}
//	S: {"return": {}, "id": 1}
//	C: {"execute": "query-status", "id": 2}
//	S: {"event": "STOP", "timestamp": {…}}                      at any time
//	S: {"return": {"status": "paused", …}, "id": 2}
//	C: {"exec-oob": "migrate-pause", "id": 3}                   out of band
//	S: {"error": {"class": "GenericError", "desc": "…"}, "id": 3}
//
// A monitor serves one client at a time; the next one connects but hears
// nothing until the first has gone ([ErrBusy]). A command of the first that is
// under way then is answered to the next one.
//
// In-band commands run one after another on QEMU's main loop, which can stall
// (on a missing page of the guest, for example). Out-of-band commands pass
// them. QEMU stops reading the monitor, out-of-band commands included, once
// eight in-band commands wait (QMP_REQ_QUEUE_LEN_MAX), so a Client never has
// more than four under way; further calls wait for their turn.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

const (
	maxLine       = 16 << 20 // of a reply; the longest in practice is HMP output
	maxGreeting   = 64 << 10
	maxInFlight   = 4
	greetingLimit = 5 * time.Second // where the context sets no earlier one
)

var (
	// ErrClosed means that a command could not be sent, or that its reply cannot come any more, as
	// the connection has ended: by Close, by QEMU's exit, or by a message that breaks the protocol.
	// Whether QEMU carried the command out is then unknown.
	ErrClosed = errors.New("QMP connection closed")

	// ErrBusy is wrapped by Dial's error when the monitor accepts the
	// connection but stays silent.
	ErrBusy = errors.New("monitor is silent")

	// ErrStopped is wrapped by Dial's error when QEMU's process is stopped, so that it answers
	// nobody.
	ErrStopped = errors.New("QEMU's process is stopped")

	// ErrNotQMP is wrapped by Dial's error when something else than a QMP
	// server answers.
	ErrNotQMP = errors.New("not a QMP monitor")

	// ErrCommandNotFound matches (errors.Is) an *Error of that class: this
	// QEMU is too old, too new or built without the command.
	ErrCommandNotFound = errors.New("command not found in this QEMU")

	// ErrNoOOB is returned for out-of-band commands where the monitor does not
	// offer them (a monitor on anything but a socket, or one in mux mode).
	ErrNoOOB = errors.New("this monitor has no out-of-band commands: give QEMU one with -qmp " +
		"unix:PATH,server=on,wait=off")
)

// An Error is QEMU's refusal of a command.
type Error struct {
	Command string
	Class   string // "GenericError", "CommandNotFound", "DeviceNotFound"…
	Desc    string // for humans; it may change between versions
}

func (e *Error) Error() string { return fmt.Sprintf("qemu refused %s: %s", e.Command, e.Desc) }

// Is reports a match with ErrCommandNotFound.
func (e *Error) Is(target error) bool {
	return target == ErrCommandNotFound && e.Class == "CommandNotFound"
}

// Version is QEMU's own version. Package names the distributor's build and may be empty.
type Version struct {
	Major, Minor, Micro int
	Package             string
}

// AtLeast reports whether v is major.minor or later.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// An Event is an asynchronous message. Data is nil where the event has none.
type Event struct {
	Name string // "STOP", "MIGRATION"…
	Data json.RawMessage
	Time time.Time // of QEMU's clock; zero if it has none
}

// A Subscription delivers events on C in order, from the moment of Subscribe
// until Close of either the subscription or the client, which close C.
// When C is full, newer events are dropped and counted.
type Subscription struct {
	C       <-chan Event
	c       chan Event
	client  *Client
	dropped atomic.Uint64
}

// Dropped returns how many events the reader was too slow for.
func (s *Subscription) Dropped() uint64 { return s.dropped.Load() }

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() { s.client.unsubscribe(s) }

// A Client is one connection to a QMP monitor. Its methods may be called
// concurrently.
type Client struct {
	conn    *net.UnixConn
	in      *input // of conn
	version Version
	pid     int
	oob     bool

	// holds one token while a line is written and, if a descriptor is with it, until its reply
	writing        chan struct{}
	inBand, outBnd chan struct{} // one token per command under way, abandoned ones included
	done           chan struct{} // closed when the reader has ended

	mu     sync.Mutex // guards what follows
	lastID uint64
	// how many replies to an earlier client's commands may come; 0 once one of its own came
	stale   int
	pending map[uint64]*call // commands without a reply yet, abandoned ones included
	subs    []*Subscription
	err     error // why the connection ended
}

// A call is a command under way.
type call struct {
	reply chan *message // capacity 1: the reader never waits
	slot  chan struct{}
	alone bool   // nothing else is sent until its reply
	sent  func() // lets others write; may be called more than once
}

// Dial connects to the monitor at the given socket path, reads its greeting
// and enables out-of-band commands where they are offered. It gives up after
// five seconds or at the end of ctx, whichever is earlier; afterwards ctx has
// no effect on the client.
func Dial(ctx context.Context, path string) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, greetingLimit)
	defer cancel()
	c, err := dial(ctx, path)
	for try := 1; try < maxSessions && mixed(err); try++ {
		c, err = dial(ctx, path)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to QMP monitor %s: %w", path, err)
	}
	return c, nil
}

// maxSessions is how often Dial begins. Each time QEMU has less left of earlier sessions.
const maxSessions = 4

var errGreetedAgain = errors.New("second greeting")

// mixed reports whether QEMU goes on with an earlier client's session in this one. One that was too
// busy for that client may carry out its qmp_capabilities now, and refuse ours. Or it greets it
// now, when it has greeted us. In another session it does not.
func mixed(err error) bool {
	return errors.Is(err, ErrCommandNotFound) || errors.Is(err, errGreetedAgain)
}

// NewClient is Dial for a connection that is there: one that somebody made who speaks for QEMU,
// such as package libvirt. So PeerPID is the process that runs the virtual CPUs. It closes conn
// after an error.
func NewClient(ctx context.Context, conn *net.UnixConn) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, greetingLimit)
	defer cancel()
	c, err := handshake(ctx, conn, uint64(time.Now().UnixMicro()))
	if err != nil {
		return nil, fmt.Errorf("begin with a QMP monitor: %w", err)
	}
	if c.pid, _, err = c.Process(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// queuePause is how long to wait while the queue of clients is full.
const queuePause = 50 * time.Millisecond

func dial(ctx context.Context, path string) (*Client, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unix", path)
	for errors.Is(err, syscall.EAGAIN) { // a full queue of waiting clients
		if pid := stoppedBehind(path); pid > 0 {
			return nil, stoppedError(pid)
		}
		// Some of them may have given up, and most only look, and leave.
		select {
		case <-time.After(queuePause):
			nc, err = new(net.Dialer).DialContext(ctx, "unix", path)
			continue
		case <-ctx.Done():
		}
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, busy()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil,
			fmt.Errorf("%w: no such socket: check the path, and that QEMU runs with -qmp "+
				"unix:PATH,server=on,wait=off", fs.ErrNotExist)
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil,
			fmt.Errorf("%w: nothing listens there: QEMU has exited and left its socket behind, "+
				"or the file is no socket", syscall.ECONNREFUSED)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w: run as root or as the user that owns the socket",
			fs.ErrPermission)
	case err != nil:
		return nil, err
	}
	return handshake(ctx, nc.(*net.UnixConn), uint64(time.Now().UnixMicro()))
}

// handshake makes a client of a fresh connection, or closes it. The ids of its commands count up
// from first, which differs from client to client. So a late answer to the client before is not
// taken for an answer to this one.
func handshake(ctx context.Context, conn *net.UnixConn, first uint64) (*Client, error) {
	peer, err := process.PeerOf(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	pid := int(peer.Pid)
	if stopped(pid) {
		conn.Close()
		return nil, stoppedError(pid)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
	in := &input{conn: conn}
	r := bufio.NewReaderSize(in, 64<<10)
	g, err := readGreeting(r)
	if !stop() { // the deadline is, or is being, set; the connection is of no more use
		conn.Close()
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err()
		}
		return nil, busy()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	v := g.Version
	c := &Client{
		conn:    conn,
		in:      in,
		version: Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package},
		pid:     pid,
		oob:     slices.Contains(g.Capabilities, "oob"),
		writing: make(chan struct{}, 1),
		inBand:  make(chan struct{}, maxInFlight),
		outBnd:  make(chan struct{}, maxInFlight),
		done:    make(chan struct{}),
		lastID:  first - 1,
		stale:   maxEarly,
		pending: make(map[uint64]*call),
	}
	enable := []string{}
	if c.oob {
		enable = append(enable, "oob")
	}
	negotiation := c.Begin(ctx, "qmp_capabilities", map[string]any{"enable": enable})
	go c.read(r) // now that it knows which reply is awaited
	if err := negotiation.Reply(ctx, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func busy() error {
	return fmt.Errorf("%w: another client probably holds it (libvirt, a management tool, "+
		"another eviction), as it serves one at a time: end that client, or give QEMU one more "+
		"monitor with -qmp unix:PATH,server=on,wait=off; or else QEMU is stopped or stuck", ErrBusy)
}

// maxEarly is how many messages may come ahead of the greeting, and how many replies to an earlier
// client's commands behind it. QEMU 11.1 sends an event that happens just as a client connects. And
// a QEMU that was too busy to answer until its client gave up answers to the next one.
const maxEarly = 16

func readGreeting(r *bufio.Reader) (*greeting, error) {
	for early := 0; ; early++ {
		line, err := readLine(r, maxGreeting)
		switch {
		case errors.Is(err, errLongLine):
			return nil, fmt.Errorf("%w: greeting of more than %d bytes", ErrNotQMP, maxGreeting)
		case err != nil && len(line) > 0:
			return nil, fmt.Errorf("%w: it said %s: %w", ErrNotQMP, excerpt(line), err)
		case err != nil:
			return nil, fmt.Errorf("%w: no greeting: %w", ErrNotQMP, err)
		case bytes.HasPrefix(line, []byte("QEMU ")):
			return nil,
				fmt.Errorf("%w: this is a human monitor: give QEMU a machine monitor with -qmp "+
					"unix:PATH,server=on,wait=off", ErrNotQMP)
		}
		m, err := parseMessage(line)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotQMP, err)
		}
		if m.QMP != nil {
			return m.QMP, nil
		}
		if early == maxEarly {
			return nil, fmt.Errorf("%w: it began without a greeting: %s", ErrNotQMP, excerpt(line))
		}
	}
}

func stoppedError(pid int) error {
	return fmt.Errorf(
		"%w (process %d): an eviction has frozen its VM, or somebody sent it SIGSTOP. `vacate "+
			"status` says which. Do not let it go on before you know where the VM runs", ErrStopped,
		pid)
}

// stoppedBehind returns the process that is stopped and was told on its command line to make a
// monitor's socket; 0 if there is none. Whose socket it is, the socket does not tell before it has
// room for a client.
func stoppedBehind(path string) int {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return 0
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || !stopped(pid) {
			continue
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && (bytes.Contains(line, []byte("unix:"+path+",")) ||
			bytes.Contains(line, []byte("path="+path+","))) {
			return pid
		}
	}
	return 0
}

// stopped reports whether a process is known to be stopped.
func stopped(pid int) bool {
	p, err := process.Find(pid)
	if err != nil {
		return false
	}
	is, err := p.Stopped()
	return err == nil && is
}

// Version returns the version that QEMU greeted with.
func (c *Client) Version() Version { return c.version }

// PeerPID returns the process that made the monitor's socket listen, in our
// PID namespace: QEMU itself, unless a manager such as libvirt opened the
// socket and handed it over. It is 0 for a process outside our namespace.
func (c *Client) PeerPID() int { return c.pid }

// Run executes a command in band and decodes its result into reply, a pointer, or drops it where
// reply is nil. It returns an *Error when QEMU refuses, an error wrapping ErrClosed when the
// connection is gone, and ctx's error when that ends first. QEMU may then still carry the command
// out, and its late reply is dropped.
func (c *Client) Run(ctx context.Context, cmd string, args, reply any) error {
	return c.run(ctx, request{Execute: cmd, Arguments: args}, reply, -1)
}

// A Pending is a command that was sent.
type Pending struct {
	client *Client
	name   string
	call   *call
	err    error // it could not be sent
}

// Begin is the first half of Run: it returns when the command was sent. QEMU carries out a client's
// commands in the order in which they were sent, with nothing of that client's in between.
func (c *Client) Begin(ctx context.Context, cmd string, args any) *Pending {
	call, err := c.send(ctx, request{Execute: cmd, Arguments: args}, c.inBand, -1)
	return &Pending{c, cmd, call, err}
}

// Reply is the second half of Run. Call it once.
func (p *Pending) Reply(ctx context.Context, reply any) error {
	if p.err != nil {
		return fmt.Errorf("run %s: %w", p.name, p.err)
	}
	m, err := p.client.await(ctx, p.call)
	return result(p.name, m, err, reply)
}

// RunFD is Run that also passes a descriptor (SCM_RIGHTS), as getfd and
// add-fd need. The caller keeps, and should close, its own copy.
//
// It sends other commands before that or when QEMU has replied, never meanwhile. A monitor with
// out-of-band commands has a thread of its own. With all that it reads, that thread looks through
// the descriptors, without a lock against the main loop that takes them. QEMU may crash over that
// (seen with 7.2.22: chardev/char-socket.c, tcp_chr_recv against tcp_get_msgfds).
func (c *Client) RunFD(ctx context.Context, cmd string, args, reply any, fd int) error {
	if fd < 0 {
		return fmt.Errorf("run %s: bad descriptor %d", cmd, fd)
	}
	return c.run(ctx, request{Execute: cmd, Arguments: args}, reply, fd)
}

// RunOOB is Run past the main loop. Only few commands allow it: migrate-recover,
// migrate-pause, query-yank and yank in QEMU 7.2. It returns ErrNoOOB where the monitor cannot.
func (c *Client) RunOOB(ctx context.Context, cmd string, args, reply any) error {
	if !c.oob {
		return fmt.Errorf("run %s: %w", cmd, ErrNoOOB)
	}
	return c.run(ctx, request{ExecOOB: cmd, Arguments: args}, reply, -1)
}

func (c *Client) run(ctx context.Context, req request, reply any, fd int) error {
	name, slot := req.Execute, c.inBand
	if req.ExecOOB != "" {
		name, slot = req.ExecOOB, c.outBnd
	}
	m, err := c.exchange(ctx, req, slot, fd)
	return result(name, m, err, reply)
}

// result decodes what came of a command.
func result(name string, m *message, err error, reply any) error {
	if err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	if m.Error != nil {
		return &Error{Command: name, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if err := decodeReply(m.Return, reply); err != nil {
		return fmt.Errorf("decode reply to %s: %w", name, err)
	}
	return nil
}

func (c *Client) exchange(ctx context.Context, req request, slot chan struct{},
	fd int) (*message, error) {
	p, err := c.send(ctx, req, slot, fd)
	if err != nil {
		return nil, err
	}
	return c.await(ctx, p)
}

// send writes a command.
func (c *Client) send(ctx context.Context, req request, slot chan struct{}, fd int) (*call, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case slot <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("%d earlier commands unanswered: %w", maxInFlight, ctx.Err())
	case <-c.done:
		return nil, c.closed()
	}
	p := &call{reply: make(chan *message, 1), slot: slot, alone: fd >= 0,
		sent: sync.OnceFunc(func() { <-c.writing })}
	c.mu.Lock()
	c.lastID++
	req.ID = c.lastID
	c.mu.Unlock()
	line, err := json.Marshal(req)
	if err != nil {
		<-slot
		return nil, err
	}
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		<-slot
		return nil, ctx.Err()
	case <-c.done:
		<-slot
		return nil, c.closed()
	}
	c.mu.Lock()
	c.pending[req.ID] = p
	c.mu.Unlock()
	err = c.write(ctx, append(line, '\n'), fd)
	if err != nil || !p.alone {
		p.sent()
	}
	if err != nil {
		c.mu.Lock()
		if c.pending[req.ID] == p { // else a lying server has answered already
			delete(c.pending, req.ID)
			<-slot
		}
		c.mu.Unlock()
		return nil, err
	}
	return p, nil
}

// await waits for the reply to a command that was sent.
func (c *Client) await(ctx context.Context, p *call) (*message, error) {
	select {
	case m := <-p.reply:
		return m, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("no reply: %w", ctx.Err())
	case <-c.done:
	}
	select { // the reader may have delivered it before it ended
	case m := <-p.reply:
		return m, nil
	default:
		return nil, c.closed()
	}
}

// write sends one line whole, with a descriptor unless fd is negative, and is called with the token
// of writing. An error means that nothing was sent, or that the connection was closed because a
// part of the line was.
func (c *Client) write(ctx context.Context, line []byte, fd int) error {
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetWriteDeadline(time.Now())
		close(fired)
	})
	var rights []byte
	if fd >= 0 {
		rights = unix.UnixRights(fd)
	}
	n, _, err := c.conn.WriteMsgUnix(line, rights, nil)
	for err == nil && n < len(line) { // the descriptor went with the first part
		var m int
		m, err = c.conn.Write(line[n:])
		n += m
	}
	if !stop() {
		<-fired
		c.conn.SetWriteDeadline(time.Time{})
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = ctx.Err()
		if n == 0 {
			return err
		}
	}
	if n > 0 || !errors.Is(err, syscall.EBADF) && isGone(err) {
		c.fail(fmt.Errorf("send command: %w", err))
		<-c.done
		return c.closed()
	}
	return err
}

// isGone tells a dead connection from a bad argument such as a closed descriptor.
func isGone(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, net.ErrClosed)
}

// input reads a connection, and tells when for the moment there is nothing more to be read.
type input struct {
	conn *net.UnixConn
	mu   sync.Mutex
	// guarded by mu; closed when there is nothing more; nil if nobody wants to know
	dry chan struct{}
}

func (in *input) Read(b []byte) (int, error) {
	for {
		n, err := in.conn.Read(b)
		in.mu.Lock()
		dry := in.dry
		in.mu.Unlock()
		if dry == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		// Drain has interrupted the read above, which took nothing.
		raw, err := in.conn.SyscallConn()
		if err != nil {
			return 0, err
		}
		var readErr error
		err = raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), b) })
		switch {
		case err != nil:
			return 0, err
		case readErr == unix.EAGAIN:
			in.mu.Lock()
			in.dry = nil
			in.conn.SetReadDeadline(time.Time{})
			in.mu.Unlock()
			close(dry)
		case readErr == unix.EINTR:
		case readErr != nil:
			return 0, readErr
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

// Drain returns when everything was handed on that QEMU has sent so far: what a subscription then
// has not, QEMU has not said. To know that it says nothing more, stop its process first.
func (c *Client) Drain(ctx context.Context) error {
	c.in.mu.Lock()
	if c.in.dry == nil {
		c.in.dry = make(chan struct{})
	}
	dry := c.in.dry
	c.conn.SetReadDeadline(time.Unix(1, 0))
	c.in.mu.Unlock()
	select {
	case <-dry:
		return nil
	case <-c.done:
		return c.closed()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// HMP runs a line of the human monitor and returns its output with \n line
// ends. The human monitor has no errors: an unknown command is text too.
func (c *Client) HMP(ctx context.Context, line string) (string, error) {
	var out string
	err := c.Run(ctx, "human-monitor-command", map[string]any{"command-line": line}, &out)
	return strings.ReplaceAll(out, "\r\n", "\n"), err
}

// Subscribe returns the coming events; up to n (at least one) wait unread.
func (c *Client) Subscribe(n int) *Subscription {
	ch := make(chan Event, max(n, 1))
	s := &Subscription{C: ch, c: ch, client: c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil && c.err != nil {
		close(ch)
		return s
	}
	c.subs = append(c.subs, s)
	return s
}

func (c *Client) unsubscribe(s *Subscription) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.subs, s); i >= 0 {
		c.subs = slices.Delete(c.subs, i, i+1)
		close(s.c)
	}
}

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns nil while the connection is up, then why it ended.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.closed()
	default:
		return nil
	}
}

// Close ends the connection and returns when nothing of the client runs any
// more. Commands under way return errors wrapping ErrClosed. QEMU goes on.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	<-c.done
	return nil
}

// fail records the first cause and breaks the connection, which ends the reader.
func (c *Client) fail(cause error) {
	c.mu.Lock()
	if c.err == nil {
		c.err = cause
	}
	c.mu.Unlock()
	c.conn.Close()
}

func (c *Client) closed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == net.ErrClosed {
		return ErrClosed
	}
	return fmt.Errorf("%w: %w", ErrClosed, c.err)
}

// read routes messages until the connection ends.
func (c *Client) read(r *bufio.Reader) {
	for {
		line, err := readLine(r, maxLine)
		if err == nil {
			err = c.route(line)
		}
		if err == io.EOF && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err == io.EOF {
			err = fmt.Errorf("qemu exited or dropped its monitor: %w", err)
		}
		if err != nil {
			c.fail(err)
			break
		}
	}
	c.mu.Lock()
	for _, s := range c.subs {
		close(s.c)
	}
	c.subs = nil
	c.mu.Unlock()
	close(c.done)
}

func (c *Client) route(line []byte) error {
	m, err := parseMessage(line)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case m.QMP != nil:
		return errGreetedAgain
	case m.Event != "":
		for _, s := range c.subs {
			select {
			case s.c <- Event{m.Event, m.Data, m.Timestamp.time()}:
			default:
				s.dropped.Add(1)
			}
		}
		return nil
	}
	p := c.pending[*m.ID]
	if p == nil && c.stale > 0 {
		c.stale--
		return nil
	}
	c.stale = 0
	if p == nil {
		return fmt.Errorf("reply with id %d, which no command waits for", *m.ID)
	}
	delete(c.pending, *m.ID)
	if p.alone {
		p.sent()
	}
	p.reply <- m
	<-p.slot
	return nil
}

var errLongLine = errors.New("line too long")

// readLine returns the next line without its end; with an error, what came of
// it. The result is the caller's.
func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("%w: more than %d bytes", errLongLine, limit)
		}
		line = append(line, part...)
		if err == bufio.ErrBufferFull {
			continue
		}
		return bytes.TrimRight(line, "\r\n"), err
	}
}

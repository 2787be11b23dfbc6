package libvirt

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// MonitorCommand passes one QMP command, as JSON, to a domain's QEMU and returns its reply, also as
// JSON. libvirt marks the domain as tainted (custom-monitor), which another host is not told.
func (c *Conn) MonitorCommand(ctx context.Context, d Domain, command string) (string, error) {
	return call(ctx, c, "pass a command to the QEMU of the domain "+d.Name, func() (string, error) {
		return c.l.QEMUDomainMonitorCommand(d.raw(), command, 0)
	})
}

const (
	maxCommand = 1 << 20 // of a line
	maxEvents  = 1024    // that wait for the client to read
)

// Monitor returns a connection that behaves as a QMP monitor of a domain's QEMU does: see
// [qmp.NewClient]. libvirt passes the commands on, one after the other, and the events.
//
//   - Commands that hand over a descriptor (getfd, add-fd) are refused, as the descriptor would not
//     get there. There is nothing out of band.
//   - Other clients of libvirt's, and libvirt itself, give QEMU commands in between.
//   - An event may come after the reply to a later command.
//
// It ends with ctx, with the connection to libvirt, and when the caller closes it.
//
// [qmp.NewClient]: vacate/internal/qemu/qmp
func (c *Conn) Monitor(ctx context.Context, d Domain) (*net.UnixConn, error) {
	events, err := c.Subscribe(ctx, &d, maxEvents)
	if err != nil {
		return nil, err
	}
	version, err := c.MonitorCommand(ctx, d, `{"execute":"query-version"}`)
	if err != nil {
		events.Close()
		return nil, err
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
	}
	if err := json.Unmarshal([]byte(version), &reply); err != nil || reply.Return == nil {
		events.Close()
		return nil, fmt.Errorf(
			"the QEMU of the domain %s does not tell its version: %.200q",
			d.Name,
			version,
		)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		events.Close()
		return nil, fmt.Errorf("make a monitor of the domain %s: %w", d.Name, err)
	}
	m := &monitor{c: c, d: d, conn: ours, events: events}
	go m.serve(ctx, reply.Return)
	return theirs.(*net.UnixConn), nil
}

func socketPair() (a, b net.Conn, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]net.Conn
	var errs [2]error
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "monitor")
		ends[i], errs[i] = net.FileConn(f)
		f.Close()
	}
	if err := errors.Join(errs[:]...); err != nil {
		for _, e := range ends {
			if e != nil {
				e.Close()
			}
		}
		return nil, nil, err
	}
	return ends[0], ends[1], nil
}

// monitor is the server's end.
type monitor struct {
	c      *Conn
	d      Domain
	conn   net.Conn
	events *Subscription
	write  sync.Mutex // held while a line is written
}

func (m *monitor) serve(ctx context.Context, version json.RawMessage) {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer func() {
		cancel()
		m.conn.Close()
		all.Wait()
		m.events.Close()
	}()
	all.Go(func() {
		select {
		case <-ctx.Done():
		case <-m.c.Done():
		}
		m.conn.Close()
		cancel() // a command under way
	})
	m.say(map[string]any{"QMP": map[string]any{"version": version, "capabilities": []string{}}})
	all.Go(func() {
		for {
			select {
			case ev := <-m.events.C:
				if ev.QEMU != "" {
					m.tell(ev)
				}
			case <-ctx.Done():
				return
			}
		}
	})
	lines := bufio.NewScanner(m.conn)
	lines.Buffer(make([]byte, 0, 64<<10), maxCommand)
	for lines.Scan() {
		if err := m.command(ctx, lines.Bytes()); err != nil {
			return
		}
	}
}

func (m *monitor) tell(ev Event) {
	line := map[string]any{
		"event": ev.QEMU,
		"timestamp": map[string]int64{
			"seconds":      ev.Time.Unix(),
			"microseconds": int64(ev.Time.Nanosecond()) / 1000,
		},
	}
	if ev.Data != nil {
		line["data"] = ev.Data
	}
	m.say(line)
}

func (m *monitor) say(line any) error {
	b, err := json.Marshal(line)
	if err != nil {
		return err
	}
	m.write.Lock()
	defer m.write.Unlock()
	m.conn.SetWriteDeadline(time.Now().Add(10 * time.Second)) // of a client that does not read
	_, err = m.conn.Write(append(b, '\n'))
	return err
}

// command carries out one line of the client's. An error ends the monitor.
func (m *monitor) command(ctx context.Context, line []byte) error {
	var request struct {
		Execute   string          `json:"execute,omitempty"`
		ExecOOB   string          `json:"exec-oob,omitempty"`
		Arguments json.RawMessage `json:"arguments,omitempty"`
		ID        json.RawMessage `json:"id,omitempty"`
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&request); err != nil {
		return err
	}
	answer := map[string]any{}
	if request.ID != nil {
		answer["id"] = request.ID
	}
	id := request.ID
	refuse := func(class, text string) error {
		answer["error"] = map[string]string{"class": class, "desc": text}
		return m.say(answer)
	}
	switch {
	case request.ExecOOB != "":
		return refuse("GenericError", "libvirt passes no commands out of band")
	case request.Execute == "qmp_capabilities":
		answer["return"] = struct{}{}
		return m.say(answer)
	case request.Execute == "getfd" || request.Execute == "add-fd":
		return refuse("GenericError", "no descriptor gets through libvirt to the domain's QEMU")
	}
	request.ID = nil // libvirt has its own
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	text, err := m.c.MonitorCommand(ctx, m.d, string(b))
	var refusal *Error
	if errors.As(err, &refusal) {
		return refuse("GenericError", refusal.Error())
	} else if err != nil {
		return err
	}
	var reply struct {
		Return json.RawMessage `json:"return,omitempty"`
		Error  json.RawMessage `json:"error,omitempty"`
		ID     json.RawMessage `json:"id,omitempty"`
	}
	if err := json.Unmarshal([]byte(text), &reply); err != nil {
		return fmt.Errorf("a reply through libvirt: %w", err)
	}
	reply.ID = id
	return m.say(reply)
}

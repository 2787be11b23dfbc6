package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/agent"
)

// A port is an open virtio-serial port (drivers/char/virtio_console.c). While no host is
// connected it reads as ended and polls as hung up, so waiting for a host must be
// edge-triggered; writing would wait for ever.
type port struct {
	fd, epoll int
	wake      int // an eventfd, readable when the agent is to end
}

var errHostGone = errors.New("the host has gone")

// findPort returns the device of the port with our name, or "".
func findPort(sys string) (string, error) {
	names, err := filepath.Glob(sys + "/class/virtio-ports/*/name")
	if err != nil {
		return "", err
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err == nil && strings.TrimSpace(string(b)) == agent.PortName {
			return "/dev/" + filepath.Base(filepath.Dir(n)), nil
		}
	}
	return "", nil
}

func openPort(device string, wake int) (*port, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", device, err)
	}
	p := &port{fd: fd, wake: wake}
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		unix.Close(fd)
		return nil, err
	}
	err = errors.Join(
		unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd,
			&unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLET, Fd: int32(fd)}),
		unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, wake,
			&unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wake)}),
	)
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *port) close() {
	unix.Close(p.epoll)
	unix.Close(p.fd)
}

// wait waits until something about the port changed, or for a time if that is not negative.
// It returns io.EOF when the agent is to end, fs.ErrNotExist when the port was unplugged.
func (p *port) wait(d time.Duration) error {
	ms := -1
	if d >= 0 {
		ms = int((d + time.Millisecond - 1).Milliseconds())
	}
	var events [2]unix.EpollEvent
	n, err := unix.EpollWait(p.epoll, events[:], ms)
	if err != nil && err != unix.EINTR {
		return err
	}
	for _, e := range events[:max(n, 0)] {
		if int(e.Fd) == p.wake {
			return io.EOF
		}
	}
	return nil
}

// read returns 0 without an error when there is nothing to read.
func (p *port) read(b []byte) (n int, err error) {
	for {
		n, err = unix.Read(p.fd, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return 0, nil
		case err == unix.ENODEV:
			return 0, fs.ErrNotExist
		case err != nil:
			return 0, err
		case n == 0:
			return 0, errHostGone
		default:
			return n, nil
		}
	}
}

// write writes until a point in time.
func (p *port) write(b []byte, until time.Time) error {
	for len(b) > 0 {
		n, err := unix.Write(p.fd, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLOUT}}
			if _, err := unix.Poll(fds, 0); err == nil && fds[0].Revents&unix.POLLHUP != 0 {
				return errHostGone
			}
			left := time.Until(until)
			if left <= 0 {
				return os.ErrDeadlineExceeded
			}
			if err := p.wait(left); err != nil {
				return err
			}
		case err == unix.ENODEV:
			return fs.ErrNotExist
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}

// serve answers the host until the context ends.
func serve(ctx context.Context, g *guest, device string, clear time.Duration, log io.Writer) error {
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(wake)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-stopped
		}
	}()
	told := false
	for ctx.Err() == nil {
		name := device
		if name == "" {
			if name, err = findPort(g.sys); err != nil {
				return err
			}
		}
		var p *port
		if name != "" {
			p, err = openPort(name, wake)
		} else {
			err = fs.ErrNotExist
		}
		switch {
		case errors.Is(err, fs.ErrNotExist) && device == "" || errors.Is(err, unix.EBUSY):
			if !told {
				fmt.Fprintf(log, "vacate-guest: waiting for the port %s\n", agent.PortName)
				told = true
			}
			select {
			case <-time.After(10 * time.Second):
			case <-ctx.Done():
			}
			continue
		case err != nil:
			return err
		}
		told = false
		err = p.serve(g, clear)
		p.close()
		if err != io.EOF && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// serve answers until the port has gone (fs.ErrNotExist) or the agent is to end (io.EOF).
func (p *port) serve(g *guest, clear time.Duration) error {
	var got []byte
	buf := make([]byte, 4096)
	next := clearing{every: clear, at: time.Now().Add(clear)}
	for {
		if err := p.wait(next.wait()); err != nil {
			return err
		}
		next.run(g)
		for {
			begin := time.Now()
			n, err := p.read(buf)
			if err == errHostGone {
				got = got[:0]
				break
			}
			if err != nil {
				return err
			}
			if n == 0 {
				break
			}
			got = append(got, buf[:n]...)
			if got, err = p.handle(g, got, begin); err != nil {
				return err
			}
		}
	}
}

// handle answers what is in got, and returns what remains of it. Of several requests that
// wait only the last is worth an answer: their host has given the others up.
func (p *port) handle(g *guest, got []byte, begin time.Time) ([]byte, error) {
	var last *agent.Request
	for {
		r, refusal, n, ok := agent.NextRequest(got)
		got = got[n:]
		if refusal != nil {
			if err := ignore(p.write(refusal, begin.Add(time.Second))); err != nil {
				return nil, err
			}
			continue
		}
		if !ok {
			break
		}
		last = &r
	}
	if last == nil {
		return got, nil
	}
	err := ignore(p.write(g.answer(last, begin), begin.Add(last.Deadline)))
	forget()
	return got, err
}

// ignore drops the errors of a host that does not want its answer any more.
func ignore(err error) error {
	if err == errHostGone || err == os.ErrDeadlineExceeded {
		return nil
	}
	return err
}

// clearing is when accessed bits are cleared without being asked.
type clearing struct {
	every time.Duration // never if 0
	at    time.Time     // the next
}

func (c *clearing) wait() time.Duration {
	if c.every == 0 {
		return -1
	}
	return max(0, time.Until(c.at))
}

// run clears if it is time, and waits 2000 times as long as that took of a CPU. It must not
// run at idle priority: it holds the memory map of a process while it clears.
func (c *clearing) run(g *guest) {
	if c.every == 0 || time.Now().Before(c.at) {
		return
	}
	cpu := cpuTime()
	g.prepare(time.Now().Add(time.Second)) // what fails now may work the next time
	c.at = time.Now().Add(max(c.every, 2000*(cpuTime()-cpu)))
}

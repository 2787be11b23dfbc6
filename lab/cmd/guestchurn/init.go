package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"vacate/lab/churnproto"
)

// A control is process 1: it starts the workers and talks to the host.
type control struct {
	sys    *system
	shared *counters
	fd     int // of the counters

	mu   sync.Mutex
	port *os.File // guarded by mu when written to
	out  []byte   // guarded by mu
	told uint64   // messages Bad and Death sent; guarded by mu

	workers []string
	procs   sync.Map // process → index in workers
	said    []tail   // of each worker
	oom     int      // guarded by mu
	sum     uint64   // ftraceSum
	snaps   *snapshots
	trace   *churnproto.Trace
}

// A tail keeps the end of what was written to it.
type tail struct {
	mu sync.Mutex
	b  []byte
}

func (t *tail) follow(r io.ReadCloser) {
	defer r.Close()
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		t.mu.Lock()
		t.b = append(t.b, buf[:n]...)
		t.b = t.b[:min(len(t.b), 3000)] // the start says what happened
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func run() error {
	s, err := setUp()
	if err != nil {
		return err
	}
	c := &control{sys: s}
	if c.fd, err = unix.MemfdCreate("counters", 0); err != nil {
		return err
	}
	if err := unix.Ftruncate(c.fd, pageSize); err != nil {
		return err
	}
	if c.shared, err = mapCounters(c.fd); err != nil {
		return err
	}
	if c.port, err = openPort(); err != nil {
		return err
	}
	if c.snaps, err = newSnapshots(); err != nil {
		return err
	}
	if c.sum, err = ftraceSum(); err != nil {
		s.lacks = append(s.lacks, fmt.Sprintf("ftrace's records: %v", err))
	}
	if c.trace, err = traceAllocator(s.trace); err != nil {
		s.lacks = append(s.lacks, fmt.Sprintf("trace of the allocator: %v", err))
	}
	for _, l := range loads {
		if l.needs(s) && (s.workers == nil || slices.Contains(s.workers, l.name)) {
			c.workers = append(c.workers, l.name)
		}
	}
	c.said = make([]tail, len(c.workers))
	for i := range c.workers {
		if err := c.start(i); err != nil {
			return err
		}
	}
	go c.reap()
	go c.beat()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	c.send(churnproto.TypeHello, churnproto.Hello{
		Release: unix.ByteSliceToString(u.Release[:]), CPUs: runtime.NumCPU(), MemKiB: s.memKiB,
		Workers: c.workers, Lacks: s.lacks,
	})
	return c.serve()
}

// start starts a worker, with the write ends of pipes that are followed until it ends.
func (c *control) start(i int) error {
	report, err := c.follow(func(r io.ReadCloser) {
		defer r.Close()
		for lines := bufio.NewScanner(r); lines.Scan(); {
			c.sendRaw(churnproto.TypeBad, lines.Bytes())
		}
	})
	if err != nil {
		return err
	}
	defer report.Close()
	errs, err := c.follow(c.said[i].follow)
	if err != nil {
		return err
	}
	defer errs.Close()
	p, err := syscall.ForkExec("/proc/self/exe",
		[]string{"guestchurn", c.workers[i], fmt.Sprint(i)}, &syscall.ProcAttr{
			Dir: "/", Env: []string{"GOTRACEBACK=single"},
			Files: []uintptr{errs.Fd(), errs.Fd(), errs.Fd(), report.Fd(), uintptr(c.fd)},
		})
	if err != nil {
		return fmt.Errorf("start worker %s: %w", c.workers[i], err)
	}
	c.procs.Store(p, i)
	return nil
}

func (c *control) follow(f func(io.ReadCloser)) (*os.File, error) {
	r, w, err := os.Pipe()
	if err == nil {
		go f(r)
	}
	return w, err
}

// reap collects what ends. A worker should not; it is started anew.
func (c *control) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		v, ok := c.procs.LoadAndDelete(pid)
		if !ok {
			continue // a worker's child, left behind
		}
		i := v.(int)
		if c.workers[i] == "press" && status.Signaled() && status.Signal() == unix.SIGKILL {
			c.mu.Lock()
			c.oom++
			c.mu.Unlock()
		} else {
			time.Sleep(50 * time.Millisecond) // for its last words
			c.said[i].mu.Lock()
			said := string(c.said[i].b)
			c.said[i].b = nil
			c.said[i].mu.Unlock()
			text := fmt.Sprintf("exit status %d", status.ExitStatus())
			if status.Signaled() {
				text = status.Signal().String()
			}
			c.send(churnproto.TypeDeath, churnproto.Death{Worker: i, Status: text, Said: said})
			time.Sleep(time.Second) // lest it floods
		}
		if err := c.start(i); err != nil {
			c.send(churnproto.TypeDeath, churnproto.Death{Worker: i, Status: err.Error()})
		}
	}
}

// beat tells of the work done, twice a second.
func (c *control) beat() {
	for {
		time.Sleep(500 * time.Millisecond)
		b := churnproto.Beat{Ops: make([]uint64, len(c.workers)), Pages: c.shared.pages.Load()}
		for i := range b.Ops {
			b.Ops[i] = c.shared.ops[i].Load()
		}
		c.mu.Lock()
		b.OOM, b.Told = uint64(c.oom), c.told
		c.mu.Unlock()
		c.send(churnproto.TypeBeat, b)
	}
}

func (c *control) send(t churnproto.Type, m any) {
	b, err := json.Marshal(m)
	if err != nil {
		panic(err) // messages hold nothing that JSON does not
	}
	c.sendRaw(t, b)
}

func (c *control) sendRaw(t churnproto.Type, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = churnproto.AppendFrame(c.out[:0], t, b)
	if t == churnproto.TypeBad || t == churnproto.TypeDeath {
		c.told++
	}
	if _, err := c.port.Write(c.out); err != nil {
		fmt.Fprintln(os.Stderr, "guestchurn: BUG: write to the host:", err)
	}
}

// serve carries out commands, one after the other.
func (c *control) serve() error {
	lines := bufio.NewScanner(c.port)
	for {
		for lines.Scan() {
			f := strings.Fields(lines.Text())
			if len(f) < 2 {
				continue // a line cut by a snapshot
			}
			r := churnproto.Reply{ID: f[0]}
			if err := c.obey(f[0], f[1], &r); err != nil {
				r.Error = err.Error()
			}
			c.send(churnproto.TypeReply, r)
		}
		if err := lines.Err(); err != nil {
			return fmt.Errorf("read commands: %w", err)
		}
		time.Sleep(10 * time.Millisecond) // the host is not there
		lines = bufio.NewScanner(c.port)
	}
}

func vmstat() (map[string]uint64, error) {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return nil, err
	}
	counts := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseUint(value, 10, 64); err == nil {
			counts[name] = n
		}
	}
	return counts, nil
}

// checkAll has all workers verify all that they have.
func (c *control) checkAll() error {
	n := c.shared.checks.Add(1)
	for began := time.Now(); ; {
		var waiting []string
		c.procs.Range(func(pid, i any) bool {
			if i := i.(int); c.shared.done[i].Load() != n {
				waiting = append(waiting,
					fmt.Sprintf("%s (%s)", c.workers[i], whereabouts(pid.(int))))
			}
			return true
		})
		if waiting == nil {
			return nil
		}
		if time.Since(began) > 100*time.Second {
			return fmt.Errorf("these workers do not come to an end of verifying: %s",
				strings.Join(waiting, "; "))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// whereabouts says where in the kernel the threads of a process are.
func whereabouts(pid int) string {
	var at []string
	dirs, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, d := range dirs {
		stat, _ := os.ReadFile(d + "/stat")
		wchan, _ := os.ReadFile(d + "/wchan")
		if _, rest, ok := strings.Cut(string(stat), ") "); ok {
			at = append(at, fmt.Sprintf("%.1s %s", rest, wchan))
		}
	}
	return strings.Join(at, ", ")
}

func (c *control) obey(id, verb string, r *churnproto.Reply) (err error) {
	switch verb {
	case "sync":
		return nil
	case "quiet":
		return quiet()
	case "go":
		return letGo()
	case "trace":
		if c.trace == nil {
			return fmt.Errorf("the guest cannot trace its allocator: see what it lacks")
		}
		r.Trace = c.trace
		return nil
	case "check":
		if err := c.checkAll(); err != nil {
			return err
		}
		if r.Vmstat, err = vmstat(); err != nil {
			return err
		}
		if c.sum == 0 {
			return nil
		}
		if err := quiet(); err != nil {
			return err
		}
		sum, err := ftraceSum()
		if e := letGo(); err == nil {
			err = e
		}
		if err == nil && sum != c.sum {
			c.send(churnproto.TypeBad,
				churnproto.Bad{Worker: -1, What: "ftrace's records", Want: c.sum, Found: sum})
		}
		return err
	case "snapshot":
		tables, err := c.snaps.take()
		if err != nil {
			return err
		}
		for _, t := range tables {
			const part = churnproto.MaxPayload - 1024
			for at := 0; at < len(t.data) || at == 0; at += part {
				c.sendRaw(churnproto.TypeTable,
					churnproto.AppendTable(nil, id, t.name, uint64(at),
						t.data[at:min(len(t.data), at+part)]))
			}
		}
		return nil
	}
	return fmt.Errorf("no command %q", verb)
}

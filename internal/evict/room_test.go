package evict_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/link"
	"vacate/lab"
	"vacate/lab/labtest"
)

// memoryGroup makes a control group, and returns its directory, and the file of its limit.
func memoryGroup(t *testing.T, bytes int64) (dir, limit string) {
	t.Helper()
	root, limit := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(root); err != nil {
		root, limit = "/sys/fs/cgroup", "memory.max"
		labtest.Need(t, os.WriteFile(root+"/cgroup.subtree_control", []byte("+memory"), 0))
	}
	dir, err := os.MkdirTemp(root, "vacate-test-")
	if err != nil {
		labtest.Need(t, fmt.Errorf("a control group for memory cannot be made: %w", err))
	}
	t.Cleanup(func() {
		var err error
		for range 50 { // until its processes are gone
			if err = os.Remove(dir); err == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Error(err)
	})
	if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.FormatInt(bytes, 10)),
		0); err != nil {
		t.Fatal(err)
	}
	return dir, filepath.Join(dir, limit)
}

// within returns a QEMU that runs in a control group from its start.
func within(t *testing.T, q lab.QEMU, group string) lab.QEMU {
	t.Helper()
	script := filepath.Join(t.TempDir(), "qemu")
	text := fmt.Sprintf("#!/bin/sh\necho $$ >%s/cgroup.procs && exec %s \"$@\"\n", group, q.Path)
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	q.Path = script
	return q
}

// spell is a time in which a destination has no memory for pages of a VM that runs there.
type spell struct {
	t        *testing.T
	lab      *lab.Lab
	from, to *lab.Host
	vm, twin *lab.VM
	begin    func() // takes the memory, in mid-push
	// does something more to the eviction; restart makes another engine go on at the destination
	meanwhile func(restart func())
	end       func() // gives it back
	says      string // of the reason, at both ends
}

// memoryJournal is a destination's journal in memory.
type memoryJournal struct {
	mu   sync.Mutex
	kept map[string][]byte // guarded by mu
}

func (j *memoryJournal) Note(evict.Mark, string) error { return nil }

func (j *memoryJournal) Keep(name string, b []byte) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.kept == nil {
		j.kept = map[string][]byte{}
	}
	j.kept[name] = slices.Clone(b)
	return nil
}

func (j *memoryJournal) Kept(name string) ([]byte, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if b, ok := j.kept[name]; ok {
		return b, nil
	}
	return nil, fs.ErrNotExist
}

// shorts holds what progress said about missing memory.
type shorts struct {
	mu   sync.Mutex
	last string
	all  []string
}

func (s *shorts) take(p evict.Progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.Short != s.last {
		s.last = p.Short
		s.all = append(s.all, p.Short)
	}
}

func (s *shorts) now() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// await waits until progress says, or no longer says, that memory is missing.
func (s *shorts) await(t *testing.T, short bool) string {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 *
		time.Millisecond) {
		if now := s.now(); (now != "") == short {
			return now
		}
	}
	t.Fatalf("progress says %q", s.now())
	return ""
}

func (s spell) run() {
	t := s.t
	t.Helper()
	ln := listen(t, s.to)
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	var here, there shorts
	pushing := make(chan struct{})
	var once sync.Once
	limit := new(evict.Limit)
	limit.Set(10e6)
	var r result
	ended := make(chan struct{})
	received := make(chan error, 1)
	ctx := labtest.Within(t, 4*time.Minute+*withoutMemory)
	taking, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	id := journal.NewID()
	go func() {
		sessions := link.NewListener(ln, link.ListenOptions{})
		defer sessions.Close()
		requests, stop := evict.Requests(ctx, sessions.Accept,
			func(_ string, err error) { t.Error(err) }, func(err error) { t.Error(err) })
		defer stop()
		d := evict.Destination{QMP: s.twin.QMP, Log: log.With("side", "destination"),
			Show: there.take, Journal: &memoryJournal{}}
		_, err := d.Receive(taking, requests)
		if errors.Is(err, evict.ErrLeft) {
			_, err = d.Resume(ctx, id, evict.MarkMayRun, requests)
		}
		received <- err
	}()
	go func() {
		defer close(ended)
		src := evict.Source{Eviction: id, QMP: s.vm.QMP,
			Connect: connectTo(s.from, ln.Addr().String()), Log: log.With("side", "source"),
			Limit: limit, SendFree: true}
		src.Show = func(p evict.Progress) {
			here.take(p)
			if p.State == evict.Pushing && p.Pages > p.Total/10 {
				once.Do(func() { close(pushing) })
			}
		}
		r.report, r.source = src.Evict(ctx)
	}()
	select {
	case <-pushing:
	case <-ended:
		t.Fatal(r.source)
	}
	s.begin()
	limit.Set(0)
	for side, text := range map[string]string{"source": here.await(t, true),
		"destination": there.await(t, true)} {
		if !strings.Contains(text, s.says) || !strings.Contains(text, "goes on by itself") {
			t.Errorf("the %s says %q", side, text)
		}
	}
	s.meanwhile(func() { leave(evict.ErrLeave) })
	select {
	case <-ended:
		t.Fatalf("without memory it ended: %v; at the destination: %v", r.source, <-received)
	case <-time.After(*withoutMemory):
	}
	if status, err := s.twin.Status(labtest.Within(t, 20*time.Second)); err != nil ||
		status != "running" {
		t.Errorf("the twin is %q, %v", status, err)
	}
	here.await(t, true)
	there.await(t, true)
	s.end()
	<-ended
	r.destErr = <-received
	r.report.Pages.Duplicate = 0 // those that were on their way when the link was cut
	r.mustComplete(t)
	here.await(t, false)
	there.await(t, false)
	// The guest's scheduler charges all of that time to the thread that waited for the page. It
	// then runs other threads until they had as much: the one that reports, for instance.
	if err := s.vm.Guest.WaitOps(labtest.Within(t, time.Minute+*withoutMemory), 1000); err != nil {
		t.Error(err)
	}
}

var withoutMemory = flag.Duration("without-memory", 2*time.Second,
	"how long TestNoMemory leaves the destination without memory")

// fill fills a file system, except for what one page needs.
func fill(t *testing.T, dir string) (empty func()) {
	t.Helper()
	name := filepath.Join(dir, "other")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 64<<10)
	for err == nil {
		_, err = f.Write(b)
	}
	return func() {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
}

// A VM whose pages find no memory at the destination after the commit waits. Both ends report that.
// The VM goes on by itself when there is memory, whatever else happens meanwhile. One guest goes to
// and fro.
func TestNoMemory(t *testing.T) {
	l := labtest.New(t, lab.Options{Rate: 1e9})
	vm := boot(t, l, lab.Spec{MemoryMiB: 256, Load: lab.Load{HotMiB: 40, IdleMiB: 60}})
	plain := vm.Spec
	start := func(h *lab.Host, spec lab.Spec) *lab.VM {
		t.Helper()
		twin, err := h.Incoming(labtest.Within(t, time.Minute),
			&lab.VM{Spec: spec, Guest: vm.Guest}, lab.IncomingOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return twin
	}
	inFile := func(dir string) lab.Spec {
		spec := plain
		spec.Machine += ",memory-backend=pc.ram"
		spec.Extra = append([]string{"-object",
			"memory-backend-file,id=pc.ram,size=256M,share=on,mem-path=" + dir}, spec.Extra...)
		return spec
	}
	dir := mount(t, "tmpfs", "size=300m")
	cutLink := func(func()) {
		if err := l.SetLinkUp(false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if err := l.SetLinkUp(true); err != nil {
			t.Fatal(err)
		}
	}

	// The kernel refuses memory: a file system is full.
	twin := start(l.B, inFile(dir))
	var empty func()
	spell{t: t, lab: l, from: l.A, to: l.B, vm: vm, twin: twin,
		says:  "the file system at " + dir + " has no room",
		begin: func() { empty = fill(t, dir) }, meanwhile: cutLink, end: func() { empty() }}.run()
	if t.Failed() {
		return
	}

	// The kernel would end the QEMU: another process of its control group takes the memory.
	group, limit := memoryGroup(t, 600<<20)
	dir = mount(t, "tmpfs", "size=600m")
	spec := plain
	spec.QEMU = within(t, plain.QEMU, group)
	vm, twin = twin, start(l.A, spec)
	t.Cleanup(twin.Kill)
	spell{t: t, lab: l, from: l.B, to: l.A, vm: vm, twin: twin,
		says:      "the control group " + group + " has no room",
		begin:     func() { eat(t, group, limit, dir, 40<<20) },
		meanwhile: func(restart func()) { restart() },
		end: func() {
			if err := os.Remove(filepath.Join(dir, "eaten")); err != nil {
				t.Error(err)
			}
		}}.run()
	labtest.MustCheck(t, twin)
}

// eat makes a process in a control group write a file in memory, until so many bytes of the group's
// limit are left.
func eat(t *testing.T, group, limit, dir string, left int64) {
	t.Helper()
	number := func(names ...string) (n int64) {
		for _, name := range names {
			if b, err := os.ReadFile(name); err == nil {
				if n, err = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err != nil {
					t.Fatal(err)
				}
			}
		}
		return n
	}
	n := number(limit) - number(filepath.Join(group, "memory.usage_in_bytes"),
		filepath.Join(group, "memory.current")) - left
	cmd := exec.Command("sh", "-c",
		fmt.Sprintf("echo $$ >%s/cgroup.procs && exec head -c %d /dev/zero >%s/eaten", group, n,
			dir))
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
}

package evict

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
	"unsafe"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/link"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/sys/sched"
	"vacate/lab"
	"vacate/lab/labtest"

	"golang.org/x/sys/unix"
)

// BenchmarkPush pushes memory from a process on one of the lab's hosts to a process on the other,
// by the engines' own code, and without VMs. Each is on a core of its own. While it pushes, the
// other side fetches a page every few milliseconds.
func BenchmarkPush(b *testing.B) {
	for _, l := range []struct {
		name string
		rate uint64
		size int
	}{{"none", 0, 1 << 30}, {"10Gbit", 1e10, 1 << 30}, {"1Gbit", 1e9, 1 << 28}} {
		for _, file := range []bool{false, true} {
			name := l.name + "/anonymous"
			if file {
				name = l.name + "/memfd"
			}
			b.Run(name, func(b *testing.B) {
				hosts := labtest.New(b, lab.Options{Rate: l.rate})
				var took, sent, received, switches float64
				var delays []float64
				for b.Loop() {
					in := startPush(b, hosts.B, push{Role: "receive", Bytes: l.size, File: file,
						Addr: hosts.B.Addr + ":7603"})
					in.line(b) // it listens
					out := startPush(b, hosts.A, push{Role: "push", Bytes: l.size, File: file,
						Addr: hosts.B.Addr + ":7603"})
					r, s := in.line(b), out.line(b)
					took, sent, received = took+r.Took, sent+s.CPU, received+r.CPU
					switches += r.Switches + s.Switches
					delays = append(delays, r.Delays...)
				}
				gb := float64(b.N) * float64(l.size) / 1e9
				slices.Sort(delays)
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(gb*1e3/took, "MB/s")
				b.ReportMetric(sent/gb, "source-CPU-s/GB")
				b.ReportMetric(received/gb, "destination-CPU-s/GB")
				b.ReportMetric(switches/gb, "switches/GB")
				if n := len(delays); n > 0 {
					b.ReportMetric(delays[n/2]*1e6, "fetch-p50-µs")
					b.ReportMetric(delays[n*99/100]*1e6, "fetch-p99-µs")
				}
			})
		}
	}
}

// push is what one side of BenchmarkPush does, in a process of its own.
type push struct {
	Role  string
	Addr  string
	Bytes int
	File  bool // the memory is in a file
}

// pushResult is what it says in the end.
type pushResult struct {
	Took float64 // seconds from the first frame to the last page
	CPU  float64 // seconds
	// Switches is how often a thread slept.
	Switches float64
	Delays   []float64 // of fetches, in seconds
}

const pushEnv = "VACATE_PUSH_BENCH"

type side struct {
	cmd *exec.Cmd
	out *bufio.Reader
}

func startPush(b *testing.B, h *lab.Host, p push) side {
	b.Helper()
	env, err := json.Marshal(p)
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), pushEnv+"="+string(env))
	cmd.Stderr = b.Output()
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = h.Start(cmd)
	}
	if err != nil {
		b.Fatal(err)
	}
	return side{cmd, bufio.NewReader(out)}
}

// line reads the process's next line; behind the second of the receiver, and the first of the
// other, the process ends.
func (s side) line(b *testing.B) (r pushResult) {
	b.Helper()
	text, err := s.out.ReadString('\n')
	if err != nil {
		b.Fatal(errors.Join(err, s.cmd.Wait()))
	}
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		b.Fatal(err)
	}
	if r.Took > 0 {
		if err := s.cmd.Wait(); err != nil {
			b.Fatal(err)
		}
	}
	return r
}

func init() {
	env := os.Getenv(pushEnv)
	if env == "" {
		return
	}
	var p push
	err := json.Unmarshal([]byte(env), &p)
	if err == nil {
		sched.Process()
		if p.Role == "push" {
			err = p.send()
		} else {
			err = p.receive()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, p.Role, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (p push) layout() layout {
	return layout{{"ram", uint64(p.Bytes), migstream.TargetPageSize,
		p.Bytes / migstream.TargetPageSize}}
}

// memory maps what the source pushes, or the place for it, so that no other mapping joins it.
func (p push) memory() ([]byte, error) {
	// A page that nobody may touch on either side.
	all, err := unix.Mmap(-1, 0, p.Bytes+2*migstream.TargetPageSize, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if p.File {
		if fd, err = unix.MemfdCreate("ram", unix.MFD_CLOEXEC); err != nil {
			return nil, err
		}
		if err := unix.Ftruncate(fd, int64(p.Bytes)); err != nil {
			return nil, err
		}
		flags = unix.MAP_SHARED
	}
	at := unsafe.Add(unsafe.Pointer(&all[0]), migstream.TargetPageSize)
	if _, err := unix.MmapPtr(fd, 0, at, uintptr(p.Bytes), unix.PROT_READ|unix.PROT_WRITE,
		flags|unix.MAP_FIXED); err != nil {
		return nil, err
	}
	mem := all[migstream.TargetPageSize:][:p.Bytes]
	return mem, unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
}

// used returns the seconds of CPU that this process used so far, and how often it slept.
func used() (cpu, switches float64) {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0, 0
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9, float64(u.Nvcsw)
}

// since returns what was used since a moment.
func since(begun time.Time, cpu, switches float64) pushResult {
	c, s := used()
	return pushResult{Took: time.Since(begun).Seconds(), CPU: c - cpu, Switches: s - switches}
}

// send is the source's side.
func (p push) send() error {
	ram, err := p.memory()
	if err != nil {
		return err
	}
	for i := 0; i < len(ram); i += 8 {
		binary.LittleEndian.PutUint64(ram[i:], uint64(i/migstream.TargetPageSize+1))
	}
	kind := guestmem.Anonymous
	if p.File {
		kind = guestmem.SharedFile
	}
	size := uint64(p.Bytes)
	mem, err := guestmem.Reopen(os.Getpid(), []guestmem.Block{{Name: "ram", Size: size,
		Total: size, PageSize: migstream.TargetPageSize, Kind: kind, Located: true,
		HVA: uint64(uintptr(unsafe.Pointer(&ram[0])))}})
	if err != nil {
		return err
	}
	l := p.layout()
	e := &source{Source: Source{Order: pushorder.Policy{Base: pushorder.Address}, Path: NewPath(0),
		Log: slog.New(slog.DiscardHandler)}}
	e.sessions.now = &e.at
	e.departures.begin(l, e.Order, time.Now())
	if e.image.frozen, err = newFrozen(mem, l); err != nil {
		return err
	}
	e.image.pushed, e.image.fetched = newFrame(mem), newFrame(mem)
	e.image.pushed.f, e.image.fetched.f = e.image.frozen, e.image.frozen
	e.image.unusedKnown.Store(true)
	s, err := link.Dialer{Addr: p.Addr}.Session(context.Background())
	if err != nil {
		return err
	}
	a := attach(s, maxJSON)
	e.at.Store(a)
	a.window = e.Path.join(migstream.TargetPageSize, nil, false)
	begun := time.Now()
	cpu, switches := used()
	a.begin(func() error { return e.serveFetches(a) })
	e.beginPush(a)
	<-a.Done()
	if n := e.departures.sentPages(); n != l.pages() {
		return fmt.Errorf("%d of %d pages are sent: %w", n, l.pages(), a.Err())
	}
	return json.NewEncoder(os.Stdout).Encode(since(begun, cpu, switches))
}

// receive is the destination's side.
func (p push) receive() error {
	ram, err := p.memory()
	if err != nil {
		return err
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return errno
	}
	if _, err := guestmem.Userfault(int(fd), ram); err != nil {
		return err
	}
	l := p.layout()
	e := &destination{incoming: incoming{layout: l}, machine: newMachine(Running, func(State) {}),
		Destination: Destination{Log: slog.New(slog.DiscardHandler)}, ended: make(chan struct{})}
	e.pages.begin(l)
	e.units.begin(l)
	e.placer = newPlacer(nil, 0, l)
	e.placer.direct.Store(&direct{uffd: int(fd), huge: []bool{false},
		hva: []uint64{uint64(uintptr(unsafe.Pointer(&ram[0])))}})
	ln, err := net.Listen("tcp", p.Addr)
	if err != nil {
		return err
	}
	listener := link.NewListener(ln, link.ListenOptions{})
	fmt.Println("{}")
	s, err := listener.Accept(context.Background())
	if err != nil {
		return err
	}
	a := attach(s, maxJSON)
	e.at.Store(a)
	begun := time.Now()
	cpu, switches := used()
	e.receiveLanes(a)
	next := time.NewTicker(5 * time.Millisecond)
	defer next.Stop()
	for whole := e.pages.done(); ; {
		select {
		case <-next.C:
			page := rand.IntN(l[0].Pages) // #nosec G404 -- any page will do
			if err := e.fetch(migstream.Message{Type: migstream.MsgReqPages, Block: "ram",
				Start:  uint64(page) * migstream.TargetPageSize,
				Length: migstream.TargetPageSize}); err != nil {
				return err
			}
			continue
		case <-whole:
		case <-a.Done():
			return a.Err()
		}
		break
	}
	r := since(begun, cpu, switches)
	a.end()
	for i := range pageset.Page(l[0].Pages) {
		if got := binary.LittleEndian.Uint64(ram[i*migstream.TargetPageSize+8:]); got !=
			uint64(i)+1 {
			return fmt.Errorf("page %d has the content of page %d", i, int64(got)-1)
		}
	}
	r.Delays = e.pages.summary().FetchDelays
	return json.NewEncoder(os.Stdout).Encode(r)
}

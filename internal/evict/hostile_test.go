package evict_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"vacate/internal/evict"
	"vacate/internal/guest/agent"
	"vacate/internal/guest/linux"
	"vacate/internal/guest/pageclass"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/units"
	"vacate/lab"
	"vacate/lab/labtest"
)

// evictAs is evictBetween with another source.
func evictAs(ctx context.Context, t testing.TB, vm, twin *lab.VM, s evict.Source) result {
	t.Helper()
	ln := listen(t, twin.Host)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	received := make(chan error, 1)
	go func() {
		received <- receiveOn(ctx,
			evict.Destination{QMP: twin.QMP, Log: log.With("side", "destination")}, ln)
	}()
	var r result
	s.QMP, s.Connect, s.Log = vm.QMP, connectTo(vm.Host, ln.Addr().String()), log.With("side",
		"source")
	r.report, r.source = s.Evict(ctx)
	if r.source != nil {
		ln.Close()
	}
	r.destErr = <-received
	return r
}

// allowance is how much memory both engines together may allocate in the eviction of such a small
// guest, whatever the guest does.
const allowance = 256 << 20

// suffer evicts a hostile guest to the other host. It must arrive whole and at work, and not cost
// much memory. What it says must be fit for a terminal.
func suffer(t testing.TB, l *lab.Lab, vm *lab.VM, s evict.Source,
	prepare func(twin *lab.VM)) (*lab.VM, evict.Report) {
	t.Helper()
	to := l.B
	if vm.Host == l.B {
		to = l.A
	}
	twin, err := to.Incoming(labtest.Within(t, time.Minute), vm, lab.IncomingOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(twin)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r := evictAs(labtest.Within(t, time.Minute), t, vm, twin, s)
	runtime.ReadMemStats(&after)
	r.mustComplete(t)
	if n := after.TotalAlloc - before.TotalAlloc; n > allowance {
		t.Errorf("the eviction has allocated %d MiB", n>>20)
	} else {
		t.Logf("%d MiB allocated", n>>20)
	}
	e := r.report.Enlightenment
	t.Logf("by %s, %d of %d pages left out; doubts: %q; notes: %q", e.Source,
		r.report.Pages.Skipped, r.report.Pages.Total, e.Doubts, e.Notes)
	for _, text := range append([]string{e.Doubts, e.Kernel}, e.Notes...) {
		if len(text) > 2000 ||
			strings.ContainsFunc(text,
				func(r rune) bool { return r != '\n' && !unicode.IsGraphic(r) }) {
			t.Errorf("a text that is not fit for a terminal: %q", text)
		}
	}
	vm.Kill()
	if err := twin.Guest.WaitOps(labtest.Within(t, time.Minute), 2000); err != nil {
		status, qerr := twin.Status(t.Context())
		log, _ := os.ReadFile(twin.Console)
		t.Fatalf("%v; the VM is %s %v; its console: %s", err, status, qerr, log)
	}
	if bad := twin.Guest.Bad(); len(bad) > 0 {
		t.Fatalf("bad words: %+v", bad)
	}
	if log, err := os.ReadFile(twin.Console); err != nil || complaint.Match(log) {
		t.Fatalf("%v; the guest's kernel complains: %s", err, log)
	}
	return twin, r.report
}

var complaint = regexp.MustCompile(
	`\bBUG\b|WARNING:|Oops|[Bb]ad page|corrupt|Call Trace|general protection`)

// TestHostileAgents: at worst, an agent spoils the order.
func TestHostileAgents(t *testing.T) {
	dice.seed(t)
	l := labtest.New(t, lab.Options{})
	vm := boot(t, l, lab.Spec{MemoryMiB: 192, Agent: true,
		Load: lab.Load{HotMiB: 16, IdleMiB: 24, OtherMiB: 16, Others: 2, FileMiB: 4}})
	answers(t, vm)
	const late = "in time"
	for _, a := range []struct {
		name    string
		answer  func(net.Conn, agent.Request) // nil: the real agent's own
		trusted bool                          // it breaks no rule
		doubt   string
	}{
		{"real", nil, true, ""},
		{"lies", func(c net.Conn, r agent.Request) { c.Write(lies(r)) }, true, ""},
		{"calls all pages skippable",
			func(c net.Conn, r agent.Request) { c.Write(skippable(t, r)) }, false, "skippable"},
		{"says nothing", func(c net.Conn, r agent.Request) { untilClosed(c) }, false, late},
		{"stops in the middle", func(c net.Conn, r agent.Request) {
			b := lies(r)
			c.Write(b[:len(b)/2])
			untilClosed(c)
		}, false, late},
		{"drips", func(c net.Conn, r agent.Request) {
			for _, v := range lies(r) {
				if _, err := c.Write([]byte{v}); err != nil {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}, false, late},
		{"hangs up", func(net.Conn, agent.Request) {}, false, ""},
		{"floods", func(c net.Conn, r agent.Request) { flood(c, 1<<20, random) }, false,
			"belong to no answer"},
		{"floods with headers", func(c net.Conn, r agent.Request) {
			head := agent.AppendRefusal(nil, r.ID+1, "")
			binary.LittleEndian.PutUint32(head[12:], 1<<32-1)
			sign(head)
			flood(c, 64<<10, func(b []byte) {
				for len(b) > 0 {
					b = b[copy(b, head):]
				}
			})
		}, false, "belong to no answer"},
		{"promises 4 GiB", func(c net.Conn, r agent.Request) {
			b := lies(r)
			binary.LittleEndian.PutUint32(b[12:], 1<<32-1)
			binary.LittleEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
			c.Write(b)
			flood(c, 1<<20, random)
		}, false, "want at most"},
		{"plays with the terminal", func(c net.Conn, r agent.Request) {
			c.Write(agent.AppendRefusal(nil, r.ID, "\x1b]0;gotcha\a\x1b[2J\r\u202e\xff"))
		}, false, "refuses"},
		{"real, again", nil, true, ""},
	} {
		ok := t.Run(a.name, func(t *testing.T) {
			if a.doubt != late { // an answer comes, however busy this machine is
				defer evict.SetAgentTime(20 * time.Second)()
			}
			if a.answer != nil {
				impersonate(t, vm.AgentSocket, a.answer)
			}
			var report evict.Report
			vm, report = suffer(t, l, vm, evict.Source{Enlightenment: evict.Agent}, nil)
			e := report.Enlightenment
			if report.Pages.Skipped != 0 {
				t.Errorf("an agent has %d pages left out", report.Pages.Skipped)
			}
			if a.trusted != (e.Source == evict.Agent) || a.trusted == (e.Doubts != "") ||
				!strings.Contains(e.Doubts, a.doubt) {
				t.Errorf("order by %s; doubts %q, want %q", e.Source, e.Doubts, a.doubt)
			}
		})
		if !ok {
			return
		}
	}
	labtest.MustCheck(t, vm)
}

// answers waits until the guest's agent has opened its port.
func answers(t testing.TB, vm *lab.VM) {
	t.Helper()
	c, err := qmp.Dial(t.Context(), vm.LabQMP)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := labtest.Within(t, time.Minute)
	for {
		_, err := agent.Find(ctx, c)
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			t.Fatal(err)
		}
	}
}

// impersonate replaces QEMU's socket behind the agent's port, and so the agent: the engine sees
// only bytes of either.
func impersonate(t testing.TB, path string, answer func(net.Conn, agent.Request)) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			var got []byte
			buf := make([]byte, 4096)
			for {
				n, err := c.Read(buf)
				if err != nil {
					break
				}
				got = append(got, buf[:n]...)
				r, _, used, ok := agent.NextRequest(got)
				if got = got[used:]; ok {
					answer(c, r)
					break
				}
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		if err := ln.Close(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		<-done
	})
}

func untilClosed(c net.Conn) {
	var b [64]byte
	for {
		if _, err := c.Read(b[:]); err != nil {
			return
		}
	}
}

// flood writes pieces of a size until nobody reads.
func flood(c net.Conn, size int, fill func([]byte)) {
	b := make([]byte, size)
	fill(b)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// chance is the source of randomness in this file.
var chance = rand.New(&dice)

var dice seeded

// seeded is a source that several goroutines may use.
type seeded struct {
	mu  sync.Mutex
	pcg rand.PCG // guarded by mu
}

// Uint64 implements rand.Source.
func (s *seeded) Uint64() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pcg.Uint64()
}

func (s *seeded) seed(t *testing.T) {
	n := labtest.Seed(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pcg.Seed(n, 0)
}

func random(b []byte) {
	for i := range b {
		b[i] = byte(chance.Uint32())
	}
}

// lies is a well-formed answer in which nothing is true: all is free, thousands of processes run,
// and memory is used backwards.
func lies(r agent.Request) []byte {
	s := &pageclass.Survey{Fresh: true, Pages: make([]pageclass.Page, r.Frames)}
	for i := range s.Pages {
		s.Pages[i] = pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free,
			Flags: pageclass.Exec | pageclass.Dirty}
	}
	for i := range 20_000 {
		s.Processes = append(s.Processes,
			pageclass.Process{PID: i, Name: "\x1b[2J", Active: true, OnCPU: true, Recent: -1})
	}
	for i := range uint32(r.Frames) {
		s.Sequence = append(s.Sequence, uint32(r.Frames)-1-i)
	}
	return agent.AppendSurvey(nil, r.ID, &agent.Costs{}, s, false, r.MaxBytes)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sign sets the checksums of an agent's frame.
func sign(b []byte) {
	binary.LittleEndian.PutUint32(b[24:], crc32.Checksum(b[32:], castagnoli))
	binary.LittleEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
}

// skippable is an answer that no agent can make by AppendSurvey.
func skippable(t testing.TB, r agent.Request) []byte {
	b := lies(r)
	kind := []byte{byte(pageclass.FreeBuddy), byte(pageclass.Free),
		byte(pageclass.Exec | pageclass.Dirty)}
	at := bytes.LastIndex(b[:bytes.LastIndex(b, kind)+3], kind)
	if at < 0 {
		t.Error("the kind of pages is not where it was")
		return nil
	}
	b[at+2] |= byte(pageclass.Skippable)
	sign(b)
	return b
}

// A victim is the memory of a guest. The test writes to it from outside, and repairs it.
type victim struct {
	t     testing.TB
	mem   *guestmem.Memory
	file  *os.File // /proc/PID/mem
	linux *linux.Guest
	pages []pageclass.Page // while it is frozen
	undo  []write
	close []func() error
}

type write struct {
	at   uint64
	data []byte
}

func newVictim(t testing.TB, vm *lab.VM) *victim {
	t.Helper()
	v := &victim{t: t}
	t.Cleanup(func() {
		for _, f := range v.close {
			f()
		}
	})
	c, err := qmp.Dial(t.Context(), vm.LabQMP)
	if err != nil {
		t.Fatal(err)
	}
	v.close = append(v.close, c.Close)
	if v.mem, err = guestmem.Attach(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	v.close = append(v.close, v.mem.Close)
	if v.file, err = os.OpenFile(fmt.Sprintf("/proc/%d/mem", v.mem.PID()), os.O_RDWR,
		0); err != nil {
		t.Fatal(err)
	}
	v.close = append(v.close, v.file.Close)
	live, err := linux.NewLive(v.mem, c)
	if err != nil {
		t.Fatal(err)
	}
	if v.linux, err = linux.Attach(t.Context(), live); err != nil {
		t.Fatal(err)
	}
	return v
}

// look finds out what the frozen guest's pages are.
func (v *victim) look() {
	r, err := v.linux.Survey(v.t.Context())
	if err != nil {
		v.t.Error(err)
		return
	}
	v.pages = append(v.pages[:0], r.Pages...)
}

// place returns the address in QEMU of a guest-physical address.
func (v *victim) place(gpa uint64) int64 {
	block, offset, ok := v.mem.Resolve(gpa)
	if !ok {
		return -1 // reading and writing there fail
	}
	return int64(v.mem.Blocks()[block].HVA + offset)
}

func (v *victim) read(gpa uint64, n int) []byte {
	b := make([]byte, n)
	if _, err := v.file.ReadAt(b, v.place(gpa)); err != nil {
		v.t.Errorf("read %#x: %v", gpa, err)
	}
	return b
}

func (v *victim) write(gpa uint64, data []byte) {
	v.undo = append(v.undo, write{gpa, v.read(gpa, len(data))})
	if _, err := v.file.WriteAt(data, v.place(gpa)); err != nil {
		v.t.Errorf("write %#x: %v", gpa, err)
	}
}

// heal undoes all writes.
func (v *victim) heal() {
	for i := len(v.undo) - 1; i >= 0; i-- {
		if _, err := v.file.WriteAt(v.undo[i].data, v.place(v.undo[i].at)); err != nil {
			v.t.Errorf("put %#x right: %v", v.undo[i].at, err)
		}
	}
	v.undo = nil
}

// change calls f to change each of the guest's pages of some kinds.
func (v *victim) change(f func(page []uint64), kinds ...pageclass.Kind) {
	n := 0
	words := make([]uint64, units.PageSize/8)
	for pfn, p := range v.pages {
		for _, k := range kinds {
			if p.Kind != k {
				continue
			}
			b := v.read(uint64(pfn)*units.PageSize, units.PageSize)
			binary.Decode(b, binary.LittleEndian, words)
			f(words)
			if again, err := binary.Append(nil, binary.LittleEndian, words); err == nil &&
				!bytes.Equal(b, again) {
				v.write(uint64(pfn)*units.PageSize, again)
				n++
			}
		}
	}
	if n == 0 {
		v.t.Errorf("no page of kinds %v was changed", kinds)
	}
}

// find returns where in memory a text is, at multiples of step bytes.
func (v *victim) find(text []byte, step int) []uint64 {
	var found []uint64
	for _, m := range v.mem.Mappings() {
		if !v.mem.Blocks()[m.Block].Located || m.Size < units.PageSize {
			continue
		}
		const part = 1 << 20
		for at := uint64(0); at < m.Size; at += part {
			b := v.read(m.GPA+at, int(min(part, m.Size-at)))
			for i := 0; ; i++ {
				n := bytes.Index(b[i:], text)
				if n < 0 {
					break
				}
				if i += n; i%step == 0 {
					found = append(found, m.GPA+at+uint64(i))
				}
			}
		}
	}
	return found
}

const noteHead = 24 // bytes before the text of a note

// note returns the address and the text of the kernel's note of itself.
func (v *victim) note() (uint64, []byte) {
	v.t.Helper()
	for _, at := range v.find([]byte("VMCOREINFO\x00"), 4) {
		if at%units.PageSize != 12 {
			continue
		}
		at -= 12
		size := binary.LittleEndian.Uint32(v.read(at+4, 4))
		if size > 0 && size <= units.PageSize-noteHead {
			return at, v.read(at+noteHead, int(size))
		}
	}
	v.t.Error("the guest has no note of itself")
	return 0, nil
}

// rewrite changes the text of the note.
func (v *victim) rewrite(pattern, with string) {
	at, text := v.note()
	changed := regexp.MustCompile(pattern).ReplaceAll(text, []byte(with))
	if bytes.Equal(text, changed) {
		v.t.Errorf("the guest's note has nothing like %s", pattern)
	}
	changed = changed[:min(len(changed), units.PageSize-noteHead)]
	v.write(at+noteHead, changed)
	v.write(at+4, binary.LittleEndian.AppendUint32(nil, uint32(len(changed))))
}

// symbol returns the guest-physical address of a symbol in the note.
func (v *victim) symbol(name string) (uint64, bool) {
	_, text := v.note()
	find := func(pattern string, base int) (uint64, bool) {
		m := regexp.MustCompile(pattern).FindSubmatch(text)
		if m == nil {
			return 0, false
		}
		if n, err := strconv.ParseUint(string(m[1]), base, 64); err == nil {
			return n, true
		}
		n, err := strconv.ParseInt(string(m[1]), base, 64)
		return uint64(n), err == nil
	}
	at, ok1 := find(`SYMBOL\(`+name+`\)=([0-9a-f]+)`, 16)
	base, ok2 := find(`NUMBER\(phys_base\)=(-?[0-9]+)`, 10)
	return at - 0xffffffff80000000 + base, ok1 && ok2
}

// types returns where the types of the kernel's BTF are, and their size. It ignores those of
// modules, which may be in pieces, and the remains of a copy from the kernel's own unpacking.
func (v *victim) types() (uint64, uint32) {
	for _, at := range v.find([]byte{0x9f, 0xeb, 1, 0, 24, 0, 0, 0, 0, 0, 0, 0}, 4) {
		// struct btf_header: ends with the types' size, and offset and size of names
		head := v.read(at, 24)
		size, names, length := binary.LittleEndian.Uint32(head[12:]),
			binary.LittleEndian.Uint32(head[16:]), binary.LittleEndian.Uint32(head[20:])
		if size < 1<<20 || size > 32<<20 || names != size || length > 32<<20 {
			continue
		}
		all := v.read(at+24+uint64(names), int(length))
		if bytes.Contains(all, []byte("\x00task_struct\x00")) &&
			!bytes.ContainsFunc(all, func(r rune) bool { return r >= 0x7f }) {
			return at + 24, size
		}
	}
	v.t.Fatal("the guest has no BTF")
	return 0, 0
}

// isPointer reports whether a word is probably an address of the kernel, with page tables of 4 or 5
// levels.
func isPointer(w uint64) bool { return w>>56 == 0xff && w < ^uint64(units.PageSize) }

// TestHostileKernels: whatever is wrong with the memory management of a guest's kernel, the
// eviction goes on. At worst it goes in plain order and leaves nothing out. The test repairs the
// damage before the guest runs on, so that the guest can check its memory.
func TestHostileKernels(t *testing.T) {
	evict.Near(t) // else pages of the broken guest may go ahead of the VM, where nobody heals them
	dice.seed(t)
	l := labtest.New(t, lab.Options{})
	vm := boot(t, l, lab.Spec{MemoryMiB: 256,
		Load: lab.Load{HotMiB: 32, IdleMiB: 32, OtherMiB: 16, Others: 2, FileMiB: 4}})
	descriptors := func(f func(d []uint64)) func(*victim) {
		return func(v *victim) {
			v.change(func(page []uint64) {
				for ; len(page) > 0; page = page[8:] {
					f(page[:8])
				}
			}, pageclass.PageDescriptors)
		}
	}
	// shuffle swaps words that look like pointers.
	shuffle := func(one uint64, kinds ...pageclass.Kind) func(*victim) {
		return func(v *victim) {
			last := uint64(0)
			v.change(func(page []uint64) {
				for i, w := range page {
					if isPointer(w) && chance.Uint64N(one) == 0 {
						if last != 0 {
							page[i] = last
						}
						last = w
					}
				}
			}, kinds...)
		}
	}
	all := []pageclass.Kind{pageclass.PageDescriptors, pageclass.KernelImage, pageclass.KernelStack,
		pageclass.PerCPU, pageclass.UserPageTable, pageclass.Slab, pageclass.KernelOther,
		pageclass.Unreferenced}
	fill := func(w uint64) func(*victim) {
		return func(v *victim) {
			v.change(func(page []uint64) {
				for i := range page {
					page[i] = w
				}
			}, all...)
		}
	}
	for _, a := range []struct {
		name    string
		running func(*victim) // before the eviction: nothing that the kernel uses
		frozen  func(*victim)
		skips   bool // pages are left out
		may     bool // pages may be left out: free pages are free beyond doubt even so
	}{
		{name: "none", skips: true},
		{name: "note plays with the terminal",
			running: func(v *victim) { v.rewrite(`OSRELEASE=....`, "OSRELEASE=\x1b[2J") }},
		{name: "note lies about page tables", running: func(v *victim) {
			v.rewrite(`SYMBOL\(swapper_pg_dir\)=[0-9a-f]+`,
				"SYMBOL(swapper_pg_dir)=fffffffffffff000")
		}},
		{name: "note lies about descriptors", running: func(v *victim) {
			v.rewrite(`(OFFSET\([a-z.]+\)|SIZE\([a-z_]+\)|LENGTH\([a-z._]+\))=[0-9]+`,
				"$1=18446744073709551615")
		}},
		{name: "note of garbage", running: func(v *victim) {
			v.rewrite(`(?s)\n.*`,
				"\n"+strings.Repeat("SYMBOL(mem_section)=\xff\x00=\x1b[2J\n", 120))
		}},
		{name: "types of garbage", running: func(v *victim) {
			at, size := v.types()
			garbage := make([]byte, size/2)
			random(garbage)
			v.write(at, garbage)
		}},
		{name: "types in circles", running: func(v *victim) {
			// Words of struct btf_type: name, info, and size or type. All are typedefs of the next
			// but one.
			at, size := v.types()
			var b []byte
			for i := range size / 12 {
				b = binary.LittleEndian.AppendUint32(b, 1)
				b = binary.LittleEndian.AppendUint32(b, 8<<24)
				b = binary.LittleEndian.AppendUint32(b, (i+2)%(size/12)+1)
			}
			v.write(at, b)
		}},
		{name: "symbols of garbage", running: func(v *victim) {
			for _, name := range []string{"kallsyms_token_table", "kallsyms_names"} {
				if at, ok := v.symbol(name); ok { // since Linux 6.0
					garbage := make([]byte, 16<<10)
					random(garbage)
					v.write(at, garbage)
				}
			}
		}},
		{name: "descriptors at random", frozen: descriptors(func(d []uint64) {
			if chance.IntN(8) == 0 {
				d[chance.IntN(8)] = []uint64{0, ^uint64(0), chance.Uint64(),
					1 << chance.IntN(64)}[chance.IntN(4)]
			}
		})},
		{name: "lists in circles", frozen: func(v *victim) {
			var one [2]uint64
			descriptors(func(d []uint64) {
				for i := range one {
					if isPointer(d[1+i]) && isPointer(d[2-i]) {
						if one[i] == 0 {
							one[i] = d[1+i]
						}
						d[1+i] = one[i]
					}
				}
			})(v)
		}},
		{name: "lists mixed up", frozen: shuffle(1, pageclass.PageDescriptors)},
		{name: "huge orders", frozen: descriptors(func(d []uint64) {
			if isPointer(d[1]) && d[5] <= 10 {
				d[5] = []uint64{10, 11, 63, 64, 1 << 40, ^uint64(0)}[chance.IntN(6)]
			}
		})},
		{name: "all alike", frozen: func(v *victim) { // a block of free pages, every one of them
			var block [8]uint64
			descriptors(func(d []uint64) {
				if isPointer(d[1]) && isPointer(d[2]) && d[5] > 0 && d[5] <= 10 &&
					block == [8]uint64{} {
					copy(block[:], d)
				}
				if block != [8]uint64{} {
					copy(d, block[:])
				}
			})(v)
		}},
		{name: "kernel's variables mixed up",
			frozen: shuffle(8, pageclass.KernelImage, pageclass.PerCPU), may: true},
		{name: "objects mixed up", frozen: shuffle(8, pageclass.Slab), may: true},
		{name: "page tables of garbage", frozen: func(v *victim) {
			v.change(func(page []uint64) {
				for i := range page {
					if chance.IntN(4) == 0 {
						page[i] = chance.Uint64()&^0xfff&(1<<28-1) | 0x67
					}
				}
			}, pageclass.UserPageTable)
		}, may: true},
		{name: "everything mixed up", frozen: shuffle(16, all...)},
		{name: "everything zero", frozen: fill(0)},
		{name: "everything ones", frozen: fill(^uint64(0))},
		{name: "none, again", skips: true},
	} {
		ok := t.Run(a.name, func(t *testing.T) {
			var report evict.Report
			// On a busy machine the survey may come late, and find nothing broken.
			for wait := 2 * time.Second; ; wait *= 2 {
				v := newVictim(t, vm)
				if a.running != nil {
					a.running(v)
				}
				var began, healed time.Time // of the frozen guest
				s := evict.Source{LoadTimeout: 2 * time.Minute, Show: func(p evict.Progress) {
					switch {
					case p.State == evict.Loading && began.IsZero(): // frozen, not yet looked at
						began = time.Now()
						if a.frozen != nil {
							v.look()
							a.frozen(v)
						}
					case p.State == evict.Committing && healed.IsZero():
						// Before the commit, the source sends only pages that loading the devices
						// touches. This guest has no device that touches more than a ROM.
						if a.running != nil || a.frozen != nil {
							time.Sleep(wait) // for the survey
						}
						healed = time.Now()
						v.heal()
					}
				}}
				vm, report = suffer(t, l, vm, s, nil)
				if healed.IsZero() {
					t.Fatal("the guest runs with what was broken")
				}
				if a.running == nil && a.frozen == nil ||
					report.Enlightenment.Known <= healed.Sub(began).Seconds() {
					break
				}
				if wait > 10*time.Second {
					t.Fatalf("the survey was not done in %v", wait)
				}
			}
			e, skipped := report.Enlightenment, report.Pages.Skipped
			// Pages that were free when the VM came here have no memory any more.
			left := skipped + report.Pages.Unused
			if left == 0 && e.Doubts == "" && len(e.Notes) == 0 {
				t.Error("nothing is left out, and nothing says why")
			}
			if a.skips && left == 0 {
				t.Error("nothing is left out")
			}
			if !a.skips && !a.may && skipped > 4096 { // small zones may be beyond doubt
				t.Errorf("%d pages are left out", skipped)
			}
		})
		if !ok {
			return
		}
	}
	labtest.MustCheck(t, vm)
}

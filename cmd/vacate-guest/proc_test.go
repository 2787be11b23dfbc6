package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/agent"
	"vacate/internal/guest/pageclass"
	"vacate/lab/labtest"
)

// recorded returns the files of that name in /proc of a real guest; TestRecord makes them.
func recorded(t testing.TB, name string) []byte {
	t.Helper()
	names, err := filepath.Glob("testdata/" + name + "-*")
	if err != nil || len(names) == 0 {
		t.Fatal("nothing recorded of", name, err)
	}
	b, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseStat(t *testing.T) {
	s, err := parseStat(recorded(t, "1-stat"))
	if err != nil || s.name != "init" || s.kernel || s.threads < 2 || s.rss < 100 {
		t.Errorf("%+v, %v", s, err)
	}
	s, err = parseStat([]byte("5 (a) R (b)) S" + strings.Repeat(" 0", 5) + " 2097152" +
		strings.Repeat(" 1", 40)))
	if s.name != "a) R (b)" || s.running || !s.kernel || err != nil {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestParseSched(t *testing.T) {
	s, err := parseSched(recorded(t, "1-sched"))
	if err != nil || s.ran < 100*time.Millisecond || s.ran > time.Minute || s.cpu <= 0 ||
		s.cpu > s.ran {
		t.Errorf("%+v, %v", s, err)
	}
	s, err = parseSched([]byte("x\nse.exec_start     :    12.000345\nse.sum_exec_runtime : 1.5\n"))
	if s.ran != 12*time.Millisecond+345*time.Nanosecond || s.cpu != 1500*time.Microsecond ||
		err != nil {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestIomem(t *testing.T) {
	g := newGuest(t.TempDir(), t.TempDir())
	if err := os.WriteFile(g.proc+"/iomem", recorded(t, "iomem"), 0o600); err != nil {
		t.Fatal(err)
	}
	last, err := g.lastFrame()
	if err != nil || last < 60000 || last >= 1<<16 { // 256 MiB
		t.Errorf("last frame %d, %v", last, err)
	}
	pages := make([]pageclass.Page, 1<<16)
	for i := range pages {
		pages[i] = classify(kpfReserved, false)
	}
	g.kernelRanges(pages)
	counts := map[pageclass.Kind]int{}
	for _, p := range pages {
		counts[p.Kind]++
	}
	if counts[pageclass.KernelText] < 1000 || counts[pageclass.KernelImage] < 1000 ||
		pages[0xf0].Class != pageclass.MMIO {
		t.Errorf("%v, ROM %+v", counts, pages[0xf0])
	}
	if err := os.WriteFile(g.proc+"/iomem", []byte("00000000-00000000 : System RAM\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := g.lastFrame(); err == nil {
		t.Error("no error for what others than root see")
	}
}

func TestClassify(t *testing.T) {
	for _, tt := range []struct {
		flags uint64
		mglru bool
		want  pageclass.Page
	}{
		{1<<20 | 1<<4, false, pageclass.Page{}},
		{1 << 10, false, pageclass.Page{Kind: pageclass.FreeBuddy, Class: pageclass.Free}},
		{0, false, pageclass.Page{Kind: pageclass.KernelOther, Class: pageclass.Kernel}},
		{1<<7 | 1<<16, false, pageclass.Page{Kind: pageclass.Slab, Class: pageclass.Kernel}},
		{0x402415828, false, pageclass.Page{Kind: pageclass.Anon, Class: pageclass.Other,
			Flags: pageclass.Mapped}},
		{0x40000006c, false, pageclass.Page{Kind: pageclass.File, Class: pageclass.FileActive,
			Flags: pageclass.Active}},
		{0x40000002c, false, pageclass.Page{Kind: pageclass.File, Class: pageclass.FileInactive}},
		{0x40000002c, true, pageclass.Page{Kind: pageclass.File, Class: pageclass.FileActive,
			Flags: pageclass.Active}},
		{1<<5 | 1<<14 | 1<<4, false,
			pageclass.Page{Kind: pageclass.Shmem, Class: pageclass.FileInactive,
				Flags: pageclass.Dirty}},
		{1 << 26, false, pageclass.Page{Kind: pageclass.UserPageTable, Class: pageclass.PageTable}},
	} {
		if got := classify(tt.flags, tt.mglru); got != tt.want {
			t.Errorf("%#x: %+v, want %+v", tt.flags, got, tt.want)
		}
	}
}

// A tail has what its head has, whatever its own flags are.
func TestTails(t *testing.T) {
	var b []byte
	for _, f := range []uint64{1 << 10, 1<<5 | 1<<12 | 1<<15 | 1<<22, 1 << 16, 1<<16 | 1<<22,
		1 << 19, 1 << 16, 1 << 7} {
		b = binary.NativeEndian.AppendUint64(b, f)
	}
	pages := make([]pageclass.Page, 8)
	classifyAll(pages, b, false)
	var got []pageclass.Kind
	for _, p := range pages {
		got = append(got, p.Kind)
	}
	want := []pageclass.Kind{pageclass.FreeBuddy, pageclass.Anon, pageclass.Anon, pageclass.Anon,
		pageclass.Poisoned, pageclass.Poisoned, pageclass.Slab, pageclass.None}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestTables(t *testing.T) {
	s := survey{g: newGuest("", "")}
	s.Pages = make([]pageclass.Page, 4096)
	s.Pages[9].Kind = pageclass.UserPageTable
	for i := 1000; i < 3000; i++ {
		s.Pages[i].Kind = pageclass.Anon
	}
	s.Pages[2000].Owner = 3
	s.Pages[1030] = pageclass.Page{} // its flags were not read
	table := make([]byte, 4096)
	for i, e := range []uint64{
		// accessed, not, not present, the kernel's
		2000<<12 | 0x27, 2001<<12 | 0x07, 2002<<12 | 0x26, 2003<<12 | 0x23,
		// 2 MiB, far outside, a table
		1024<<12 | 0xa7, 1<<40<<12>>1 | 0x27, 1 << 52 >> 1, 9<<12 | 0x27,
		1<<63 | 2004<<12 | 0x67,
	} {
		binary.LittleEndian.PutUint64(table[8*i:], e)
	}
	mapped, accessed, below := s.readTable(8, table)
	if mapped != 515 || accessed != 514 || below != 9 || s.Pages[8].Owner != 3 {
		t.Errorf("mapped %d, accessed %d, below %d, owner %d", mapped, accessed, below,
			s.Pages[8].Owner)
	}
	for frame, want := range map[int]bool{2000: true, 2001: false, 2002: false, 2003: false,
		2004: true, 1024: true, 1030: false, 1535: true, 1536: false} {
		if got := s.Pages[frame].Flags&pageclass.Accessed != 0; got != want {
			t.Errorf("frame %d: accessed %v, want %v", frame, got, want)
		}
	}
}

func TestKcore(t *testing.T) {
	list, err := kcore(bytes.NewReader(recorded(t, "kcore")))
	if err != nil || len(list) == 0 {
		t.Fatal(list, err)
	}
	var sum uint64
	for _, s := range list {
		sum += s.size
	}
	if sum < 250<<20 || sum > 256<<20 {
		t.Errorf("%d bytes of memory in %+v", sum, list)
	}
}

// TestPresent compares the ioctl with what is known of this process's own memory.
func TestPresent(t *testing.T) {
	const pages = 2048
	mem, err := unix.Mmap(-1, 0, pages*4096, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	var want []int
	for i := range pages {
		if i%7 == 3 || i > 300 && i < 900 || i == pages-1 {
			mem[i*4096] = 1
			want = append(want, i)
		}
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g := newGuest("/proc", "/sys")
	start := addressOf(mem)
	var got []int
	for at := start; at < start+pages*4096; {
		from, to, next := g.present(f, at, start+pages*4096, 100*4096)
		if next <= at {
			t.Fatalf("from %#x on to %#x", at, next)
		}
		for a := from; a < to; a += 4096 {
			got = append(got, int((a-start)/4096))
		}
		at = next
	}
	if !g.scanEmpty {
		t.Skip("this kernel has no PAGEMAP_SCAN")
	}
	if !slices.Equal(got, want) {
		t.Errorf("present %v, want %v", got, want)
	}
}

// The agent reads its own kernel's files, but must not die of a strange one.
func FuzzProc(f *testing.F) {
	names, err := filepath.Glob("testdata/*-*")
	if err != nil || len(names) == 0 {
		f.Fatal("nothing recorded", err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		parseStat(b)
		if s, err := parseSched(b); err == nil && (s.ran < 0 || s.cpu < 0) {
			t.Errorf("%+v", s)
		}
		for line := range strings.Lines(string(b)) {
			if m, err := parseMapping(strings.TrimSuffix(line, "\n")); err == nil &&
				(m.end < m.start || m.start%4096 != 0) {
				t.Errorf("%+v", m)
			}
			parseArea(strings.TrimSuffix(line, "\n"))
		}
		kcore(bytes.NewReader(b))
		pages := make([]pageclass.Page, 4096)
		classifyAll(pages, b[:min(len(b), 8*len(pages))&^7], true)
		s := survey{g: newGuest("", ""), Survey: pageclass.Survey{Pages: pages}}
		s.claimEntries(1, true, true, b)
		if len(b) >= 4096 {
			s.readTable(1, b[:4096])
		}
		if len(s.Sequence) > len(pages) {
			t.Error("frames are twice in the sequence")
		}
	})
}

// TestHere surveys the machine that the test runs on: as root, of itself and a child.
func TestHere(t *testing.T) {
	if testing.Short() {
		t.Skip("short: needs root")
	}
	g := newGuest("/proc", "/sys")
	labtest.Need(t, g.check())
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()
	owned := func(s *pageclass.Survey) (n int) {
		for _, p := range s.Pages {
			if p.Owner != 0 && s.Processes[p.Owner-1].PID == child.Process.Pid {
				n++
			}
		}
		return n
	}
	r := &agent.Request{Deadline: time.Minute, ActiveWithin: time.Hour, Frames: 1 << 32}
	s, incomplete, err := g.survey(r, time.Now())
	if err != nil || incomplete || owned(s) < 10 {
		t.Errorf("%v, incomplete %v, %d pages of the child", err, incomplete, owned(s))
	}
	// Half of the time is over before it begins, so that no page flags are read, but maps are.
	s, incomplete, err = g.survey(r, time.Now().Add(-31*time.Second))
	if err != nil || !incomplete || owned(s) < 10 || len(s.Sequence) < 10 {
		t.Errorf("without page flags: %v, incomplete %v, %d pages of the child", err, incomplete,
			owned(s))
	}
	r.Deadline, r.Frames = 0, 1000
	s, incomplete, err = g.survey(r, time.Now())
	if err != nil || !incomplete || len(s.Pages) != 1000 {
		t.Errorf("without time: %v, incomplete %v, %d pages", err, incomplete, len(s.Pages))
	}
}

func TestFlags(t *testing.T) {
	var out, errs bytes.Buffer
	for _, args := range [][]string{{"--clear", "1s"}, {"more"}, {"--nothing"}} {
		if err := run(args, &out, &errs); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	if err := run([]string{"--help"}, &out, &errs); err == nil ||
		!strings.Contains(errs.String(), "org.vacate.agent") {
		t.Errorf("help: %v, %q", err, errs.String())
	}
}

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	lp "vacate/lab/loadproto"
)

// reportedBad bounds the bad words that are reported in full, over all sets.
const reportedBad = 20

// badSink counts bad pages and reports the first of them.
type badSink struct {
	pages atomic.Uint64
	words chan lp.BadWord // taken by the reporter; full means enough was said
}

// look counts page n of a set if it is not as base says. It is called for
// pages already known to be bad, or in full checks.
func (b *badSink) look(set string, n int, p *lp.Page, base uint64) bool {
	i, want, got := p.FirstBad(base)
	if i < 0 {
		return false
	}
	if b.pages.Add(1) <= reportedBad {
		b.words <- lp.BadWord{Set: set, Page: uint64(n), Word: uint64(i), Want: want, Got: got}
	}
	return true
}

// mapPages returns n zero pages outside the Go heap.
func mapPages(n int) ([]lp.Page, error) {
	if n == 0 {
		return nil, nil
	}
	mem, err := unix.Mmap(-1, 0, n*lp.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d pages: %w; give the guest more memory", n, err)
	}
	return unsafe.Slice((*lp.Page)(unsafe.Pointer(unsafe.SliceData(mem))), n), nil
}

// still is memory that is written once.
type still struct {
	set   string
	seed  uint64
	pages []lp.Page
}

func newStill(set string, seed uint64, n int) (*still, error) {
	s := &still{set: set, seed: lp.SetSeed(seed, set)}
	var err error
	if s.pages, err = mapPages(n); err != nil {
		return nil, fmt.Errorf("%s set: %w", set, err)
	}
	for i := range s.pages {
		s.pages[i].Fill(lp.Base(s.seed, uint64(i), 0))
	}
	return s, nil
}

func (s *still) check(bad *badSink) (lp.SetResult, error) {
	r := lp.SetResult{Set: s.set, Pages: uint64(len(s.pages))}
	for i := range s.pages {
		if bad.look(s.set, i, &s.pages[i], lp.Base(s.seed, uint64(i), 0)) {
			r.Bad++
		}
	}
	return r, nil
}

// onFile is the page cache of a file or disk.
type onFile struct {
	set  string
	seed uint64
	f    *os.File
	n    int
}

// newDisk reads n pages of the lab's disk into the page cache.
func newDisk(seed uint64, n int, bad *badSink) (*onFile, error) {
	f, err := os.Open("/dev/vda")
	if err != nil {
		return nil, fmt.Errorf("cache set: %w; it needs a machine with a disk", err)
	}
	d := &onFile{lp.SetCache, lp.SetSeed(seed, lp.SetCache), f, n}
	if r, err := d.check(bad); err != nil {
		return nil, err
	} else if r.Bad > 0 {
		return nil, fmt.Errorf("cache set: %d of %d pages of the disk do not hold the lab's pattern", r.Bad, n)
	}
	return d, nil
}

func newFile(seed uint64, n int) (*onFile, error) {
	f, err := os.OpenFile("/pages", os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("file set: %w", err)
	}
	d := &onFile{lp.SetFile, lp.SetSeed(seed, lp.SetFile), f, n}
	var p lp.Page
	for i := range n {
		p.Fill(lp.Base(d.seed, uint64(i), 0))
		if _, err := f.WriteAt(bytesOf(&p), int64(i)*lp.PageSize); err != nil {
			return nil, fmt.Errorf("file set: %w", err)
		}
	}
	return d, nil
}

func bytesOf(p *lp.Page) []byte { return (*[lp.PageSize]byte)(unsafe.Pointer(p))[:] }

func (d *onFile) check(bad *badSink) (lp.SetResult, error) {
	r := lp.SetResult{Set: d.set, Pages: uint64(d.n)}
	var p lp.Page
	for i := range d.n {
		if _, err := d.f.ReadAt(bytesOf(&p), int64(i)*lp.PageSize); err != nil {
			return r, fmt.Errorf("%s set: %w", d.set, err)
		}
		if bad.look(d.set, i, &p, lp.Base(d.seed, uint64(i), 0)) {
			r.Bad++
		}
	}
	return r, nil
}

// otherArg is the first argument of the other process; pages and seed follow.
const otherArg = "other"

// otherProcess is the parent's end of the other process: it says "ready" once,
// then answers each newline with its check's lines.
type otherProcess struct {
	pages int
	in    io.Writer
	out   *bufio.Reader
}

func startOther(seed uint64, n int) (*otherProcess, error) {
	cmd := exec.Command("/init", otherArg, strconv.Itoa(n), strconv.FormatUint(seed, 10))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the other process: %w", err)
	}
	o := &otherProcess{n, in, bufio.NewReader(out)}
	if line, err := o.out.ReadString('\n'); err != nil || line != "ready\n" {
		return nil, fmt.Errorf("the other process said %q: %v; give the guest more memory", line, err)
	}
	return o, nil
}

func (o *otherProcess) check(bad *badSink) (lp.SetResult, error) {
	if _, err := o.in.Write([]byte("\n")); err != nil {
		return lp.SetResult{}, fmt.Errorf("the other process is gone: %w", err)
	}
	for {
		line, err := o.out.ReadSlice('\n')
		if err != nil {
			return lp.SetResult{}, fmt.Errorf("the other process is gone: %w", err)
		}
		m, err := lp.Parse(line[:len(line)-1])
		if err != nil {
			return lp.SetResult{}, fmt.Errorf("the other process: %w", err)
		}
		switch m := m.(type) {
		case lp.BadWord:
			if bad.pages.Load() < reportedBad {
				bad.words <- m
			}
			bad.pages.Add(1)
		case lp.SetResult:
			// Only the first bad words were sent, one each.
			if m.Bad > reportedBad {
				bad.pages.Add(m.Bad - reportedBad)
			}
			return m, nil
		default:
			return lp.SetResult{}, fmt.Errorf("the other process said %T", m)
		}
	}
}

// other is the main function of the other process. It returns only what it
// cannot go on with.
func other(args []string) error {
	if len(args) != 2 {
		return errors.New("want pages and seed")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	seed, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return err
	}
	s, err := newStill(lp.SetOther, seed, n)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	ask := bufio.NewReader(os.Stdin)
	for {
		if _, err := ask.ReadByte(); err != nil {
			return err
		}
		bad := &badSink{words: make(chan lp.BadWord, reportedBad)}
		r, err := s.check(bad)
		if err != nil {
			return err
		}
		close(bad.words)
		var out []byte
		for w := range bad.words {
			out = lp.Append(out, w)
		}
		if _, err := os.Stdout.Write(lp.Append(out, r)); err != nil {
			return err
		}
	}
}

package evict

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"vacate/internal/evict/pageset"
	"vacate/internal/qemu/migstream"

	"pgregory.net/rapid"
)

// sink is a connection to a QEMU that accepts everything.
type sink struct {
	net.Conn
	bytes.Buffer
}

func (s *sink) Read([]byte) (int, error)    { return 0, io.EOF }
func (s *sink) Write(b []byte) (int, error) { return s.Buffer.Write(b) }

const testSection = 2

// fillPage makes each guest page of a VM different, and none zero.
func fillPage(b []byte, block int, page uint64) {
	for i := 0; i < len(b); i += migstream.TargetPageSize {
		binary.BigEndian.PutUint64(b[i:],
			uint64(block)<<56|page<<16|uint64(i/migstream.TargetPageSize)+1)
	}
}

// pageData returns the data of runs, in the format of a frame.
func pageData(l layout, runs []pageRun) (data []byte) {
	for _, r := range runs {
		size := l[r.Block].PageSize
		for p := r.First; p < r.End() && !r.Zero; p++ {
			b := make([]byte, size)
			fillPage(b, r.Block, uint64(p))
			data = append(data, b...)
		}
	}
	return data
}

// decoded reads the stream that a placer wrote for a layout, as QEMU would. It returns whether each
// guest page that came was of data, and checks the contents. It makes sure that pages of the back
// end come whole and that no section is long.
func decoded(t interface {
	Helper()
	Fatalf(string, ...any)
}, l layout, stream []byte) map[pageKey]bool {
	t.Helper()
	start := migstream.Configuration{Machine: "pc"}.Append(migstream.Header{}.Append(nil))
	start = migstream.SectionStart{ID: testSection, Name: "ram", Version: 4}.Append(start)
	var sizes migstream.MemSize
	largest := 0
	for _, b := range l {
		sizes.Blocks = append(sizes.Blocks,
			migstream.Block{Name: b.Name, Length: b.Length, PageSize: b.PageSize})
		largest = max(largest, int(b.PageSize))
	}
	start = migstream.Footer{ID: testSection}.Append(migstream.EOS{}.Append(sizes.Append(start)))
	r := migstream.NewReader(bytes.NewReader(append(start, stream...)))
	pages := map[pageKey]bool{}
	var whole pageKey // the page of the back end that is under way
	records, data, zeros, ended := 0, 0, 0, false
	for {
		item, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("%v", err)
		}
		switch it := item.(type) {
		case migstream.SectionPart:
			data, zeros = 0, 0
		case migstream.EOS:
			if records != 0 {
				t.Fatalf("a section ends inside page %d of block %d", whole.page, whole.block)
			}
			if data >= sectionBytes+largest ||
				zeros >= sectionZeros+largest/migstream.TargetPageSize {
				t.Fatalf("a section has %d bytes of pages and %d zero pages", data, zeros)
			}
		case migstream.SectionEnd:
			ended = true
		case migstream.Page:
			block := l.find(it.Block)
			size := l[block].PageSize
			at := pageKey{block, pageset.Page(it.Offset / size)}
			if records == 0 {
				whole = at
			} else if at != whole {
				t.Fatalf("page %d of block %d comes inside page %d of block %d", at.page, block,
					whole.page, whole.block)
			}
			if uint64(records)*migstream.TargetPageSize != it.Offset%size {
				t.Fatalf("record at %#x is number %d of its page", it.Offset, records)
			}
			records = (records + 1) % int(size/migstream.TargetPageSize)
			key := pageKey{block, pageset.Page(it.Offset / migstream.TargetPageSize)}
			if _, twice := pages[key]; twice {
				t.Fatalf("page at %#x of %s comes twice", it.Offset, it.Block)
			}
			pages[key] = it.Data != nil
			if it.Data == nil {
				zeros++
				if it.Fill != 0 {
					t.Fatalf("page at %#x of %s is filled with %#x", it.Offset, it.Block, it.Fill)
				}
				continue
			}
			data += len(it.Data)
			want := make([]byte, size)
			fillPage(want, block, uint64(at.page))
			if !bytes.Equal(it.Data, want[it.Offset%size:][:migstream.TargetPageSize]) {
				t.Fatalf("page at %#x of %s has other contents", it.Offset, it.Block)
			}
		}
	}
	if !ended {
		t.Fatalf("the RAM section does not end")
	}
	return pages
}

// expect lists the guest pages of runs.
func expect(l layout, pages map[pageKey]bool, runs []pageRun) {
	for _, r := range runs {
		n := l[r.Block].PageSize / migstream.TargetPageSize
		for p := uint64(r.First) * n; p < uint64(r.End())*n; p++ {
			pages[pageKey{r.Block, pageset.Page(p)}] = !r.Zero
		}
	}
}

// drawRuns cuts each block into runs, and takes some of them in any order.
func drawRuns(t *rapid.T, l layout) (runs []pageRun) {
	for i, b := range l {
		for p := 0; p < b.Pages; {
			n := rapid.IntRange(1, b.Pages-p).Draw(t, "pages")
			if rapid.Bool().Draw(t, "sent") {
				runs = append(runs,
					pageRun{run(i, pageset.Page(p), n), rapid.Bool().Draw(t, "zero")})
			}
			p += n
		}
	}
	return rapid.Permutation(runs).Draw(t, "order")
}

// QEMU reads what was placed: the same pages, each once, whole.
func TestPlacer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := layout{{"pc.ram", 700 * 4096, 4096, 700}, {"huge", 2 * maxPage, maxPage, 2},
			{"pc.bios", 3 * 4096, 4096, 3}}
		if rapid.IntRange(0, 9).Draw(t, "huge pages") > 0 {
			l[1] = blockLayout{"vga.vram", 40 * 4096, 4096, 40}
		}
		s := &sink{}
		p := newPlacer(s, testSection, l)
		runs := drawRuns(t, l)
		want := map[pageKey]bool{}
		expect(l, want, runs)
		for rest := runs; len(rest) > 0; {
			n := rapid.IntRange(1, len(rest)).Draw(t, "runs at once")
			if _, _, err := p.place(rest[:n], pageData(l, rest[:n]),
				rapid.Bool().Draw(t, "urgent")); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if err := p.end(); err != nil {
			t.Fatal(err)
		}
		got := decoded(t, l, s.Bytes())
		if len(got) != len(want) {
			t.Fatalf("%d pages came of %d", len(got), len(want))
		}
		for key, data := range want {
			if came, ok := got[key]; !ok || came != data {
				t.Fatalf("page %d of block %d: came %v, with data %v, want %v", key.page, key.block,
					ok, came, data)
			}
		}
	})
}

// Several lanes place at the same time: their sections do not mix.
func TestPlacerConcurrently(t *testing.T) {
	l := layout{{"pc.ram", 4096 * 4096, 4096, 4096}}
	s := &sink{}
	p := newPlacer(s, testSection, l)
	var lanes sync.WaitGroup
	want := map[pageKey]bool{}
	for lane := range 4 {
		var all [][]pageRun
		for i := range 16 {
			runs := []pageRun{{run(0, pageset.Page(lane*1024+i*64), 40), false},
				{run(0, pageset.Page(lane*1024+i*64+40), 24), true}}
			expect(l, want, runs)
			all = append(all, runs)
		}
		lanes.Go(func() {
			for _, runs := range all {
				if _, _, err := p.place(runs, pageData(l, runs), lane == 3); err != nil {
					t.Error(err)
				}
			}
		})
	}
	lanes.Wait()
	if err := p.end(); err != nil {
		t.Fatal(err)
	}
	if got := decoded(t, l, s.Bytes()); len(got) != len(want) {
		t.Errorf("%d pages came of %d", len(got), len(want))
	}
}

// An urgent writer goes ahead of one that came sooner.
func TestPlacerUrgent(t *testing.T) {
	p := newPlacer(&sink{}, testSection, small)
	p.acquire(false)
	order := make(chan bool, 4)
	var waiting sync.WaitGroup
	for _, urgent := range []bool{false, false, true, true} {
		waiting.Go(func() {
			p.acquire(urgent)
			order <- urgent
			p.release()
		})
	}
	for {
		p.mu.Lock()
		n := p.urgent
		p.mu.Unlock()
		if n == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	p.release()
	waiting.Wait()
	for i, want := range []bool{true, true, false, false} {
		if urgent := <-order; urgent != want {
			t.Errorf("number %d was urgent: %v", i, urgent)
		}
	}
}

type broken struct{ net.Conn }

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func TestPlacerFails(t *testing.T) {
	p := newPlacer(broken{}, testSection, small)
	runs := []pageRun{{run(0, 0, 1), true}}
	place := func(urgent bool) error {
		_, _, err := p.place(runs, nil, urgent)
		return err
	}
	for name, err := range map[string]error{"place": place(false), "raw": p.raw([]byte("x")),
		"end": p.end(), "again": place(true)} {
		if !errors.Is(err, errQEMU) || !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

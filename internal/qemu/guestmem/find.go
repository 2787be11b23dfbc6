package guestmem

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// What nobody tells the address of is found where QEMU itself keeps it: in its struct RAMBlock,
// which lies on its heap. The facts about that struct hold on 64-bit hosts, from QEMU 7.2
// to 11.1 alike. Where another version differs, nothing is found.
const (
	recordHost = 24 // *uint8_t: the block's first byte
	recordUsed = 48 // u64: bytes in use
	recordMax  = 56 // u64: bytes that it may grow to
	recordName = 76 // char[256]
	recordLink = 344
	recordTail = 360 // from here to recordSize one word is the page size: which, differs by version
	recordSize = 424
	recordStep = 8 // the struct's alignment

	nameSize = 256
)

// maxHeap is how much is searched. A real QEMU's heap has some 10 MiB, which take some 10 ms of a
// core. It bounds the work, not the time: an overloaded host takes its time.
const maxHeap = 4 << 30

// An Extent is what is known of a block that has yet to be found.
type Extent struct {
	Name     string
	Size     uint64 // bytes in use
	Total    uint64 // bytes that it may grow to; 0: not known
	PageSize uint64 // of the host memory
}

// Find returns where blocks of a QEMU lie, without asking it: in the order of the extents. It
// searches QEMU's heap for what QEMU itself knows of them, and believes what the process's mappings
// bear out. A block that it finds not exactly once is an error that names it.
func Find(ctx context.Context, pid int, blocks []Extent) ([]Block, error) {
	found, err := findIn(ctx, pid, blocks)
	if err != nil {
		return nil, fmt.Errorf("find guest memory: %w", err)
	}
	return found, nil
}

func findIn(ctx context.Context, pid int, blocks []Extent) ([]Block, error) {
	m, err := hold(pid)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	vmas, err := m.mappings()
	if err != nil {
		return nil, err
	}
	if err := m.mayRead(vmas); err != nil {
		return nil, err
	}
	return m.image(vmas).find(ctx, blocks, nil)
}

// image is the process's memory, for a search.
func (m *Memory) image(vmas []vma) image {
	read := func(dst []byte, at uint64) error {
		for len(dst) > 0 {
			n, err := m.readv(dst, []unix.RemoteIovec{{Base: uintptr(at), Len: len(dst)}})
			if err != nil {
				return err
			}
			dst, at = dst[n:], at+uint64(n) // #nosec G115 -- positive
		}
		return nil
	}
	return image{vmas, read, m.touched}
}

// An image is memory of a process that is searched.
type image struct {
	vmas []vma
	read func(dst []byte, at uint64) error
	// touched adds, for each of n pages from number first on, whether it is there.
	touched func(first, n uint64, dst []uint64) error
}

// A finding is what a struct RAMBlock says.
type finding struct {
	at   uint64 // of the struct
	name string
	host uint64
	max  uint64
	link uint64 // where the pointer to this struct is, in the list of all
}

// find does what Find says. It does not search blocks whose place is known already.
func (p image) find(ctx context.Context, blocks []Extent, known []Block) ([]Block, error) {
	wanted := make(map[string]Extent, len(blocks))
	for _, b := range blocks {
		_, twice := wanted[b.Name]
		if twice || b.Name == "" || len(b.Name) >= nameSize || strings.ContainsRune(b.Name, 0) ||
			b.Size > 1<<52 ||
			b.Total > 1<<52 || b.PageSize < units.PageSize || bits.OnesCount64(b.PageSize) != 1 {
			return nil, fmt.Errorf("no such block can be found: %+v", b)
		}
		wanted[b.Name] = b
	}
	records := make(map[string][]finding)
	searched, err := p.search(ctx, wanted, known, func(r finding) {
		if p.bearsOut(r, wanted[r.name].PageSize) {
			records[r.name] = append(records[r.name], r)
		}
	})
	if err != nil {
		return nil, err
	}
	found := make([]Block, len(blocks))
	var none, several []string
	for i, b := range blocks {
		switch rs := records[b.Name]; len(rs) {
		case 0:
			none = append(none, b.Name)
		case 1:
			found[i] = p.block(b, rs[0])
		default:
			several = append(several, b.Name)
		}
	}
	if none != nil {
		err = fmt.Errorf("none of its heap's %d MiB says where memory %q lies", searched>>20, none)
	}
	if several != nil {
		err = errors.Join(err,
			fmt.Errorf("its heap says that memory %q lies in several places", several))
	}
	if err != nil {
		return nil, err
	}
	if err := apart(found, records); err != nil {
		return nil, err
	}
	return found, nil
}

// block is b at the place that r tells.
func (p image) block(b Extent, r finding) Block {
	out := Block{Name: b.Name, Size: b.Size, Total: r.max, PageSize: b.PageSize, HVA: r.host,
		Located: true}
	out.Kind = covering(p.vmas, r.host, r.host+out.space())
	return out
}

// apart makes sure that no two blocks share memory, and that none has what told of one.
func apart(blocks []Block, records map[string][]finding) error {
	byPlace := slices.SortedFunc(slices.Values(blocks), func(a, b Block) int {
		return cmp.Compare(a.HVA, b.HVA)
	})
	for i, b := range byPlace {
		if i > 0 && byPlace[i-1].HVA+byPlace[i-1].space() > b.HVA {
			return fmt.Errorf("its heap says that memory %q and %q lie in one place",
				byPlace[i-1].Name, b.Name)
		}
	}
	for _, b := range blocks {
		at := records[b.Name][0].at
		n, _ := slices.BinarySearchFunc(byPlace, at,
			func(b Block, at uint64) int { return cmp.Compare(b.HVA, at+1) })
		if n > 0 && at < byPlace[n-1].HVA+byPlace[n-1].space() {
			return fmt.Errorf("what says where memory %q lies is in the guest's own memory %q",
				b.Name, byPlace[n-1].Name)
		}
	}
	return nil
}

// search calls each for every struct in QEMU's heap that fits a wanted block. It returns how many
// bytes it read.
func (p image) search(ctx context.Context, wanted map[string]Extent, known []Block,
	each func(finding)) (uint64, error) {
	const window = 1 << 20
	// A struct that begins in a window is read with it to its end.
	const more = (recordSize + units.PageSize - 1) / units.PageSize * units.PageSize
	buf := make([]byte, window+more)
	there := make([]uint64, (len(buf)/units.PageSize+63)/64)
	var begins [256]bool // a wanted name, with this byte
	for name := range wanted {
		begins[name[0]] = true
	}
	searched := uint64(0)
	for _, s := range heap(p.vmas, known) {
		for at := s.start; at < s.end; at += window {
			part := buf[:min(uint64(len(buf)), s.end-at)]
			n, err := p.fill(part, at, there)
			if err != nil {
				return searched, err
			}
			if searched += n; searched > maxHeap {
				return searched,
					fmt.Errorf("its heap has more than %d GiB: no search for where its memory lies",
						maxHeap>>30)
			}
			if ctx.Err() != nil {
				return searched, fmt.Errorf("search its heap for where its memory lies: %w",
					context.Cause(ctx))
			}
			end := min(window, len(part)-recordSize+1)
			for i := 0; n > 0; i += recordStep {
				if i = nextRecord(part, i, end, &begins); i >= end {
					break
				}
				if r, ok := match(part[i:i+recordSize], wanted); ok {
					r.at = at + uint64(i) // #nosec G115 -- positive
					each(r)
				}
			}
		}
	}
	return searched, nil
}

// nextRecord returns where the next struct before end may be whose name begins with one of those
// bytes, or a place from end on. The race detector would take most of a search, and nobody else has
// this memory.
//
//go:norace
func nextRecord(part []byte, i, end int, begins *[256]bool) int {
	for i < end && !begins[part[i+recordName]] {
		i += recordStep
	}
	return i
}

// fill reads the pages that are there; the others are zero, and reading them could make the process
// grow. there is for its own use. It returns how many bytes it read; dst is undefined if there are
// none.
func (p image) fill(dst []byte, at uint64, there []uint64) (uint64, error) {
	pages := uint64(len(dst) / units.PageSize)
	clear(there)
	if err := p.touched(at/units.PageSize, pages, there); err != nil {
		return 0, err
	}
	if !slices.ContainsFunc(there, func(w uint64) bool { return w != 0 }) {
		return 0, nil
	}
	clear(dst)
	set := func(i uint64) bool { return i < pages && there[i/64]>>(i%64)&1 != 0 }
	read := uint64(0)
	for i := uint64(0); i < pages; i++ {
		first := i
		for ; set(i); i++ {
		}
		if first == i {
			continue
		}
		part := dst[first*units.PageSize : i*units.PageSize]
		err := p.read(part, at+first*units.PageSize)
		if errors.Is(err, ErrGone) {
			return read, err
		} else if err != nil { // unmapped since
			clear(part)
		}
		read += uint64(len(part))
	}
	return read, nil
}

type span struct{ start, end uint64 }

// heap returns where a heap may be: in private memory without a file that may be written and not
// run, as the code that QEMU translates may be. Known blocks are not a heap.
func heap(vmas []vma, known []Block) []span {
	var spans []span
	for _, v := range vmas {
		if !v.read || !v.write || v.exec || v.shared || v.inode != 0 ||
			slices.ContainsFunc(known,
				func(b Block) bool {
					return b.Located && v.start < b.HVA+b.space() && b.HVA < v.end
				}) {
			continue
		}
		if n := len(spans); n > 0 && spans[n-1].end == v.start {
			spans[n-1].end = v.end
		} else {
			spans = append(spans, span{v.start, v.end})
		}
	}
	return spans
}

// match reads a struct RAMBlock, recordSize bytes long, if it is that of a wanted block.
func match(b []byte, wanted map[string]Extent) (finding, bool) {
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }
	r := finding{host: word(recordHost), max: word(recordMax), link: word(recordLink)}
	if r.link == 0 || r.link%8 != 0 || r.host == 0 || r.host%units.PageSize != 0 {
		return finding{}, false
	}
	name := b[recordName : recordName+nameSize]
	n := bytes.IndexByte(name, 0)
	if n < 0 {
		return finding{}, false
	}
	w, ok := wanted[string(name[:n])]
	if !ok || !IsZero(name[n:]) || word(recordUsed) != w.Size || r.max < w.Size || r.max > 1<<52 ||
		w.Total != 0 && r.max != w.Total || r.host > 1<<56 || r.host%w.PageSize != 0 {
		return finding{}, false
	}
	for at := recordTail; at < recordSize; at += 8 {
		if word(at) == w.PageSize {
			r.name = w.Name
			return r, true
		}
	}
	return finding{}, false
}

// bearsOut reports whether the rest of the process agrees with a finding: mappings cover the block
// exactly, and the list of all blocks has the struct. One that was freed has left that list.
func (p image) bearsOut(r finding, pageSize uint64) bool {
	size := (r.max + pageSize - 1) / pageSize * pageSize
	if covering(p.vmas, r.host, r.host+size) == Unknown {
		return false
	}
	private := func(v vma) bool {
		return v.read && v.write && !v.shared && v.start <= r.link && r.link+8 <= v.end
	}
	var back [8]byte
	return slices.ContainsFunc(p.vmas, private) && p.read(back[:], r.link) == nil &&
		binary.LittleEndian.Uint64(back[:]) == r.at
}

// Package guestmem reads the RAM of a running QEMU's guest from outside: which
// blocks it has, where each lies in guest-physical space and in QEMU's own
// address space, which of its pages were ever used, and their contents.
//
//	info ramblock          block   name, sizes (HVA too: QEMU 10.0 and later)
//	info mtree -f          GPA  →  region name, offset
//	gpa2hva                GPA  →  HVA, QEMU's virtual address
//	QEMU's heap            block → HVA, where the others do not tell (before QEMU 10.0)
//	/proc/PID/maps         HVA  →  what backs it: anonymous memory or a file
//
// It believes nothing that the others do not confirm. A block counts as located only if every place
// where the guest sees it yields the same HVA for its first byte, and mappings of QEMU cover it
// exactly. Before 10.0 QEMU tells only of blocks that the guest can see at the moment of Attach.
// The others, such as option ROMs and ACPI tables, are found in QEMU's heap (Find).
//
// Reading must not make QEMU grow. Holes of a shared memory file are therefore
// read through the file, never through the process.
//
// Tried with QEMU 7.2, 10.0 and 11.1 on Linux, x86-64.
package guestmem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sort"
	"strings"
	"sync"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

var (
	// ErrGone is wrapped by errors of reading a QEMU that has exited.
	ErrGone = errors.New("qemu process has exited")
	// ErrNotLocated is wrapped by errors of reading a block whose Located is false.
	ErrNotLocated = errors.New("ram block not located in qemu's address space")
)

// Kind says what memory backs a block.
type Kind int

const (
	Unknown     Kind = iota // not located
	Anonymous               // private memory: an untouched page is zero
	SharedFile              // memfd, shared memory or a file, mapped shared
	PrivateFile             // a file mapped privately: guest's changes stay in memory
)

func (k Kind) String() string {
	return [...]string{"unknown", "anonymous", "shared file", "private file"}[k]
}

// A Block is one of QEMU's RAM blocks, as its migration stream knows them.
type Block struct {
	Name     string // "pc.ram", "0000:00:02.0/vga.vram"
	Size     uint64 // bytes in use, a multiple of units.PageSize but for odd firmware
	Total    uint64 // bytes that it may grow to
	PageSize uint64 // of the host memory: 4096, or 2 MiB or 1 GiB on hugetlb
	HVA      uint64 // of the first byte, in QEMU's address space; 0 if not located
	Located  bool
	Kind     Kind
}

// space is how much of QEMU's address space the block fills.
func (b *Block) space() uint64 { return (b.Total + b.PageSize - 1) / b.PageSize * b.PageSize }

// Memory is the RAM of one QEMU, as laid out at the time of Attach. Memory
// hotplug, and the guest moving a device's memory, need a new Attach.
// Its methods may be called concurrently, but none after Close.
type Memory struct {
	pid     int
	pidfd   int
	pagemap *os.File
	blocks  []Block
	backing []backing  // of each block
	rows    []mapped   // by guest-physical address
	unfound error      // why blocks are not located, if any is not
	viewing sync.Mutex // guards the views, and the files open for writing
}

type mapped struct {
	row
	block int
}

// backing is the file behind a block, if any: the block's byte 0 is at offset.
type backing struct {
	file    *os.File
	offset  int64
	hugetlb bool
	tmpfs   bool
	unnamed bool     // it is in memory, and has no name
	view    []byte   // the block's bytes, once View was called
	written *os.File // the file, open for writing, once Release was called
}

// Attach finds the memory of the QEMU behind c. It needs permission to trace
// that process and asks a handful of HMP commands, which the guest does not
// notice. Blocks that QEMU does not migrate are left out.
func Attach(ctx context.Context, c *qmp.Client) (*Memory, error) {
	if os.Getpagesize() != units.PageSize {
		return nil,
			fmt.Errorf("attach to guest memory: host pages of %d bytes: only %d is supported",
				os.Getpagesize(), units.PageSize)
	}
	m, err := attach(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("attach to guest memory: %w", err)
	}
	return m, nil
}

func attach(ctx context.Context, c *qmp.Client) (_ *Memory, err error) {
	// A QEMU on a busy host answers late, and three questions as late as one.
	var blocks, tree string
	var blocksErr, treeErr error
	var asking sync.WaitGroup
	asking.Go(func() { blocks, blocksErr = c.HMP(ctx, "info ramblock") })
	asking.Go(func() { tree, treeErr = c.HMP(ctx, "info mtree -f") })
	pid, _, err := c.Process(ctx)
	asking.Wait()
	if err = errors.Join(err, blocksErr, treeErr); err != nil {
		return nil, err
	}
	m, err := hold(pid)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	listed, err := parseRAMBlocks(blocks)
	if err != nil {
		return nil, err
	}
	// Blocks without a name are not migrated and of no interest.
	listed = slices.DeleteFunc(listed, func(b ramBlock) bool { return b.name == "" })
	rows, err := parseMTree(tree)
	if err != nil {
		return nil, err
	}
	hvas, err := hostAddresses(ctx, c, listed, rows)
	if err != nil {
		return nil, err
	}
	// QEMU has answered since the pidfd was opened, so that is QEMU's.
	vmas, err := m.mappings()
	if err != nil {
		return nil, err
	}
	if err := m.mayRead(vmas); err != nil {
		return nil, err
	}
	m.blocks, m.rows = locate(listed, rows, hvas, vmas)
	if !allLocated(m.blocks) {
		if err := m.findOthers(ctx, listed, rows, hvas, vmas); err != nil {
			return nil, err
		}
	}
	m.backing = make([]backing, len(m.blocks))
	for i := range m.blocks {
		if err := m.open(i, vmas); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// findOthers looks in QEMU's heap for the blocks that QEMU does not tell the place of. The heap
// tells of the others as well, so that both must agree. What is not found then stays so.
func (m *Memory) findOthers(ctx context.Context, listed []ramBlock, rows []row, hvas []uint64,
	vmas []vma) error {
	extents := make([]Extent, len(listed))
	for i, b := range listed {
		extents[i] = Extent{b.name, b.used, b.total, b.pageSize}
	}
	found, err := m.image(vmas).find(ctx, extents, m.blocks)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	} else if errors.Is(err, ErrGone) {
		return err
	}
	told := slices.Clone(listed)
	for i, b := range found {
		if was := m.blocks[i]; was.Located && was.HVA != b.HVA {
			err = fmt.Errorf("QEMU says that memory %q lies at %#x, and its heap says %#x", b.Name,
				was.HVA, b.HVA)
		}
		told[i].hva = b.HVA
	}
	if m.unfound = err; err == nil {
		m.blocks, m.rows = locate(told, rows, hvas, vmas)
	}
	return nil
}

func allLocated(blocks []Block) bool {
	return !slices.ContainsFunc(blocks, func(b Block) bool { return !b.Located })
}

// Missing tells which blocks are not located and why, or returns nil if all are.
func (m *Memory) Missing() error {
	var names []string
	for _, b := range m.blocks {
		if !b.Located {
			names = append(names, b.Name)
		}
	}
	if names == nil {
		return nil
	}
	if m.unfound != nil {
		return fmt.Errorf("%w: %q: %w", ErrNotLocated, names, m.unfound)
	}
	return fmt.Errorf("%w: %q", ErrNotLocated, names)
}

// Reopen returns the memory of a QEMU that was attached to before and has not ended since. It does
// not ask the QEMU, which may be unable to answer. blocks are those of the earlier Memory.
// Guest-physical addresses are not known.
func Reopen(pid int, blocks []Block) (_ *Memory, err error) {
	m, err := hold(pid)
	if err != nil {
		return nil, fmt.Errorf("reopen guest memory: %w", err)
	}
	defer func() {
		if err != nil {
			m.Close()
			err = fmt.Errorf("reopen guest memory: %w", err)
		}
	}()
	vmas, err := m.mappings()
	if err != nil {
		return nil, err
	}
	m.blocks = slices.Clone(blocks)
	m.backing = make([]backing, len(m.blocks))
	for i, b := range m.blocks {
		if !b.Located {
			continue
		}
		if b.PageSize == 0 || b.Size > b.Total || b.Total > 1<<62 ||
			covering(vmas, b.HVA, b.HVA+b.space()) != b.Kind {
			return nil, fmt.Errorf("block %s is not where it was", b.Name)
		}
		if err := m.open(i, vmas); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// hold opens what is needed of a QEMU's process for as long as its memory is read.
func hold(pid int) (*Memory, error) {
	m := &Memory{pid: pid, pidfd: -1}
	var err error
	if m.pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		return nil, m.explain(os.NewSyscallError("pidfd_open", err))
	}
	if m.pagemap, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", pid)); err != nil {
		err = m.explain(err)
		m.Close()
		return nil, err
	}
	return m, nil
}

// mappings reads the process's memory map.
func (m *Memory) mappings() ([]vma, error) {
	vmas, err := readMaps(func() (io.ReadCloser, error) {
		return os.Open(fmt.Sprintf("/proc/%d/maps", m.pid))
	})
	if err != nil {
		return nil, m.explain(err)
	}
	return vmas, nil
}

// mapsTries is how often a map is read that changes each time.
const mapsTries = 20

func readMaps(open func() (io.ReadCloser, error)) (vmas []vma, err error) {
	for range mapsTries {
		maps, err1 := open()
		if err1 != nil {
			return nil, err1
		}
		vmas, err = parseMaps(maps)
		maps.Close()
		if !errors.Is(err, errMoved) {
			break
		}
	}
	return vmas, err
}

// mayRead reads one byte of the process, of whatever comes first, to find out
// now rather than in the middle of an eviction.
func (m *Memory) mayRead(vmas []vma) error {
	i := slices.IndexFunc(vmas, func(v vma) bool { return v.read && !v.shared })
	if i < 0 {
		return m.explain(unix.ESRCH)
	}
	_, err := m.readv(make([]byte, 1), []unix.RemoteIovec{{Base: uintptr(vmas[i].start), Len: 1}})
	return err
}

// hostAddresses asks QEMU where the rows lie in its address space; 0 for one that is gone
// since. Each question costs a turn of a main loop that a busy guest makes wait: where only
// one block bears the region's name, its first row tells of the others.
func hostAddresses(ctx context.Context, c *qmp.Client, listed []ramBlock,
	rows []row) ([]uint64, error) {
	bearers := map[string]int{}
	for _, b := range listed {
		bearers[b.name[strings.LastIndexByte(b.name, '/')+1:]]++
	}
	// The first row of a region with one bearer answers for all of them.
	first := map[string]int{}
	var ask []int
	for i, r := range rows {
		if _, asked := first[r.region]; !asked || bearers[r.region] != 1 {
			first[r.region] = i
			ask = append(ask, i)
		}
	}
	hvas, errs := make([]uint64, len(rows)), make([]error, len(ask))
	var asking sync.WaitGroup
	for n, i := range ask {
		asking.Go(func() {
			text, err := c.HMP(ctx, fmt.Sprintf("gpa2hva %#x", rows[i].gpa))
			errs[n] = err
			// gone since: 0 fits no block
			hvas[i], _ = parseGPA2HVA(text, rows[i].gpa, rows[i].region)
		})
	}
	asking.Wait()
	for i, r := range rows {
		f := first[r.region]
		if bearers[r.region] == 1 && hvas[f] >= rows[f].offset {
			hvas[i] = hvas[f] - rows[f].offset + r.offset
		}
	}
	return hvas, errors.Join(errs...)
}

// locate brings the tables together. See the package comment.
func locate(listed []ramBlock, rows []row, hvas []uint64, vmas []vma) ([]Block, []mapped) {
	blocks := make([]Block, len(listed))
	wrong := make([]bool, len(listed)) // what is said of it does not fit
	var seen []mapped
	for i, b := range listed {
		blocks[i] = Block{Name: b.name, Size: b.used, Total: b.total, PageSize: b.pageSize,
			HVA: b.hva}
	}
	for i, r := range rows {
		block := blockOf(listed, r, hvas[i])
		if block < 0 {
			continue
		}
		b := listed[block]
		base := hvas[i] - r.offset
		if r.offset > b.total || r.size > b.total-r.offset || hvas[i] < r.offset || hvas[i] == 0 ||
			blocks[block].HVA != 0 && blocks[block].HVA != base {
			wrong[block] = true
			continue
		}
		blocks[block].HVA = base
		seen = append(seen, mapped{r, block})
	}
	for i, b := range blocks {
		if b.HVA == 0 || wrong[i] {
			continue
		}
		blocks[i].Kind = covering(vmas, b.HVA, b.HVA+b.space())
		blocks[i].Located = blocks[i].Kind != Unknown
	}
	dropWrong(blocks, wrong)
	seen = slices.DeleteFunc(seen, func(s mapped) bool { return wrong[s.block] })
	return blocks, seen
}

// blockOf returns the index of the block that a row of the guest's memory at an address of QEMU
// belongs to; -1 if that is not known.
func blockOf(listed []ramBlock, r row, hva uint64) int {
	block := -1
	for j, b := range listed {
		switch {
		case b.hva != 0:
			if hva < b.hva || hva-b.hva >= b.total || hva-b.hva != r.offset {
				continue
			}
		case b.name != r.region && !strings.HasSuffix(b.name, "/"+r.region):
			continue
		}
		if block >= 0 { // two devices of a kind: nothing says which of them
			return -1
		}
		block = j
	}
	return block
}

// dropWrong makes blocks unknown that are wrong, or that overlap, which it adds to wrong.
func dropWrong(blocks []Block, wrong []bool) {
	for i, a := range blocks {
		for j, b := range blocks[:i] {
			if a.Located && b.Located && a.HVA < b.HVA+b.Total && b.HVA < a.HVA+a.Total {
				wrong[i], wrong[j] = true, true
			}
		}
	}
	for i := range blocks {
		if wrong[i] {
			blocks[i].Located, blocks[i].Kind = false, Unknown
		}
		if !blocks[i].Located {
			blocks[i].HVA = 0
		}
	}
}

// covering returns the kind of memory that fills [start, end). It returns Unknown if a part is not
// readable, if there are several kinds, or if start and end are not borders of mappings. QEMU maps
// each block apart, with a guard page behind it (util/mmap-alloc.c), so the borders tell a block
// from a neighbour that happens to bear a similar name.
func covering(vmas []vma, start, end uint64) Kind {
	i := sort.Search(len(vmas), func(i int) bool { return vmas[i].start >= start })
	if i == len(vmas) || vmas[i].start != start {
		return Unknown
	}
	first := vmas[i]
	kind := Anonymous
	switch {
	case first.shared:
		kind = SharedFile
	case first.inode != 0:
		kind = PrivateFile
	}
	for at := start; at < end; i++ {
		if i == len(vmas) || vmas[i].start != at || vmas[i].end > end {
			return Unknown
		}
		v := vmas[i]
		if !v.read || v.shared != first.shared || v.inode != first.inode ||
			v.major != first.major || v.minor != first.minor ||
			v.inode != 0 && v.offset != first.offset+(at-start) {
			return Unknown
		}
		at = v.end
	}
	return kind
}

// open finds the file behind block i. One that cannot be opened makes a shared
// block unreadable, as reading it through the process would fill its holes.
func (m *Memory) open(i int, vmas []vma) error {
	b := &m.blocks[i]
	if b.Kind != SharedFile && b.Kind != PrivateFile {
		return nil
	}
	v := vmas[sort.Search(len(vmas), func(j int) bool { return vmas[j].start >= b.HVA })]
	f, err := m.mappedFile(v)
	var fsinfo unix.Statfs_t
	var info unix.Stat_t
	if err == nil {
		err = unix.Fstatfs(int(f.Fd()), &fsinfo)
	}
	if err == nil {
		err = unix.Fstat(int(f.Fd()), &info)
	}
	if err != nil && b.Kind == SharedFile {
		return fmt.Errorf("open the memory file of block %s: %w", b.Name, m.explain(err))
	}
	if err != nil {
		f = nil // every page then counts as populated
	}
	hugetlb, tmpfs := fsinfo.Type == unix.HUGETLBFS_MAGIC, fsinfo.Type == unix.TMPFS_MAGIC
	m.backing[i] = backing{file: f, offset: int64(v.offset), hugetlb: hugetlb, tmpfs: tmpfs,
		unnamed: f != nil && info.Nlink == 0 && (hugetlb || tmpfs)}
	return nil
}

// mappedFile opens the file of a mapping: through map_files, which works for
// deleted files too but may need privileges, or through a descriptor of QEMU's.
func (m *Memory) mappedFile(v vma) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", m.pid, v.start, v.end))
	if err == nil {
		return f, nil
	}
	dir := fmt.Sprintf("/proc/%d/fd", m.pid)
	names, _ := os.ReadDir(dir)
	for _, n := range names {
		path := dir + "/" + n.Name()
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Ino == v.inode && unix.Major(st.Dev) == v.major &&
			unix.Minor(st.Dev) == v.minor {
			return os.Open(path)
		}
	}
	return nil, err
}

// explain adds the remedy to errors of access, and tells a dead QEMU.
func (m *Memory) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case !m.alive() || errors.Is(err, unix.ESRCH):
		return fmt.Errorf("%w (pid %d): %w", ErrGone, m.pid, err)
	case errors.Is(err, fs.ErrPermission): // EPERM and EACCES
		return fmt.Errorf("%w: may not read the memory of qemu (pid %d): run as root or with "+
			"CAP_SYS_PTRACE, or as qemu's user with kernel.yama.ptrace_scope=0", err, m.pid)
	}
	return err
}

// alive reports whether the process that was attached to still exists, which
// means that its number has not gone to another.
func (m *Memory) alive() bool {
	if m.pidfd < 0 {
		return true // not known otherwise
	}
	err := unix.PidfdSendSignal(m.pidfd, 0, nil, 0)
	return err == nil || err == unix.EPERM
}

// PID returns QEMU's process.
func (m *Memory) PID() int { return m.pid }

// Blocks returns all blocks in QEMU's order. The caller must not change them.
// The other methods take an index into it.
func (m *Memory) Blocks() []Block { return m.blocks }

// Resolve finds the block and the byte offset behind a guest-physical address,
// as mapped at the time of Attach, whether or not the block is located.
func (m *Memory) Resolve(gpa uint64) (block int, offset uint64, ok bool) {
	i := sort.Search(len(m.rows), func(i int) bool { return m.rows[i].gpa > gpa }) - 1
	if i < 0 || gpa-m.rows[i].gpa >= m.rows[i].size {
		return 0, 0, false
	}
	return m.rows[i].block, m.rows[i].offset + gpa - m.rows[i].gpa, true
}

// A Mapping says that Size bytes from guest-physical GPA on are the block's from Offset on.
type Mapping struct {
	GPA, Size uint64
	Block     int
	Offset    uint64
}

// Mappings returns what Resolve knows, by guest-physical address.
func (m *Memory) Mappings() []Mapping {
	out := make([]Mapping, len(m.rows))
	for i, r := range m.rows {
		out[i] = Mapping{r.gpa, r.size, r.block, r.offset}
	}
	return out
}

// Close releases the process. QEMU does not notice.
func (m *Memory) Close() error {
	if m.pidfd >= 0 {
		unix.Close(m.pidfd)
		m.pidfd = -1
	}
	if m.pagemap != nil {
		m.pagemap.Close()
	}
	for _, b := range m.backing {
		b.file.Close()
		b.written.Close()
		if b.view != nil {
			unix.Munmap(b.view)
		}
	}
	return nil
}

package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"vacate/internal/sys/units"
)

var (
	// ErrNoLinux is wrapped by errors of Attach when the memory holds no Linux that
	// describes itself by VMCOREINFO and is running.
	ErrNoLinux = errors.New("no running linux found in the guest's memory")
	// ErrUnsupported is wrapped by errors of Attach when it is a Linux that this package
	// cannot read.
	ErrUnsupported = errors.New("guest kernel not supported")
	// ErrChanged is wrapped by errors of Revalidate when the guest runs another kernel
	// than at the time of Attach: it was reset, or started another by kexec.
	ErrChanged = errors.New("guest runs another kernel than before")
)

// A Guest is a Linux kernel found in guest-physical memory. What it knows was true when
// it was attached; memory that a kernel frees or moves must be read while it is stopped.
// Its methods must not be called concurrently.
type Guest struct {
	// ActiveWithin is how long ago a process may have run to be active; 0 is DefaultActive.
	ActiveWithin time.Duration

	mem      Memory
	info     *vmcoreinfo
	noteAddr uint64 // guest-physical, of the note's page
	note     []byte // its text
	space    *space // the kernel's own address space
	types    *types
	kallsyms *kallsyms // nil where the kernel does not tell of its symbols
	offsets  []byte    // kallsyms' array of addresses, and how it is coded
	coding   offsetCoding
	base     uint64            // kallsyms_relative_base
	array    uint64            // address of kallsyms_offsets
	extra    map[string]uint64 // symbols found otherwise
	ranges   []Range           // of readMany
	features
}

// Release returns the kernel's release, such as "6.1.0-56-cloud-amd64". It comes from the
// guest; it is short, printable ASCII.
func (g *Guest) Release() string { return g.info.release }

// Attach finds the guest's kernel, its symbols and its types. The guest may run. It takes
// tens of milliseconds, mostly for its types.
func Attach(ctx context.Context, mem Memory) (*Guest, error) {
	g, err := attach(ctx, mem)
	if err != nil {
		return nil, fmt.Errorf("attach to guest kernel: %w", err)
	}
	return g, nil
}

func attach(ctx context.Context, mem Memory) (*Guest, error) {
	cpus, err := mem.CPUs(ctx)
	if err != nil {
		return nil, err
	}
	var g *Guest
	var rejected error // why the last of them is not the one
	err = findNotes(ctx, mem, cpus, func(addr uint64, text []byte) bool {
		info, err := parseVMCOREINFO(text)
		if err == nil {
			candidate := &Guest{mem: mem, info: info, noteAddr: addr, note: text,
				extra: map[string]uint64{}}
			if err = candidate.enter(cpus); err == nil {
				g = candidate
				return true
			}
		}
		rejected = err
		return false
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("look for vmcoreinfo: %w", err)
	case g == nil && rejected != nil:
		return nil, fmt.Errorf("%w: vmcoreinfo was found, but %w", ErrNoLinux, rejected)
	case g == nil:
		return nil, fmt.Errorf("%w: no vmcoreinfo", ErrNoLinux)
	}
	if err := g.learn(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: linux %s: %w", ErrUnsupported, g.info.release, err)
	}
	return g, nil
}

// enter sets up the kernel's address space and verifies that it is in force.
func (g *Guest) enter(cpus []CPU) error {
	if mask, ok := g.info.number("NUMBER(sme_mask)"); ok && mask != 0 {
		return errors.New("its memory is encrypted")
	}
	dir, ok1 := g.info.symbol("swapper_pg_dir")
	base, ok2 := g.info.number("NUMBER(phys_base)")
	if !ok1 || !ok2 {
		return errors.New("it does not say where the page tables are")
	}
	root := dir - imageFirst + uint64(base)
	if root%units.PageSize != 0 {
		return errors.New("its page tables are not aligned")
	}
	levels := 4
	if l5, _ := g.info.number("NUMBER(pgtable_l5_enabled)"); l5 == 1 {
		levels = 5
	}
	g.space = newSpace(g.mem, root, levels)
	return g.inForce(cpus)
}

// inForce verifies that the kernel that the note describes is there, and that every virtual CPU
// uses it. A note may stay in memory when its kernel is long gone.
func (g *Guest) inForce(cpus []CPU) error {
	uts, ok := g.info.symbol("init_uts_ns")
	if !ok {
		return errors.New("it does not say where init_uts_ns is")
	}
	// The release is somewhere in the first bytes: struct new_utsname has six texts of 65.
	var name [512]byte
	if err := g.read(name[:], uts); err != nil {
		return err
	}
	if !bytes.Contains(name[:], append([]byte(g.info.release), 0)) {
		return errors.New("its release is not where it says")
	}
	want, _, err := g.space.translate(uts)
	if err != nil {
		return err
	}
	agreed := false
	for i, cpu := range cpus {
		if cpu.CR0&cr0Paging == 0 {
			continue // it was never started, or is being reset
		}
		if cpu.levels() != g.space.levels {
			return fmt.Errorf("cpu %d does not use %d levels of page tables", i, g.space.levels)
		}
		var got uint64
		for _, root := range cpu.roots() {
			if got, _, err = newSpace(g.mem, root, g.space.levels).translate(uts); err == nil {
				break
			}
		}
		if err != nil || got != want {
			return fmt.Errorf("cpu %d runs something else", i)
		}
		agreed = true
	}
	if !agreed {
		return errors.New("no cpu runs it")
	}
	return nil
}

// Revalidate verifies, with the guest stopped, that it still runs the kernel that was
// attached, and forgets what may have changed since. An error means that nothing this
// Guest says can be relied on; it wraps ErrChanged unless memory could not be read.
func (g *Guest) Revalidate(ctx context.Context) error {
	cpus, err := g.mem.CPUs(ctx)
	if err == nil {
		err = g.refresh()
	}
	if err == nil {
		if err = g.inForce(cpus); err != nil {
			err = fmt.Errorf("%w: %w", ErrChanged, err)
		}
	}
	if err != nil {
		return fmt.Errorf("revalidate guest kernel: %w", err)
	}
	return nil
}

// refresh forgets the page tables and verifies the note.
func (g *Guest) refresh() error {
	g.space.forget()
	page := make([]byte, noteHeader+len(g.note))
	if err := readPhys(g.mem, page, g.noteAddr); err != nil {
		return err
	}
	if !bytes.Equal(page[12:12+len(noteName)], noteName) ||
		!bytes.Equal(page[noteHeader:], g.note) {
		return fmt.Errorf("%w: its vmcoreinfo is gone", ErrChanged)
	}
	return nil
}

// read fills dst from the kernel's virtual address va.
func (g *Guest) read(dst []byte, va uint64) error {
	r := [1]Range{{va, uint64(len(dst))}}
	return g.readMany(dst, r[:])
}

// readMany fills dst with ranges of the kernel's virtual memory, one after another. It
// translates them and reads all at once: one call for many is far quicker than many. The
// first that is not mapped, or not RAM, fails all.
func (g *Guest) readMany(dst []byte, virtual []Range) error {
	list := g.ranges[:0]
	sum := uint64(0)
	for _, r := range virtual {
		if r.Len > uint64(len(dst))-sum {
			return fmt.Errorf("ranges longer than the buffer of %d bytes", len(dst))
		}
		sum += r.Len
		for r.Len > 0 {
			addr, left, err := g.space.translate(r.Addr)
			if err != nil {
				return err
			}
			left = min(left, r.Len)
			if n := len(list); n > 0 && list[n-1].Addr+list[n-1].Len == addr {
				list[n-1].Len += left
			} else {
				list = append(list, Range{addr, left})
			}
			r.Addr, r.Len = r.Addr+left, r.Len-left
		}
	}
	g.ranges = list
	return g.mem.ReadRanges(dst[:sum], list)
}

// readU64 reads one word.
func (g *Guest) readU64(va uint64) (uint64, error) {
	var b [8]byte
	err := g.read(b[:], va)
	return u64(b[:]), err
}

// readU32 reads half a word.
func (g *Guest) readU32(va uint64) (uint32, error) {
	var b [4]byte
	err := g.read(b[:], va)
	return u32(b[:]), err
}

// symbol returns the address of a variable or function of the kernel. A kernel without kallsyms
// knows only what VMCOREINFO has, and init_task.
func (g *Guest) symbol(name string) (uint64, bool) {
	if va, ok := g.info.symbol(name); ok {
		return va, true
	}
	if va, ok := g.extra[name]; ok {
		return va, true
	}
	return g.kallsym(name)
}

func (g *Guest) kallsym(name string) (uint64, bool) {
	if g.kallsyms == nil {
		return 0, false
	}
	i, ok := g.kallsyms.symbolNumber(name)
	if !ok || uint64(i)*4+4 > uint64(len(g.offsets)) {
		return 0, false
	}
	return g.coding.address(g.base, g.array, i, u32(g.offsets[i*4:])), true
}

// learn finds symbols and types.
func (g *Guest) learn(ctx context.Context) error {
	var err error
	if _, told := g.info.symbol("kallsyms_names"); told {
		if err := g.readKallsyms(); err != nil {
			return fmt.Errorf("read kallsyms: %w", err)
		}
		start, ok1 := g.kallsym("__start_BTF")
		stop, ok2 := g.kallsym("__stop_BTF")
		if !ok1 || !ok2 || stop <= start || stop-start > maxBTF {
			return errors.New("it has no btf: build it with CONFIG_DEBUG_INFO_BTF")
		}
		raw := make([]byte, stop-start)
		if err := g.read(raw, start); err != nil {
			return fmt.Errorf("read btf: %w", err)
		}
		g.types, err = parseTypes(raw)
	} else {
		err = g.searchImage()
	}
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return g.probe()
}

func (g *Guest) readKallsyms() error {
	var at struct{ names, count, table, index, offsets uint64 }
	for name, to := range map[string]*uint64{
		"kallsyms_names": &at.names, "kallsyms_num_syms": &at.count,
		"kallsyms_token_table": &at.table,
		"kallsyms_token_index": &at.index, "kallsyms_offsets": &at.offsets,
	} {
		var ok bool
		if *to, ok = g.info.symbol(name); !ok {
			return fmt.Errorf("vmcoreinfo lacks %s", name)
		}
	}
	count, err := g.readU32(at.count)
	if err != nil {
		return err
	}
	if count == 0 || count > maxSymbols {
		return fmt.Errorf("%d symbols: want 1 to %d", count, maxSymbols)
	}
	if va, ok := g.info.symbol("kallsyms_relative_base"); ok {
		if g.base, err = g.readU64(va); err != nil {
			return err
		}
	}
	var index [512]byte
	if err := g.read(index[:], at.index); err != nil {
		return err
	}
	tokens := make([]byte, tokenTable)
	tokens = tokens[:g.readPart(tokens, at.table)]
	g.offsets = make([]byte, count*4)
	if err := g.read(g.offsets, at.offsets); err != nil {
		return err
	}
	g.array = at.offsets
	chunk := make([]byte, 64<<10)
	g.kallsyms, err = decodeNames(wanted, count, &index, tokens, func(from int) ([]byte, error) {
		return chunk[:g.readPart(chunk, at.names+uint64(from))], nil
	})
	if err != nil {
		return err
	}
	// Which coding it is, shows in what is known from elsewhere.
	for coding := range offsetCodings {
		g.coding = coding
		if g.agrees("_stext", "_stext") &&
			g.agrees("swapper_pg_dir", "swapper_pg_dir", "init_top_pgt") {
			return nil
		}
	}
	return errors.New("addresses are coded in a way that is not known")
}

// agrees reports whether one of the names has, in kallsyms, the address that VMCOREINFO
// has for name.
func (g *Guest) agrees(name string, names ...string) bool {
	want, ok := g.info.symbol(name)
	for _, n := range names {
		if got, found := g.kallsym(n); ok && found && got == want {
			return true
		}
	}
	return false
}

// readPart reads as much from va on as is mapped, in one piece, and returns how much it is.
func (g *Guest) readPart(dst []byte, va uint64) int {
	n := 0
	for n < len(dst) {
		addr, left, err := g.space.translate(va + uint64(n))
		if err != nil {
			break
		}
		part := dst[n : n+int(min(left, uint64(len(dst)-n)))]
		if readPhys(g.mem, part, addr) != nil {
			break
		}
		n += len(part)
	}
	return n
}

// searchImage finds, in a kernel that does not tell of kallsyms (before 6.0), the types
// and init_task by what they look like.
func (g *Guest) searchImage() error {
	text, ok := g.info.symbol("_stext")
	if !ok {
		return errors.New("vmcoreinfo lacks _stext")
	}
	const imageSize = 64 << 20 // larger than any image with its data
	image := make([]byte, imageSize)
	for at := 0; at < len(image); at += units.PageSize { // under page table isolation, it has holes
		at += g.readPart(image[at:], text+uint64(at))
	}
	g.types = findTypes(image)
	if g.types == nil {
		return errors.New("it has neither kallsyms nor btf")
	}
	comm, err1 := g.types.field("task_struct", "comm")
	tasks, err2 := g.types.field("task_struct", "tasks")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	name := []byte("swapper/0\x00")
	for at, tries := 0, 0; tries < 64; tries++ {
		i := bytes.Index(image[at:], name)
		if i < 0 {
			break
		}
		at += i
		// init_task is the one whose list of tasks leads back to itself.
		task := text + uint64(at) - comm.offset
		next, err := g.readU64(task + tasks.offset)
		if err == nil {
			if back, err := g.readU64(next + 8); err == nil && back == task+tasks.offset {
				g.extra["init_task"] = task
				break
			}
		}
		at++
	}
	return nil
}

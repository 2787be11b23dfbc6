package linux

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"testing"

	"vacate/internal/sys/units"
)

// record writes testdata anew: go test -run TestRecord -record
var record = flag.Bool("record", false, "record testdata from guests")

// TestRecord keeps small pieces of real guests: the note VMCOREINFO, the beginning of
// kallsyms, QEMU's registers and the beginning of a core file.
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("records only with -record")
	}
	for i, kernel := range kernels(t) {
		m := boot(t, spec{kernel: kernel, mib: 192, cpus: 2})
		g, err := Attach(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		m.stop(t)
		write := func(name string, b []byte) {
			if err := os.WriteFile(filepath.Join("testdata", name), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		write("vmcoreinfo-"+g.Release(), g.note)
		if va, ok := g.info.symbol("kallsyms_names"); ok {
			s := kallsymsSample{Count: 200}
			index, _ := g.info.symbol("kallsyms_token_index")
			table, _ := g.info.symbol("kallsyms_token_table")
			s.Names = make([]byte, 4096)
			if g.read(s.Index[:], index) != nil || g.read(s.Tokens[:], table) != nil ||
				g.read(s.Names, va) != nil {
				t.Fatal("cannot read kallsyms")
			}
			write("kallsyms-"+g.Release(), s.append(nil))
		}
		if start, ok := g.kallsym("__start_BTF"); ok {
			raw := make([]byte, 8<<20)
			write("btf-"+g.Release(), cutTypes(t, raw[:g.readPart(raw, start)]))
		}
		if i > 0 {
			continue
		}
		text, err := m.HMP(t.Context(), "info registers -a")
		if err != nil {
			t.Fatal(err)
		}
		write("registers-"+m.Version().String(), []byte(text))
		f := m.dump(t)
		head := make([]byte, 4096)
		if _, err := io.ReadFull(f, head); err != nil {
			t.Fatal(err)
		}
		write("core-head", head)
	}
}

// kallsymsSample is a piece of a kernel's tables.
type kallsymsSample struct {
	Count  uint32
	Index  [512]byte
	Tokens [2048]byte
	Names  []byte
}

func (s *kallsymsSample) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, s.Count)
	b = append(b, s.Index[:]...)
	b = append(b, s.Tokens[:]...)
	return append(b, s.Names...)
}

func parseSample(b []byte) (s kallsymsSample, ok bool) {
	if len(b) < 4+len(s.Index)+len(s.Tokens) {
		return s, false
	}
	s.Count, b = u32(b), b[4:]
	b = b[copy(s.Index[:], b):]
	s.Names = b[copy(s.Tokens[:], b):]
	return s, true
}

func (s *kallsymsSample) decode() (*kallsyms, error) {
	return decodeNames([]string{"fixed_percpu_data", "_stext", "no_such_symbol"}, s.Count, &s.Index,
		s.Tokens[:], func(at int) ([]byte, error) {
			return s.Names[min(at, len(s.Names)):], nil
		})
}

// cutTypes returns the first types of a BTF, with the texts that they need.
func cutTypes(t *testing.T, raw []byte) []byte {
	t.Helper()
	raw = raw[:btfHeader+u32(raw[16:])+u32(raw[20:])] // the texts are last
	all, err := parseTypes(raw)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(all.raw[:all.at[600]])
	texts, places := []byte{0}, map[uint32]uint32{0: 0}
	move := func(at []byte) {
		old := u32(at)
		if _, ok := places[old]; !ok {
			places[old] = uint32(len(texts))
			texts = append(texts,
				all.texts[old:old+uint32(bytes.IndexByte(all.texts[old:], 0))+1]...)
		}
		binary.LittleEndian.PutUint32(at, places[old])
	}
	for _, at := range all.at[1:600] {
		d := btfDescription(b[at:])
		move(d)
		switch x := btfExtra[d.kind()]; d.kind() {
		case btfStruct, btfUnion, btfEnum, btfEnum64, btfFuncProto:
			for i := range d.elements() {
				move(d.element(i, x.each))
			}
		}
	}
	head := bytes.Clone(raw[:btfHeader])
	for i, n := range []int{0, len(b), len(b), len(texts)} {
		binary.LittleEndian.PutUint32(head[8+4*i:], uint32(n))
	}
	return append(append(head, b...), texts...)
}

// seeds adds the files of testdata whose names begin with prefix.
func seeds(t testing.TB, prefix string) (all [][]byte) {
	t.Helper()
	names, err := filepath.Glob("testdata/" + prefix + "*")
	if err != nil || len(names) == 0 {
		t.Fatalf("no testdata/%s*: %v", prefix, err)
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

func TestRecorded(t *testing.T) {
	for _, b := range seeds(t, "vmcoreinfo-") {
		v, err := parseVMCOREINFO(b)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := v.symbol("swapper_pg_dir"); !ok {
			t.Errorf("%s: no swapper_pg_dir", v.release)
		}
		if n, ok := v.number("NUMBER(SECTION_SIZE_BITS)"); !ok || n != 27 {
			t.Errorf("%s: sections of 2^%d bytes", v.release, n)
		}
		if n, ok := v.number("NUMBER(phys_base)"); !ok || n%4096 != 0 {
			t.Errorf("%s: phys_base %d", v.release, n)
		}
	}
	for _, b := range seeds(t, "kallsyms-") {
		s, ok := parseSample(b)
		if !ok {
			t.Fatal("sample too short")
		}
		k, err := s.decode()
		if err != nil {
			t.Fatal(err)
		}
		// The first symbols are per-CPU variables, or the beginning of the image.
		_, ok1 := k.symbolNumber("fixed_percpu_data")
		_, ok2 := k.symbolNumber("_stext")
		if !ok1 && !ok2 {
			t.Error("neither of the symbols that come first")
		}
		if _, ok := k.symbolNumber("no_such_symbol"); ok {
			t.Error("a symbol was found that does not exist")
		}
	}
	found := 0
	for _, b := range seeds(t, "btf-") {
		all, err := parseTypes(b)
		if err != nil {
			t.Fatal(err)
		}
		f, err := all.field("list_head", "prev")
		if err != nil {
			continue // newer kernels' first types have no names
		}
		found++
		if f != (field{offset: 8, size: 8, count: 1}) {
			t.Errorf("%+v", f)
		}
		if n, err := all.size("list_head"); err != nil || n != 16 {
			t.Errorf("%d, %v", n, err)
		}
		if _, err := all.field("list_head", "first"); !errors.Is(err, errNoField) {
			t.Error(err)
		}
	}
	if found == 0 {
		t.Error("no btf has struct list_head")
	}
	for _, b := range seeds(t, "registers-") {
		cpus, err := parseRegisters(string(b))
		if err != nil || len(cpus) != 2 {
			t.Fatalf("%v, %v", cpus, err)
		}
		for _, c := range cpus {
			if c.CR0>>31&1 != 1 || c.CR3 == 0 || c.CR4 == 0 {
				t.Errorf("registers %#x", c)
			}
		}
	}
	c, err := OpenCore(sparse(seeds(t, "core-head")[0]), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.cpus) != 2 || c.cpus[0].CR0>>31&1 != 1 || len(c.extents) == 0 ||
		c.extents[0].Addr != 0 {
		t.Errorf("cpus %#x, extents %#x", c.cpus, c.extents)
	}
}

// TestNoKernel: page tables in which nothing is are no way to a kernel, and no endless one.
func TestNoKernel(t *testing.T) {
	c, err := OpenCore(sparse(seeds(t, "core-head")[0]), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	for _, levels := range []uint64{0, cr4LA57} {
		cpus := []CPU{{CR0: cr0Paging, CR3: 0x10000, CR4: levels}}
		err := findNotes(t.Context(), c, cpus, func(uint64, []byte) bool {
			t.Error("a note was found where there is none")
			return true
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// sparse is a file that begins with some bytes; zeroes follow.
type sparse []byte

func (s sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(s)) {
		copy(p, s[off:])
	}
	return len(p), nil
}

func FuzzVMCOREINFO(f *testing.F) {
	for _, b := range seeds(f, "vmcoreinfo-") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := parseVMCOREINFO(b)
		if err != nil {
			return
		}
		if v.release == "" || len(v.release) > 64 {
			t.Errorf("release %q", v.release)
		}
		for key := range v.values {
			v.number(key)
			v.symbol(key)
		}
		// A kernel with nothing but this note must be refused, not followed.
		g := &Guest{mem: &ram{data: make([]byte, 16<<12)}, info: v, note: b,
			extra: map[string]uint64{}}
		if g.enter([]CPU{{CR0: 1 << 31, CR3: 0}}) == nil {
			t.Error("a kernel without page tables was entered")
		}
	})
}

func FuzzKallsyms(f *testing.F) {
	for _, b := range seeds(f, "kallsyms-") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, ok := parseSample(b)
		if !ok {
			return
		}
		k, err := s.decode()
		if err != nil {
			return
		}
		for _, i := range k.number {
			if i >= s.Count && i < absent {
				t.Errorf("symbol %d of %d", i, s.Count)
			}
		}
	})
}

func FuzzTypes(f *testing.F) {
	for _, b := range seeds(f, "btf-") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		all, err := parseTypes(b)
		if err != nil {
			return
		}
		text := func(at uint32) string {
			if uint64(at) >= uint64(len(all.texts)) {
				return ""
			}
			rest := all.texts[at:]
			return string(rest[:bytes.IndexByte(rest, 0)])
		}
		for _, id := range all.named[:min(len(all.named), 50)] {
			d := all.get(id)
			name := text(d.name())
			all.size(name)
			all.enum(name, "x")
			each := btfExtra[d.kind()].each
			for i := range min(d.elements(), 20, each*20) {
				member := text(u32(d.element(i, each)))
				all.enum(name, member)
				if f, err := all.field(name, member+"."+member); err == nil &&
					(f.offset > 1<<24 || f.size > 1<<24) {
					t.Errorf("%s.%s: %+v", name, member, f)
				}
			}
		}
	})
}

func FuzzCore(f *testing.F) {
	for _, b := range seeds(f, "core-head") {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := OpenCore(sparse(b), 1<<40)
		if err != nil {
			return
		}
		end := uint64(0)
		for _, e := range c.Extents() {
			if e.Addr < end || e.Len == 0 || (e.Addr|e.Len)%units.PageSize != 0 {
				t.Fatalf("extents %#x", c.Extents())
			}
			end = e.Addr + e.Len
			var p [8]byte
			if err := readPhys(c, p[:], end-8); err != nil {
				t.Error(err)
			}
			if err := readPhys(c, p[:], end-4); err == nil &&
				inRAM(c.extents, Range{end - 4, 8}) < 0 {
				t.Error("read beyond an extent")
			}
		}
		// The same bytes as a whole file: segments now end beyond it.
		if c, err := OpenCore(bytes.NewReader(b), int64(len(b))); err == nil {
			for _, e := range c.Extents() {
				if e.Len > uint64(len(b)) {
					t.Errorf("extent of %d bytes in a file of %d", e.Len, len(b))
				}
			}
		}
	})
}

func FuzzNotes(f *testing.F) {
	for _, b := range seeds(f, "core-head") {
		// The notes follow the program headers; where exactly, the first of them says.
		f.Add(b[64+56*u64(b[56:])%1024:])
		off := u64(b[64+8:])
		if off < uint64(len(b)) {
			f.Add(b[off:min(uint64(len(b)), off+u64(b[64+32:]))])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if cpus, err := parseNotes(b); err == nil && len(cpus)*440 > len(b) {
			t.Errorf("%d cpus in %d bytes", len(cpus), len(b))
		}
	})
}

func FuzzRegisters(f *testing.F) {
	for _, b := range seeds(f, "registers-") {
		f.Add(string(b))
	}
	f.Fuzz(func(t *testing.T, s string) {
		if cpus, err := parseRegisters(s); err == nil && (len(cpus) == 0 || len(cpus) > maxCPUs) {
			t.Errorf("%d cpus", len(cpus))
		}
	})
}

package guestlinux

import (
	"bytes"
	"encoding/binary"
	"flag"
	"io"
	"os"
	"path/filepath"
	"testing"
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
			if g.read(s.Index[:], index) != nil || g.read(s.Tokens[:], table) != nil || g.read(s.Names, va) != nil {
				t.Fatal("cannot read kallsyms")
			}
			write("kallsyms-"+g.Release(), s.append(nil))
		}
		if i > 0 {
			continue
		}
		text, err := m.HMP(t.Context(), "info registers -a")
		if err != nil {
			t.Fatal(err)
		}
		write("registers-"+m.Version().String(), []byte(text))
		core := filepath.Join(t.TempDir(), "core")
		if err := m.Run(t.Context(), "dump-guest-memory", map[string]any{"paging": false, "protocol": "file:" + core}, nil); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(core)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
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
	return decodeNames(s.Count, &s.Index, s.Tokens[:], func(at int) ([]byte, error) {
		return s.Names[min(at, len(s.Names)):], nil
	})
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
	if len(c.cpus) != 2 || c.cpus[0].CR0>>31&1 != 1 || len(c.extents) == 0 || c.extents[0].Addr != 0 {
		t.Errorf("cpus %#x, extents %#x", c.cpus, c.extents)
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
		g := &Guest{mem: &ram{data: make([]byte, 16<<12)}, info: v, note: b, extra: map[string]uint64{}}
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
		if err == nil && uint64(len(k.number)) > uint64(s.Count) {
			t.Errorf("%d names of %d symbols", len(k.number), s.Count)
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
			if e.Addr < end || e.Len == 0 || (e.Addr|e.Len)%pageSize != 0 {
				t.Fatalf("extents %#x", c.Extents())
			}
			end = e.Addr + e.Len
			var p [8]byte
			if err := readPhys(c, p[:], end-8); err != nil {
				t.Error(err)
			}
			if err := readPhys(c, p[:], end-4); err == nil && inRAM(c.extents, Range{end - 4, 8}) < 0 {
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

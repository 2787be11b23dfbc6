package export_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vacate/internal/qemu/export"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"

	"golang.org/x/sys/unix"
)

// captured takes head and load out of a recorded stream, as an eviction captures them.
func captured(t testing.TB, name string) (head, load []byte, blocks []migstream.Block) {
	t.Helper()
	r := migstream.NewReader(bytes.NewReader(
		streamtest.Recorded(t, "../migstream/testdata/"+name+".forward.gz")))
	for whole := false; ; {
		item, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !whole {
			head = item.Append(head)
		}
		switch it := item.(type) {
		case migstream.MemSize:
			blocks = it.Blocks
		case migstream.Footer:
			whole = true
		case migstream.Packaged:
			return head, it.Append(nil), blocks
		}
	}
}

var recorded = []string{"pc-bare", "pc-old", "q35-virtio", "microvm-memfd"}

// ram is memory that no QEMU has.
type ram struct {
	blocks []guestmem.Block
	data   [][]byte
	err    error // of reading
}

// newRAM fills blocks: a third of the pages was never used, another is zero.
func newRAM(blocks []migstream.Block) *ram {
	m := &ram{}
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, b := range blocks {
		data := make([]byte, b.Length)
		for at := 0; at < len(data); at += 4096 {
			if rnd.IntN(3) == 0 {
				data[at+rnd.IntN(4096)] = byte(1 + rnd.IntN(255))
			}
		}
		m.blocks = append(m.blocks,
			guestmem.Block{Name: b.Name, Size: b.Length, PageSize: b.PageSize, Located: true})
		m.data = append(m.data, data)
	}
	return m
}

func (m *ram) Blocks() []guestmem.Block { return m.blocks }

func (m *ram) Populated(block int, first, n uint64, dst []uint64) error {
	clear(dst)
	for i := range n {
		if used := !guestmem.IsZero(m.data[block][(first+i)*4096:][:4096]); used ||
			(first+i)%2 == 0 {
			dst[i/64] |= 1 << (i % 64)
		}
	}
	return nil
}

func (m *ram) ReadRanges(dst []byte, ranges []guestmem.Range) error {
	for _, r := range ranges {
		if m.blocks[r.Block].Located {
			dst = dst[copy(dst[:r.Length], m.data[r.Block][r.Offset:][:r.Length]):]
		}
	}
	if len(dst) > 0 {
		return errors.New("the ranges are not as long as the buffer")
	}
	return m.err
}

// unpacked is what a stream that was written holds.
type unpacked struct {
	blocks  map[string][]byte
	devices []byte
}

// unpack reads a stream, in which each page must be once.
func unpack(t testing.TB, stream io.Reader) unpacked {
	t.Helper()
	u := unpacked{blocks: map[string][]byte{}}
	missing := 0
	seen := map[string]bool{}
	r := migstream.NewReader(stream)
	for {
		item, err := r.Next()
		if err == io.EOF {
			if missing != 0 {
				t.Fatalf("%d pages are not in the stream", missing)
			}
			return u
		}
		if err != nil {
			t.Fatal(err)
		}
		switch it := item.(type) {
		case migstream.MemSize:
			for _, b := range it.Blocks {
				if b.PageSize != 4096 {
					t.Errorf("block %s has a page size in the stream", b.Name)
				}
				u.blocks[b.Name] = make([]byte, b.Length)
				missing += int(b.Length / 4096)
			}
		case migstream.Page:
			if key := fmt.Sprint(it.Block, it.Offset); seen[key] {
				t.Fatalf("page %#x of %s is in the stream twice", it.Offset, it.Block)
			} else {
				seen[key] = true
			}
			missing--
			copy(u.blocks[it.Block][it.Offset:], it.Data)
		case migstream.Opaque:
			u.devices = append(u.devices, it.Data...)
		case migstream.Command, migstream.Packaged:
			t.Fatalf("%T in the stream", item)
		}
	}
}

// What is written holds all memory, and all devices' sections, and no commands.
func TestWrite(t *testing.T) {
	for _, name := range recorded {
		t.Run(name, func(t *testing.T) {
			head, load, blocks := captured(t, name)
			m := newRAM(blocks)
			vm := export.VM{Memory: m, Head: head, Load: load}
			var out bytes.Buffer
			pages, before := 0, 0
			err := vm.Write(t.Context(), &out, func(done, total int) {
				if done <= before || done > total {
					t.Errorf("progress from %d to %d of %d", before, done, total)
				}
				before, pages = done, total
			})
			if err != nil {
				t.Fatal(err)
			}
			got := unpack(t, &out)
			sum := 0
			for i, b := range blocks {
				sum += int(b.Length / 4096)
				if !bytes.Equal(got.blocks[b.Name], m.data[i]) {
					t.Errorf("block %s is another", b.Name)
				}
			}
			if before != sum || pages != sum {
				t.Errorf("progress ended at %d of %d pages, there are %d", before, pages, sum)
			}
			// The package's sections, as the package parser takes them.
			want, err := migstream.Packaged{Data: load[9:]}.Sections()
			if err != nil || len(want) < 3 {
				t.Fatal(len(want), err)
			}
			devices, found := bytes.CutSuffix(got.devices, []byte("\x00\x06\x00\x00\x00\x02{}"))
			if !found {
				t.Errorf("the stream ends in % x", got.devices[len(got.devices)-16:])
			}
			have, err := migstream.Packaged{Data: devices}.Sections()
			if err != nil || !slices.Equal(have, want) {
				t.Errorf("sections %v, want %v; %v", have, want, err)
			}
			size := 0
			for _, s := range want {
				size += s.Size
			}
			if size != len(devices) {
				t.Errorf("%d bytes of devices, want %d: there is something between them",
					len(devices), size)
			}
		})
	}
}

// Without post-copy, QEMU reads no page size behind a block of huge pages.
func TestHugePages(t *testing.T) {
	head, load, _ := captured(t, "pc-bare")
	blocks := []migstream.Block{{Name: "mem", Length: 4 << 20, PageSize: 2 << 20},
		{Name: "rom", Length: 4096, PageSize: 4096}}
	head = withBlocks(t, head, blocks)
	m := newRAM(blocks)
	var out bytes.Buffer
	if err := (export.VM{Memory: m, Head: head, Load: load}).Write(t.Context(), &out,
		nil); err != nil {
		t.Fatal(err)
	}
	if got := unpack(t, &out); !bytes.Equal(got.blocks["mem"], m.data[0]) ||
		!bytes.Equal(got.blocks["rom"], m.data[1]) {
		t.Error("the memory is another")
	}
}

// withBlocks replaces the list of blocks in a head.
func withBlocks(t testing.TB, head []byte, blocks []migstream.Block) []byte {
	t.Helper()
	r := migstream.NewReader(bytes.NewReader(head))
	var b []byte
	for {
		item, err := r.Next()
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return b
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := item.(migstream.MemSize); ok {
			item = migstream.MemSize{Blocks: blocks}
		}
		b = item.Append(b)
	}
}

func TestRefuses(t *testing.T) {
	head, load, blocks := captured(t, "pc-bare")
	packed := func(data []byte) []byte { return migstream.Packaged{Data: data}.Append(nil) }
	data := load[9:]
	for what, c := range map[string]struct {
		change func(*export.VM, *ram)
		says   string
	}{
		"no head": {func(v *export.VM, _ *ram) { v.Head = nil }, "captured head"},
		"head cut": {func(v *export.VM, _ *ram) { v.Head = head[:len(head)-1] },
			"ends in its middle"},
		"bytes behind the head": {func(v *export.VM, _ *ram) {
			v.Head = append(slices.Clone(head), 0)
		}, "1 bytes behind it"},
		"huge head": {func(v *export.VM, _ *ram) {
			v.Head = append(slices.Clone(head), make([]byte, 1<<20)...)
		}, "more than"},
		"command in the head": {func(v *export.VM, _ *ram) {
			v.Head = migstream.Command{ID: migstream.CmdPostcopyListen}.Append(
				migstream.Header{}.Append(nil))
		}, "postcopy-listen"},
		"no load": {func(v *export.VM, _ *ram) { v.Load = nil },
			"captured devices"},
		"load cut": {func(v *export.VM, _ *ram) { v.Load = load[:len(load)-1] },
			"ends in its middle"},
		"bytes behind the load": {func(v *export.VM, _ *ram) {
			v.Load = append(slices.Clone(load), 0)
		}, "1 bytes behind the package"},
		"command with the load": {func(v *export.VM, _ *ram) {
			v.Load = append(migstream.PingCommand(1).Append(nil), load...)
		}, "ping"},
		"package without LISTEN": {func(v *export.VM, _ *ram) { v.Load = packed(data[5:]) },
			"without LISTEN"},
		"package without RUN": {func(v *export.VM, _ *ram) {
			v.Load = packed(data[:len(data)-5])
		}, "RUN at its end"},
		"package without devices": {func(v *export.VM, _ *ram) {
			v.Load = packed(append(slices.Clone(data[:5]), data[len(data)-5:]...))
		}, "without sections"},
		"device without footer": {func(v *export.VM, _ *ram) {
			v.Load = packed(slices.Delete(slices.Clone(data), len(data)-15, len(data)-14))
		}, "without sections"},
		"block not at hand": {func(_ *export.VM, m *ram) { m.blocks[0].Located = false },
			"not located"},
		"block shrunk": {func(_ *export.VM, m *ram) { m.blocks[0].Size -= 4096 },
			"is this QEMU the one"},
		"block with other pages": {func(_ *export.VM, m *ram) { m.blocks[0].PageSize = 2 << 20 },
			"is this QEMU the one"},
		"memory unreadable": {func(_ *export.VM, m *ram) { m.err = guestmem.ErrGone },
			guestmem.ErrGone.Error()},
	} {
		m := newRAM(blocks)
		vm := export.VM{Memory: m, Head: head, Load: load}
		c.change(&vm, m)
		file := filepath.Join(t.TempDir(), "vm")
		for how, err := range map[string]error{"stream": vm.Write(t.Context(), io.Discard, nil),
			"file": vm.WriteFile(t.Context(), file, nil)} {
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%s, to a %s: %v, want %q", what, how, err, c.says)
			}
		}
		mustBeEmpty(t, filepath.Dir(file))
	}
}

func mustBeEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestWriteFile(t *testing.T) {
	head, load, blocks := captured(t, "pc-bare")
	vm := export.VM{Memory: newRAM(blocks), Head: head, Load: load}
	var want bytes.Buffer
	if err := vm.Write(t.Context(), &want, nil); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	name := filepath.Join(dir, "vm")
	if err := vm.WriteFile(t.Context(), name, nil); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(got, want.Bytes()) {
		t.Errorf("the file has %d bytes, not the %d of the stream; %v", len(got), want.Len(), err)
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode() != 0o600 {
		t.Error(fi.Mode(), err)
	}
	// Neither it nor what is half written is touched by another.
	if err := os.WriteFile(filepath.Join(dir, "other.part"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, taken := range []string{"vm", "other"} {
		if err := vm.WriteFile(t.Context(), filepath.Join(dir, taken), nil); !errors.Is(err,
			os.ErrExist) {
			t.Errorf("%s: %v", taken, err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "other.part")); string(b) != "mine" {
		t.Error(string(b), err)
	}
	// One that comes in the meantime neither.
	late := filepath.Join(dir, "late")
	err = vm.WriteFile(t.Context(), late,
		func(done, total int) { os.WriteFile(late, []byte("mine"), 0o600) })
	if b, _ := os.ReadFile(late); !errors.Is(err, os.ErrExist) || string(b) != "mine" {
		t.Errorf("%v, %d bytes", err, len(b))
	}
	if _, err := os.Stat(late + ".part"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestCancel(t *testing.T) {
	head, load, blocks := captured(t, "pc-bare")
	vm := export.VM{Memory: newRAM(blocks), Head: head, Load: load}
	dir := t.TempDir()
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("no longer wanted")
	if err := vm.WriteFile(ctx, filepath.Join(dir, "vm"),
		func(done, total int) { cancel(why) }); !errors.Is(err, why) {
		t.Error(err)
	}
	mustBeEmpty(t, dir)
}

// A disk without room is told before anything is written, and nothing is left on it.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1M"); err != nil {
		if os.Getenv("VACATE_REQUIRE") == "1" {
			t.Fatal(err)
		}
		t.Skip("needs root:", err)
	}
	defer unix.Unmount(dir, 0)
	head, load, blocks := captured(t, "pc-bare")
	vm := export.VM{Memory: newRAM(blocks), Head: head, Load: load}
	err := vm.WriteFile(t.Context(), filepath.Join(dir, "vm"),
		func(done, total int) { t.Error("something was written") })
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "MiB are needed") {
		t.Error(err)
	}
	mustBeEmpty(t, dir)
}

// Whatever the captured bytes, there is an error, or a stream that holds the memory.
func FuzzWrite(f *testing.F) {
	for _, name := range recorded {
		head, load, _ := captured(f, name)
		f.Add(withBlocks(f, head, fuzzBlocks), load)
	}
	f.Fuzz(func(t *testing.T, head, load []byte) {
		m := newRAM(fuzzBlocks)
		var out bytes.Buffer
		if err := (export.VM{Memory: m, Head: head, Load: load}).Write(t.Context(), &out,
			nil); err != nil {
			if errors.Is(err, migstream.ErrMalformed) || errors.Is(err, migstream.ErrUnsupported) ||
				errors.Is(err, io.ErrUnexpectedEOF) ||
				strings.Contains(err.Error(), "memory ") {
				return
			}
			t.Fatalf("unclassified error %v", err)
		}
		for name, data := range unpack(t, &out).blocks {
			i := slices.IndexFunc(m.blocks, func(b guestmem.Block) bool { return b.Name == name })
			if i >= 0 && !bytes.Equal(data, m.data[i][:len(data)]) {
				t.Fatalf("block %s is another", name)
			}
		}
	})
}

var fuzzBlocks = []migstream.Block{{Name: "pc.ram", Length: 64 << 10, PageSize: 4096},
	{Name: "huge", Length: 2 << 20, PageSize: 2 << 20}}

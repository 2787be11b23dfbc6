package guestmem

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

var (
	record     = flag.Bool("record", false, "record testdata from -qemu instead of testing")
	qemuBinary = flag.String("qemu", "qemu-system-x86_64",
		"QEMU to test with, and its first arguments")
)

type vm struct {
	*qmp.Client
	cmd *exec.Cmd
}

func start(tb testing.TB, args ...string) *vm {
	tb.Helper()
	return startAs(tb, *qemuBinary, args...)
}

func startAs(tb testing.TB, binary string, args ...string) *vm {
	tb.Helper()
	first := strings.Fields(binary)
	if _, err := exec.LookPath(first[0]); err != nil {
		tb.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	sock := filepath.Join(tb.TempDir(), "qmp")
	args = append(append(first[1:], "-nodefaults", "-display", "none", "-qmp",
		"unix:"+sock+",server=on,wait=off"), args...)
	cmd := exec.Command(first[0], args...)
	cmd.Stderr = os.Stderr
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	c, err := qmp.Dial(tb.Context(), sock)
	for i := 0; i < 500 && (errors.Is(err, fs.ErrNotExist) ||
		errors.Is(err, unix.ECONNREFUSED)); i++ {
		time.Sleep(20 * time.Millisecond) // until QEMU listens
		c, err = qmp.Dial(tb.Context(), sock)
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return &vm{c, cmd}
}

func (v *vm) attach(tb testing.TB) *Memory {
	tb.Helper()
	m, err := Attach(tb.Context(), v.Client)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { m.Close() })
	if m.PID() != v.cmd.Process.Pid {
		tb.Fatalf("pid %d, want %d", m.PID(), v.cmd.Process.Pid)
	}
	return m
}

func backend(kind, size, more string) []string {
	return []string{"-m", size, "-object", "memory-backend-" + kind + ",id=pc.ram,size=" + size +
		more, "-machine", "memory-backend=pc.ram"}
}

// rss returns how much memory QEMU has.
func (v *vm) rss(tb testing.TB) int {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", v.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	var size, resident int
	if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
		tb.Fatal(err)
	}
	return resident * units.PageSize
}

// shmem returns what reading must not change: QEMU's shared memory in use.
func (v *vm) shmem(tb testing.TB) string {
	tb.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.SplitSeq(string(status), "\n") {
		if strings.HasPrefix(line, "RssShmem:") {
			return line
		}
	}
	tb.Fatal("no RssShmem")
	return ""
}

// Data that QEMU's loader device puts at guest-physical addresses must be found there.
func TestRead(t *testing.T) {
	pattern := make([]byte, 3*units.PageSize+100)
	for i := range pattern {
		pattern[i] = byte(rand.Uint32() | 1)
	}
	file := filepath.Join(t.TempDir(), "pattern")
	if err := os.WriteFile(file, pattern, 0o600); err != nil {
		t.Fatal(err)
	}
	huge := 0
	if b, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"); err ==
		nil {
		huge, _ = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	for _, tt := range []struct {
		name string
		args []string
		kind Kind
	}{
		{"anonymous", []string{"-m", "5G"}, Anonymous},
		{"q35", []string{"-M", "q35", "-m", "5G", "-vga", "std"}, Anonymous},
		{"memfd", backend("memfd", "5G", ",share=on"), SharedFile},
		{"private memfd", backend("memfd", "5G", ",share=off"), PrivateFile},
		{"shared anonymous", backend("ram", "5G", ",share=on"), SharedFile},
		{"hugetlb", backend("memfd", "5G", ",share=on,hugetlb=on,hugetlbsize=2M,reserve=off"),
			SharedFile},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name == "hugetlb" && huge < 16 {
				t.Skip("needs 16 free 2 MiB pages: echo 16 > /proc/sys/vm/nr_hugepages")
			}
			low := uint64(3 << 30) // RAM below the hole under 4 GiB
			if tt.name == "q35" {
				low = 2 << 30
			}
			addrs := []uint64{1 << 20, 0x1234_5678, low - 4*units.PageSize + 100, 4 << 30,
				0x1_2345_6000}
			args := append([]string{"-S"}, tt.args...)
			for _, a := range addrs {
				args = append(args, "-device",
					fmt.Sprintf("loader,file=%s,addr=%#x,force-raw=on", file, a))
			}
			v := start(t, args...)
			m := v.attach(t)
			ram, _, ok := m.Resolve(0)
			if !ok {
				t.Fatal("no memory at address 0")
			}
			b := m.Blocks()[ram]
			if b.Name != "pc.ram" || b.Size != 5<<30 || !b.Located || b.Kind != tt.kind ||
				(b.PageSize == 2<<20) != (tt.name == "hugetlb") {
				t.Fatalf("block %+v", b)
			}
			before := v.shmem(t)
			got := make([]byte, len(pattern))
			ranges := []Range{}
			for _, a := range addrs {
				block, offset, ok := m.Resolve(a)
				if !ok || block != ram {
					t.Fatalf("%#x resolves to %d, %v", a, block, ok)
				}
				clear(got)
				if err := m.Read(got, block, offset); err != nil || !bytes.Equal(got, pattern) {
					t.Errorf("%#x: wrong content, %v", a, err)
				}
				ranges = append(ranges, Range{block, offset, uint64(len(pattern))})
				bits := make([]uint64, 1)
				if err := m.Populated(block, offset/units.PageSize, 4, bits); err != nil ||
					bits[0] != 15 {
					t.Errorf("%#x: populated %b, %v", a, bits, err)
				}
			}
			all := make([]byte, len(ranges)*len(pattern))
			if err := m.ReadRanges(all, ranges); err != nil ||
				!bytes.Equal(all, bytes.Repeat(pattern, len(ranges))) {
				t.Errorf("all ranges at once: wrong content, %v", err)
			}
			// Nothing was ever at 2.5 GiB.
			const hole = 5 << 29
			bits := make([]uint64, 64)
			if err := m.Populated(ram, hole/units.PageSize, 4096, bits); err != nil {
				t.Error(err)
			}
			for _, w := range bits {
				if w != 0 && tt.name != "hugetlb" {
					t.Fatal("untouched pages count as populated")
				}
			}
			if tt.kind == SharedFile {
				buf := make([]byte, 16<<20)
				if err := m.Read(buf, ram, hole); err != nil || !IsZero(buf) {
					t.Errorf("hole: %v", err)
				}
				if after := v.shmem(t); after != before {
					t.Errorf("reading made QEMU grow: %s, then %s", before, after)
				}
				if err := m.Populated(ram, hole/units.PageSize, 4096, bits); err != nil ||
					bits[0] != 0 && tt.name != "hugetlb" {
					t.Error("reading filled a hole")
				}
			}
		})
	}
}

// Where the firmware has run, our view must equal QEMU's own dump.
func TestEqualsDump(t *testing.T) {
	for _, args := range [][]string{
		{"-m", "128M", "-vga", "std"},
		append(backend("memfd", "128M", ",share=on"), "-vga", "std"),
	} {
		v := start(t, args...)
		time.Sleep(500 * time.Millisecond)
		if err := v.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		m := v.attach(t)
		dump := filepath.Join(t.TempDir(), "dump")
		if err := v.Run(t.Context(), "pmemsave",
			map[string]any{"val": 0, "size": 128 << 20, "filename": dump}, nil); err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(dump)
		if err != nil {
			t.Fatal(err)
		}
		compared, nonzero := 0, 0
		for _, r := range m.Mappings() {
			b := m.Blocks()[r.Block]
			if !b.Located || r.GPA+r.Size > uint64(len(want)) {
				continue
			}
			got := make([]byte, r.Size)
			if err := m.Read(got, r.Block, r.Offset); err != nil {
				t.Fatal(err)
			}
			part := want[r.GPA:][:r.Size]
			if !bytes.Equal(got, part) {
				t.Errorf("%s at %#x differs from the dump", b.Name, r.GPA)
			}
			compared += len(got)
			// What is called unpopulated must be zero.
			bits := make([]uint64, r.Size/units.PageSize/64+1)
			if err := m.Populated(r.Block, r.Offset/units.PageSize, r.Size/units.PageSize,
				bits); err != nil {
				t.Fatal(err)
			}
			for i := range r.Size / units.PageSize {
				if zero := IsZero(part[i*units.PageSize:][:units.PageSize]); !zero {
					nonzero++
					if bits[i/64]>>(i%64)&1 == 0 {
						t.Fatalf("%s page %d holds data but counts as unpopulated", b.Name, i)
					}
				}
			}
		}
		if compared < 127<<20 || nonzero < 50 {
			t.Errorf("compared %d bytes, %d pages with content: the test proves little", compared,
				nonzero)
		}
	}
}

func TestLimits(t *testing.T) {
	v := start(t, "-S", "-m", "64M", "-vga", "std")
	m := v.attach(t)
	ram, _, _ := m.Resolve(0)
	page := make([]byte, units.PageSize)
	for _, r := range []Range{
		{-1, 0, units.PageSize}, {len(m.Blocks()), 0, units.PageSize},
		{ram, 64 << 20, units.PageSize}, {ram, ^uint64(0), units.PageSize},
		{ram, 64<<20 - 1, units.PageSize}, {ram, 0, units.PageSize + 1},
		{ram, 0, units.PageSize - 1}, {ram, 0, ^uint64(0)},
	} {
		if err := m.ReadRanges(page, []Range{r}); err == nil {
			t.Errorf("read %+v", r)
		}
	}
	for i, b := range m.Blocks() {
		if err := m.Read(page, i, 0); !b.Located && !errors.Is(err, ErrNotLocated) {
			t.Errorf("%+v: %v", b, err)
		}
	}
	bits := make([]uint64, 1)
	for _, r := range [][2]uint64{{0, 65}, {1 << 60, 1}, {64 << 20 / units.PageSize, 1},
		{^uint64(0), 2}} {
		if err := m.Populated(ram, r[0], r[1], bits); err == nil {
			t.Errorf("populated %v", r)
		}
	}
	// More ranges than one system call takes, of odd sizes.
	var ranges []Range
	var want []byte
	whole := make([]byte, 64<<20)
	if err := m.Read(whole, ram, 0); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		at, n := rand.Uint64N(60<<20), uint64(i)
		ranges = append(ranges, Range{ram, at, n})
		want = append(want, whole[at:][:n]...)
	}
	got := make([]byte, len(want))
	if err := m.ReadRanges(got, ranges); err != nil || !bytes.Equal(got, want) {
		t.Errorf("3000 ranges: %v", err)
	}
}

func TestDeadQEMU(t *testing.T) {
	for name, args := range map[string][]string{"anonymous": {"-m", "64M"},
		"memfd": backend("memfd", "64M", ",share=on")} {
		t.Run(name, func(t *testing.T) {
			v := start(t, append(args, "-S")...)
			m := v.attach(t)
			ram, _, _ := m.Resolve(0)
			began, died := make(chan struct{}), make(chan error)
			go func() {
				buf := make([]byte, 64<<20)
				err := m.Read(buf, ram, 0)
				close(began)
				for err == nil {
					err = m.Read(buf, ram, 0)
				}
				died <- err
			}()
			<-began
			v.cmd.Process.Kill()
			v.cmd.Wait()
			if err := <-died; !errors.Is(err, ErrGone) {
				t.Errorf("killed during a read: %v", err)
			}
			if err := m.Populated(ram, 0, 64, make([]uint64, 1)); !errors.Is(err, ErrGone) {
				t.Errorf("populated: %v", err)
			}
			if _, err := Attach(t.Context(), v.Client); !errors.Is(err, qmp.ErrClosed) {
				t.Errorf("attach: %v", err)
			}
		})
	}
}

func TestNoPermission(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to give it up on one thread")
	}
	v := start(t, "-S", "-m", "64M")
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		const nobody = 65534
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); e != 0 {
			done <- e
			return
		}
		_, err := Attach(context.Background(), v.Client)
		done <- err
	}()
	if err := <-done; !errors.Is(err, os.ErrPermission) ||
		!strings.Contains(err.Error(), "CAP_SYS_PTRACE") {
		t.Errorf("without permission: %v", err)
	}
}

func BenchmarkRead(b *testing.B) {
	for name, kind := range map[string]string{"anonymous": "ram", "memfd": "memfd"} {
		v := start(b, append(backend(kind, "512M", ",prealloc=on"), "-S")...)
		m := v.attach(b)
		ram, _, _ := m.Resolve(0)
		for _, pages := range []int{1, 64, 512} {
			ranges := make([]Range, pages)
			dst := make([]byte, pages*units.PageSize)
			b.Run(fmt.Sprintf("%s/%d scattered pages", name, pages), func(b *testing.B) {
				b.SetBytes(int64(len(dst)))
				b.ReportAllocs()
				for b.Loop() {
					for i := range ranges {
						ranges[i] = Range{ram,
							rand.Uint64N(512<<20/units.PageSize) * units.PageSize, units.PageSize}
					}
					if err := m.ReadRanges(dst, ranges); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		dst := make([]byte, 1<<20)
		b.Run(name+"/1 MiB runs", func(b *testing.B) {
			b.SetBytes(int64(len(dst)))
			for i := uint64(0); b.Loop(); i++ {
				if err := m.Read(dst, ram, i%512<<20); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/populated 512 MiB", func(b *testing.B) {
			b.ReportAllocs()
			bits := make([]uint64, 512<<20/units.PageSize/64)
			for b.Loop() {
				if err := m.Populated(ram, 0, 512<<20/units.PageSize, bits); err != nil {
					b.Fatal(err)
				}
			}
		})
		if f := m.backing[ram].file; f != nil { // for comparison: what mapping the file would give
			mem, err := unix.Mmap(int(f.Fd()), 0, 512<<20, unix.PROT_READ,
				unix.MAP_SHARED|unix.MAP_POPULATE)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Munmap(mem)
			b.Run(name+"/64 scattered pages by mmap", func(b *testing.B) {
				b.SetBytes(64 * units.PageSize)
				for b.Loop() {
					for i := range 64 {
						copy(dst[i*units.PageSize:],
							mem[rand.IntN(512<<20/units.PageSize)*units.PageSize:][:units.PageSize])
					}
				}
			})
		}
	}
}

// variants are the VMs whose tables testdata holds.
var variants = map[string][]string{
	"pc":    {"-M", "pc", "-m", "256M", "-S"},
	"pc-5g": {"-M", "pc", "-m", "5G", "-vga", "std", "-S"},
	"pc-booted": {"-M", "pc", "-m", "256M", "-vga", "std", "-device", "virtio-net-pci",
		"-device", "virtio-balloon-pci"},
	"pc-two-displays": {"-M", "pc", "-m", "256M", "-vga", "std", "-device", "VGA", "-device",
		"virtio-net-pci", "-device", "virtio-net-pci"},
	"q35-booted": {"-M", "q35", "-m", "5G", "-vga", "std", "-device", "virtio-net-pci", "-device",
		"virtio-balloon-pci"},
	"memfd": append([]string{"-M", "pc", "-S"}, backend("memfd", "5G", ",share=on")...),
	"kvm":   {"-M", "pc", "-accel", "kvm", "-m", "256M", "-vga", "std", "-S"},
}

// TestRecord rewrites the tables of one QEMU version:
// go test ./internal/qemu/guestmem -run TestRecord -record [-qemu "PATH -L DATA"]
func TestRecord(t *testing.T) {
	if !*record {
		t.Skip("records only with -record")
	}
	for name, args := range variants {
		v := start(t, args...)
		time.Sleep(2 * time.Second)
		dir := filepath.Join("testdata",
			fmt.Sprintf("%d.%d-%s", v.Version().Major, v.Version().Minor, name))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write := func(file, text string) {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		hmp := func(line string) string {
			text, err := v.HMP(t.Context(), line)
			if err != nil {
				t.Fatal(err)
			}
			return text
		}
		write("ramblock", hmp("info ramblock"))
		mtree := hmp("info mtree -f")
		write("mtree", mtree)
		rows, err := parseMTree(mtree)
		if err != nil {
			t.Fatal(err)
		}
		var hvas strings.Builder
		for _, r := range rows {
			hvas.WriteString(hmp(fmt.Sprintf("gpa2hva %#x", r.gpa)))
		}
		write("gpa2hva", hvas.String())
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", v.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		bin, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", v.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		write("maps", strings.ReplaceAll(string(maps), bin, "/usr/bin/qemu-system-x86_64"))
		v.cmd.Process.Kill()
	}
}

// A view shows what reading shows, of shared blocks only, and does not outlive Close.
func TestView(t *testing.T) {
	for _, kind := range []string{"memfd", "ram"} {
		t.Run(kind, func(t *testing.T) {
			pattern := bytes.Repeat([]byte("view"), units.PageSize)
			file := filepath.Join(t.TempDir(), "pattern")
			if err := os.WriteFile(file, pattern, 0o600); err != nil {
				t.Fatal(err)
			}
			v := start(t, append(backend(kind, "64M", ""), "-S", "-device",
				"loader,file="+file+",addr=0x1234000,force-raw=on")...)
			m := v.attach(t)
			block, offset, ok := m.Resolve(0x1234000)
			if !ok {
				t.Fatal("address not resolved")
			}
			view, err := m.View(block)
			if err != nil {
				t.Fatal(err)
			}
			if kind == "ram" {
				if view != nil {
					t.Fatal("private memory has a view")
				}
				return
			}
			if uint64(len(view)) != m.Blocks()[block].Size ||
				!bytes.Equal(view[offset:][:len(pattern)], pattern) {
				t.Fatalf("view of %d bytes differs from what was loaded", len(view))
			}
			again, err := m.View(block)
			if err != nil || &again[0] != &view[0] {
				t.Fatalf("second view is another: %v", err)
			}
			if _, err := m.View(len(m.Blocks())); err == nil {
				t.Fatal("view of a block that does not exist")
			}
		})
	}
}

// The memory of a QEMU in a PID namespace of its own is found, although it numbers its threads
// otherwise.
func TestContained(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a PID namespace")
	}
	pattern := bytes.Repeat([]byte("contained"), units.PageSize)
	file := filepath.Join(t.TempDir(), "pattern")
	if err := os.WriteFile(file, pattern, 0o600); err != nil {
		t.Fatal(err)
	}
	v := startAs(t, "unshare --pid --fork --kill-child "+*qemuBinary, "-S", "-m", "64M", "-device",
		"loader,file="+file+",addr=0x1234000,force-raw=on")
	m, err := Attach(t.Context(), v.Client)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	block, offset, ok := m.Resolve(0x1234000)
	got := make([]byte, len(pattern))
	if err := m.Read(got, block, offset); !ok || err != nil || !bytes.Equal(got, pattern) ||
		m.PID() == v.cmd.Process.Pid {
		t.Errorf("process %d, block %d: wrong content, %v", m.PID(), block, err)
	}
	if err := m.Missing(); err != nil {
		t.Error(err)
	}
}

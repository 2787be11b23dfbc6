package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func outb(port uint16, value uint8)

// pvpanic is the port of QEMU's device of that name (docs/specs/pvpanic.txt): bit 0 says
// that the guest has panicked, upon which QEMU pauses it if so told by "-action panic=pause".
const pvpanic = 0x505

// pauseVM has the VM paused; it returns when someone has it go on.
func pauseVM() error {
	runtime.LockOSThread() // the permission is the thread's
	defer runtime.UnlockOSThread()
	if err := unix.Ioperm(pvpanic, 1, 1); err != nil {
		return fmt.Errorf("ioperm: %w", err)
	}
	outb(pvpanic, 1)
	return unix.Ioperm(pvpanic, 1, 0)
}

// quiet stops all other processes, and returns when they stand.
func quiet() error {
	if err := unix.Kill(-1, unix.SIGSTOP); err != nil && err != unix.ESRCH {
		return fmt.Errorf("stop all processes: %w", err)
	}
	for range 500 {
		states, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/stat")
		if err != nil {
			return err
		}
		running := 0
		for _, s := range states {
			b, _ := os.ReadFile(s)
			_, rest, ok := bytes.Cut(b, []byte(") "))
			f := strings.Fields(string(rest))
			if !ok || len(f) < 7 || strings.HasPrefix(s, "/proc/1/") || flag(f[6], 0x00200000) {
				// PF_KTHREAD
				continue
			}
			if !strings.ContainsAny(f[0], "TtZX") {
				running++
			}
		}
		if running == 0 {
			return nil
		}
		time.Sleep(2 * time.Millisecond)
	}
	return fmt.Errorf("processes do not stop")
}

func flag(number string, bit uint64) bool {
	n, err := strconv.ParseUint(number, 10, 64)
	return err == nil && n&bit != 0
}

func letGo() error {
	if err := unix.Kill(-1, unix.SIGCONT); err != nil && err != unix.ESRCH {
		return fmt.Errorf("let all processes go on: %w", err)
	}
	return nil
}

// A table is what the kernel says, for the host to compare.
type table struct {
	name string
	data []byte
}

// snapshots takes snapshots. Its buffers are there before, as what it reads changes by
// being read into new memory.
type snapshots struct {
	flags [2][]byte // kpageflags before and after the pause
	count []byte
	maps  []byte
	zones []byte
}

func newSnapshots() (*snapshots, error) {
	b, err := os.ReadFile("/proc/iomem")
	if err != nil {
		return nil, err
	}
	end := uint64(0) // page frame number
	for line := range strings.Lines(string(b)) {
		var from, to uint64
		if n, _ := fmt.Sscanf(line, "%x-%x : System RAM", &from, &to); n == 2 &&
			strings.Contains(line, "System RAM") {
			end = max(end, (to+1)/pageSize)
		}
	}
	s := &snapshots{}
	for _, p := range []*[]byte{&s.flags[0], &s.flags[1], &s.count} {
		*p = touched(int(end) * 8)
	}
	s.maps, s.zones = touched(int(end)*8), touched(256<<10)
	return s, nil
}

// touched returns memory that is there already.
func touched(n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += pageSize {
		b[i] = 1
	}
	return b
}

func (s *snapshots) take() (_ []table, err error) {
	if err := quiet(); err != nil {
		return nil, err
	}
	defer func() {
		if e := letGo(); err == nil {
			err = e
		}
	}()
	runtime.GC()
	maps, err := s.pagemaps()
	if err != nil {
		return nil, err
	}
	count, err := readInto(s.count, "/proc/kpagecount")
	if err != nil {
		return nil, err
	}
	before, err := readInto(s.flags[0], "/proc/kpageflags")
	if err != nil {
		return nil, err
	}
	zones, err := readInto(s.zones, "/proc/zoneinfo")
	if err != nil {
		return nil, err
	}
	if err := pauseVM(); err != nil {
		return nil, err
	}
	after, err := readInto(s.flags[1], "/proc/kpageflags")
	if err != nil {
		return nil, err
	}
	return []table{{"kpageflags", before}, {"kpageflags after", after}, {"kpagecount", count},
		{"zoneinfo", zones}, {"pagemaps", maps}}, nil
}

func readInto(buf []byte, name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n := 0
	for n < len(buf) {
		m, err := f.Read(buf[n:])
		n += m
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
	}
	return buf[:n], nil
}

// pagemaps returns, process by process, its id, a count, and the frames that it maps in
// the order of their addresses; all u32.
func (s *snapshots) pagemaps() ([]byte, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	out := s.maps[:0]
	entries := make([]byte, 64<<10)
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		areas, err := os.ReadFile(dir + "/maps")
		if err != nil || len(areas) == 0 {
			continue // a thread of the kernel, or gone
		}
		f, err := os.Open(dir + "/pagemap")
		if err != nil {
			continue
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(pid))
		at := len(out)
		out = append(out, 0, 0, 0, 0)
		for line := range strings.Lines(string(areas)) {
			var from, to uint64
			var perms string
			if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perms); err != nil ||
				strings.HasPrefix(perms, "---") || to > 1<<47 {
				continue
			}
			for from < to {
				part := entries[:min(uint64(len(entries)), (to-from)/pageSize*8)]
				if n, err := f.ReadAt(part, int64(from/pageSize*8)); n != len(part) {
					f.Close()
					return nil, fmt.Errorf("read pagemap of %d: %w", pid, err)
				}
				for e := range slices.Chunk(part, 8) {
					v := binary.LittleEndian.Uint64(e)
					if v>>63 == 1 {
						out = binary.LittleEndian.AppendUint32(out, uint32(v&(1<<55-1)))
					}
				}
				from += uint64(len(part)) / 8 * pageSize
			}
		}
		f.Close()
		binary.LittleEndian.PutUint32(out[at:], uint32((len(out)-at-4)/4))
	}
	return out, nil
}

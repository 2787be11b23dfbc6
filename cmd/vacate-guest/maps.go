package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"vacate/internal/guest/pageclass"
)

// A mapping is a line of /proc/PID/maps that may have pages.
type mapping struct {
	start, end uint64 // addresses
	exec       bool
	none       bool // may not be accessed at all
}

func parseMapping(line string) (m mapping, err error) {
	span, rest, ok := strings.Cut(line, " ")
	first, end, ok2 := strings.Cut(span, "-")
	if !ok || !ok2 || len(rest) < 4 {
		return m, fmt.Errorf("bad line in maps: %q", line)
	}
	var err1, err2 error
	m.start, err1 = strconv.ParseUint(first, 16, 64)
	m.end, err2 = strconv.ParseUint(end, 16, 64)
	m.none = rest[:3] == "---"
	m.exec = rest[2] == 'x'
	if m.end < m.start || m.start%4096 != 0 || m.end%4096 != 0 {
		return m, fmt.Errorf("bad addresses in maps: %q", line)
	}
	return m, errors.Join(err1, err2)
}

// Bits of /proc/PID/pagemap (admin-guide/mm/pagemap.rst).
const (
	pmPresent = 1 << 63
	pmFile    = 1 << 61 // or shared memory
	pmFrame   = 1<<55 - 1
)

// claim gives a process the pages that it maps, those that nobody has claimed before.
// It returns false if the time was over before it was done.
func (s *survey) claim(owner uint16, t *task, until time.Time) bool {
	dir := s.g.proc + "/" + strconv.Itoa(t.PID)
	maps, err := os.Open(dir + "/maps")
	if err != nil {
		return true // it has ended
	}
	defer maps.Close()
	pagemap, err := os.Open(dir + "/pagemap")
	if err != nil {
		return true
	}
	defer pagemap.Close()
	lines := bufio.NewScanner(maps)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		m, err := parseMapping(lines.Text())
		if err != nil || m.none || m.start >= 1<<63 { // the last: vsyscall
			continue
		}
		if !s.claimMapping(owner, t, pagemap, m, until) {
			return false
		}
	}
	return true
}

func (s *survey) claimMapping(owner uint16, t *task, pagemap *os.File, m mapping,
	until time.Time) bool {
	for at := m.start; at < m.end; {
		if time.Now().After(until) {
			return false
		}
		end := min(at+uint64(len(s.entries))/8*4096, m.end)
		from, to := at, end
		if m.end-m.start >= 1<<20 && s.g.scanEmpty {
			from, to, end = s.g.present(pagemap, at, m.end, end-at)
		}
		if from < to {
			n, err := pagemap.ReadAt(s.entries[:(to-from)/4096*8], int64(from/4096*8))
			s.claimEntries(owner, t.Active, m.exec, s.entries[:n])
			if err != nil {
				return true // unmapped since
			}
		}
		at = end
	}
	return true
}

func (s *survey) claimEntries(owner uint16, active, exec bool, entries []byte) {
	for i := 0; i+8 <= len(entries); i += 8 {
		e := binary.NativeEndian.Uint64(entries[i:])
		frame := e & pmFrame
		if e&pmPresent == 0 || frame == 0 || frame >= uint64(len(s.Pages)) {
			continue
		}
		p := &s.Pages[frame]
		switch p.Kind {
		case pageclass.None:
			if s.whole { // a device's memory
				continue
			}
			p.Kind, p.Class = pageclass.Anon, pageclass.Other
			if e&pmFile != 0 {
				p.Kind, p.Class = pageclass.File, pageclass.FileInactive
			}
		case pageclass.Anon, pageclass.File, pageclass.Shmem, pageclass.Hugetlb:
		case pageclass.FreeBuddy, pageclass.KernelOther: // it was, when the flags were read
			p.Kind, p.Class = pageclass.Anon, pageclass.Other
			if e&pmFile != 0 {
				p.Kind, p.Class = pageclass.File, pageclass.FileInactive
			}
		default: // the page of zeroes, the vDSO
			continue
		}
		p.Flags |= pageclass.Mapped
		if exec {
			p.Flags |= pageclass.Exec
		}
		if active {
			class := pageclass.UserData
			if exec {
				class = pageclass.UserCode
			}
			p.Class = min(p.Class, class)
		}
		if p.Owner == 0 {
			p.Owner = owner
			s.Sequence = append(s.Sequence, uint32(frame))
		}
	}
}

// scanArg is the argument of the ioctl PAGEMAP_SCAN, and region what it fills in
// (include/uapi/linux/fs.h, since Linux 6.7).
type scanArg struct {
	size, flags, start, end, walkEnd, vec, vecLen, maxPages uint64
	inverted, mask, anyOf, result                           uint64
}

type region struct{ start, end, categories uint64 }

const (
	pagemapScan = 3<<30 | uint(unsafe.Sizeof(scanArg{}))<<16 | 'f'<<8 | 16
	isPresent   = 1 << 3
)

// present returns the first range of present pages from an address on, cut to a size, and
// where to look next. Where the kernel cannot tell, all pages may be present.
func (g *guest) present(pagemap *os.File, at, end, size uint64) (from, to, next uint64) {
	r := &g.region // on the heap, which does not move
	g.scan = scanArg{
		size: uint64(unsafe.Sizeof(scanArg{})), start: at, end: end,
		vec: uint64(uintptr(unsafe.Pointer(r))), vecLen: 1, maxPages: size / 4096,
		mask: isPresent, result: isPresent,
	}
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, pagemap.Fd(), uintptr(pagemapScan),
		uintptr(unsafe.Pointer(&g.scan)))
	switch {
	case errno == unix.ENOTTY || errno == unix.EINVAL:
		g.scanEmpty = false
		return at, at + size, at + size
	case errno != 0 || n == 0:
		return end, end, end
	}
	return r.start, min(r.end, r.start+size), min(r.end, r.start+size)
}

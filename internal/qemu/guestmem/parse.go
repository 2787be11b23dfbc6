package guestmem

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"vacate/internal/sys/units"
)

// Limits of what is believed of QEMU and of /proc; real ones are far smaller.
const (
	maxBlocks = 4096
	maxRows   = 65536
	maxVMAs   = 1 << 20
)

// A ramBlock is a row of HMP "info ramblock" (ram_block_format in QEMU's
// physmem.c: softmmu/ in 7.2, system/ in 10.0).
type ramBlock struct {
	name        string // the block's name in the migration stream; empty if it is not migrated
	pageSize    uint64
	used, total uint64 // bytes
	hva         uint64 // of QEMU 10.0 and later, else 0
}

var ramBlockRow = regexp.MustCompile(
	`^ *(.*?) +(\d+) ([KMG]?i?)B +0x[0-9a-f]{16} +0x([0-9a-f]{16}) +0x([0-9a-f]{16})(?: +0x([0-9a-f]{16}) +\S+)?$`)

func parseRAMBlocks(text string) ([]ramBlock, error) {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if !strings.HasPrefix(strings.TrimLeft(lines[0], " "), "Block Name") {
		return nil, fmt.Errorf("read ram blocks: unknown heading %.80q", lines[0])
	}
	if len(lines) > maxBlocks {
		return nil, fmt.Errorf("read ram blocks: more than %d", maxBlocks)
	}
	seen := make(map[string]bool)
	var blocks []ramBlock
	for _, line := range lines[1:] {
		f := ramBlockRow.FindStringSubmatch(line)
		if f == nil {
			return nil, fmt.Errorf("read ram blocks: unknown row %.120q", line)
		}
		b := ramBlock{name: f[1]}
		shift := map[string]int{"": 0, "Ki": 10, "Mi": 20, "Gi": 30}
		n, err := strconv.ParseUint(f[2], 10, 16)
		s, known := shift[f[3]]
		b.pageSize = n << s
		b.used, b.total = hex(f[4]), hex(f[5])
		if f[6] != "" {
			b.hva = hex(f[6])
		}
		switch {
		case err != nil || !known || b.pageSize < units.PageSize || b.pageSize&(b.pageSize-1) != 0:
			return nil, fmt.Errorf("read ram blocks: bad page size in %.120q", line)
		case b.used > b.total || b.total > 1<<52 || b.hva > 1<<56:
			return nil, fmt.Errorf("read ram blocks: bad size in %.120q", line)
		case len(b.name) > 255 || b.name != "" && seen[b.name]:
			return nil, fmt.Errorf("read ram blocks: bad name in %.120q", line)
		}
		seen[b.name] = true
		blocks = append(blocks, b)
	}
	return blocks, nil
}

// hex parses what a pattern has found to be at most 16 hexadecimal digits.
func hex(s string) uint64 {
	v, _ := strconv.ParseUint(s, 16, 64)
	return v
}

// A row says that guest-physical [gpa, gpa+size) is the region's bytes from
// offset on.
type row struct {
	gpa, size, offset uint64
	region            string // the memory region's own name, without the device's path
}

// flatRow is a row of HMP "info mtree -f" (mtree_print_flatview in QEMU's
// memory.c). Under KVM, QEMU adds the accelerator's name to rows it knows.
var flatRow = regexp.MustCompile(
	`^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:nv-)?(.*?)\): (.*?)(?: @([0-9a-f]{16}))?(?: KVM)?$`)

// parseMTree returns the rows of the address space "memory" that RAM backs:
// "ram", "rom" and "romd", but not "ramd", which is a device's memory.
func parseMTree(text string) ([]row, error) {
	var rows []row
	within, found := false, false
	for line := range strings.SplitSeq(text, "\n") {
		switch {
		case strings.HasPrefix(line, "FlatView #"):
			within = false
		case strings.HasPrefix(line, ` AS "memory", `):
			if found {
				return nil, errors.New(`read memory map: address space "memory" appears twice`)
			}
			within, found = true, true
		case within && strings.HasPrefix(line, "  ") && !strings.HasPrefix(line, "  No rendered"):
			f := flatRow.FindStringSubmatch(line)
			if f == nil {
				return nil, fmt.Errorf("read memory map: unknown row %.120q", line)
			}
			if f[3] != "ram" && f[3] != "rom" && f[3] != "romd" {
				continue
			}
			start, last, offset := hex(f[1]), hex(f[2]), hex(f[5])
			if last < start || last-start >= 1<<52 || offset >= 1<<52 {
				return nil, fmt.Errorf("read memory map: bad range in %.120q", line)
			}
			if n := len(rows); n > 0 && start <= rows[n-1].gpa+rows[n-1].size-1 {
				return nil, fmt.Errorf("read memory map: overlapping rows at %#x", start)
			}
			if len(rows) == maxRows {
				return nil, fmt.Errorf("read memory map: more than %d rows", maxRows)
			}
			rows = append(rows,
				row{gpa: start, size: last - start + 1, offset: offset, region: f[4]})
		}
	}
	if !found {
		return nil, errors.New(`read memory map: no address space "memory"`)
	}
	return rows, nil
}

var gpa2hvaLine = regexp.MustCompile(
	`^Host virtual address for 0x([0-9a-f]{1,16}) \((.*)\) is 0x([0-9a-f]{1,16})\n?$`)

// parseGPA2HVA reads the answer to HMP "gpa2hva"; false if the guest has no RAM there.
func parseGPA2HVA(text string, gpa uint64, region string) (hva uint64, ok bool) {
	f := gpa2hvaLine.FindStringSubmatch(text)
	if f == nil || hex(f[1]) != gpa || f[2] != region {
		return 0, false
	}
	return hex(f[3]), true
}

// A vma is a row of /proc/PID/maps (proc(5)).
type vma struct {
	start, end uint64
	read       bool
	write      bool
	exec       bool
	shared     bool
	offset     uint64 // in the file
	major      uint32
	minor      uint32
	inode      uint64 // 0: no file
	path       string
}

// errMoved: rows of a map overlap. Linux reads the map piece by piece, and the process may have
// changed it in between, such as for a thread that it started.
var errMoved = errors.New("the process's map changed while it was read")

func parseMaps(r io.Reader) ([]vma, error) {
	var vmas []vma
	s := bufio.NewScanner(r)
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		line := s.Text()
		f := strings.SplitN(line, " ", 6)
		if len(f) < 5 || len(f[1]) != 4 {
			return nil, fmt.Errorf("read process maps: unknown row %.120q", line)
		}
		v := vma{read: f[1][0] == 'r', write: f[1][1] == 'w', exec: f[1][2] == 'x',
			shared: f[1][3] == 's'}
		var bad error
		num := func(s string, base, bits int) uint64 {
			n, err := strconv.ParseUint(s, base, bits)
			bad = errors.Join(bad, err)
			return n
		}
		from, to, _ := strings.Cut(f[0], "-")
		major, minor, _ := strings.Cut(f[3], ":")
		v.start, v.end, v.offset = num(from, 16, 64), num(to, 16, 64), num(f[2], 16, 64)
		v.major, v.minor = uint32(num(major, 16, 32)), uint32(num(minor, 16, 32))
		v.inode = num(f[4], 10, 64)
		if len(f) == 6 {
			v.path = strings.TrimLeft(f[5], " ")
		}
		if bad != nil || v.start >= v.end {
			return nil, fmt.Errorf("read process maps: bad row %.120q", line)
		}
		if n := len(vmas); n > 0 && v.start < vmas[n-1].end {
			return nil, fmt.Errorf("read process maps: %w: row %.120q", errMoved, line)
		}
		if len(vmas) == maxVMAs {
			return nil, fmt.Errorf("read process maps: more than %d rows", maxVMAs)
		}
		vmas = append(vmas, v)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read process maps: %w", err)
	}
	return vmas, nil
}

// parseUnreserved reads /proc/PID/smaps: for each mapping, by its start, whether it was made
// without setting memory aside.
func parseUnreserved(r io.Reader) (map[uint64]bool, error) {
	lax := map[uint64]bool{}
	var start uint64
	s := bufio.NewScanner(r)
	s.Buffer(nil, 64<<10)
	for s.Scan() {
		name, rest, _ := strings.Cut(s.Text(), " ")
		if from, _, ok := strings.Cut(name, "-"); ok {
			n, err := strconv.ParseUint(from, 16, 64)
			if err != nil || len(lax) == maxVMAs {
				return nil, fmt.Errorf("read process maps: bad row %.120q", s.Text())
			}
			start, lax[n] = n, false
		} else if name == "VmFlags:" {
			lax[start] = slices.Contains(strings.Fields(rest), "nr")
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("read process maps: %w", err)
	}
	return lax, nil
}

package room

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// endless is what limits have that are none: version 1 of control groups has a number of pages
// below 2^63 bytes.
const endless = 1 << 62

// parseNumber reads a file with one number; "max", and anything else, is none.
func parseNumber(b []byte) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}

// parseKeys reads lines of a name and a number. Others are left out.
func parseKeys(b []byte) map[string]uint64 {
	keys := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, number, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if n, err := strconv.ParseUint(number, 10, 64); err == nil {
			keys[name] = n
		}
	}
	return keys
}

// Meminfo returns the sizes in /proc/meminfo or /proc/PID/status, in bytes.
func Meminfo(b []byte) map[string]uint64 {
	sizes := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		kib, ok := strings.CutSuffix(strings.TrimSpace(value), " kB")
		if n, err := strconv.ParseUint(kib, 10, 54); ok && err == nil {
			sizes[name] = n << 10
		}
	}
	return sizes
}

// parseGroups reads /proc/PID/cgroup: the path of each controller of version 1, and under "" that
// of version 2.
func parseGroups(b []byte) map[string]string {
	groups := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) < 3 {
			continue
		}
		if f[0] == "0" && f[1] == "" {
			groups[""] = f[2]
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			if c != "" {
				groups[c] = f[2]
			}
		}
	}
	return groups
}

// mount is a line of /proc/PID/mountinfo.
type mount struct {
	device  uint64
	root    string // of the file system, that is mounted
	point   string
	kind    string
	options []string // of the file system
}

func parseMounts(b []byte) (mounts []mount) {
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		f, g := strings.Split(before, " "), strings.Split(after, " ")
		if !ok || len(f) < 6 || len(g) < 3 {
			continue
		}
		major, minor, _ := strings.Cut(f[2], ":")
		a, errA := strconv.ParseUint(major, 10, 32)
		i, errI := strconv.ParseUint(minor, 10, 32)
		if errA != nil || errI != nil {
			continue
		}
		mounts = append(mounts,
			mount{device: unix.Mkdev(uint32(a), uint32(i)), root: unescape(f[3]),
				point: unescape(f[4]), kind: g[0], options: strings.Split(g[2], ",")})
	}
	return mounts
}

// unescape undoes what the kernel does to blanks and the like: \ and three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parsePage reads the size of huge pages as control groups have it: "2MB".
func parsePage(s string) uint64 {
	for unit, shift := range map[string]int{"KB": 10, "MB": 20, "GB": 30} {
		if digits, ok := strings.CutSuffix(s, unit); ok {
			if n, err := strconv.ParseUint(digits, 10, 16); err == nil {
				return n << shift
			}
		}
	}
	return 0
}

// parseAddressSpace reads the soft limit on mappings from /proc/PID/limits, in bytes; false if
// there is none.
func parseAddressSpace(b []byte) (uint64, bool) {
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Max address space"); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				return parseNumber([]byte(f[0]))
			}
		}
	}
	return 0, false
}

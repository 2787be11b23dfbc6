package doctor

import (
	"math/bits"
	"strconv"
	"strings"
)

// memoryOf returns the bytes of memory that arguments of QEMU (-m) give a VM; 0 if they do not say.
// The syntax is that of qemu(1): "-m [size=]N[KMGT][,slots=…,maxmem=…]", in MiB unless it says
// otherwise; the last one counts.
func memoryOf(args []string) uint64 {
	var size uint64
	for i := 0; i+1 < len(args); i++ {
		if args[i] != "-m" && args[i] != "--m" {
			continue
		}
		o, err := parseOptions(args[i+1])
		if err != nil {
			continue // QEMU refuses it, too
		}
		text, ok := o["size"]
		if !ok {
			// The first one needs no key.
			text, _, _ = strings.Cut(args[i+1], ",")
			if strings.Contains(text, "=") {
				continue
			}
		}
		size = parseSize(text)
	}
	return size
}

// parseSize reads a size as QEMU does where the unit is MiB; 0 if it is none.
func parseSize(s string) uint64 {
	shift := 20
	if n := len(s); n > 0 {
		if unit := strings.IndexByte("BKMGTPE", s[n-1]&^0x20); s[n-1] >= 'A' && unit >= 0 {
			s, shift = s[:n-1], 10*unit
		}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || f < 0 || f != f {
		return 0
	}
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		if bits.Len64(n)+shift > 64 {
			return 0
		}
		return n << shift
	}
	if f *= float64(uint64(1) << shift); f < 1<<63 {
		return uint64(f)
	}
	return 0
}

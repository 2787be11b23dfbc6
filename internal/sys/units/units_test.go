package units

import (
	"testing"

	"pgregory.net/rapid"
)

func TestSizes(t *testing.T) {
	for n, want := range map[uint64][3]string{
		0:         {"0 bytes", "0", "0 bytes"},
		1023:      {"1023 bytes", "1023 bytes", "1023 bytes"},
		4096:      {"4 KiB", "4 KiB", "4096 bytes"},
		1536:      {"1.5 KiB", "1.5 KiB", "1536 bytes"},
		123456789: {"118 MiB", "123456789 bytes", "117 MiB"},
		3 << 19:   {"1.5 MiB", "1.5 MiB", "1536 KiB"},
		1<<30 + 1: {"1.0 GiB", "1073741825 bytes", "1024 MiB"},
		129 << 20: {"129 MiB", "129 MiB", "129 MiB"},
		1<<64 - 1: {"16 EiB", "18446744073709551615 bytes", "17592186044415 MiB"},
		1025 << 7: {"128 KiB", "128.125 KiB", "128 KiB"},
	} {
		if got := [3]string{Size(n), Exact(n), Fine(n)}; got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// Numbers that differ read differently.
func TestExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, shift := rapid.Uint64().Draw(t, "n"), rapid.IntRange(0, 60).Draw(t, "shift")
		a, b := n>>shift<<shift, (n>>shift+1)<<shift
		if a != b && Exact(a) == Exact(b) {
			t.Errorf("%d and %d are both %s", a, b, Exact(a))
		}
	})
}

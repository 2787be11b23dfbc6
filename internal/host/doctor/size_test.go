package doctor

import (
	"strings"
	"testing"
)

func TestMemoryOf(t *testing.T) {
	for args, want := range map[string]uint64{
		"-m 4G":                             4 << 30,
		"-m 512":                            512 << 20,
		"--m 512m":                          512 << 20,
		"-m size=2g,slots=4,maxmem=8G":      2 << 30,
		"-m slots=4,size=2048M,maxmem=8G":   2 << 30,
		"-m 1.5G":                           3 << 29,
		"-m 1G -smp 2 -m 2G":                2 << 30,
		"-m 1073741824B":                    1 << 30,
		"-machine q35":                      0,
		"-m":                                0,
		"-m maxmem=8G,slots=4":              0,
		"-m x":                              0,
		"-m -5":                             0,
		"-m NaN":                            0,
		"-m 99999999999999999999999999T":    0,
		"-m 18446744073709551615":           0,
		"-m 1e300G":                         0,
		"-object memory-backend-ram,size=4": 0,
	} {
		if got := memoryOf(strings.Fields(args)); got != want {
			t.Errorf("%q: %d, want %d", args, got, want)
		}
	}
}

// A description may give any argument.
func FuzzMemoryOf(f *testing.F) {
	for _, s := range []string{"4G", "size=2g,slots=4,maxmem=8G", "{\"size\":\"1G\"}", "1.5G", ",",
		"=", "B"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) { memoryOf([]string{"-m", s}) })
}

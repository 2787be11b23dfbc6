package cli

import "testing"

func TestSize(t *testing.T) {
	for in, want := range map[string]MiB{"1G": 1024, "200M": 200, "0M": 0, "1536M": 1536} {
		var m MiB
		if err := m.Set(in); err != nil || m != want {
			t.Errorf("size %q is %d MiB, %v; want %d", in, m, err, want)
		}
	}
	for _, in := range []string{"", "M", "1", "1g", "1GB", "1GiB", "-1G", "+1G", "1.5G", " 1G",
		"1G ", "9999999M", "0x10M", "1_0M"} {
		var m MiB
		if err := m.Set(in); err == nil {
			t.Errorf("size %q is taken as %d MiB", in, m)
		}
	}
}

func TestRate(t *testing.T) {
	for in, want := range map[string]Rate{"none": 0, "1Gbit": 1e9, "2.5Gbit": 2.5e9, "100Mbit": 1e8,
		"100kbit": 1e5} {
		var r Rate
		if err := r.Set(in); err != nil || r != want {
			t.Errorf("rate %q is %d, %v; want %d", in, r, err, want)
		}
	}
	for _, in := range []string{"", "0", "1", "1G", "1gbit", "-1Gbit", "+1Gbit", "1e9Gbit",
		"NaNGbit", "InfGbit", "0Gbit", "1kbit", "500Gbit", "1..2Gbit", ".Gbit", "None"} {
		var r Rate
		if err := r.Set(in); err == nil {
			t.Errorf("rate %q is taken as %d", in, r)
		}
	}
}

// What Set takes, String writes so that Set takes it again.
func FuzzUnits(f *testing.F) {
	for _, s := range []string{"1G", "200M", "none", "1Gbit", "2.5Gbit", "100kbit", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var m, m2 MiB
		if m.Set(s) == nil && (m2.Set(m.String()) != nil || m != m2) {
			t.Errorf("size %q: %d, written %s", s, m, m)
		}
		var r, r2 Rate
		if r.Set(s) == nil && (r2.Set(r.String()) != nil || r != r2) {
			t.Errorf("rate %q: %d, written %s", s, r, r)
		}
	})
}

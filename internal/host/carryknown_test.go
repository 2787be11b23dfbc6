package host

import (
	"strings"
	"testing"
)

// What a stream begins with says whether it can be carried, and if not, what to leave out.
func TestKnownStream(t *testing.T) {
	for _, c := range []struct {
		first [4]byte
		want  string
	}{
		{[4]byte{'Q', 'E', 'V', 'M'}, ""},
		{[4]byte{0x16, 3, 1, 2}, "leave --tls out"},
		{several, "begins with"}, // it is dropped, as the first one is refused
		{resumes, "begins with"}, // it is relayed
		{[4]byte{'G', 'E', 'T', ' '}, "begins with 47 45 54 20"},
	} {
		err := known(c.first)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("% x: %v, want %q", c.first, err, c.want)
		}
	}
}

package doctor

import (
	"strings"
	"testing"
)

func TestText(t *testing.T) {
	for _, tt := range []struct {
		findings []Finding
		want     string
	}{
		{nil, "\nready: 0 fatal, 0 warnings, 0 notes, 0 ok\n"},
		{[]Finding{
			{"alpha", "vm", OK, "runs", ""},
			{"", "link", Warning,
				"is neither\nencrypted nor  authenticated: whoever can listen sees the guest's " +
					"memory, all of it", "`vacate certs init`"},
			{"beta", "disk", Fatal, "gone", "put it " + strings.Repeat("x", 90)},
		}, `fatal    beta   disk  gone
                      → put it
                        ` + strings.Repeat("x", 76) + `
                        ` + strings.Repeat("x", 14) + `
warning         link  is neither encrypted nor authenticated: whoever can listen sees the guest's
                      memory, all of it
                      → ` + "`vacate certs init`" + `
ok       alpha  vm    runs

not possible as it is: 1 fatal, 1 warning, 0 notes, 1 ok
`},
		{[]Finding{{strings.Repeat("h", 30), strings.Repeat("c", 30), Warning, "x", "y"},
			{"", "", Note, "", ""}, {"", "", Note, "", ""}},
			"warning  " + strings.Repeat("h", 19) + "…  " + strings.Repeat("c", 19) + "…  x\n" +
				strings.Repeat(" ", 53) + "→ y\n" +
				"note     " + strings.Repeat(" ", 44) + "\nnote     " + strings.Repeat(" ", 44) +
				"\n\npossible, with care: 0 fatal, 1 warning, 2 notes, 0 ok\n"},
		{[]Finding{{"h", "c", Level(9), "x", ""}},
			"fatal    h  c  x\n\nnot possible as it is: 1 fatal, 0 warnings, 0 notes, 0 ok\n"},
	} {
		var b strings.Builder
		if err := Text(&b, tt.findings); err != nil || b.String() != tt.want {
			t.Errorf("%v\n%s\nwant\n%s", err, b.String(), tt.want)
		}
	}
}

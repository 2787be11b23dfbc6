package libvirt

import (
	"errors"
	"strings"
	"testing"
)

func TestMetadata(t *testing.T) {
	for text, want := range map[string]Metadata{
		`<vm/>`:                             {},
		`<vm pinned="yes" priority="3"/>`:   {Pinned: true, Priority: 3},
		`<vm pinned='no' priority='-7'/>`:   {Priority: -7},
		`<vm labels="app=db,tier=prod"/>`:   {Labels: "app=db,tier=prod"},
		"<!-- db -->\n<vm pinned='yes'/>\n": {Pinned: true},
		`<vacate:vm xmlns:vacate="urn:vacate:domain:1" pinned="yes"></vacate:vm>`: {Pinned: true},
	} {
		if m, err := parseMetadata(text); err != nil || m != want {
			t.Errorf("%s: %+v, %v", text, m, err)
		}
	}
	for text, say := range map[string]string{
		"":                                      "want one element",
		"<vm":                                   "syntax",
		`<vm pined="yes"/>`:                     `no "pined"`,
		`<vm labels="a=b" labels="c=d"/>`:       "twice",
		`<vm pinned="true"/>`:                   "want yes or no",
		`<vm pinned="no" pinned="yes"/>`:        "twice",
		`<vm priority="high"/>`:                 "want -1000 to 1000",
		`<vm priority="1001"/>`:                 "want -1000 to 1000",
		`<vm priority="99999999999999999999"/>`: "want -1000 to 1000",
		`<vm><vm/></vm>`:                        "one element",
		`<vm/><vm pinned="yes"/>`:               "one element",
		`<vm>pinned</vm>`:                       "text",
		`<domain/>`:                             "one element",
		`<!DOCTYPE vm [<!ENTITY a "yes">]><vm pinned="&a;"/>`: "one element",
		`<vm pinned="&a;"/>`:                                     "entity",
		`<vm xmlns:o="urn:other" o:pinned="yes"/>`:               "only pinned",
		"<vm>" + strings.Repeat(" ", maxMetadata) + "</vm>":      "more than",
		"<?xml version='1.0' encoding='ascii'?><vm/>":            "encoding",
		strings.Repeat("<vm>", 200) + strings.Repeat("</vm>", 1): "one element",
	} {
		m, err := parseMetadata(text)
		if !errors.Is(err, ErrMetadata) || !strings.Contains(err.Error(), say) ||
			m != (Metadata{}) {
			t.Errorf("%.60s: %+v, %v; want %s", text, m, err, say)
		}
	}
}

// Metadata comes with domains of other hosts.
func FuzzMetadata(f *testing.F) {
	f.Add(`<vm pinned="yes" priority="3"/>`)
	f.Add(`<vacate:vm xmlns:vacate="urn:vacate:domain:1" pinned="no"/>`)
	f.Add(`<!DOCTYPE vm [<!ENTITY a "yes">]><vm pinned="&a;"/>`)
	f.Fuzz(func(t *testing.T, text string) {
		m, err := parseMetadata(text)
		switch {
		case err != nil && (m != (Metadata{}) || !errors.Is(err, ErrMetadata) ||
			len(err.Error()) > 500):
			t.Fatalf("%q: %+v, %v", text, m, err)
		case err == nil && (m.Priority < -maxPriority || m.Priority > maxPriority ||
			m.Pinned && !strings.Contains(text, "yes")):
			t.Fatalf("%q: %+v", text, m)
		}
	})
}

package evict

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/qmp"
)

// The head that the engine makes equals QEMU's, except for the number of the section.
func TestHead(t *testing.T) {
	for _, name := range []string{"pc-bare", "pc-old", "q35-virtio", "microvm-memfd"} {
		r := migstream.NewReader(bytes.NewReader(golden(t, name+".forward.gz")))
		var want []byte
		var machine string
		var blocks []guestmem.Block
		for item := migstream.Item(nil); !is[migstream.Footer](item); {
			var err error
			if item, err = r.Next(); err != nil {
				t.Fatal(err)
			}
			switch it := item.(type) {
			case migstream.Configuration:
				machine = it.Machine
			case migstream.MemSize:
				for _, b := range it.Blocks {
					blocks = append(blocks,
						guestmem.Block{Name: b.Name, Size: b.Length, PageSize: b.PageSize})
				}
			case migstream.SectionStart:
				it.ID = ramSection
				item = it
			case migstream.Footer:
				it.ID = ramSection
				item = it
			}
			want = item.Append(want)
		}
		head, l, err := makeHead(machine, ramSection, blocks)
		if err != nil || !bytes.Equal(head, want) {
			t.Errorf("%s: %v; made\n% x, QEMU\n% x", name, err, head, want)
		}
		again, r, err := parseHead(head)
		if err != nil || len(again) != len(l) || r.SectionID() != ramSection {
			t.Errorf("%s: %v of %v, section %#x, %v", name, again, l, r.SectionID(), err)
		}
	}
	if _, _, err := makeHead("pc", ramSection,
		[]guestmem.Block{{Name: "huge", Size: 1 << 30, PageSize: 1 << 30}}); err == nil {
		t.Error("a page of 1 GiB is taken")
	}
}

func is[T any](item migstream.Item) bool {
	_, ok := item.(T)
	return ok
}

// The events that QEMU sent before its process was stopped decide whether the guest ran.
func TestFacts(t *testing.T) {
	for _, bad := range []string{"", "[]", `{"process": 1}`, `{"unknown": 1}`,
		`{"blocks": [{"Size": -1}]}`} {
		if f, err := parseFacts([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, f)
		}
	}
	var none registers
	if _, err := none.HMP(t.Context(), registersCommand); err == nil {
		t.Error("registers that are not known are told")
	}
	if _, err := registers("CPU#0").HMP(t.Context(), "info mtree -f"); err == nil {
		t.Error("a stopped QEMU answers")
	}
}

// The engine leaves a VM alone that is already migrating, or that must not migrate.
func TestMayLeave(t *testing.T) {
	for _, c := range []struct {
		m    qmp.Migration
		free bool
	}{
		{qmp.Migration{}, true}, {qmp.Migration{Status: "completed"}, true},
		{qmp.Migration{Status: "cancelled"}, true},
		{qmp.Migration{Status: "active"}, false}, {qmp.Migration{Status: "postcopy-paused"}, false},
		{qmp.Migration{Blocked: []string{"nvme"}}, false},
	} {
		if err := mayLeave(c.m); (err == nil) != c.free {
			t.Errorf("%+v: %v", c.m, err)
		}
	}
	if err := unfinished([]job{{"a", "backup", "concluded"}, {"b", "mirror", "null"}}); err != nil {
		t.Error(err)
	}
	if err := unfinished([]job{{"bk", "backup", "running"}}); err == nil || errors.Is(err, io.EOF) {
		t.Error("a job that runs is overlooked")
	}
}

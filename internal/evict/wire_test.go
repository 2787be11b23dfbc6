package evict

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"vacate/internal/evict/journal"
	"vacate/internal/evict/pageset"
	"vacate/internal/link"
	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/migstream"
	"vacate/internal/qemu/migstream/streamtest"
)

// small is the layout of a VM with blocks of both kinds of pages.
var small = layout{
	{"pc.ram", 64 * 4096, 4096, 64},
	{"pc.bios", 3 * 4096, 4096, 3},
	{"huge", 2 * maxPage, maxPage, 2},
}

func run(block int, first pageset.Page, count int) pageset.Run {
	return pageset.Run{Block: block, First: first, Count: count}
}

// Each frame of pages that is accepted equals what appendPages makes of its content, and lies
// within the VM.
func FuzzParsePages(f *testing.F) {
	add := func(runs ...pageRun) {
		b := appendPages(nil, runs)
		for _, r := range runs {
			if !r.Zero {
				b = append(b, bytes.Repeat([]byte("page"),
					r.Count*int(small[r.Block].PageSize)/4)...)
			}
		}
		f.Add(b)
	}
	add(pageRun{run(0, 0, 1), false})
	add(pageRun{run(0, 0, 64), true})
	add(pageRun{run(2, 1, 1), true}, pageRun{run(1, 0, 3), true})
	add(pageRun{run(0, 62, 2), false}, pageRun{run(1, 2, 1), true}, pageRun{run(0, 3, 1), false})
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, data, err := small.parsePages(nil, b)
		if err != nil {
			if !errors.Is(err, link.ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		want := 0
		for _, r := range runs {
			if r.Block >= len(small) || r.Count < 1 || int(r.First) < 0 ||
				int(r.End()) > small[r.Block].Pages {
				t.Fatalf("run %+v is not in the VM", r)
			}
			if !r.Zero {
				want += r.Count * int(small[r.Block].PageSize)
			}
		}
		if len(data) != want {
			t.Fatalf("%d bytes of data for runs of %d", len(data), want)
		}
		if again := append(appendPages(nil, runs), data...); !bytes.Equal(again, b) {
			t.Fatalf("%x was understood as %x", b, again)
		}
	})
}

func TestParsePagesRefuses(t *testing.T) {
	page := make([]byte, 4096)
	one := appendPages(nil, []pageRun{{run(0, 5, 1), false}})
	set := func(at int, v byte) []byte {
		b := append(bytes.Clone(one), page...)
		b[at] = v
		return b
	}
	if _, _, err := small.parsePages(nil, set(0, 0)); err != nil {
		t.Fatal(err)
	}
	many := make([]pageRun, maxRuns+1)
	for i := range many {
		many[i] = pageRun{run(0, 1, 1), true}
	}
	if _, _, err := small.parsePages(nil, appendPages(nil, many[:maxRuns])); err != nil {
		t.Errorf("as many runs as are allowed: %v", err)
	}
	for name, b := range map[string][]byte{
		"nothing":        nil,
		"no runs":        {0, 0},
		"cut runs":       one[:10],
		"no data":        one,
		"too much data":  append(set(0, 0), 0),
		"other block":    set(3, 3),
		"unknown kind":   set(4, 2),
		"reserved byte":  set(5, 1),
		"no pages":       set(9, 0),
		"beyond the end": set(17, 64),
		"far beyond":     set(10, 0x80),
		"too many runs":  appendPages(nil, many),
	} {
		if _, _, err := small.parsePages(nil, b); !errors.Is(err, errFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add(appendRequest(nil, run(0, 0, 1)))
	f.Add(appendRequest(nil, run(0, 60, 4)))
	f.Add(appendRequest(nil, run(2, 1, 1)))
	f.Add(appendRequest(nil, run(1, 3, 1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := small.parseRequest(b)
		if err != nil {
			if !errors.Is(err, link.ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		if small.check(r) != nil || !bytes.Equal(appendRequest(nil, r), b) {
			t.Fatalf("%x was understood as %+v", b, r)
		}
	})
}

func FuzzParsePlaced(f *testing.F) {
	f.Add(appendPlaced(nil, 0, false))
	f.Add(appendPlaced(nil, 262162, true))
	f.Add(appendPlaced(nil, 1<<40, true)[:8])
	f.Fuzz(func(t *testing.T, b []byte) {
		n, held, err := parsePlaced(b)
		if err != nil {
			if !errors.Is(err, link.ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(appendPlaced(nil, n, held), b) {
			t.Fatalf("%x was understood as %d, %v", b, n, held)
		}
	})
}

// anOffer is the offer of a real VM (QEMU 7.2, machine pc).
func anOffer() offer {
	return offer{
		QEMU: "7.2.22", Machine: "pc-i440fx-7.2", LoadTimeout: 20000,
		CPUs: fit.CPUs{Arch: "x86_64", Accel: "tcg", Model: "qemu64", VCPUs: []fit.VCPU{{}},
			Features: [][]fit.Word{{{Leaf: "1 EDX", Bits: 0x078bfbfd},
				{Leaf: "1 ECX", Bits: 0x80002001}}},
			Properties: []fit.Property{{Name: "family", Value: "15"}}},
		Blocks: []blockOffer{{"pc.ram", 256 << 20, 4096}, {"pc.bios", 256 << 10, 4096},
			{"/rom@etc/acpi/tables", 128 << 10, 4096}},
		Devices: fit.Devices{
			List: []fit.Device{{Place: "i440FX-pcihost/addr 00.0"},
				{Place: "i440FX-pcihost/addr 01.0", Kind: 1},
				{Place: "i440FX-pcihost/addr 02.0", ID: "rng0", Kind: 2}},
			Kinds: []fit.Kind{{Type: "i440FX", PCI: "8086:1237"}, {Type: "PIIX3", PCI: "8086:7000"},
				{Type: "virtio-rng-pci", PCI: "1af4:1005",
					Properties: []fit.Property{{Name: "vectors", Value: "2"}}}},
		},
	}
}

// An accepted offer can be made, and comparing it fails with a reason or not at all.
func FuzzOffer(f *testing.F) {
	here := anOffer()
	b, err := json.Marshal(here)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.Replace(b, []byte(`"size"`), []byte(`"length"`), 1))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var o offer
		if err := decode(b, &o); err != nil {
			if !errors.Is(err, link.ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		if err := o.check(); err == nil {
			o.mismatch(here)
			here.mismatch(o)
		} else if !errors.Is(err, link.ErrPeer) {
			t.Fatal(err)
		}
		b, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		var again offer
		if err := decode(b, &again); err != nil {
			t.Fatal(err)
		}
		if third, err := json.Marshal(again); err != nil || !bytes.Equal(b, third) {
			t.Fatalf("%s became %s, %v", b, third, err)
		}
	})
}

func TestDecodeIsStrict(t *testing.T) {
	for _, bad := range []string{"", "{", "[]", `{"cpus":"1"}`, `{"cpus":1}x`, `{"cpus":1}{}`,
		`{"speed":1}`, `{"cpus":1e99}`} {
		var o offer
		if err := decode([]byte(bad), &o); !errors.Is(err, errFrame) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	var o offer
	if err := decode([]byte(`{"machine":"pc"} `), &o); err != nil ||
		!reflect.DeepEqual(o, offer{Machine: "pc"}) {
		t.Errorf("%+v, %v", o, err)
	}
}

// golden returns a stream that package migstream's tests have recorded from a real QEMU.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	return streamtest.Recorded(t, filepath.Join("..", "qemu", "migstream", "testdata", name))
}

// recordings are of the machines pc and q35, bare and with virtio, and of a microvm.
var recordings = []string{"pc-bare.forward.gz", "q35-virtio.forward.gz", "pc-old.forward.gz",
	"microvm-memfd.forward.gz"}

// split takes from a stream what a source would send of it: the head and the device state.
func split(t testing.TB, stream []byte) (head, load []byte, blocks []migstream.Block) {
	t.Helper()
	r := migstream.NewReader(bytes.NewReader(stream))
	inHead := true
	for {
		item, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if inHead {
			head = item.Append(head)
		}
		switch it := item.(type) {
		case migstream.MemSize:
			blocks = it.Blocks
		case migstream.Footer:
			inHead = false
		case migstream.Command:
			if it.ID == migstream.CmdSwitchoverStart {
				load = it.Append(load)
			}
		case migstream.Packaged:
			return head, it.Append(load), blocks
		}
	}
}

// offered is a destination that has accepted an offer of the blocks.
func offered(blocks []migstream.Block) *destination {
	e := Destination{}.engine(Waiting)
	e.recovery.present.Store(newStream(nil))
	here := &e.owner.(*qemuTwin).found.here
	for _, b := range blocks {
		here.Blocks = append(here.Blocks, blockOffer{b.Name, b.Length, b.PageSize})
	}
	return e
}

// A head is accepted if it matches the VM that was offered, and its device state only whole.
func TestHeadAndLoad(t *testing.T) {
	for _, name := range recordings {
		head, load, blocks := split(t, golden(t, name))
		e := offered(blocks)
		err := e.takeHead(head)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e.pages.left() != e.incoming.layout.pages() || len(e.incoming.layout) != len(blocks) ||
			len(e.pages.received) != len(blocks) || e.placer == nil {
			t.Errorf("%s: %d pages of %+v", name, e.pages.left(), e.incoming.layout)
		}
		got, err := checkLoad(e.incoming.reader.Resume(bytes.NewReader(load)))
		if err != nil || !bytes.Equal(got, load) {
			t.Errorf("%s: %d bytes of load became %d, %v", name, len(load), len(got), err)
		}
		for _, bad := range [][]byte{nil, load[:len(load)-1], append(bytes.Clone(load), 0),
			append(bytes.Clone(load), load...), head} {
			if _, err := checkLoad(e.incoming.reader.Resume(bytes.NewReader(bad))); err == nil {
				t.Errorf("%s: a load of %d bytes was taken for one of %d", name, len(bad),
					len(load))
			}
		}
		for n := range head {
			if err := offered(blocks).takeHead(head[:n]); err == nil {
				t.Errorf("%s: a head cut at %d was taken", name, n)
			}
		}
		if err := offered(blocks).takeHead(append(bytes.Clone(head), load...)); err == nil {
			t.Errorf("%s: a head with more behind it was taken", name)
		}
		for i := range blocks {
			other := bytes.Clone(head)
			name := append([]byte{byte(len(blocks[i].Name))}, blocks[i].Name...)
			other[bytes.LastIndex(other, name)+len(name)+2] ^= 1 // 1 TiB more or less
			if err := offered(blocks).takeHead(other); err == nil {
				t.Errorf("%s: a head with a block of any size was taken", name)
			}
			if err := offered(blocks[:i]).takeHead(head); !errors.Is(err, errFrame) {
				t.Errorf("%s: a head with a block that was not offered: %v", name, err)
			}
			grown := offered(blocks)
			grown.owner.(*qemuTwin).found.here.Blocks[i].Size *= 2
			if err := grown.takeHead(head); err == nil != resizable(blocks[i].Name) {
				t.Errorf("%s: %s has half the size that was offered: %v", name, blocks[i].Name, err)
			}
		}
	}
}

func FuzzHead(f *testing.F) {
	_, _, blocks := split(f, golden(f, "pc-bare.forward.gz"))
	for _, name := range recordings {
		head, load, _ := split(f, golden(f, name))
		f.Add(head)
		f.Add(append(head, load[:min(len(load), 64)]...))
	}
	most := 0
	for _, b := range blocks {
		most += int(b.Length/migstream.TargetPageSize) + maxResizable/migstream.TargetPageSize
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e := offered(blocks)
		err := e.takeHead(b)
		if err != nil {
			return
		}
		if e.incoming.reader.Offset() != int64(len(b)) || len(e.incoming.layout) == 0 ||
			e.pages.left() < len(e.incoming.layout) || e.pages.left() > most {
			t.Fatalf("took %d of %d bytes, %d pages of %+v", e.incoming.reader.Offset(), len(b),
				e.pages.left(), e.incoming.layout)
		}
	})
}

func FuzzLoad(f *testing.F) {
	var head []byte
	var blocks []migstream.Block
	for _, name := range recordings {
		h, load, b := split(f, golden(f, name))
		if head == nil {
			head, blocks = h, b
		}
		f.Add(load)
	}
	f.Add(migstream.PingCommand(3).Append(nil))
	f.Add(migstream.Packaged{}.Append(
		migstream.Command{ID: migstream.CmdSwitchoverStart}.Append(nil)))
	e := offered(blocks)
	if err := e.takeHead(head); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		load, err := checkLoad(e.incoming.reader.Resume(bytes.NewReader(b)))
		if err == nil && !bytes.Equal(load, b) {
			t.Fatalf("%x was understood as %x", b, load)
		}
	})
}

// The addresses that a device state names are found, and no others: rings that the guest's driver
// has not set up are at 0.
func TestTouchedByLoading(t *testing.T) {
	word := func(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
	load := []byte("\x05\x11virtio/virtqueues\x00\x00\x00\x01")
	for _, a := range []uint64{0x1000, 0x2000, 0, 0, 0x5000, 0, 0x3000, 0x4000} {
		load = append(load, word(a)...)
	}
	load = append(load, make([]byte, 1020*16)...)
	load = append(load, "\x0bkvm-tpr-opt"...)
	load = binary.BigEndian.AppendUint32(append(load, make([]byte, 148)...), 0xc8000)
	load = append(append(load, "\x07vmgenid\x00\x00\x00\x00\x00\x00\x00\x01"...), 0x28, 0, 0xe, 0,
		0, 0, 0, 0)
	// Two pages of descriptors ahead of an available ring, and a number that no queue has.
	load = append(binary.BigEndian.AppendUint32(load, 512), word(0x3000-512*16)...)
	load = append(binary.BigEndian.AppendUint32(load, 128), word(0x3000-512*16)...)
	want := []uint64{0x1000, 0x2000, 0x3000, 0x4000, 0x1000, 0x2000, 0xc8000, 0xc9000, 0xca000,
		0xe0028}
	if got := touchedByLoading(load, nothing); !slices.Equal(got, want) {
		t.Errorf("%#x, want %#x", got, want)
	}
	for _, name := range recordings { // of VMs whose guests have not set anything up
		_, load, _ := split(t, golden(t, name))
		if got := touchedByLoading(load, nothing); !slices.Equal(got, []uint64{0, 0x1000, 0x2000}) {
			t.Errorf("%s: %#x", name, got)
		}
		if name == "q35-virtio.forward.gz" && !bytes.Contains(load, []byte("virtio/virtqueues")) {
			t.Errorf("%s has no queues", name)
		}
	}
}

// nothing is a guest's memory that cannot be read, and anything one that is full of addresses.
func nothing(uint64, []byte) bool { return false }

func anything(gpa uint64, b []byte) bool {
	for i := range b {
		b[i] = byte(gpa>>i) | 1
	}
	return true
}

// The state of a USB controller names the array of its slots, and the array says where they are
// described.
func TestXHCIContexts(t *testing.T) {
	controller := func(id byte, path string, array uint64) []byte {
		b := append([]byte{4, 0, 0, 0, id, byte(len(path))}, path...)
		b = append(b, make([]byte, 8+300)...)
		b = binary.BigEndian.AppendUint32(b, uint32(array))
		b = binary.BigEndian.AppendUint32(b, uint32(array>>32))
		b = append(b, make([]byte, 29)...)
		return append(b, 0x7e, 0, 0, 0, id)
	}
	load := slices.Concat([]byte("before /xhci"), controller(7, "0000:00:04.0/xhci", 0x1_0000_1000),
		controller(8, "0000:00:1c.0/00.0/xhci", 0), controller(9, "x/xhci", 0x5000))
	got := xhciContexts(load, func(gpa uint64, b []byte) bool {
		if gpa == 0x1_0000_1000 {
			binary.LittleEndian.PutUint64(b[8:], 0x20c40)
			binary.LittleEndian.PutUint64(b, 0x77000) // scratchpad buffers, which nobody reads
		}
		if gpa == 0x20c40 { // the first endpoint runs, the second does not
			b[32], b[64] = 1, 0
			binary.LittleEndian.PutUint64(b[32+8:], 0x99011)
			binary.LittleEndian.PutUint64(b[64+8:], 0xaa011)
		}
		return gpa != 0x5000
	})
	if want := []uint64{0x1_0000_1000, 0x1_0000_1000 + 65*8 - 1, 0x20c40, 0x20c40 + 1023,
		0x99010}; !slices.Equal(got, want) {
		t.Errorf("%#x, want %#x", got, want)
	}
}

// The descriptors of a balloon's queues say where its buffers are.
func TestBalloonBuffers(t *testing.T) {
	const rings, table = 0x3000, 0x3000 - 128*16
	b := append([]byte{4, 0, 0, 0, 3}, "\x1b0000:00:05.0/virtio-balloon"...)
	b = append(b, make([]byte, 8)...)
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(b, 128), table)
	b = append(b, "\x05\x11virtio/virtqueues\x00\x00\x00\x01"...)
	b = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(b, rings), 0x4000)
	b = append(append(b, make([]byte, 1023*16)...), 0x7e, 0, 0, 0, 3)
	got := balloonBuffers(b, func(gpa uint64, b []byte) bool {
		binary.LittleEndian.PutUint64(b[16:], 0x2c3e0a8)
		return gpa == table
	})
	if !slices.Equal(got, []uint64{0x2c3e0a8}) {
		t.Errorf("%#x", got)
	}
}

func FuzzTouchedByLoading(f *testing.F) {
	for _, name := range recordings {
		_, load, _ := split(f, golden(f, name))
		f.Add(load)
	}
	queues := append([]byte("\x05\x11virtio/virtqueues\x00\x00\x00\x01"),
		bytes.Repeat([]byte{0, 0, 0, 0, 1, 2, 0, 0}, 40)...)
	f.Add(queues)
	f.Add(bytes.Repeat(queues, 20))
	f.Add(append([]byte("\x0bkvm-tpr-opt"), make([]byte, 152)...))
	f.Add(slices.Concat([]byte("\x04\x00\x00\x00\x01\x0f/virtio-balloon"), make([]byte, 8),
		[]byte{0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0xff, 0xf0}, queues, []byte{0x7e, 0, 0, 0, 1}))
	f.Add(append(append([]byte("\x04\x00\x00\x00\x01\x05/xhci"), make([]byte, 100)...), 0x7e, 0, 0,
		0, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := len(touchedByLoading(b, anything)); n > 2*maxEarly+20_000 {
			t.Fatalf("%d addresses of %d bytes", n, len(b))
		}
	})
}

// What a destination says that it has is a set of existing pages.
func FuzzHas(f *testing.F) {
	full := pageset.New(small[0].Pages)
	for p := range pageset.Page(small[0].Pages) {
		if p%3 != 0 {
			full.Add(p)
		}
	}
	f.Add(appendPresent(nil, 0, 0, small[0].Pages, full))
	f.Add(appendPresent(nil, 0, 2, 5, full))
	f.Add(appendRequest(nil, run(0, 0, 1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		sets := make([]*pageset.Set, len(small))
		for i, block := range small {
			sets[i] = pageset.New(block.Pages)
		}
		if err := small.parsePresent(b, sets); err != nil {
			if !errors.Is(err, link.ErrPeer) {
				t.Fatal(err)
			}
			return
		}
		r, err := small.parseRequest(b[:runSize])
		if err != nil {
			t.Fatal(err)
		}
		again := []*pageset.Set{}
		for _, block := range small {
			again = append(again, pageset.New(block.Pages))
		}
		if err := small.parsePresent(appendPresent(nil, r.Block, int(r.First), r.Count,
			sets[r.Block]),
			again); err != nil {
			t.Fatal(err)
		}
		for i := range sets {
			for p := range pageset.Page(small[i].Pages) {
				if sets[i].Has(p) != again[i].Has(p) {
					t.Fatalf("page %d of block %d changed", p, i)
				}
			}
		}
	})
}

// All JSON messages except the offer, which has its own test, are accepted as what they are, or
// refused.
func FuzzMessages(f *testing.F) {
	for _, m := range []any{
		resume{Eviction: journal.NewID(), Committed: true},
		status{Answer: AnswerComplete, Summary: &Received{Fetches: 3, FetchDelays: []float64{0.1}}},
		farewell{Reason: "why"}, Received{Duplicate: 1}, twin{PID: 1, Start: 2},
		settings{map[string]bool{"events": true}, map[string]any{"max-bandwidth": 1}},
	} {
		b, err := json.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"eviction":"00"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, into := range []any{new(resume), new(status), new(farewell), new(Received)} {
			if err := decode(b, into); err != nil {
				if !errors.Is(err, link.ErrPeer) {
					t.Fatal(err)
				}
				continue
			}
			if _, err := json.Marshal(into); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// Pages that are too large to come one by one are refused with the offer, even if both ends have
// them.
func TestOfferOfHugePages(t *testing.T) {
	o := anOffer()
	o.Blocks[0].PageSize = 1 << 30
	if err := o.mismatch(o); err == nil ||
		!strings.Contains(err.Error(),
			`memory "pc.ram" has pages of 1024 MiB, and only those of 2 MiB at most can come one by one`) {
		t.Error(err)
	}
	if err := anOffer().mismatch(anOffer()); err != nil {
		t.Error(err)
	}
}

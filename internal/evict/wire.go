package evict

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"vacate/internal/evict/pageset"
	"vacate/internal/evict/pushorder"
	"vacate/internal/link"
	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/migstream"
)

// Frames of the control lane. Their payload is JSON, raw bytes, or empty.
const (
	// source to destination
	msgOffer uint8 = 1 // offer: the VM to be moved
	// raw: QEMU's stream from its header to the footer of the RAM section's start
	msgHead uint8 = 2
	msgLoad uint8 = 3 // raw: the device state, as a package of QEMU's stream
	// from here on the destination may run the VM. Empty: it runs it at once. Else commitment: the
	// VM stands
	msgCommit uint8 = 4
	msgResume uint8 = 5 // resume: goes on with an eviction, in a new session, in place of an offer
	// the caller's JSON: a question that touches no VM, in place of an offer
	msgAsk   uint8 = 6
	msgFill  uint8 = 8  // zeroes, ahead of msgAsk: only their time matters
	msgOpen  uint8 = 10 // filler, after an accepted offer: see openWindow
	msgHeard uint8 = 7  // empty: the source knows that the eviction is complete
	msgRelay uint8 = 11 // relayed: QEMU's own recovery of a migration, in place of an offer
	// destination to source
	msgAccepted uint8 = 16 // empty: the offer fits; QEMU waits for the stream
	msgArmed    uint8 = 25 // empty: QEMU took the head
	msgLoaded   uint8 = 17 // empty: the devices are loaded, the VM is paused
	msgRunning  uint8 = 18 // empty: the VM runs on the destination, or stands there and may run
	msgComplete uint8 = 19 // Received: every page is placed
	msgFailed   uint8 = 20 // farewell: the VM ran here, and it is lost
	msgStatus   uint8 = 21 // status: what became of the eviction, to a resume
	// pages that are here, see appendPresent; several, behind a status that says "running"
	msgPresent uint8 = 22
	msgReady   uint8 = 23 // empty: all msgPresent were sent
	// waiting: what an offer waits for, repeated until it is accepted or refused
	msgWaiting uint8 = 25
	msgOpened  uint8 = 26 // empty: msgOpen has arrived
	msgAnswer  uint8 = 24 // the caller's JSON: the answer to a question
	// farewell: the guest ended itself here; nobody needs its memory any more
	msgShutDown uint8 = 27
	// farewell, once the VM runs: why pages find no memory there; empty if they do again
	msgShort uint8 = 28
	// both ways
	msgProve uint8 = 9 // filler, ahead of an offer, and its answer: the path carries large frames
	// raw, after an accepted msgRelay: bytes of QEMU's stream; empty: it has ended
	msgRelayed uint8 = 12
	// farewell: the sender gave the eviction up, and the VM never ran on the destination
	msgAbort uint8 = 32
)

// Frames of the other lanes; the control lane carries framePages ahead of msgLoad.
const (
	framePages uint8 = 64 // pages, see appendPages
	// fetch lane, destination to source: a run of pages that the guest waits for
	frameRequest uint8 = 65
	// push lane, destination to source, for each frame of pages, see appendPlaced
	framePlaced uint8 = 66
	frameProof  uint8 = 68 // filler, both ways, with msgProve: see prove
	// push lane: pages that are never sent and read as zero, see appendPages; all runs are zero
	frameSkipped uint8 = 67
	// push lane: which units of 2 MiB of a block are huge pages at the source, see appendHuge
	frameHuge uint8 = 69
)

const (
	maxJSON    = 1 << 20
	maxHead    = 1 << 20
	maxFill    = 16 << 20 // bytes of all frames ahead of a question
	maxControl = migstream.MaxPackage
	// maxBatch is the number of bytes of pages in one frame, unless a single page is larger.
	maxBatch = 8 * burst
	// maxRuns is the number of runs of pages in one frame.
	maxRuns = 512
	// maxZeroPages bounds the zero pages in one frame: each costs the destination about a
	// microsecond, during which a fetch waits.
	maxZeroPages = 1024
	// maxPage is the largest page of a RAM block that we move, a huge page on x86.
	maxPage  = 2 << 20
	runSize  = 16
	maxPages = max(maxBatch, maxPage) + 2 + maxRuns*runSize
)

// maxPresent is the number of pages of a block in one msgPresent.
const maxPresent = 1 << 22

// placedSize is the length of framePlaced, in bytes.
const placedSize = 9

// appendPlaced encodes a report of what the destination has placed: u64 bytes of frames of pages so
// far; then u8 1 if the pages of the last frame are in QEMU's memory, 0 if they may still be on
// their way.
func appendPlaced(b []byte, bytes uint64, held bool) []byte {
	b = binary.BigEndian.AppendUint64(b, bytes)
	if held {
		return append(b, 1)
	}
	return append(b, 0)
}

// parsePlaced is the reverse of appendPlaced.
func parsePlaced(b []byte) (bytes uint64, held bool, err error) {
	if len(b) != placedSize || b[8] > 1 {
		return 0, false, fmt.Errorf("%w: report of %d bytes on the push lane", errFrame, len(b))
	}
	return binary.BigEndian.Uint64(b), b[8] == 1, nil
}

// An offer says which VM the source wants to move. So a destination that cannot take it says so
// before the VM is touched.
type offer struct {
	Eviction ID `json:"eviction"`
	// its name on both hosts, if they name VMs
	VM      string       `json:"vm,omitempty"`
	QEMU    string       `json:"qemu"`    // version, for messages
	Machine string       `json:"machine"` // versioned type: "pc-i440fx-7.2"
	CPUs    fit.CPUs     `json:"cpus"`
	Blocks  []blockOffer `json:"blocks"`
	Devices fit.Devices  `json:"devices"`
	Disks   fit.Disks    `json:"disks"`
	// Domain is set for a VM that is a domain of libvirt.
	Domain *domainOffer `json:"domain,omitempty"`
	// Carried is set for a domain that libvirt itself moves.
	Carried *carriedOffer `json:"carried,omitempty"`
	// LoadTimeout is the source's, in milliseconds. The destination gives up if that much time has
	// passed since the device state came, without a commit. Its QEMU may hold the locks of the
	// disks, and without those the source cannot resume the VM.
	LoadTimeout int64 `json:"load_timeout_ms"`
	// Stands is QEMU's word for the state that the VM stands in; empty if it runs.
	Stands string `json:"stands,omitempty"`
	// Forced says that an operator wants it there although the destination keeps VMs off.
	Forced bool `json:"forced,omitempty"`
}

// commitment is the commit of a VM that stood when it was frozen.
type commitment struct {
	Stands string `json:"stands"` // QEMU's word for the state that it stood in
}

type blockOffer struct {
	Name     string `json:"name"`
	Size     uint64 `json:"size"`      // in bytes
	PageSize uint64 `json:"page_size"` // in bytes
}

// relayed is what a relayed stream is for.
type relayed struct {
	VM string `json:"vm"`
}

// resume is the first message of a source that continues an eviction.
type resume struct {
	Eviction ID `json:"eviction"`
	// Committed says that the source can run the VM only if the destination says that it never did.
	Committed bool `json:"committed"`
	// Resumed says that an operator decided to run the VM at the source, which it does or is about
	// to. The twin must end.
	Resumed bool `json:"resumed,omitempty"`
}

// status is what a destination knows of an eviction.
type status struct {
	Answer  Answer    `json:"answer"`
	Reason  string    `json:"reason,omitempty"`
	Dead    bool      `json:"dead,omitempty"`    // the twin has ended, and never runs again
	Summary *Received `json:"summary,omitempty"` // for a complete one
	// for a running one: how long the VM has run here; 0 if not known
	Ran uint32 `json:"ran_ms,omitempty"`
}

// waiting is what a destination does before it can accept an offer.
type waiting struct {
	What string `json:"what"` // "hostb starts a QEMU for VM web1"
}

// farewell is why an eviction was given up.
type farewell struct {
	Reason string `json:"reason"`
	Dead   bool   `json:"dead,omitempty"` // as in status
}

// Received is what the destination knows of an eviction that is complete.
type Received struct {
	Duplicate   int `json:"duplicate"` // pages that came twice and were dropped
	Fetches     int `json:"fetches"`
	FreeTouched int `json:"free_touched"` // requests for pages that were left out
	// ShutDown is why the guest ended itself; then the eviction did not complete, but ended well.
	ShutDown string `json:"shut_down,omitempty"`
	// sorted, thinned to at most 1000; seconds from request to placement
	FetchDelays []float64 `json:"fetch_delays_s"`
}

// pageRun is a run of pages in a frame: of data, or zero.
type pageRun struct {
	pageset.Run
	Zero bool
}

// appendPages appends the head of a frame of pages: u16 number of runs, then per run u16
// block, u8 zero, u8 0, u32 count, u64 first page. The data of the runs that are not zero
// follows, in order.
func appendPages(b []byte, runs []pageRun) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(runs)))
	for _, r := range runs {
		b = binary.BigEndian.AppendUint16(b, uint16(r.Block))
		zero := byte(0)
		if r.Zero {
			zero = 1
		}
		b = binary.BigEndian.AppendUint32(append(b, zero, 0), uint32(r.Count))
		b = binary.BigEndian.AppendUint64(b, uint64(r.First))
	}
	return b
}

var errFrame = fmt.Errorf("%w: bad frame", link.ErrPeer)

// layout is the extent of the VM's blocks, in the order of QEMU's stream. A block's index in it is
// its number on the link.
type layout []blockLayout

type blockLayout struct {
	Name     string
	Length   uint64
	PageSize uint64
	Pages    int
}

func newLayout(blocks []migstream.Block) (layout, error) {
	l := make(layout, len(blocks))
	for i, b := range blocks {
		if b.PageSize > maxPage {
			return nil,
				fmt.Errorf("block %q is backed by pages of %d MiB; at most 2 MiB are supported",
					b.Name, b.PageSize>>20)
		}
		l[i] = blockLayout{b.Name, b.Length, b.PageSize, int(b.Length / b.PageSize)}
	}
	return l, nil
}

// blocks returns the layout as pushorder needs it.
func (l layout) blocks() []pushorder.Block {
	blocks := make([]pushorder.Block, len(l))
	for i, b := range l {
		blocks[i] = pushorder.Block{Pages: b.Pages, PageSize: int(b.PageSize)}
	}
	return blocks
}

func (l layout) pages() int {
	n := 0
	for _, b := range l {
		n += b.Pages
	}
	return n
}

// find returns the number of the block called name, or -1.
func (l layout) find(name string) int {
	for i, b := range l {
		if b.Name == name {
			return i
		}
	}
	return -1
}

// discards encodes commands that make QEMU drop all of the memory: QEMU wrote ROMs into it when it
// started. From the first of them on, QEMU takes no huge pages for it (postcopy_ram_prepare_discard
// in QEMU's migration/postcopy-ram.c).
func (l layout) discards() (b []byte) {
	for _, block := range l {
		if block.Pages > 0 {
			b = migstream.DiscardCommand(block.Name,
				[]migstream.Range{{Length: uint64(block.Pages) * block.PageSize}}).Append(b)
		}
	}
	return b
}

// check returns an error if the run does not lie within its block.
func (l layout) check(r pageset.Run) error {
	if r.Block < 0 || r.Block >= len(l) || r.Count <= 0 ||
		uint64(r.First) >= uint64(l[r.Block].Pages) || r.Count > l[r.Block].Pages-int(r.First) {
		return fmt.Errorf("%w: pages %d+%d of block %d are not in the VM", errFrame, r.First,
			r.Count, r.Block)
	}
	return nil
}

// parsePages parses a frame of pages. data is the part of b that holds the data of all runs in a
// row.
func (l layout) parsePages(dst []pageRun, b []byte) (runs []pageRun, data []byte, err error) {
	if len(b) < 2 {
		return nil, nil, fmt.Errorf("%w: pages of %d bytes", errFrame, len(b))
	}
	n := binary.BigEndian.Uint16(b)
	b = b[2:]
	if n == 0 || n > maxRuns || len(b) < int(n)*runSize {
		return nil, nil, fmt.Errorf("%w: %d runs of pages in %d bytes", errFrame, n, len(b))
	}
	runs = dst
	want := uint64(0)
	for range n {
		r := pageRun{Run: pageset.Run{
			Block: int(binary.BigEndian.Uint16(b)),
			First: pageset.Page(binary.BigEndian.Uint64(b[8:])),
			Count: int(binary.BigEndian.Uint32(b[4:])),
		}, Zero: b[2] == 1}
		if b[2] > 1 || b[3] != 0 {
			return nil, nil, fmt.Errorf("%w: run of unknown kind", errFrame)
		}
		if err := l.check(r.Run); err != nil {
			return nil, nil, err
		}
		if !r.Zero {
			want += uint64(r.Count) * l[r.Block].PageSize
		}
		runs = append(runs, r)
		b = b[runSize:]
	}
	if uint64(len(b)) != want {
		return nil, nil, fmt.Errorf("%w: %d bytes of page data, want %d", errFrame, len(b), want)
	}
	return runs, b, nil
}

// appendRequest encodes a run of pages that the guest waits for.
func appendRequest(b []byte, r pageset.Run) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(r.Block))
	b = binary.BigEndian.AppendUint32(append(b, 0, 0), uint32(r.Count))
	return binary.BigEndian.AppendUint64(b, uint64(r.First))
}

func (l layout) parseRequest(b []byte) (pageset.Run, error) {
	if len(b) != runSize || b[2]|b[3] != 0 {
		return pageset.Run{}, fmt.Errorf("%w: request of %d bytes", errFrame, len(b))
	}
	r := pageset.Run{
		Block: int(binary.BigEndian.Uint16(b)),
		First: pageset.Page(binary.BigEndian.Uint64(b[8:])),
		Count: int(binary.BigEndian.Uint32(b[4:])),
	}
	return r, l.check(r)
}

// appendPresent appends a frame that says which pages of a block are here: u16 block, u16 0, u32
// count of pages, u64 first page. Then comes a bit for each page from the first on, the least
// significant of a byte first, padded to 8 bytes.
func appendPresent(b []byte, block int, first, count int, set *pageset.Set) []byte {
	b = appendRequest(b, pageset.Run{Block: block, First: pageset.Page(first), Count: count})
	words := make([]uint64, (count+63)/64)
	for at, n := range set.Runs(pageset.Page(first), pageset.Page(first+count)) {
		for i := int(at) - first; n > 0; n, i = n-1, i+1 {
			words[i/64] |= 1 << (i % 64)
		}
	}
	for _, w := range words {
		b = binary.LittleEndian.AppendUint64(b, w)
	}
	return b
}

// parsePresent adds the pages of a frame to the sets, one for each block.
func (l layout) parsePresent(b []byte, sets []*pageset.Set) error {
	if len(b) < runSize {
		return fmt.Errorf("%w: pages received, in %d bytes", errFrame, len(b))
	}
	r, err := l.parseRequest(b[:runSize])
	if err != nil {
		return err
	}
	if b = b[runSize:]; len(b) != (r.Count+63)/64*8 {
		return fmt.Errorf("%w: %d bytes about %d pages", errFrame, len(b), r.Count)
	}
	addBits(sets[r.Block], r.First, r.Count, b)
	return nil
}

// addBits adds the pages from first on whose bits are set, of count bits in bytes.
func addBits(set *pageset.Set, first pageset.Page, count int, bits []byte) {
	for i := 0; i < count; i++ {
		if bits[i/8] == 0 && i%8 == 0 {
			i += 7
			continue
		}
		if bits[i/8]>>(i%8)&1 != 0 {
			set.Add(first + pageset.Page(i))
		}
	}
}

// decode parses a peer's JSON message strictly.
func decode(b []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	err := dec.Decode(into)
	if _, end := dec.Token(); err == nil && !errors.Is(end, io.EOF) {
		err = errors.New("bytes behind it")
	}
	if err != nil {
		return fmt.Errorf("%w: message: %v", errFrame, err)
	}
	return nil
}

func writeJSON(c *link.Conn, kind uint8, message any) error {
	b, err := json.Marshal(message)
	if err != nil {
		return fmt.Errorf("encode a message: %w", err)
	}
	if len(b) > maxJSON {
		return fmt.Errorf("message of %d bytes is longer than %d", len(b), maxJSON)
	}
	return c.Write(kind, b)
}

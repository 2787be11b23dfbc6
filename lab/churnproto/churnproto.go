// Package churnproto is what the churn guest (lab/cmd/guestchurn) and its host (lab/churn) say
// to each other over one virtio-serial port, and what the guest writes into its pages.
//
// The host sends lines, "ID VERB ARGUMENT…\n". The guest sends frames, integers
// little-endian:
//
//	u32 magic "CHRN" │ u32 type │ u32 length │ u32 CRC-32C of the payload │ payload
//
// A VM that is set back to a snapshot may cut a frame anywhere: the host then looks for the
// next frame that is whole.
package churnproto

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Port is the name of the virtio-serial port.
const Port = "vacate.churn"

// Type is what a frame holds.
type Type uint32

// The types of frames. All but Table hold JSON.
const (
	TypeHello Type = iota + 1 // Hello: the guest is ready
	TypeBeat                  // Beat: twice a second
	TypeBad                   // Bad: a word is not as it was written
	TypeDeath                 // Death: a worker ended
	TypeTable                 // AppendTable's: a part of a reply
	TypeReply                 // Reply: a command is carried out
	types
)

// MaxPayload is the greatest length of a payload in bytes.
const MaxPayload = 1 << 20

const (
	magic      = 0x4e524843 // "CHRN"
	headerSize = 16
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// AppendFrame appends a frame to b. The payload must not exceed MaxPayload.
func AppendFrame(b []byte, t Type, payload []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, magic)
	b = binary.LittleEndian.AppendUint32(b, uint32(t))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.LittleEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	return append(b, payload...)
}

// A Reader takes frames from a stream.
type Reader struct {
	in *bufio.Reader
	// Skipped counts bytes that belong to no frame.
	Skipped uint64
}

// NewReader returns a Reader of r.
func NewReader(r io.Reader) *Reader {
	return &Reader{in: bufio.NewReaderSize(r, headerSize+MaxPayload)}
}

// Next returns the next whole frame, whose payload is valid until the next call; what is no
// frame is skipped. Its error is that of the stream.
func (r *Reader) Next() (Type, []byte, error) {
	for {
		h, err := r.in.Peek(headerSize)
		if err != nil {
			return 0, nil, err
		}
		t, n := Type(binary.LittleEndian.Uint32(h[4:])), binary.LittleEndian.Uint32(h[8:])
		if binary.LittleEndian.Uint32(h) == magic && t > 0 && t < types && n <= MaxPayload {
			sum := binary.LittleEndian.Uint32(h[12:])
			all, err := r.in.Peek(headerSize + int(n))
			if err == nil && crc32.Checksum(all[headerSize:], castagnoli) == sum {
				r.in.Discard(len(all))
				return t, all[headerSize:], nil // the buffer is not refilled before the next Peek
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return 0, nil, err
			}
		}
		r.in.Discard(1)
		r.Skipped++
	}
}

// Hello is the guest's first message.
type Hello struct {
	Release string   `json:"release"` // of the kernel
	CPUs    int      `json:"cpus"`
	MemKiB  int      `json:"mem_kib"`
	Workers []string `json:"workers"` // their names; others' messages give their index
	// Lacks says what the guest's kernel does not offer to the load.
	Lacks []string `json:"lacks,omitempty"`
}

// Beat tells that the guest lives, and how much its workers have done.
type Beat struct {
	Ops   []uint64 `json:"ops"`   // by worker, since the guest began
	Pages uint64   `json:"pages"` // verified in all, by all workers
	// OOM counts the deaths of the worker that presses memory, which is meant to die first.
	OOM uint64 `json:"oom"`
	// Told is how many messages Bad and Death were sent before, as a move may cut some.
	Told uint64 `json:"told"`
}

// Bad is a word of memory, or of what the kernel kept for the load, that is wrong.
type Bad struct {
	Worker  int    `json:"worker"`
	What    string `json:"what"`
	Address uint64 `json:"address"` // guest-virtual, or an offset in what What names
	Want    uint64 `json:"want"`
	Found   uint64 `json:"found"`
}

func (b Bad) String() string {
	return fmt.Sprintf("%s at %#x: %#016x, not %#016x", b.What, b.Address, b.Found, b.Want)
}

// Death is the end of a worker, which never ends by itself.
type Death struct {
	Worker int    `json:"worker"`
	Status string `json:"status"`
	Said   string `json:"said,omitempty"` // the end of what it wrote to standard error
}

// Reply is the end of a command.
type Reply struct {
	ID    string `json:"id"`
	Error string `json:"error,omitempty"`
	Trace *Trace `json:"trace,omitempty"`
	// Vmstat is /proc/vmstat at the end of the command "check".
	Vmstat map[string]uint64 `json:"vmstat,omitempty"`
}

// Trace says how to find what the guest's kernel writes when its page allocator allocates
// or frees: perf(2) rings of the tracepoints kmem:mm_page_alloc and kmem:mm_page_free, one
// a CPU. Their reader moves the tail; as long as there is none, they are full.
type Trace struct {
	Rings []Ring `json:"rings"`
	Alloc Event  `json:"alloc"`
	Free  Event  `json:"free"`
}

// Ring tells the pages of a ring by what is in them.
type Ring struct {
	Mark uint64   `json:"mark"` // in the first page, struct perf_event_mmap_page, at MarkOffset
	Sums []uint64 `json:"sums"` // of the pages of data
}

// FullBut is how many bytes a ring lacks at most when it counts as full.
const FullBut = 256

// Offsets in struct perf_event_mmap_page (include/uapi/linux/perf_event.h), in bytes.
const (
	MarkOffset = 1016 // the end of what it holds in reserve
	HeadOffset = 1024
	TailOffset = 1032
)

// Sum sums up a page, but for its end: a ring that is full may still take a short record.
func Sum(w *Words) (sum uint64) {
	for _, v := range w[:len(w)-FullBut/8] {
		sum = (sum ^ v) * stepBase
		sum ^= sum >> 32
	}
	return sum
}

// Event is the layout of a tracepoint's record: offsets in bytes.
type Event struct {
	ID    int `json:"id"`
	PFN   int `json:"pfn"`   // of 8 bytes
	Order int `json:"order"` // of 4 bytes
}

// AppendTable appends a part of a named table of the reply to command id, from an offset on.
func AppendTable(b []byte, id, name string, offset uint64, data []byte) []byte {
	for _, s := range []string{id, name} {
		b = append(b, byte(len(s)))
		b = append(b, s...)
	}
	b = binary.LittleEndian.AppendUint64(b, offset)
	return append(b, data...)
}

// ParseTable takes apart what AppendTable made.
func ParseTable(b []byte) (id, name string, offset uint64, data []byte, err error) {
	var s [2]string
	for i := range s {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return "", "", 0, nil, errors.New("table is cut")
		}
		s[i], b = string(b[1:1+b[0]]), b[1+b[0]:]
	}
	if len(b) < 8 {
		return "", "", 0, nil, errors.New("table is cut")
	}
	return s[0], s[1], binary.LittleEndian.Uint64(b), b[8:], nil
}

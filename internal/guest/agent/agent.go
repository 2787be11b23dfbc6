// Package agent asks the agent inside a guest, cmd/vacate-guest, what the guest's
// pages are used for, and decodes what it answers. It is for guests that cannot be read
// from outside. What an agent says may order pages, never leave one out: its word is
// older than the freeze, and a guest may lie. The coding has no way to call a page
// skippable, and the decoder refuses one that tries.
//
// The two talk over a virtio-serial port called [PortName], a plain stream of bytes that
// either side may enter or leave in the middle of. So each message is a frame that can be
// found in a stream that begins anywhere. Numbers are little-endian:
//
//	 0  7  "vacateG"
//	 7  1  version of the protocol, 1
//	 8  1  type
//	 9  3  zero
//	12  4  length of the body
//	16  8  id: random in a request, repeated in its answer
//	24  4  CRC-32C of the body
//	28  4  CRC-32C of bytes 0 to 27
//	32     body
//
// Frames that are broken, or that answer somebody else, are skipped byte by byte. A frame
// of another version has the same header.
//
//	type     from   body
//	prepare  host   24 bytes: the time in milliseconds that the host waits, the time in
//	                milliseconds that counts as active, the most bytes of an answer, zero
//	                (4 bytes each); the number of page frames the guest may have (8)
//	ask      host   the same
//	done     guest  the costs
//	survey   guest  the costs and a survey, see append.go
//	refusal  guest  why not, at most 512 bytes of text
//
// "Prepare" has the agent clear the accessed bits of the guest's processes and note their
// CPU times. Sent some seconds before "ask", it lets the survey tell what was used since.
package agent

import (
	"encoding/binary"
	"hash/crc32"
	"time"
)

// PortName is the name of the virtio-serial port.
const PortName = "org.vacate.agent"

const (
	version    = 1
	headerSize = 32
	// RequestSize is the size of a request's frame.
	RequestSize = headerSize + 24
	maxText     = 512
)

var magic = [8]byte{'v', 'a', 'c', 'a', 't', 'e', 'G', version}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// A kind of frame.
type frameType uint8

const (
	typePrepare frameType = 1 + iota
	typeAsk
	typeDone
	typeSurvey
	typeRefusal
)

type header struct {
	version uint8
	typ     frameType
	length  uint32
	id      uint64
	bodySum uint32
}

func appendFrame(b []byte, typ frameType, id uint64, body []byte) []byte {
	start := len(b)
	b = append(b, magic[:]...)
	b = append(b, byte(typ), 0, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = binary.LittleEndian.AppendUint64(b, id)
	b = binary.LittleEndian.AppendUint32(b, checksum(body))
	b = binary.LittleEndian.AppendUint32(b, checksum(b[start:]))
	return append(b, body...)
}

// findHeader returns the first header in b, and where it begins. Without one, at is how
// many bytes cannot be the beginning of one.
func findHeader(b []byte) (h header, at int, ok bool) {
	for at = range b {
		rest := b[at:]
		if rest[0] != magic[0] {
			continue
		}
		if len(rest) < headerSize {
			n := min(len(rest), len(magic)-1) // the version may be another
			if string(rest[:n]) == string(magic[:n]) {
				return h, at, false
			}
			continue
		}
		if string(rest[:7]) != string(magic[:7]) ||
			binary.LittleEndian.Uint32(rest[28:]) != checksum(rest[:28]) {
			continue
		}
		return header{
			version: rest[7],
			typ:     frameType(rest[8]),
			length:  binary.LittleEndian.Uint32(rest[12:]),
			id:      binary.LittleEndian.Uint64(rest[16:]),
			bodySum: binary.LittleEndian.Uint32(rest[24:]),
		}, at, true
	}
	return h, len(b), false
}

// A Request is what the host wants of the agent.
type Request struct {
	ID      uint64
	Prepare bool // else a survey is wanted
	// Deadline is how long the host waits, from when it sent the request; of up to a minute.
	Deadline     time.Duration
	ActiveWithin time.Duration // how long ago a process that is active may have run
	MaxBytes     int           // the host reads no longer answer
	Frames       uint64        // the host knows of no page frames beyond
}

// Append appends the request's frame to b. Times are coded in whole milliseconds.
func (r *Request) Append(b []byte) []byte {
	typ := typeAsk
	if r.Prepare {
		typ = typePrepare
	}
	var body [RequestSize - headerSize]byte
	binary.LittleEndian.PutUint32(body[0:], millis(r.Deadline))
	binary.LittleEndian.PutUint32(body[4:], millis(r.ActiveWithin))
	binary.LittleEndian.PutUint32(body[8:], uint32(r.MaxBytes))
	binary.LittleEndian.PutUint64(body[16:], r.Frames)
	return appendFrame(b, typ, r.ID, body[:])
}

func millis(d time.Duration) uint32 {
	return uint32(min(max(d.Milliseconds(), 0), 1<<32-1))
}

// NextRequest is the agent's side: it looks in b, what came from the host, for the first
// whole request, and returns how many bytes of b are done with. Whatever is no request is
// done with at once, so what remains is shorter than [RequestSize]. A request of another
// version of the protocol gives refusal, the frame to answer it with.
func NextRequest(b []byte) (r Request, refusal []byte, n int, ok bool) {
	for {
		h, at, found := findHeader(b[n:])
		n += at
		if !found {
			return r, nil, n, false
		}
		if h.version != version {
			n += headerSize
			return r, AppendRefusal(nil, h.id,
				"the agent in the guest speaks version 1 of the protocol only: install the "+
					"vacate-guest that belongs to this vacate"), n, false
		}
		if h.typ != typePrepare && h.typ != typeAsk || h.length != RequestSize-headerSize {
			n++
			continue
		}
		if len(b)-n < RequestSize {
			return r, nil, n, false
		}
		body := b[n+headerSize : n+RequestSize]
		if checksum(body) != h.bodySum {
			n++
			continue
		}
		ms := func(at int) time.Duration {
			return time.Duration(binary.LittleEndian.Uint32(body[at:])) * time.Millisecond
		}
		return Request{
			ID:           h.id,
			Prepare:      h.typ == typePrepare,
			Deadline:     min(ms(0), time.Minute),
			ActiveWithin: ms(4),
			MaxBytes:     int(min(binary.LittleEndian.Uint32(body[8:]), maxAnswer)),
			Frames:       min(binary.LittleEndian.Uint64(body[16:]), maxFrames),
		}, nil, n + RequestSize, true
	}
}

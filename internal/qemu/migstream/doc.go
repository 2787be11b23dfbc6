// Package migstream reads and writes QEMU's migration stream and its return path, as far
// as a post-copy migration needs them.
//
// The truth is QEMU itself: migration/savevm.c, migration/ram.c and migration/migration.c
// of QEMU 7.2 to 11.1, which write and read version 3 of the stream. All integers are
// big-endian. Every element is an [Item]: [Reader] decodes a stream into items,
// Item.Append encodes one, and encoding what was decoded gives the same bytes.
//
// The forward stream, source to destination:
//
//	"QEVM" u32=3                                        Header
//	07 u32 len, machine type                            Configuration
//	08 u16 command, u16 len, payload                    Command
//	08 0007 0004 u32 size, then size bytes              Packaged
//	01 u32 id, u8 n, "ram", u32 instance 0, u32 4       SectionStart, then RAM records
//	02 u32 id / 03 u32 id                               SectionPart, SectionEnd, then RAM records
//	7e u32 id                                           Footer
//	00                                                  EOF
//
// RAM records run up to and including an EOS. Each starts with a u64 that holds a page's
// offset in its block in the high bits and flags in the low twelve:
//
//	04  MemSize: total bytes, then per block u8 n, name, u64 length [u64 page size]
//	02  zero page, one byte of fill          } then, unless flag 20 is set,
//	08  page, 4096 bytes                     } u8 n, block name
//	20  the same block as the record before (in an earlier section, even)
//	10  EOS
//
// The state of all other devices is FULL sections (04), whose length only the device's own
// code knows. They are opaque here: in post-copy they travel inside the package, in
// pre-copy they follow the last RAM section, and [Reader] hands out the rest as [Opaque].
//
// The return path, destination to source, is u16 type, u16 len, payload; see [Message].
package migstream

import "errors"

// Sizes and limits of the format.
const (
	// Version of the stream that QEMU has written since 2009.
	Version = 3
	// TargetPageSize is the size of the page of a RAM record: 4 KiB on x86.
	TargetPageSize = 4096
	// MaxPackage is the size of the largest package that QEMU accepts.
	MaxPackage = 16 << 20
	// MaxName is the length of the longest block, section or machine type name.
	MaxName = 255
	// MaxBlocks is how many RAM blocks we accept. QEMU gives no limit; large machines have a few
	// dozen.
	MaxBlocks = 1024
	// maxBlockLength is the size of the largest RAM block we accept: 64 TiB.
	maxBlockLength = 1 << 46
)

// ErrMalformed is wrapped by every error about bytes that are no valid stream.
var ErrMalformed = errors.New("malformed migration stream")

// ErrUnsupported is wrapped by every error about a valid stream that uses a feature
// an eviction does not; the message says which one to turn off.
var ErrUnsupported = errors.New("unsupported migration stream feature")

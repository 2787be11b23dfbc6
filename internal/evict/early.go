package evict

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"strings"

	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/units"
)

// maxFlash bounds the flash that is sent ahead of the device state, in bytes.
const maxFlash = 16 << 20

// writableFlash names the RAM blocks of flash that the guest may write. When QEMU is told to run
// the VM, it writes each of them to its drive before any vCPU runs. For that it reads all of the
// block. See pflash_cfi01 and postload_update_cb in QEMU's hw/block/pflash_cfi01.c. QEMU does not
// read the firmware itself, which is read-only.
func writableFlash(ctx context.Context, q *qmp.Client) ([]string, error) {
	var drives []struct {
		Device   string `json:"qdev"` // path in QEMU's tree of objects
		Inserted *struct {
			ReadOnly bool `json:"ro"`
		} `json:"inserted"`
	}
	if err := q.Run(ctx, "query-block", nil, &drives); err != nil {
		return nil, err
	}
	var names []string
	for _, d := range drives {
		// Only a flash block is named after the device, which is a part of the machine.
		if name, ok := strings.CutPrefix(d.Device, "/machine/"); ok && d.Inserted != nil &&
			!d.Inserted.ReadOnly {
			names = append(names, name)
		}
	}
	return names, nil
}

// maxEarly bounds the number of addresses taken from a device state.
const maxEarly = 8192

// touchedByLoading returns guest-physical addresses that QEMU touches before the VM runs: while it
// loads the devices, or when it is told to run the VM. For each such page that must be fetched, the
// VM stands still one more round trip.
//
// The addresses are hints. They come from the device state itself, which names them. If those bytes
// mean something else, the worst result is a page sent early. read reads the frozen guest's memory,
// and reports whether it could.
//
// The list of devices was found by watching QEMU 7.2 to 11.1 (TestRecordLoading;
// docs/results/loading.md).
func touchedByLoading(load []byte, read func(gpa uint64, b []byte) bool) []uint64 {
	a := ringsOf(load)
	a = append(a, descriptorsOf(load, a)...)
	if rest, ok := section(load, "kvm-tpr-opt"); ok && len(rest) >= vapicROM+4 {
		// kvmvapic reads its option ROM of 9 KiB (hw/i386/kvmvapic.c).
		rom := uint64(binary.BigEndian.Uint32(rest[vapicROM:]))
		a = append(a, rom, rom+4096, rom+8192)
	}
	if rest, ok := section(load, "vmgenid"); ok && len(rest) >= 8 {
		// vmgenid writes its ID where the guest looks for it (hw/acpi/vmgenid.c).
		if id := binary.LittleEndian.Uint64(rest); id != 0 {
			a = append(a, id)
		}
	}
	a = append(a, balloonBuffers(load, read)...)
	return append(a, xhciContexts(load, read)...)
}

// vapicROM is where kvmvapic's state holds the address of its option ROM: its last field.
const vapicROM = 140

// section finds the state of a device by its name. The device's address may precede the name.
func section(load []byte, name string) (state []byte, ok bool) {
	i := bytes.Index(load, append([]byte{byte(len(name))}, name...))
	if i < 0 || len(load)-i < 1+len(name)+8 { // instance and version follow
		return nil, false
	}
	return load[i+1+len(name)+8:], true
}

// ringsOf returns the addresses of the rings of virtio queues. Loading reads the indices in the
// available and the used ring of every queue. The addresses are in the subsection
// "virtio/virtqueues" (hw/virtio/virtio.c): 1024 times u64 avail, u64 used.
func ringsOf(load []byte) (addresses []uint64) {
	const (
		queues    = "\x05\x11virtio/virtqueues\x00\x00\x00\x01"
		maxQueues = 1024
	)
	for rest := load; ; {
		i := bytes.Index(rest, []byte(queues))
		if i < 0 {
			return addresses
		}
		rest = rest[i+len(queues):]
		for q := range maxQueues {
			if len(rest) < (q+1)*16 || len(addresses) >= maxEarly {
				break
			}
			avail, used := binary.BigEndian.Uint64(rest[q*16:]), binary.BigEndian.Uint64(rest[q*16+
				8:])
			if avail != 0 && used != 0 {
				addresses = append(addresses, avail, used)
			}
		}
	}
}

// descriptorsOf returns the addresses of the descriptors of virtio queues. Some devices, such as
// virtio-rng, read them before the VM runs. The state has a u32 number of descriptors and their u64
// address for each queue. Linux puts the available ring, whose address is among rings, right behind
// them.
func descriptorsOf(load []byte, rings []uint64) (addresses []uint64) {
	const size = 16 // of a descriptor
	known := map[uint64]bool{}
	for _, a := range rings {
		known[a] = true
	}
	for i := 0; len(known) > 0 && i+12 <= len(load); i++ {
		if load[i] != 0 || load[i+1] != 0 {
			continue
		}
		n, at := uint64(binary.BigEndian.Uint32(load[i:])), binary.BigEndian.Uint64(load[i+4:])
		if n == 0 || n&(n-1) != 0 || at == 0 || at%size != 0 || !known[at+n*size] {
			continue
		}
		for a := at; a < at+n*size && len(addresses) < maxEarly; a += units.PageSize {
			addresses = append(addresses, a)
		}
	}
	return addresses
}

// balloonBuffers returns the addresses of balloons' buffers. When QEMU is told to run the VM, it
// looks once more into the buffer with the guest's statistics (virtio_balloon_set_status in
// hw/virtio/virtio-balloon.c). Which buffer that is does not matter: there are few, and drivers put
// them next to each other.
func balloonBuffers(load []byte, read func(gpa uint64, b []byte) bool) (addresses []uint64) {
	const size, looked = 16, 8 // bytes of a descriptor; descriptors of a queue
	for _, state := range sections(load, "/virtio-balloon", 4) {
		for _, table := range descriptorsOf(state, ringsOf(state)) {
			var b [looked * size]byte
			if !read(table, b[:]) {
				continue
			}
			for at := 0; at < len(b); at += size { // u64 address, u32 length, u16 flags, u16 next
				if a := binary.LittleEndian.Uint64(b[at:]); a != 0 {
					addresses = append(addresses, a)
				}
			}
		}
	}
	return addresses
}

// xhciContexts returns the addresses of the slot contexts of USB controllers. Loading reads them to
// find the ports and endpoints (usb_xhci_post_load in hw/usb/hcd-xhci.c).
func xhciContexts(load []byte, read func(gpa uint64, b []byte) bool) (addresses []uint64) {
	const (
		most     = 8            // controllers
		slots    = 64           // of each
		context  = 32           // bytes
		contexts = 32 * context // of a slot and its endpoints
		running  = 1            // an endpoint whose ring QEMU reads as soon as the VM runs
		// what follows the address of the array of slots in a controller's state
		behind = 4 + 8 + 8 + 8 + 1
	)
	for _, state := range sections(load, "/xhci", most) {
		if len(state) < behind+8 {
			continue
		}
		at := state[len(state)-behind-8:]
		array := uint64(binary.BigEndian.Uint32(at[4:]))<<32 | uint64(binary.BigEndian.Uint32(at))
		var b [8 * (slots + 1)]byte
		if array == 0 || !read(array, b[:]) {
			continue
		}
		addresses = append(addresses, array, array+uint64(len(b))-1)
		for slot := 1; slot <= slots; slot++ {
			a := binary.LittleEndian.Uint64(b[8*slot:]) &^ 0x3f
			var c [contexts]byte
			if a == 0 || !read(a, c[:]) {
				continue
			}
			addresses = append(addresses, a, a+contexts-1)
			for at := context; at < contexts; at += context { // the first one is the slot's
				if ring := binary.LittleEndian.Uint64(c[at+8:]) &^ 0xf; c[at]&7 == running &&
					ring != 0 {
					addresses = append(addresses, ring)
				}
			}
		}
	}
	return addresses
}

// sections finds the states of at most so many devices whose names have a suffix, up to their
// footers. A state is: u8 4, u32 section, u8 length, name, u32 instance, u32 version, state, u8
// 0x7e, u32 section.
func sections(load []byte, suffix string, most int) (states [][]byte) {
	const full, footer, longest = 4, 0x7e, 100
	const looks = 100 // a bound: a guest may have written the name anywhere, any number of times
	from := 0
	for look := 0; look < looks && len(states) < most; look++ {
		i := bytes.Index(load[from:], []byte(suffix))
		if i < 0 {
			break
		}
		from += i + len(suffix)
		for n := len(suffix); n < longest && from-n >= 6; n++ {
			if int(load[from-n-1]) != n || load[from-n-6] != full {
				continue
			}
			end := append([]byte{footer}, load[from-n-5:from-n-1]...)
			if size := bytes.Index(load[from:], end); size >= 8 {
				states = append(states, load[from+8:from+size])
			}
			break
		}
	}
	return states
}

// flashBytes returns how many bytes the blocks have that writableFlash named.
func (p *proposal) flashBytes(blocks []guestmem.Block) (n uint64) {
	for _, b := range blocks {
		if b.Located && b.Size <= maxFlash && slices.Contains(p.flash, b.Name) {
			n += b.Size
		}
	}
	return n
}

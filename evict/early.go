package evict

import (
	"bytes"
	"encoding/binary"
)

// maxEarly bounds the addresses taken from a package.
const maxEarly = 8192

// touchedByLoading returns guest-physical addresses that a QEMU reads while it loads the
// devices of a package: each page that has to be fetched then makes the VM stand still for
// a round trip longer. They are a hint, taken from the device state itself, which names
// them; whatever else the bytes may mean, the worst that comes of it is a page sent early.
//
// Two devices read memory when they are loaded (measured with QEMU 7.2 to 11.1):
//
//   - virtio, which looks up the index in the used ring of every queue. The addresses are in
//     the subsection "virtio/virtqueues" (hw/virtio/virtio.c): 1024 times u64 avail, u64 used.
//   - kvmvapic, which reads its option ROM of 9 KiB. Its address is the last field of
//     the section "kvm-tpr-opt" (hw/i386/kvmvapic.c), 140 bytes into it.
func touchedByLoading(load []byte) []uint64 {
	const (
		queues    = "\x05\x11virtio/virtqueues\x00\x00\x00\x01"
		maxQueues = 1024
		vapic     = "\x0bkvm-tpr-opt"
		paddr     = 4 + 4 + 140 // behind instance and version
	)
	var addresses []uint64
	for rest := load; ; {
		i := bytes.Index(rest, []byte(queues))
		if i < 0 {
			break
		}
		rest = rest[i+len(queues):]
		for q := range maxQueues {
			if len(rest) < (q+1)*16 || len(addresses) >= maxEarly {
				break
			}
			avail, used := binary.BigEndian.Uint64(rest[q*16:]), binary.BigEndian.Uint64(rest[q*16+8:])
			if avail != 0 && used != 0 {
				addresses = append(addresses, avail, used)
			}
		}
	}
	if i := bytes.Index(load, []byte(vapic)); i >= 0 {
		if rest := load[i+len(vapic):]; len(rest) >= paddr+4 {
			rom := uint64(binary.BigEndian.Uint32(rest[paddr:]))
			addresses = append(addresses, rom, rom+4096, rom+8192)
		}
	}
	return addresses
}

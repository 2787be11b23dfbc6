// Package bareguest is a guest without an operating system, which runs wherever KVM does in any
// form: an ELF file that QEMU starts by PVH (-bios qboot.rom -kernel FILE). Its kernel has some
// hundred lines; its load works at privilege level 3, on 1 to 4 CPUs and up to 16 GiB, and
// reports as package loadproto has it. The source is in src, and src/build makes the file.
//
// Beside those of lab/cmd/guestload that it knows (hot, idle, other, seed, workers, access,
// place, mode and pace) it takes one more parameter: vacate.async=1 turns on KVM's asynchronous
// page faults.
//
// With vacate.port=NAME it drives a virtio-serial device on PCI bus 0, and answers at the port of
// that name as the agent of a guest with Linux does: what it works on is known to the host.
package bareguest

import _ "embed"

// ELF is the guest.
//
//go:embed guest.elf
var ELF []byte

package guestlinux

import "unsafe"

// words gives the bytes of integers in memory order. Host and guest are x86-64, so their
// order is the same; guestmem refuses other hosts by their page size, and tests would fail.
func words(w []uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*8)
}

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vacate/internal/guest/pageclass"
)

// Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h, Linux 5.10 to 7.3;
// Documentation/admin-guide/mm/pagemap.rst says what they mean).
const (
	kpfReferenced = 1 << 2
	kpfUptodate   = 1 << 3
	kpfDirty      = 1 << 4
	kpfLRU        = 1 << 5
	kpfActive     = 1 << 6
	kpfSlab       = 1 << 7
	kpfBuddy      = 1 << 10
	kpfMmap       = 1 << 11
	kpfAnon       = 1 << 12
	kpfSwapBacked = 1 << 14
	kpfTail       = 1 << 16
	kpfHuge       = 1 << 17
	kpfHWPoison   = 1 << 19
	kpfNoPage     = 1 << 20
	kpfOffline    = 1 << 23
	kpfZeroPage   = 1 << 24
	kpfPageTable  = 1 << 26
	kpfReserved   = 1 << 32
)

// classify tells what kpageflags tells of a page by itself. Pages on the lists of single
// CPUs are free, but have no flags, like many of the kernel's.
func classify(f uint64, mglru bool) (p pageclass.Page) {
	switch {
	case f&kpfNoPage != 0:
		return p
	case f&kpfHWPoison != 0:
		p.Kind, p.Class = pageclass.Poisoned, pageclass.Other
	case f&kpfOffline != 0:
		p.Kind, p.Class = pageclass.Offline, pageclass.Free
	case f&kpfBuddy != 0:
		p.Kind, p.Class = pageclass.FreeBuddy, pageclass.Free
	case f&kpfZeroPage != 0:
		p.Kind, p.Class = pageclass.ZeroPage, pageclass.Kernel
	case f&kpfHuge != 0:
		p.Kind, p.Class = pageclass.Hugetlb, pageclass.Other
	case f&kpfPageTable != 0:
		p.Kind, p.Class = pageclass.UserPageTable, pageclass.PageTable
	case f&kpfSlab != 0:
		p.Kind, p.Class = pageclass.Slab, pageclass.Kernel
	case f&kpfReserved != 0:
		p.Kind, p.Class = pageclass.Reserved, pageclass.MMIO
	case f&kpfAnon != 0:
		p.Kind, p.Class = pageclass.Anon, pageclass.Other
	case f&(kpfLRU|kpfMmap) != 0 || f&(kpfUptodate|kpfReferenced|kpfDirty) != 0:
		p.Kind, p.Class = pageclass.File, pageclass.FileInactive
		if f&kpfSwapBacked != 0 {
			p.Kind = pageclass.Shmem
		}
		// The multi-generational LRU does not use the active list's bit.
		if f&kpfActive != 0 || mglru && f&kpfReferenced != 0 {
			p.Class = pageclass.FileActive
			p.Flags |= pageclass.Active
		}
		if f&kpfDirty != 0 {
			p.Flags |= pageclass.Dirty
		}
	default:
		p.Kind, p.Class = pageclass.KernelOther, pageclass.Kernel
	}
	if f&kpfAnon != 0 && f&kpfActive != 0 {
		p.Flags |= pageclass.Active
	}
	if f&kpfMmap != 0 {
		p.Flags |= pageclass.Mapped
	}
	return p
}

// chunkFrames is how many frames are read at once: larger than compound pages but those of
// 1 GiB, whose tails all say that they are huge.
const chunkFrames = 1 << 13

// readPages reads up to frames page flags, on several CPUs, until the time is over.
// Frames that it did not get to are of kind None; whole says that there are none.
func (g *guest) readPages(frames uint64,
	until time.Time) (pages []pageclass.Page, whole bool, err error) {
	f, err := os.Open(g.proc + "/kpageflags")
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	last, err := g.lastFrame()
	if err != nil {
		return nil, false, err
	}
	frames = min(frames, last+1)
	pages = make([]pageclass.Page, frames)
	mglru := g.mglru()
	var next atomic.Uint64
	var late atomic.Bool
	var mu sync.Mutex
	var workers sync.WaitGroup
	for range min(runtime.NumCPU(), 4) {
		workers.Go(func() {
			buf := make([]byte, 8*chunkFrames)
			for {
				at := (next.Add(1) - 1) * chunkFrames
				if at >= frames {
					return
				}
				if time.Now().After(until) {
					late.Store(true)
					return
				}
				part := pages[at:min(at+chunkFrames, frames)]
				n, rerr := f.ReadAt(buf[:8*len(part)], int64(8*at))
				classifyAll(part, buf[:n], mglru)
				if rerr != nil && rerr != io.EOF { // behind the end there is no page
					mu.Lock()
					err = rerr
					mu.Unlock()
					return
				}
			}
		})
	}
	workers.Wait()
	if err != nil {
		return nil, false, err
	}
	g.kernelRanges(pages)
	return pages, !late.Load(), nil
}

// classifyAll reads flags, 8 bytes in the host's order for each page, and gives the tails of
// compound pages what their heads have.
func classifyAll(pages []pageclass.Page, flags []byte, mglru bool) {
	var head, lastFlags uint64
	var last pageclass.Page
	for i := range pages[:len(flags)/8] {
		f := binary.NativeEndian.Uint64(flags[8*i:])
		// Linux 6.1 has tails tell their own flags, which are mostly none.
		if f&kpfTail != 0 && f&(kpfNoPage|kpfHWPoison) == 0 {
			f = head
		} else {
			head = f
		}
		if i == 0 || f != lastFlags {
			last, lastFlags = classify(f, mglru), f
		}
		pages[i] = last
	}
}

// mglru reports whether the multi-generational LRU is on (admin-guide/mm/multigen_lru.rst).
func (g *guest) mglru() bool {
	b, err := g.read(g.sys + "/kernel/mm/lru_gen/enabled")
	if err != nil {
		return false
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 0, 32)
	return err == nil && v&1 != 0
}

// An area is a line of /proc/iomem.
type area struct {
	depth       int // 0: not within another
	first, last uint64
	name        string
}

func (g *guest) iomem() ([]area, error) {
	f, err := os.Open(g.proc + "/iomem")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []area
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		a, err := parseArea(lines.Text())
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, lines.Err()
}

func parseArea(line string) (a area, err error) {
	text := strings.TrimLeft(line, " ")
	a.depth = (len(line) - len(text)) / 2
	span, name, ok := strings.Cut(text, " : ")
	first, last, ok2 := strings.Cut(span, "-")
	if !ok || !ok2 {
		return a, fmt.Errorf("bad line in iomem: %q", line)
	}
	var err1, err2 error
	a.name = name
	a.first, err1 = strconv.ParseUint(first, 16, 64)
	a.last, err2 = strconv.ParseUint(last, 16, 64)
	return a, errors.Join(err1, err2)
}

// lastFrame is the last page frame of memory.
func (g *guest) lastFrame() (uint64, error) {
	list, err := g.iomem()
	if err != nil {
		return 0, err
	}
	var last uint64
	for _, a := range list {
		if strings.HasPrefix(a.name, "System RAM") {
			last = max(last, a.last/4096)
		}
	}
	if last == 0 {
		return 0, errors.New("iomem shows no addresses of memory: run as root")
	}
	return last, nil
}

// kernelRanges tells the kernel's image, and what was set aside within memory, from what is
// firmware's.
func (g *guest) kernelRanges(pages []pageclass.Page) {
	list, err := g.iomem()
	if err != nil {
		return
	}
	for _, a := range list {
		kind, class := pageclass.KernelImage, pageclass.Kernel
		switch a.name {
		case "Kernel code":
			kind, class = pageclass.KernelText, pageclass.KernelCode
		case "Kernel rodata", "Kernel data", "Kernel bss":
		case "System RAM":
			kind = pageclass.Reserved
		default:
			continue
		}
		if a.first/4096 >= uint64(len(pages)) {
			continue
		}
		part := pages[a.first/4096 : min(a.last/4096+1, uint64(len(pages)))]
		for i := range part {
			switch part[i].Kind {
			case pageclass.Reserved:
				part[i].Kind, part[i].Class = kind, class
			case pageclass.KernelOther:
				if kind != pageclass.Reserved {
					part[i].Kind, part[i].Class = kind, class
				}
			}
		}
	}
}

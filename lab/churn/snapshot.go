package churn

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h, and 32 of
// include/linux/kernel-page-flags.h).
const (
	kpfLRU         = 1 << 5
	kpfActive      = 1 << 6
	kpfSlab        = 1 << 7
	kpfBuddy       = 1 << 10
	kpfMmap        = 1 << 11
	kpfAnon        = 1 << 12
	kpfSwapBacked  = 1 << 14
	kpfHead        = 1 << 15
	kpfTail        = 1 << 16
	kpfHuge        = 1 << 17
	kpfUnevictable = 1 << 18
	kpfPoison      = 1 << 19
	kpfNoPage      = 1 << 20
	kpfTHP         = 1 << 22
	kpfOffline     = 1 << 23
	kpfZero        = 1 << 24
	kpfPageTable   = 1 << 26
	kpfReserved    = 1 << 32
)

// A Snapshot is what the guest's kernel said of its pages, right before and after the VM
// stood still. All but its own process was at rest.
type Snapshot struct {
	flags  [2][]uint64 // kpageflags; tails have what their heads say
	Free   uint64      // pages in the buddy allocator, by its own count
	Mapped []Mapped
}

// Mapped is what one process maps: frames by address.
type Mapped struct {
	PID    int
	Frames []uint32
}

func (s *Snapshot) before(pfn int) uint64 { return at(s.flags[0], pfn) }
func (s *Snapshot) after(pfn int) uint64  { return at(s.flags[1], pfn) }

func at(flags []uint64, pfn int) uint64 {
	if pfn >= len(flags) {
		return kpfNoPage
	}
	return flags[pfn]
}

// inUse says whether flags are those of a page that is certainly allocated. Other pages in use
// have no flags at all.
func inUse(flags uint64) bool {
	return flags&(kpfNoPage|kpfBuddy|kpfOffline|kpfReserved) == 0 &&
		flags&(kpfLRU|kpfSlab|kpfMmap|kpfAnon|kpfHead|kpfTail|kpfHuge|kpfPageTable|kpfTHP) != 0
}

// Snapshot takes a snapshot, and calls frozen at its moment.
func (g *Guest) Snapshot(ctx context.Context, frozen func() error) (*Snapshot, error) {
	for len(g.events.C) > 0 {
		<-g.events.C
	}
	if err := g.send("snapshot"); err != nil {
		return nil, err
	}
	if err := g.paused(ctx); err != nil {
		return nil, err
	}
	err := frozen()
	if e := g.Cont(ctx); err == nil {
		err = e
	}
	if err != nil {
		return nil, err
	}
	_, tables, err := g.finish(ctx, "snapshot")
	if err != nil {
		return nil, err
	}
	return parseSnapshot(tables)
}

// paused waits until the guest has paused itself.
func (g *Guest) paused(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	for {
		select {
		case e, ok := <-g.events.C:
			if !ok {
				return fmt.Errorf("take a snapshot: the VM has exited")
			}
			if e.Name != "STOP" {
				continue
			}
			return nil
		case <-ctx.Done():
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.reply != nil && g.reply.Error != "" {
				return fmt.Errorf("take a snapshot: the guest says: %s", g.reply.Error)
			}
			return fmt.Errorf("take a snapshot: the guest does not pause: %w", ctx.Err())
		}
	}
}

func parseSnapshot(tables map[string][]byte) (*Snapshot, error) {
	s := &Snapshot{}
	for i, name := range []string{"kpageflags", "kpageflags after"} {
		b := tables[name]
		if len(b) == 0 || len(b)%8 != 0 {
			return nil, fmt.Errorf("snapshot: %s has %d bytes", name, len(b))
		}
		head := uint64(0)
		for e := range slices.Chunk(b, 8) {
			f := binary.LittleEndian.Uint64(e)
			if f&kpfTail != 0 {
				f |= head
			} else {
				head = f &^ (kpfHead | kpfBuddy)
			}
			s.flags[i] = append(s.flags[i], f)
		}
	}
	for line := range strings.Lines(string(tables["zoneinfo"])) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "nr_free_pages" {
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("snapshot: zoneinfo: %w", err)
			}
			s.Free += n
		}
	}
	for b := tables["pagemaps"]; len(b) > 0; {
		if len(b) < 8 {
			return nil, fmt.Errorf("snapshot: pagemaps are cut")
		}
		m := Mapped{PID: int(binary.LittleEndian.Uint32(b))}
		n := uint64(binary.LittleEndian.Uint32(b[4:]))
		if b = b[8:]; uint64(len(b)) < n*4 {
			return nil, fmt.Errorf("snapshot: pagemaps are cut")
		}
		for e := range slices.Chunk(b[:n*4], 4) {
			m.Frames = append(m.Frames, binary.LittleEndian.Uint32(e))
		}
		b = b[n*4:]
		s.Mapped = append(s.Mapped, m)
	}
	return s, nil
}

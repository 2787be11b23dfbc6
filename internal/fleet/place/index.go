package place

import "math/bits"

// index has the hosts that may take a VM, in slots by what they have left: those of one slot are
// much alike. The next best host is found without a look at all of them.
type index struct {
	slots [loads][rooms][]*host
	any   [loads]int // how many hosts there are of each load
}

const (
	loads = 64 // of 1/40 core for each core; the last has all above
	rooms = 24 // powers of two, of 64 MiB; the last has all above
)

type slot struct{ load, room int }

func slotOf(h *host) slot {
	return slot{min(loads-1, max(0, int(h.load()*40))), roomSlot(h.room)}
}

func roomSlot(room int64) int {
	if room <= 0 {
		return 0
	}
	return min(rooms-1, bits.Len64(uint64(room)>>26))
}

// put has a host be where it belongs.
func (x *index) put(h *host) {
	s := slotOf(h)
	if h.inIndex > 0 && h.slot == s {
		return
	}
	x.remove(h)
	list := &x.slots[s.load][s.room]
	*list = append(*list, h)
	h.slot, h.inIndex = s, len(*list)
	x.any[s.load]++
}

func (x *index) remove(h *host) {
	if h.inIndex == 0 {
		return
	}
	list := x.slots[h.slot.load][h.slot.room]
	last := list[len(list)-1]
	list[h.inIndex-1], last.inIndex = last, h.inIndex
	list[len(list)-1] = nil
	x.slots[h.slot.load][h.slot.room] = list[:len(list)-1]
	x.any[h.slot.load]--
	h.inIndex = 0
}

// visit calls a function for hosts that may have the room, those of the least load first, until it
// returns false. The function must not change the index.
func (x *index) visit(room uint64, f func(h *host) bool) {
	least := roomSlot(int64(room))
	for load := range loads {
		if x.any[load] == 0 {
			continue
		}
		for _, hosts := range x.slots[load][least:] {
			for _, h := range hosts {
				if !f(h) {
					return
				}
			}
		}
	}
}

// set is a set of hosts.
type set []*host

func (s *set) add(h *host) {
	if h.listed == 0 {
		*s = append(*s, h)
		h.listed = len(*s)
	}
}

func (s *set) remove(h *host) {
	if h.listed == 0 {
		return
	}
	last := (*s)[len(*s)-1]
	(*s)[h.listed-1], last.listed = last, h.listed
	*s = (*s)[:len(*s)-1]
	h.listed = 0
}

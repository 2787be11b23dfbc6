package lab

import (
	"fmt"
	"net"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Shape of the link. A tbf bucket must take a whole GSO packet (64 KiB), and
// at high rates enough for a timer's delay. The queue is that of a common
// switch port; what does not fit is dropped, as there.
const (
	minBurst   = 128 << 10 // bytes
	burstTime  = 1000      // as a fraction of a second: 1 ms
	queueBytes = 2 << 20
)

// Shape of a stalled link: a byte per millisecond, in a bucket of one packet.
const (
	stallRate  = 1000 // bytes per second
	stallBurst = 1600 // bytes
)

// link is the veth pair between the hosts.
type link struct {
	mu      sync.Mutex // guards rate, stalled and the ends' down
	rate    uint64     // bits per second; 0 is unshaped
	stalled bool
	ends    [2]linkEnd
}

type linkEnd struct {
	nl   *netlink.Handle
	dev  netlink.Link
	down bool // drops what it sends
}

func newLink(a, b *Host, rate uint64) (_ *link, err error) {
	l := &link{rate: rate}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	for i, h := range []*Host{a, b} {
		if l.ends[i].nl, err = netlink.NewHandleAt(h.ns, unix.NETLINK_ROUTE); err != nil {
			return nil, fmt.Errorf("netlink: %w", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(b.ns)}
	if err := l.ends[0].nl.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add veth pair: %w", err)
	}
	for i, h := range []*Host{a, b} {
		end := &l.ends[i]
		if end.dev, err = end.nl.LinkByName("eth0"); err != nil {
			return nil, err
		}
		ip := net.IPv4(10, 77, 0, byte(1+i)).To4()
		h.Addr = ip.String()
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(24, 32)}}
		if err := end.nl.AddrAdd(end.dev, addr); err != nil {
			return nil, fmt.Errorf("address %s: %w", ip, err)
		}
		if err := end.nl.LinkSetUp(end.dev); err != nil {
			return nil, fmt.Errorf("eth0 up: %w", err)
		}
	}
	return l, l.apply()
}

// apply sets the queueing discipline at both ends. The caller holds mu, or
// owns l alone.
func (l *link) apply() error {
	for i := range l.ends {
		end := &l.ends[i]
		attrs := netlink.QdiscAttrs{LinkIndex: end.dev.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
		// One kind cannot take another's place under the same handle.
		if err := end.nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: attrs}); err != nil && err != unix.ENOENT && err != unix.EINVAL {
			return fmt.Errorf("remove link's shape: %w", err)
		}
		var q netlink.Qdisc
		switch {
		case end.down:
			q = &netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "blackhole"}
		case l.stalled:
			q = &netlink.Tbf{QdiscAttrs: attrs, Rate: stallRate, Limit: queueBytes, Buffer: netlink.Xmittime(stallRate, stallBurst)}
		case l.rate == 0:
			continue
		default:
			bytes := l.rate / 8
			burst := uint32(max(minBurst, min(bytes/burstTime, 16<<20)))
			q = &netlink.Tbf{QdiscAttrs: attrs, Rate: bytes, Limit: queueBytes, Buffer: netlink.Xmittime(bytes, burst)}
		}
		if err := end.nl.QdiscAdd(q); err != nil {
			return fmt.Errorf("shape link (kernel option NET_SCH_TBF): %w", err)
		}
	}
	return nil
}

func (l *link) close() {
	for i := range l.ends {
		if end := &l.ends[i]; end.nl != nil {
			if i == 0 && end.dev != nil {
				end.nl.LinkDel(end.dev) // and its peer
			}
			end.nl.Close()
		}
	}
}

// SetLinkUp cuts the link (false) or mends it, both ways; see SetLink.
func (l *Lab) SetLinkUp(up bool) error { return l.SetLink(up, up) }

// SetLink cuts (false) or mends each direction of the link. An end that may not send
// drops all packets and is told nothing, as when a switch fails.
func (l *Lab) SetLink(aToB, bToA bool) error {
	l.link.mu.Lock()
	defer l.link.mu.Unlock()
	l.link.ends[0].down, l.link.ends[1].down = !aToB, !bToA
	return l.link.apply()
}

// Stall slows the link to 8 kbit/s each way, or gives it its rate again. No more than
// signs of life pass while it is stalled, which keep connections from timing out. What
// is queued when it ends is dropped.
func (l *Lab) Stall(stalled bool) error {
	l.link.mu.Lock()
	defer l.link.mu.Unlock()
	l.link.stalled = stalled
	return l.link.apply()
}

// SetRate changes the link's rate, in bits per second each way; 0 is unshaped.
func (l *Lab) SetRate(rate uint64) error {
	l.link.mu.Lock()
	defer l.link.mu.Unlock()
	l.link.rate = rate
	return l.link.apply()
}

// LinkBytes returns how many bytes have crossed the link, both ways, headers
// included. Dropped packets are not counted.
func (l *Lab) LinkBytes() (uint64, error) {
	var sum uint64
	for i := range l.link.ends {
		end := &l.link.ends[i]
		dev, err := end.nl.LinkByIndex(end.dev.Attrs().Index)
		if err != nil {
			return 0, fmt.Errorf("read link's counters: %w", err)
		}
		sum += dev.Attrs().Statistics.TxBytes
	}
	return sum, nil
}

package lab

import (
	"fmt"
	"net"
	"os"
	"strings"
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

// Shape of a link that loses large packets.
const (
	losingRate  = 25e6 // bytes per second
	smallPacket = 1400 // bytes, with the head of Ethernet
)

// link is the veth pair between hosts a and b.
type link struct {
	mu      sync.Mutex // guards rate, stalled and the ends' down
	rate    uint64     // bits per second; 0 is unshaped
	stalled bool
	ends    [2]linkEnd
}

type linkEnd struct {
	nl   *netlink.Handle // the host's
	dev  netlink.Link
	down bool // drops what it sends
	// losing drops packets of more than smallPacket bytes that it sends.
	losing bool
}

func newLink(a *Host, aName string, b *Host, bName string, rate uint64) (*link, error) {
	ends, err := plug(a, aName, b, bName)
	if err != nil {
		return nil, err
	}
	l := &link{rate: rate, ends: ends}
	return l, l.apply()
}

// plug joins the bridges of two hosts by a veth pair.
func plug(a *Host, aName string, b *Host, bName string) (ends [2]linkEnd, err error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aName
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(b.ns)}
	if err := a.nl.LinkAdd(veth); err != nil {
		return ends, fmt.Errorf("add veth pair: %w", err)
	}
	ends[0].nl, ends[1].nl = a.nl, b.nl
	if ends[0].dev, err = a.addPort(aName); err != nil {
		return ends, err
	}
	ends[1].dev, err = b.addPort(bName)
	return ends, err
}

// apply sets the queueing discipline at both ends. The caller holds mu, or
// owns l alone.
func (l *link) apply() error {
	for i := range l.ends {
		end := &l.ends[i]
		attrs := netlink.QdiscAttrs{LinkIndex: end.dev.Attrs().Index,
			Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
		// One kind cannot take another's place under the same handle.
		if err := end.nl.QdiscDel(&netlink.GenericQdisc{QdiscAttrs: attrs}); err != nil &&
			err != unix.ENOENT && err != unix.EINVAL {
			return fmt.Errorf("remove link's shape: %w", err)
		}
		var q netlink.Qdisc
		switch {
		case end.down:
			q = &netlink.GenericQdisc{QdiscAttrs: attrs, QdiscType: "blackhole"}
		case end.losing:
			// A bucket that no larger packet fits into: tbf drops those, also as segments of larger
			// ones.
			q = &netlink.Tbf{QdiscAttrs: attrs, Rate: losingRate, Limit: queueBytes,
				Buffer: netlink.Xmittime(losingRate, smallPacket)}
		case l.stalled:
			q = &netlink.Tbf{QdiscAttrs: attrs, Rate: stallRate, Limit: queueBytes,
				Buffer: netlink.Xmittime(stallRate, stallBurst)}
		case l.rate == 0:
			continue
		default:
			bytes := l.rate / 8
			burst := uint32(max(minBurst, min(bytes/burstTime, 16<<20)))
			q = &netlink.Tbf{QdiscAttrs: attrs, Rate: bytes, Limit: queueBytes,
				Buffer: netlink.Xmittime(bytes, burst)}
		}
		if err := end.nl.QdiscAdd(q); err != nil {
			return fmt.Errorf("shape link (kernel option NET_SCH_TBF): %w", err)
		}
	}
	return nil
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

// Part has neither of two hosts reach the other, or again: others reach both. What they send is
// dropped where it is sent, and nobody is told, as by a broken table of a switch.
func Part(a, b *Host, apart bool) error {
	for _, way := range [][2]*Host{{a, b}, {b, a}} {
		route := &netlink.Route{Type: unix.RTN_BLACKHOLE, Dst: &net.IPNet{
			IP: net.ParseIP(way[1].Addr).To4(), Mask: net.CIDRMask(32, 32)}}
		change := way[0].nl.RouteReplace
		if !apart {
			change = way[0].nl.RouteDel
		}
		if err := change(route); err != nil && (apart || err != unix.ESRCH) {
			return fmt.Errorf("part host %s from %s: %w", way[0].Name, way[1].Name, err)
		}
	}
	return nil
}

// LoseLarge has each direction of the link drop packets of more than 1,400 bytes, or pass all of
// them again. Nobody is told of a packet that is dropped, as behind a firewall that passes no ICMP.
func (l *Lab) LoseLarge(aToB, bToA bool) error {
	l.link.mu.Lock()
	defer l.link.mu.Unlock()
	l.link.ends[0].losing, l.link.ends[1].losing = aToB, bToA
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

// UseCubic has TCP on both hosts use Linux's default congestion control, where the kernel has and
// allows it. It returns what is in force. Some machines are set to BBR, which now and then takes a
// busy core for a slow link, and then is slow itself for many seconds.
func (l *Lab) UseCubic() (now string, err error) {
	for _, h := range []*Host{l.A, l.B} {
		err := h.Do(func() error {
			const file = "/proc/sys/net/ipv4/tcp_congestion_control" // of this thread's namespace
			// what is in force is told below
			os.WriteFile(file, []byte("cubic"), 0)
			text, err := os.ReadFile(file)
			now = strings.TrimSpace(string(text))
			return err
		})
		if err != nil {
			return "", fmt.Errorf("TCP's congestion control on host %s: %w", h.Name, err)
		}
	}
	return now, nil
}

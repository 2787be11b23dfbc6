package evict

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"

	"golang.org/x/sys/unix"
)

// pollInterval is how often the engine asks for a QEMU's state if QEMU sends no event.
const pollInterval = time.Millisecond

// capabilitiesOff are switched off during an eviction if a QEMU has them. They change the stream,
// or let QEMU throttle, drop or resume on its own.
var capabilitiesOff = []string{
	"auto-converge", "background-snapshot", "block", "compress", "dirty-bitmaps", "mapped-ram",
	"multifd",
	"pause-before-switchover", "postcopy-preempt", "rdma-pin-all", "release-ram", "return-path",
	"switchover-ack", "validate-uuid", "x-colo", "x-ignore-shared", "xbzrle", "zero-copy-send",
	"zero-blocks",
}

// recent makes sure that a QEMU is not too old.
func recent(v qmp.Version) error {
	if !v.AtLeast(4, 2) {
		return fmt.Errorf("QEMU %v is too old: post-copy can be relied on from 4.2 on; this was "+
			"tried with 7.2 to 11.1", v)
	}
	return nil
}

// settings are migration settings of a QEMU.
type settings struct {
	Capabilities map[string]bool `json:"capabilities"`
	Parameters   map[string]any  `json:"parameters"`
}

// settingsOf reads the settings of a QEMU.
func settingsOf(ctx context.Context, q *qmp.Client) (s settings, err error) {
	if s.Capabilities, err = q.QueryMigrationCapabilities(ctx); err != nil {
		return s, err
	}
	if _, ok := s.Capabilities["postcopy-ram"]; !ok {
		return s,
			fmt.Errorf("QEMU %v was built without post-copy: use a build for Linux with "+
				"userfaultfd", q.Version())
	}
	return s, q.Run(ctx, "query-migrate-parameters", nil, &s.Parameters)
}

// plan returns the settings to apply for an eviction instead of s, with some parameters. was are
// the same settings with their values in s.
func (s settings) plan(parameters map[string]any) (want, was settings) {
	want = settings{map[string]bool{}, map[string]any{}}
	was = settings{map[string]bool{}, map[string]any{}}
	turn := func(name string, on bool) {
		if is, ok := s.Capabilities[name]; ok && is != on {
			want.Capabilities[name], was.Capabilities[name] = on, is
		}
	}
	for _, name := range capabilitiesOff {
		turn(name, false)
	}
	turn("postcopy-ram", true)
	turn("events", true)
	maps.Copy(want.Parameters, parameters)
	if tls, ok := s.Parameters["tls-creds"].(string); ok && tls != "" {
		// The socket that QEMU gets is no TLS connection.
		want.Parameters["tls-creds"] = ""
	}
	for name := range want.Parameters {
		if is, ok := s.Parameters[name]; ok {
			was.Parameters[name] = is
		}
	}
	return want, was
}

// apply applies the settings to a QEMU.
func (s settings) apply(ctx context.Context, q *qmp.Client) error {
	return together(
		func() error {
			if len(s.Capabilities) == 0 {
				return nil
			}
			return q.SetMigrationCapabilities(ctx, s.Capabilities)
		},
		func() error {
			if len(s.Parameters) == 0 {
				return nil
			}
			return q.SetMigrationParameters(ctx, s.Parameters)
		})
}

// announce makes the VM's network cards announce themselves, so that bridges and switches send
// their traffic here. QEMU does that by itself once it has loaded a VM. Here that is before it is
// decided where the VM runs.
func announce(ctx context.Context, q *qmp.Client, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	// ms; QEMU's own values
	err := q.Run(ctx, "announce-self",
		map[string]any{"initial": 50, "max": 550, "rounds": 5, "step": 100}, nil)
	if err != nil {
		log.Debug("the VM's network cards do not announce themselves", "error", err)
	}
}

// socketTo hands one end of a new socket pair to QEMU under a name and returns the other.
func socketTo(ctx context.Context, q *qmp.Client, name string, sendBuffer int) (net.Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket for QEMU: %w", err)
	}
	ours := os.NewFile(uintptr(pair[0]), "qemu")
	defer ours.Close()
	err = q.GetFD(ctx, name, pair[1])
	unix.Close(pair[1])
	if err != nil {
		return nil, fmt.Errorf("hand QEMU a socket: %w", err)
	}
	if sendBuffer > 0 {
		if err := unix.SetsockoptInt(pair[0], unix.SOL_SOCKET, unix.SO_SNDBUF,
			sendBuffer); err != nil {
			return nil, fmt.Errorf("set the socket's buffer: %w", err)
		}
	}
	c, err := net.FileConn(ours)
	if err != nil {
		return nil, fmt.Errorf("make a socket for QEMU: %w", err)
	}
	return c, nil
}

// probeFD is QEMU's name for a descriptor that it is handed for a moment.
const probeFD = "vacate-probe"

// handsOver makes sure that descriptors reach the QEMU behind a monitor, while both QEMUs can still
// be used. A relay may pass bytes and no descriptors; nothing earlier would notice that.
func handsOver(ctx context.Context, q *qmp.Client, monitor string) error {
	conn, err := socketTo(ctx, q, probeFD, 0)
	if isRefusal(err) {
		return fmt.Errorf("%w: something between %s and QEMU, such as socat, passes no "+
			"descriptors on: name QEMU's own socket (-qmp unix:PATH,server=on,wait=off)", err,
			monitor)
	} else if err != nil {
		return err
	}
	conn.Close()
	return q.CloseFD(ctx, probeFD)
}

// describe collects what an offer says about a VM, except its memory. It describes the source's VM,
// and at the destination the machine that the offer must match.
func describe(ctx context.Context, q *qmp.Client) (o offer, err error) {
	o.QEMU = q.Version().String()
	// If the VM's architecture is not supported, nothing else can be compared.
	if reasons, err := fit.Supported(ctx, q); err != nil || reasons != nil {
		return o, cmp.Or(err, reasons.Err())
	}
	err = together(
		func() (err error) {
			o.Machine, err = q.QueryMachine(ctx)
			return err
		},
		func() (err error) {
			o.CPUs, err = fit.CPUsOf(ctx, q)
			return err
		},
		func() (err error) {
			o.Devices, err = fit.DevicesOf(ctx, q)
			return err
		})
	return o, err
}

// held makes sure that nothing keeps the source's VM from moving.
func held(ctx context.Context, q *qmp.Client) error {
	reasons, err := fit.Held(ctx, q)
	if err != nil {
		return err
	}
	return reasons.Err()
}

// withMemory adds the blocks of memory to an offer.
func (o offer) withMemory(mem *guestmem.Memory) offer {
	for _, b := range mem.Blocks() {
		o.Blocks = append(o.Blocks, blockOffer{b.Name, b.Size, b.PageSize})
	}
	return o
}

// together runs all functions at once and returns the first error in the order given. On a busy
// host a QEMU's main loop is late to answer, and it answers several commands as late as one.
func together(do ...func() error) error {
	errs := make([]error, len(do))
	var all sync.WaitGroup
	for i, f := range do {
		all.Go(func() { errs[i] = f() })
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func isRefusal(err error) bool {
	var refusal *qmp.Error
	return errors.As(err, &refusal)
}

// check makes sure that a peer's offer is within bounds.
func (o offer) check() error {
	if err := errors.Join(o.CPUs.Check(), o.Devices.Check(), o.Disks.Check()); err != nil {
		return fmt.Errorf("%w: %w", errFrame, err)
	}
	if err := o.Domain.check(); err != nil {
		return err
	}
	if c := o.Carried; c != nil && (c.Name == "" || c.Name != o.VM || o.Domain != nil) {
		return fmt.Errorf("%w: libvirt moves a domain named %.40q as VM %.40q", errFrame, c.Name,
			o.VM)
	}
	if o.Stands != "" && !fit.Standing(o.Stands) {
		return fmt.Errorf("%w: a VM that stands in the state %.40q", errFrame, o.Stands)
	}
	return nil
}

// mismatch compares the offered VM with the one that the destination's QEMU was started as. It
// returns nil if that QEMU can take the VM.
func (o offer) mismatch(here offer) error {
	if o.Machine != here.Machine {
		return fmt.Errorf("the source's machine is %s, the destination's %s: start the "+
			"destination's QEMU with -machine %[1]s", o.Machine, here.Machine)
	}
	source, destination := versionOf(o.QEMU), versionOf(here.QEMU)
	if err := fit.StateOf(cmp.Or(o.Stands, "running"), source, destination).Err(); err != nil {
		return fmt.Errorf("the VM %w", err)
	}
	differ := slices.Concat(o.CPUs.Against(here.CPUs), o.Devices.Against(here.Devices),
		o.Disks.Against(here.Disks))
	if err := differ.Err(); err != nil {
		return err
	}
	sizes := map[string]blockOffer{}
	for _, b := range here.Blocks {
		sizes[b.Name] = b
	}
	for _, b := range o.Blocks {
		h, ok := sizes[b.Name]
		switch {
		case !ok:
			return fmt.Errorf("the source has memory %q of %d KiB and the destination has none "+
				"of that name: start the destination's QEMU with the source's -device and "+
				"-object options", b.Name, b.Size>>10)
		case b.PageSize > maxPage:
			return fmt.Errorf("memory %q has pages of %d MiB, and only those of 2 MiB at most "+
				"can come one by one: restart the VM with memory of 2 MiB pages, hugetlbsize=2M",
				b.Name, b.PageSize>>20)
		case h.PageSize != b.PageSize:
			return fmt.Errorf("memory %q has pages of %d KiB on the source, %d KiB on the "+
				"destination: start the destination's QEMU with the source's memory back end",
				b.Name, b.PageSize>>10, h.PageSize>>10)
		case h.Size != b.Size && !resizable(b.Name):
			return fmt.Errorf("memory %q has %d MiB on the source, %d MiB on the destination: "+
				"start the destination's QEMU with the source's -m and -object options", b.Name,
				b.Size>>20, h.Size>>20)
		}
		delete(sizes, b.Name)
	}
	for name := range sizes {
		return fmt.Errorf("the destination has memory %q and the source has none of that name: "+
			"start the destination's QEMU with the source's -device and -object options", name)
	}
	return nil
}

// versionOf parses the result of Version.String; zero for anything else.
func versionOf(s string) (v qmp.Version) {
	fmt.Sscanf(s, "%d.%d.%d", &v.Major, &v.Minor, &v.Micro)
	return v
}

// holds makes sure that the memory which the source's QEMU announces is that of the offer. A
// hostile peer could announce any amount.
func (o offer) holds(l layout) error {
	for _, b := range l {
		i := slices.IndexFunc(o.Blocks, func(h blockOffer) bool { return h.Name == b.Name })
		switch {
		case i < 0:
			return fmt.Errorf("%w: memory %q was not in the offer", errFrame, b.Name)
		case b.PageSize != o.Blocks[i].PageSize,
			b.Length != o.Blocks[i].Size && (!resizable(b.Name) || b.Length > maxResizable):
			return fmt.Errorf("%w: memory %q has other pages or another size, %d KiB, than in "+
				"the offer", errFrame, b.Name, b.Length>>10)
		}
	}
	return nil
}

// maxResizable is above the size to which QEMU lets a resizable block grow.
const maxResizable = 64 << 20

// resizable reports whether QEMU adapts the block's size to the source's when it loads. It does for
// the tables that it passes to the firmware.
func resizable(block string) bool { return len(block) > 5 && block[:5] == "/rom@" }

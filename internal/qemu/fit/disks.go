package fit

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"vacate/internal/sys/units"
)

// Disks is what the drives of a VM are, at one of its two QEMUs.
type Disks struct {
	Boot    string  `json:"boot"`    // ID of the kernel's boot: equal for two QEMUs on one machine
	Network uint64  `json:"network"` // number of the QEMU's network namespace
	Drives  []Drive `json:"drives"`
	// Trusted names drives of the source whose images an operator knows to be those of the
	// destination.
	Trusted []string `json:"trusted,omitempty"`
	// Volatile names dirty bitmaps that QEMU keeps in memory only. The source alone needs them.
	Volatile []string `json:"-"`
}

// A Drive is a device of the guest that has an image, or could have one.
type Drive struct {
	Name   string `json:"name"`   // for humans: of the drive, else of its device
	Device string `json:"device"` // QEMU's path of the device
	// Carried drives are parallel flashes. QEMU moves their content with the VM's memory, and
	// writes it to the image at the destination.
	Carried  bool  `json:"carried,omitempty"`
	ReadOnly bool  `json:"read_only,omitempty"`
	Root     *Node `json:"root,omitempty"` // nil: the drive is empty
}

// A Node is one of QEMU's block nodes: a format, or what reaches a file or a server. Filters that
// change no data are left out.
type Node struct {
	Role     string `json:"role,omitempty"` // for its parent: "file", "backing"…
	Driver   string `json:"driver"`         // "qcow2", "raw", "file", "nbd"…
	Options  string `json:"options,omitempty"`
	Size     uint64 `json:"size"` // that its parent, or the guest, sees
	ReadOnly bool   `json:"read_only,omitempty"`
	Direct   bool   `json:"direct,omitempty"`   // past the host's page cache
	NoFlush  bool   `json:"no_flush,omitempty"` // what was written may be lost
	File     *File  `json:"file,omitempty"`     // that it reads and writes
	Address  string `json:"address,omitempty"`  // what it reaches in place of a file
	Own      bool   `json:"own,omitempty"`      // the address means something else on each host
	Children []Node `json:"children,omitempty"`
}

// Bounds of Disks.
const (
	maxDrives = 512
	maxNodes  = 2048 // of all drives
	maxLayers = 400  // of nodes: two for each image of a chain
	maxPath   = 4096 // bytes
	maxSize   = 1 << 62
)

// Check makes sure that facts of a peer are within bounds.
func (d Disks) Check() error {
	if len(d.Drives) > maxDrives || len(d.Trusted) > maxDrives {
		return fmt.Errorf("%w: %d drives", ErrFacts, len(d.Drives))
	}
	texts := append([]string{d.Boot}, d.Trusted...)
	nodes := 0
	var check func(n Node, depth int) error
	check = func(n Node, depth int) error {
		if nodes++; nodes > maxNodes || depth > maxLayers {
			return fmt.Errorf("%w: more than %d nodes, or %d deep", ErrFacts, maxNodes, maxLayers)
		}
		if n.Size > maxSize {
			return fmt.Errorf("%w: a size of %d bytes", ErrFacts, n.Size)
		}
		texts = append(texts, n.Role, n.Driver, n.Options, n.Address)
		if f := n.File; f != nil {
			texts = append(texts, f.Path, f.Error, f.FS, f.Export, f.FSID, f.WWN, f.Head, f.Digest)
		}
		for _, c := range n.Children {
			if err := check(c, depth+1); err != nil {
				return err
			}
		}
		return nil
	}
	for _, drive := range d.Drives {
		texts = append(texts, drive.Name, drive.Device)
		if drive.Root != nil {
			if err := check(*drive.Root, 1); err != nil {
				return err
			}
		}
	}
	for _, s := range texts {
		if len(s) > maxPath || !utf8.ValidString(s) {
			return fmt.Errorf("%w: a text of %d bytes", ErrFacts, len(s))
		}
	}
	return nil
}

// Trust notes which drives' images an operator knows to be those of the destination.
func (d *Disks) Trust(names []string) error {
	for _, name := range names {
		if !slices.ContainsFunc(d.Drives, func(drive Drive) bool { return drive.Name == name }) {
			var have []string
			for _, drive := range d.Drives {
				have = append(have, strconv.Quote(drive.Name))
			}
			return fmt.Errorf("the VM has no disk %q to trust: it has %s", name,
				either(list(have), "none"))
		}
	}
	d.Trusted = names
	return nil
}

// Against says why the drives of a source's QEMU are not those of its twin. There are no reasons
// where they can be shown to be the same, but for those that the source trusts.
func (d Disks) Against(twin Disks) (r Reasons) {
	oneKernel := d.Boot != "" && d.Boot == twin.Boot
	pairs, gone, extra := pair(d.Drives, twin.Drives)
	const options = "start the destination's QEMU with the source's -drive, -blockdev and " +
		"-device options"
	for _, x := range gone {
		r.add(options, "the source has disk %q (%s) and the destination has none there", x.Name,
			x.Device)
	}
	for _, x := range extra {
		r.add(options, "the destination has disk %q (%s) and the source has none there", x.Name,
			x.Device)
	}
	for _, p := range pairs {
		c := comparison{
			name: p.source.Name, trusted: slices.Contains(d.Trusted, p.source.Name),
			oneKernel:  oneKernel,
			oneNetwork: oneKernel && d.Network != 0 && d.Network == twin.Network,
		}
		c.drives(p.source, p.destination)
		r = append(r, c.found...)
	}
	return r
}

type drivePair struct{ source, destination Drive }

// pair finds for each drive of a source the one of the destination. It goes by the device, which is
// the same on both unless QEMU numbered it, then by the drive's name. At last, if a single one is
// left at each side, these two are a pair.
func pair(source, destination []Drive) (pairs []drivePair, gone, extra []Drive) {
	gone, extra = slices.Clone(source), slices.Clone(destination)
	for _, key := range []func(Drive) string{
		func(d Drive) string {
			if strings.Contains(d.Device, "/unattached/") {
				return ""
			}
			return d.Device
		},
		func(d Drive) string { return d.Name },
	} {
		at := map[string]int{} // index in extra
		for i, d := range extra {
			if k := key(d); k != "" {
				at[k] = i
			}
		}
		taken := map[int]bool{}
		gone = slices.DeleteFunc(gone, func(d Drive) bool {
			i, ok := at[key(d)]
			if !ok || taken[i] {
				return false
			}
			taken[i] = true
			pairs = append(pairs, drivePair{d, extra[i]})
			return true
		})
		var left []Drive
		for i, d := range extra {
			if !taken[i] {
				left = append(left, d)
			}
		}
		extra = left
	}
	if len(gone) == 1 && len(extra) == 1 {
		pairs = append(pairs, drivePair{gone[0], extra[0]})
		gone, extra = nil, nil
	}
	return pairs, gone, extra
}

// comparison is that of one drive.
type comparison struct {
	name                           string
	trusted, oneKernel, oneNetwork bool
	found                          Reasons
}

func (c *comparison) add(remedy, format string, args ...any) {
	c.found.add(remedy, "disk %q %s", c.name, fmt.Sprintf(format, args...))
}

// trust ends the remedies that an operator's word can take the place of.
func (c *comparison) trust(remedy string) string {
	return fmt.Sprintf("%s; or, if you know that both hosts have the same image, say so with "+
		"`--trust-disk %s`, or `trust_disks = [%q]` in the VM's description at the source", remedy,
		c.name, c.name)
}

func (c *comparison) drives(a, b Drive) {
	switch {
	case a.Root == nil && b.Root == nil:
		return
	case a.Root == nil:
		c.add(
			fmt.Sprintf("take it out there: `eject` with %s in QEMU's monitor, or start that "+
				"QEMU without it", named(b)),
			"is empty on the source, and the destination has %s in it", b.Root)
		return
	case b.Root == nil:
		c.add("put it in there, with `blockdev-change-medium` in QEMU's monitor, or take it out "+
			"here", "is empty on the destination, and the source has %s in it", a.Root)
		return
	}
	if a.ReadOnly != b.ReadOnly {
		c.add("start the destination's QEMU with the source's -drive or -blockdev option",
			"is %s on the source and %s on the destination", readOnly(a.ReadOnly),
			readOnly(b.ReadOnly))
	}
	if a.Root.Size != b.Root.Size {
		c.add("start the destination's QEMU anew, with the image that the source has now",
			"has %s on the source, %s on the destination", units.Exact(a.Root.Size),
			units.Exact(b.Root.Size))
		return
	}
	if a.Carried && b.Carried || c.trusted {
		return
	}
	c.nodes(*a.Root, *b.Root, a.ReadOnly && b.ReadOnly)
}

func named(d Drive) string {
	if strings.HasPrefix(d.Device, "/") {
		return fmt.Sprintf("device %q", d.Name)
	}
	return fmt.Sprintf("id %q", d.Device)
}

func readOnly(is bool) string {
	if is {
		return "read-only"
	}
	return "writable"
}

// nodes compares what two drives read and write, layer by layer.
func (c *comparison) nodes(a, b Node, guestReads bool) {
	if !a.shape(b) {
		c.add(
			c.trust("start the destination's QEMU with the image that the source has now, which "+
				"a snapshot or a job may have changed"),
			"is %s on the source, %s on the destination", &a, &b)
		return
	}
	for i := range a.Children {
		before := len(c.found)
		if c.nodes(a.Children[i], b.Children[i], guestReads); len(c.found) > before {
			return // one of the layers is enough
		}
	}
	const share = "put it on storage that both hosts share (NFS, Ceph, iSCSI…), and name that " +
		"on both"
	switch {
	case a.File != nil && b.File != nil:
		switch how, why := SameFile(*a.File, *b.File, c.oneKernel); {
		case how == Same, how == Copies && a.ReadOnly && b.ReadOnly:
		case how == Unproven:
			c.add(c.trust(share),
				"is %s on the source, and it cannot be shown that %s on the destination is the "+
					"same: %s", a.File.Path, b.File.Path, why)
			return
		default:
			c.add(c.trust(share), "is %s on the source, and %s on the destination is another: %s",
				a.File.Path, b.File.Path, why)
			return
		}
		if why := UnsafeCache(*a.File, a.ReadOnly, a.Direct, a.NoFlush || b.NoFlush,
			c.oneKernel); why != "" {
			c.add(
				c.trust("start the VM, or reopen the drive (`blockdev-reopen`), with "+
					"`cache=none`: `cache.direct=on` with -blockdev"), "(%s): %s", a.File.Path, why)
		} else if why := UnsafeCache(*b.File, b.ReadOnly, b.Direct, false, c.oneKernel); why != "" {
			c.add(
				c.trust("start the destination's QEMU with `cache=none`: `cache.direct=on` with "+
					"-blockdev"), "(%s) on the destination: %s", b.File.Path, why)
		}
	case a.Address != b.Address:
		c.add(c.trust("name it alike on both hosts"), "is %s on the source, %s on the destination",
			a.Address, b.Address)
	case a.Address != "" && a.Own && !c.oneNetwork:
		c.add(c.trust(share), "is %s, which means another thing on each host", a.Address)
	}
}

// UnsafeCache says why a file must not be written by two hosts, one after the other, with QEMU's
// cache mode; "" if it may. QEMU writes out what it has when it leaves an image. It cannot have the
// other host forget what that read before.
func UnsafeCache(f File, readOnly, direct, noFlush, oneKernel bool) string {
	switch {
	case readOnly || oneKernel:
		return ""
	case noFlush:
		return "QEMU does not flush it (cache=unsafe), so what the guest wrote may not be there " +
			"for the destination"
	case !direct && !slices.Contains(coherent, f.FS):
		return "the host caches it, so the destination may read old data"
	}
	return ""
}

// shape reports whether two trees have the same formats and layers.
func (n Node) shape(m Node) bool {
	if n.Driver != m.Driver || n.Options != m.Options || n.Role != m.Role ||
		len(n.Children) != len(m.Children) ||
		(n.File != nil) != (m.File != nil) {
		return false
	}
	for i := range n.Children {
		if !n.Children[i].shape(m.Children[i]) {
			return false
		}
	}
	return true
}

// String names what a node reads and writes: "qcow2 /a, backed by raw /b".
func (n *Node) String() string {
	const most = 500 // bytes
	s := n.text()
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

func (n *Node) text() string {
	s := n.Driver
	if n.Options != "" {
		s += " (" + n.Options + ")"
	}
	if n.File != nil {
		return n.File.Path
	}
	if len(n.Children) == 0 {
		return either(n.Address, s)
	}
	for i := range n.Children {
		switch c := &n.Children[i]; c.Role {
		case "file":
			s += " " + c.text()
		case "backing":
			s += ", backed by " + c.text()
		default:
			s += fmt.Sprintf(", %s %s", c.Role, c.text())
		}
	}
	return s
}

// Address tells what a node reaches, by QEMU's name of it, without secrets; and whether that means
// something else on each host.
func Address(driver, name string) (text string, own bool) {
	if s, ok := strings.CutPrefix(name, "json:"); ok {
		var v map[string]any
		if json.Unmarshal([]byte(s), &v) != nil {
			return driver, true
		}
		var parts []string
		flatten("", v, 0, func(key, value string) {
			last := key[strings.LastIndexByte(key, '.')+1:]
			if secret(last) {
				return
			}
			own = own || last == "host" && ownHost(value) || last == "type" && value == "unix" ||
				last == "socket"
			parts = append(parts, key+"="+value)
		})
		slices.Sort(parts)
		return strings.Join(parts, ","), own || slices.Contains(ownDrivers, driver)
	}
	u, err := url.Parse(name)
	if err != nil || u.Scheme == "" || u.Host == "" && !strings.Contains(name, "://") {
		// "rbd:pool/image", "fat:/dir", and the short "nbd:host:port"
		own = slices.Contains(ownDrivers, driver)
		if rest, ok := strings.CutPrefix(name, "nbd:"); ok {
			host, _, _ := strings.Cut(rest, ":")
			own = own || host == "unix" || ownHost(host)
		}
		return name, own
	}
	u.User = nil
	q := u.Query()
	own = strings.Contains(u.Scheme, "unix") || q.Has("socket") || ownHost(u.Hostname())
	return u.String(), own || slices.Contains(ownDrivers, driver)
}

// ownDrivers reach something of the host's own.
var ownDrivers = []string{"vvfat", "nvme", "io_uring", "nvme-io_uring", "virtio-blk-vfio-pci",
	"virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"}

// secret reports whether an option is who reads an image, and not which.
func secret(key string) bool {
	return strings.Contains(key, "secret") || strings.Contains(key, "password") ||
		strings.HasPrefix(key, "tls") || key == "user" ||
		key == "cookie" || key == "auth-client-required"
}

// flatten calls f for all that is no object or list within v, with the path of its keys.
func flatten(prefix string, v any, depth int, f func(key, value string)) {
	if depth > 16 {
		return
	}
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			flatten(strings.TrimPrefix(prefix+"."+k, "."), x, depth+1, f)
		}
	case []any:
		for i, x := range v {
			flatten(fmt.Sprintf("%s.%d", prefix, i), x, depth+1, f)
		}
	case string:
		f(prefix, v)
	case float64:
		f(prefix, strconv.FormatFloat(v, 'f', -1, 64))
	case bool:
		f(prefix, strconv.FormatBool(v))
	}
}

// options returns those of a format by QEMU's name of its node: such as the offset of a raw image
// within its file. Plain names have none.
func options(name string) string {
	s, ok := strings.CutPrefix(name, "json:")
	var v map[string]any
	if !ok || json.Unmarshal([]byte(s), &v) != nil {
		return ""
	}
	var parts []string
	for k, x := range v {
		switch x.(type) {
		case string, float64, bool:
			if k != "driver" && k != "filename" && !secret(k) {
				flatten(k, x, 0, func(key, value string) { parts = append(parts, key+"="+value) })
			}
		}
	}
	slices.SortFunc(parts, cmp.Compare[string])
	return strings.Join(parts, ",")
}

// filename returns the path in QEMU's name of a file's node.
func filename(name string) (string, bool) {
	s, ok := strings.CutPrefix(name, "json:")
	if !ok {
		return name, name != ""
	}
	var v struct {
		Filename string `json:"filename"`
	}
	if json.Unmarshal([]byte(s), &v) != nil {
		return "", false
	}
	return v.Filename, v.Filename != ""
}

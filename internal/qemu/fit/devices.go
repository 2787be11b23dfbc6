package fit

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"vacate/internal/qemu/qmp"
)

// Devices are the devices of a VM, in the tree of its buses, and what of the machine itself a guest
// sees. QEMU loads the state of a device into the one at the same place. If there is none, or a
// different one, QEMU gives the VM up, at a moment when the guest stands still already.
type Devices struct {
	List []Device `json:"list"` // parents ahead of their children
	// Kinds are the different devices among them.
	Kinds   []Kind     `json:"kinds"`
	Machine []Property `json:"machine"`
}

// Device is one device.
type Device struct {
	// Place is where it is: its parents and addresses from the root on. Buses count by number, as
	// their names may be QEMU's. Devices of a bus without addresses have the same place.
	Place string `json:"place"`
	ID    string `json:"id,omitempty"` // the operator's name for it, for messages
	Kind  int    `json:"kind"`
}

// Kind is what a device is like.
type Kind struct {
	Type string `json:"type"`          // QEMU's
	PCI  string `json:"pci,omitempty"` // "1af4:1000", where it has such
	// Properties are those whose effect a guest may see; not names of what is on the host.
	Properties []Property `json:"properties"`
}

// What facts of devices hold at most.
const (
	maxDevices = 4096
	maxPlace   = 2048 // bytes
	maxTree    = 8 << 20
	maxDepth   = 64
)

// Check makes sure that facts of a peer are within bounds.
func (d Devices) Check() error {
	if len(d.List) > maxDevices || len(d.Kinds) > len(d.List) {
		return fmt.Errorf("%w: devices", ErrFacts)
	}
	var err error
	for _, x := range d.List {
		err = cmp.Or(err, text(x.ID))
		if x.Kind < 0 || x.Kind >= len(d.Kinds) || len(x.Place) > maxPlace {
			err = cmp.Or(err, fmt.Errorf("%w: a device", ErrFacts))
		}
	}
	for _, k := range append(slices.Clone(d.Kinds), Kind{Properties: d.Machine}) {
		if len(k.Properties) > maxProperties {
			return fmt.Errorf("%w: %d properties of a device", ErrFacts, len(k.Properties))
		}
		err = cmp.Or(err, text(k.Type, k.PCI))
		for _, p := range k.Properties {
			err = cmp.Or(err, text(p.Name, p.Value))
		}
	}
	return err
}

// ofMachine are properties of a machine that the guest sees, and that no device tells.
var ofMachine = []string{"max-ram-below-4g", "smm", "acpi"}

// DevicesOf asks a QEMU for its devices.
func DevicesOf(ctx context.Context, q *qmp.Client) (Devices, error) {
	var d Devices
	var tree string
	var named [2][]struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	var dimms []struct {
		Type string                     `json:"type"`
		Data map[string]json.RawMessage `json:"data"`
	}
	var memory *struct {
		Most  uint64 `json:"max-size"` // none if there are no slots
		Slots uint64 `json:"slots"`
	}
	values := make([]json.RawMessage, len(ofMachine))
	get := func(property string, v any) error {
		return optional(q.Run(ctx, "qom-get",
			map[string]any{"path": "/machine", "property": property}, v))
	}
	ask := []func() error{
		func() (err error) {
			tree, err = q.HMP(ctx, "info qtree")
			return err
		},
		func() error {
			return q.Run(ctx, "qom-list", map[string]any{"path": "/machine/peripheral"}, &named[0])
		},
		func() error {
			return q.Run(ctx, "qom-list", map[string]any{"path": "/machine/peripheral-anon"},
				&named[1])
		},
		func() error { return optional(q.Run(ctx, "query-memory-devices", nil, &dimms)) },
		func() error { return get("memory", &memory) }, // from QEMU 7.1 on
	}
	err := each(len(ask)+len(ofMachine), func(i int) error {
		if i < len(ask) {
			return ask[i]()
		}
		return get(ofMachine[i-len(ask)], &values[i-len(ask)])
	})
	if err != nil {
		return d, err
	}
	if d, err = parseTree(tree); err != nil {
		return d, err
	}
	for i, name := range ofMachine {
		if values[i] != nil {
			d.Machine = append(d.Machine, Property{name, string(values[i])})
		}
	}
	if memory != nil {
		d.Machine = append(d.Machine, Property{"-m maxmem", fmt.Sprint(memory.Most)},
			Property{"-m slots", fmt.Sprint(memory.Slots)})
	}
	for _, m := range dimms {
		var id string
		json.Unmarshal(m.Data["id"], &id) // none is no error
		k := Kind{Type: m.Type}
		for _, name := range []string{"addr", "memaddr", "node", "slot"} {
			if v := string(m.Data[name]); v != "" {
				k.Properties = append(k.Properties, Property{name, v})
			}
		}
		d.add("memory", id, k)
	}
	// Devices that are on no bus.
	onBus := map[string]bool{}
	for _, k := range d.Kinds {
		onBus[k.Type] = true
	}
	for i, some := range named {
		for _, n := range some {
			kind := child.FindStringSubmatch(n.Type)
			if kind == nil || onBus[kind[1]] || strings.HasSuffix(kind[1], "-cpu") ||
				len(dimms) > 0 && kind[1] == "pc-dimm" {
				continue
			}
			if i == 1 {
				n.Name = ""
			}
			d.add("", n.Name, Kind{Type: kind[1]})
		}
	}
	if len(d.List) > maxDevices {
		return d, fmt.Errorf("the VM has more than %d devices", maxDevices)
	}
	return d, d.Check()
}

var child = regexp.MustCompile(`^child<(.+)>$`)

func (d *Devices) add(place, id string, k Kind) {
	i := slices.IndexFunc(d.Kinds, func(o Kind) bool {
		return o.Type == k.Type && o.PCI == k.PCI && slices.Equal(o.Properties, k.Properties)
	})
	if i < 0 {
		i = len(d.Kinds)
		d.Kinds = append(d.Kinds, k)
	}
	d.List = append(d.List, Device{place, id, i})
}

// addresses are the properties that say where on its bus a device is.
var addresses = []string{"addr", "port", "channel", "scsi-id", "lun", "unit", "nr", "address",
	"iobase", "index"}

// ofHost are properties that have no effect for a guest, or none that lasts: they choose means of
// the host, or what a boot does. The guest may change busnr, MCFG and smb_io_base. The default of
// rombar has another number from QEMU 10.0 on, and the memory that it makes is compared anyway.
// QEMU computes cyls from a disk's size when it starts, and keeps it when the disk grows; the size
// is compared with the disks.
var ofHost = strings.Fields(`bootindex busnr cyls dump-guest-core hotplugged ioeventfd max-bytes MCFG period rombar share-rw smb_io_base
	x-ioeventfd x-txburst x-txtimer`)

var (
	busLine      = regexp.MustCompile(`^( *)bus: (.*)$`)
	deviceLine   = regexp.MustCompile(`^( *)dev: ([^,]+), id "(.*)"$`)
	propertyLine = regexp.MustCompile(`^ *([A-Za-z0-9_.-]+) = ([^"].*)$`)
	quotedLine   = regexp.MustCompile(`^ *(port|serial|mac) = "(.*)"$`)
	usbLine      = regexp.MustCompile(`^ *addr [0-9.]+, port ([0-9.]+), speed `)
	pciLine      = regexp.MustCompile(`^ *class .*, pci id ([0-9a-f]{4}:[0-9a-f]{4}) `)
	inWords      = regexp.MustCompile(` \(.*\)$`)
)

// node is a device while the tree is read.
type node struct {
	indent  int
	device  bool // else a bus
	place   string
	id      string
	kind    Kind
	buses   int
	address map[string]string
}

// parseTree reads what "info qtree" says: buses and devices, each in deeper lines than what they
// hang on, and properties of the device above them.
//
//	dev: virtio-net-pci, id "net0"
//	  vectors = 3 (0x3)
//	  netdev = "n0"
//	  addr = 03.0
//	  class Ethernet controller, addr 00:03.0, pci id 1af4:1000 (sub 1af4:0001)
//	  bus: virtio-bus
//	    type virtio-pci-bus
//	    dev: virtio-net-device, id ""
func parseTree(tree string) (Devices, error) {
	var d Devices
	var path []*node // from the root on
	if len(tree) > maxTree {
		return d, fmt.Errorf("the list of QEMU's devices is longer than %d bytes", maxTree)
	}
	// A device's own properties come ahead of its buses.
	done := func(n *node) {
		if n.device {
			d.add(n.place, n.id, n.kind)
			n.device = false
		}
	}
	for line := range strings.Lines(tree) {
		line = strings.TrimRight(line, "\r\n")
		bus, dev := busLine.FindStringSubmatch(line), deviceLine.FindStringSubmatch(line)
		if bus == nil && dev == nil {
			if len(path) > 0 && path[len(path)-1].device {
				path[len(path)-1].property(line)
			}
			continue
		}
		indent := 0
		if bus != nil {
			indent = len(bus[1])
		} else {
			indent = len(dev[1])
		}
		if len(path) > 0 {
			path[len(path)-1].settle(path)
			done(path[len(path)-1])
		}
		for len(path) > 0 && path[len(path)-1].indent >= indent {
			path = path[:len(path)-1]
		}
		if len(path) == maxDepth || len(d.List) > maxDevices {
			return d, fmt.Errorf("the list of QEMU's devices is deeper than %d or longer than %d",
				maxDepth, maxDevices)
		}
		n := &node{indent: indent}
		if bus != nil {
			if len(path) > 0 { // the root bus has no device above it
				parent := path[len(path)-1]
				n.place = parent.place + " " + parent.kind.Type
				if parent.buses > 0 {
					n.place += fmt.Sprintf(" bus %d", parent.buses)
				}
				parent.buses++
			}
		} else {
			n.device, n.id, n.kind.Type, n.address = true, dev[3], dev[2], map[string]string{}
		}
		path = append(path, n)
	}
	if len(path) > 0 {
		path[len(path)-1].settle(path)
		done(path[len(path)-1])
	}
	if len(d.List) == 0 {
		return d, fmt.Errorf("QEMU lists no devices: %.80q", tree)
	}
	return d, nil
}

// settle gives a device its place, when all of its properties are known.
func (n *node) settle(path []*node) {
	if !n.device {
		return
	}
	if len(path) > 1 {
		n.place = path[len(path)-2].place
	}
	for _, name := range addresses {
		if v, ok := n.address[name]; ok {
			n.place += fmt.Sprintf("/%s %s", name, v)
		}
	}
	n.place = strings.TrimSpace(n.place)
	if len(n.place) > maxPlace {
		n.place = n.place[:maxPlace]
	}
	slices.SortFunc(n.kind.Properties,
		func(a, b Property) int { return strings.Compare(a.Name, b.Name) })
	n.kind.Properties = slices.CompactFunc(n.kind.Properties,
		func(a, b Property) bool { return a.Name == b.Name })
}

func (n *node) property(line string) {
	if m := pciLine.FindStringSubmatch(line); m != nil {
		n.kind.PCI = m[1]
		return
	}
	if m := usbLine.FindStringSubmatch(line); m != nil {
		n.address["port"] = m[1] // QEMU may have chosen it
		return
	}
	m := propertyLine.FindStringSubmatch(line)
	if m == nil {
		m = quotedLine.FindStringSubmatch(line)
	}
	if m == nil || slices.Contains(ofHost, m[1]) || len(n.kind.Properties) == maxProperties {
		return
	}
	value := inWords.ReplaceAllString(m[2], "")
	if len(value) > maxText {
		value = value[:maxText]
	}
	if slices.Contains(addresses, m[1]) {
		if value != "" {
			n.address[m[1]] = value
		}
		return
	}
	n.kind.Properties = append(n.kind.Properties, Property{m[1], value})
}

// key is what two devices must have in common to be taken for the same.
func (d Devices) key(x Device) string {
	k := d.Kinds[x.Kind]
	return strings.Join([]string{x.Place, k.Type, k.PCI}, "\x00")
}

// name is how a message names a device.
func (d Devices) name(x Device) string {
	k := d.Kinds[x.Kind]
	s := k.Type
	if x.ID != "" {
		s += fmt.Sprintf(" %q", x.ID)
	}
	if k.PCI != "" {
		s += " (" + k.PCI + ")"
	}
	if x.Place != "" {
		s += " at " + x.Place
	}
	return s
}

// Against tells which devices are not at both ends, or not alike.
func (d Devices) Against(twin Devices) (r Reasons) {
	const remedy = "start the destination's QEMU with the source's -device options"
	here, there := d.byKey(), twin.byKey()
	onlyHere, onlyThere := d.missingIn(there, here), twin.missingIn(here, there)
	if len(onlyHere)+len(onlyThere) > 0 {
		r.add(remedy, "the devices differ: only the source has [%s], only the destination [%s]",
			list(onlyHere), list(onlyThere))
	}
	var differ []string
	for _, k := range slices.Sorted(maps.Keys(here)) {
		for i, x := range here[k][:min(len(here[k]), len(there[k]))] {
			if texts, _ := differences(d.Kinds[x.Kind].Properties,
				twin.Kinds[there[k][i].Kind].Properties); len(texts) > 0 {
				differ = append(differ, d.name(x)+": "+list(texts))
			}
		}
	}
	if len(differ) > 0 {
		r.add(remedy, "devices are not alike: %s", list(differ))
	}
	if texts, _ := differences(d.Machine, twin.Machine); len(texts) > 0 {
		r.add("start the destination's QEMU with the source's -machine and -m options",
			"the machines differ: %s", list(texts))
	}
	return r
}

// missingIn names the devices of mine for which there is none in others, but for what hangs on such
// ones.
func (d Devices) missingIn(others, mine map[string][]Device) (names []string) {
	seen := map[string]int{}
	gone := map[string]bool{} // places below a device that is missing
	for _, x := range d.List {
		k := d.key(x)
		seen[k]++
		if seen[k] <= len(others[k]) {
			continue
		}
		if at := mine[k][seen[k]-1]; !below(gone, at.Place) {
			names = append(names, d.name(at))
		}
		gone[strings.TrimSpace(x.Place+" "+d.Kinds[x.Kind].Type)] = true
	}
	return names
}

// byKey sorts devices that could stand for each other after what they are like.
func (d Devices) byKey() map[string][]Device {
	all := map[string][]Device{}
	for _, x := range d.List {
		k := d.key(x)
		all[k] = append(all[k], x)
	}
	for _, some := range all {
		slices.SortStableFunc(some, func(a, b Device) int {
			return slices.CompareFunc(d.Kinds[a.Kind].Properties, d.Kinds[b.Kind].Properties,
				func(p, q Property) int {
					return cmp.Or(strings.Compare(p.Name, q.Name),
						strings.Compare(p.Value, q.Value))
				})
		})
	}
	return all
}

// below reports whether a place is below one of some.
func below(some map[string]bool, place string) bool {
	for i := range len(place) + 1 {
		if (i == len(place) || place[i] == ' ' || place[i] == '/') && some[place[:i]] {
			return true
		}
	}
	return false
}

// engineLacks are kinds of devices, by how their type begins, that QEMU might migrate and an
// eviction cannot.
var engineLacks = []struct{ prefix, why string }{
	{"vfio-", "is hardware of this host, passed through"},
	{"vhost-vdpa", "is hardware of this host"},
	{"sgx-epc", "is encrypted memory, which nobody can move"},
}

// Held tells which devices hold the VM where it is.
func (d Devices) Held() (r Reasons) {
	for _, x := range d.List {
		k := d.Kinds[x.Kind]
		remedy := "shut the VM down and start it without this device"
		if x.ID != "" {
			remedy = fmt.Sprintf("unplug it: `device_del %s` in QEMU's monitor", x.ID)
		}
		for _, lack := range engineLacks {
			if strings.HasPrefix(k.Type, lack.prefix) {
				r.add(remedy, "%s %s", d.name(x), lack.why)
			}
		}
		if strings.HasPrefix(k.Type, "virtio-mem") &&
			slices.Contains(k.Properties, Property{"x-early-migration", "true"}) {
			r.add("start it with a machine type of QEMU 7.2 or before; or "+remedy,
				"%s sends state ahead of the memory, which the engine cannot follow", d.name(x))
		}
	}
	return r
}

// Held asks a QEMU for what keeps it from migrating its VM, in its own words.
func Held(ctx context.Context, q *qmp.Client) (r Reasons, err error) {
	var m struct {
		Blocked []string `json:"blocked-reasons"` // from QEMU 6.0 on
	}
	var networks string
	err = each(2, func(i int) (err error) {
		if i == 0 {
			return q.Run(ctx, "query-migrate", nil, &m)
		}
		networks, err = q.HMP(ctx, "info network")
		return err
	})
	for _, reason := range m.Blocked {
		r.add("take that device out of the VM, or unmount it in the guest: `device_del ID` in "+
			"QEMU's monitor, with its ID of `info qtree`", "QEMU refuses to migrate: %s", reason)
	}
	if slices.Contains(Networks(networks), "vhost-vdpa") {
		r.add("unplug it: `device_del ID` in QEMU's monitor, with its ID of `info network`",
			"a network card is hardware of this host (vhost-vdpa)")
	}
	return r, err
}

var network = regexp.MustCompile(`index=\d+,type=([a-z0-9-]+)`)

// Networks returns the kinds of back ends in what "info network" says, each once.
func Networks(text string) (kinds []string) {
	for _, m := range network.FindAllStringSubmatch(text, maxDevices) {
		if m[1] != "nic" && !slices.Contains(kinds, m[1]) {
			kinds = append(kinds, m[1])
		}
	}
	return kinds
}

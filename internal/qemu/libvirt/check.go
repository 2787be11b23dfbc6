package libvirt

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// A Policy says what the description of a domain may name that a peer sends. What is not known to
// be harmless is refused: libvirt starts, as root or nearly, what a description tells it to.
type Policy struct {
	Emulators []string // programs
	Paths     []string // directories of disks, sockets, firmware and the like
	Networks  []string // libvirt's networks, and bridges of the host
}

// Valid says what is wrong with a policy.
func (p Policy) Valid() error {
	for _, path := range append(slices.Clone(p.Emulators), p.Paths...) {
		named := strings.Contains(path, ":") && !strings.HasPrefix(path, "/")
		if !named && (!filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/") {
			return fmt.Errorf("%.200q: want an absolute path, and not all of them", path)
		}
	}
	return nil
}

// A Checked description is safe for this host's libvirt.
type Checked struct {
	Name string
	UUID UUID
	XML  string // as it was understood: written anew, so that libvirt reads nothing else in it
}

// The bounds of a description.
const (
	MaxXML      = 1 << 20 // bytes
	maxElements = 20_000
	maxDepth    = 32
	maxAttrs    = 64 // of an element
)

// ErrXML is wrapped by every error of Check.
var ErrXML = errors.New("the domain's description is refused")

// Check reads the description of a domain that is to come from a peer, and refuses it if it names
// anything of this host that the policy does not allow. An error names what and where.
func (p Policy) Check(text string) (Checked, error) {
	c := checker{policy: p}
	if err := c.run(text); err != nil {
		if c.line > 0 {
			return Checked{}, fmt.Errorf("%w: line %d: %w", ErrXML, c.line, err)
		}
		return Checked{}, fmt.Errorf("%w: %w", ErrXML, err)
	}
	return Checked{c.name, c.uuid, c.out.String()}, nil
}

type element struct {
	name  string
	attrs map[string]string
	text  strings.Builder
}

type checker struct {
	policy Policy
	line   int
	out    bytes.Buffer
	stack  []*element
	name   string
	uuid   UUID
	nvram  []string // paths, to be checked when the name is known
}

func (c *checker) run(text string) error {
	switch {
	case len(text) > MaxXML:
		return fmt.Errorf("it has %d bytes: at most %d are taken", len(text), MaxXML)
	case !utf8.ValidString(text) || strings.ContainsRune(text, 0):
		return errors.New("it is not UTF-8")
	}
	// Raw tokens: prefixes stay as they are written, so that the description can be written anew.
	dec := xml.NewDecoder(strings.NewReader(text))
	elements := 0
	for {
		token, err := dec.RawToken()
		c.line, _ = dec.InputPos()
		if err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		switch t := token.(type) {
		case xml.ProcInst:
			if t.Target != "xml" || elements > 0 {
				return fmt.Errorf("it has the instruction <?%.50s", t.Target)
			}
		case xml.Directive:
			return errors.New("it has a document type: entities are not taken")
		case xml.Comment:
		case xml.CharData:
			if len(c.stack) == 0 {
				if len(bytes.TrimSpace(t)) > 0 {
					return errors.New("it has text outside of its element")
				}
				continue
			}
			c.top().text.Write(t)
			xml.EscapeText(&c.out, t)
		case xml.StartElement:
			if elements++; elements > maxElements {
				return fmt.Errorf("it has more than %d elements", maxElements)
			}
			if len(c.stack) == 0 && elements > 1 {
				return errors.New("it has more than one element at the top")
			}
			if err := c.start(t); err != nil {
				return err
			}
		case xml.EndElement:
			if len(c.stack) == 0 || c.top().name != raw(t.Name) {
				return fmt.Errorf("</%.50s> ends no element", raw(t.Name))
			}
			if err := c.end(); err != nil {
				return err
			}
		}
	}
	c.line = 0
	switch {
	case len(c.stack) > 0 || elements == 0:
		return errors.New("it is not whole")
	case c.name == "":
		return errors.New("the domain has no name")
	case c.uuid == UUID{}:
		return errors.New("the domain has no UUID")
	}
	for _, path := range c.nvram {
		own := strings.HasPrefix(path, nvramDir+c.name+"_VARS.") &&
			filepath.Dir(path)+"/" == nvramDir
		if own && filepath.Clean(path) == path {
			continue
		}
		if err := c.within("nvram", path); err != nil {
			return err
		}
	}
	return nil
}

// nvramDir is where libvirt keeps the variables of UEFI firmware by itself.
const nvramDir = "/var/lib/libvirt/qemu/nvram/"

func raw(n xml.Name) string {
	if n.Space != "" {
		return n.Space + ":" + n.Local
	}
	return n.Local
}

func (c *checker) top() *element { return c.stack[len(c.stack)-1] }

// path is the element's place below the domain, such as "devices/disk/source".
func (c *checker) path() string {
	var names []string
	for _, e := range c.stack[1:] {
		names = append(names, e.name)
	}
	return strings.Join(names, "/")
}

func (c *checker) start(t xml.StartElement) error {
	name := raw(t.Name)
	if len(c.stack) == maxDepth {
		return fmt.Errorf("<%.50s> is more than %d elements deep", name, maxDepth)
	}
	if len(t.Attr) > maxAttrs {
		return fmt.Errorf("<%.50s> has %d attributes", name, len(t.Attr))
	}
	e := &element{name: name, attrs: map[string]string{}}
	c.stack = append(c.stack, e)
	c.out.WriteString("<" + name)
	for _, a := range t.Attr {
		key := raw(a.Name)
		if _, twice := e.attrs[key]; twice {
			return fmt.Errorf("<%.50s> has %.50s twice", name, key)
		}
		e.attrs[key] = a.Value
		c.out.WriteString(" " + key + `="`)
		xml.EscapeText(&c.out, []byte(a.Value))
		c.out.WriteString(`"`)
	}
	c.out.WriteString(">")
	if len(c.stack) == 1 {
		if name != "domain" {
			return fmt.Errorf("it describes no domain, but begins with <%.50s>", name)
		}
		if kind := e.attrs["type"]; kind != "kvm" && kind != "qemu" {
			return fmt.Errorf("a domain of type %.50q: only kvm and qemu are taken", kind)
		}
		return c.namespaces(e)
	}
	if c.inside("metadata") {
		return nil // libvirt keeps it, and does not look at it
	}
	if strings.Contains(name, ":") {
		return fmt.Errorf(
			"<%.50s>: nothing of another namespace is taken, such as arguments for QEMU",
			name,
		)
	}
	if err := c.namespaces(e); err != nil {
		return err
	}
	return c.known(e)
}

// inside reports whether the place is in a child of the domain, or is it.
func (c *checker) inside(child string) bool { return len(c.stack) > 1 && c.stack[1].name == child }

// namespaces refuses what would give elements another meaning. Prefixes are harmless while nobody
// uses them: libvirt declares that of QEMU's arguments at the top.
func (c *checker) namespaces(e *element) error {
	for key := range e.attrs {
		if key == "xmlns" || strings.Contains(key, ":") && !strings.HasPrefix(key, "xmlns:") {
			return fmt.Errorf("<%.50s> has the attribute %.50s", e.name, key)
		}
	}
	return nil
}

// children of a domain that are taken.
var children = words(`name uuid genid title description metadata memory currentMemory maxMemory
	memoryBacking vcpu vcpus iothreads iothreadids defaultiothread cputune numatune memtune
	resource sysinfo os features cpu clock on_poweroff on_reboot on_crash on_lockfailure pm perf
	devices seclabel`)

// devices that are taken.
var devices = words(`emulator disk controller interface serial console channel input graphics video
	sound audio watchdog memballoon rng tpm panic memory vsock hub iommu redirdev redirfilter`)

// refused devices, and why.
var refused = map[string]string{
	"hostdev": "a device of the host cannot move: detach it first",
	"filesystem": "a directory of the host cannot move: " +
		"unmount it in the guest, and detach it first",
	"shmem":     "memory shared with others cannot move: detach it first",
	"smartcard": "a smartcard of the host cannot move: detach it first",
}

// types of devices that name nothing of the host but what is checked below.
var types = map[string][]string{
	"disk":      words("file block network volume"),
	"interface": words("user network bridge"),
	"serial":    words("pty null file unix spicevmc spiceport vc"),
	"console":   words("pty null file unix spicevmc spiceport vc"),
	"channel":   words("pty null file unix spicevmc spiceport"),
	"input":     words("mouse tablet keyboard"),
	"graphics":  words("vnc spice"),
	"audio":     words("none spice"),
	"redirdev":  words("spicevmc"),
	"backing":   words("file block network volume"),
	"backend":   words("emulator"), // of a tpm
}

func words(s string) []string { return strings.Fields(s) }

// pathAttrs are attributes that always name something of the host.
var pathAttrs = words(`file dir path socket template evdev rendernode logFile tap vhost xauth
	statedir`)

// pathTexts are elements whose text does.
var pathTexts = words("emulator loader nvram kernel initrd dtb table path")

func (c *checker) known(e *element) error {
	place := c.path()
	switch {
	case len(c.stack) == 2 && !slices.Contains(children, e.name):
		return fmt.Errorf("<%.50s> is not taken", e.name)
	case len(c.stack) == 3 && c.inside("devices"):
		if why := refused[e.name]; why != "" {
			return fmt.Errorf("<%s>: %s", e.name, why)
		}
		if !slices.Contains(devices, e.name) {
			return fmt.Errorf("the device <%.50s> is not taken", e.name)
		}
		if list := types[e.name]; list != nil && !slices.Contains(list, e.attrs["type"]) {
			return fmt.Errorf(
				"<%s type=%.50q>: only %s are taken",
				e.name,
				e.attrs["type"],
				strings.Join(list, ", "),
			)
		}
	}
	switch place {
	case "seclabel":
		if kind := e.attrs["type"]; kind != "dynamic" {
			return fmt.Errorf(
				"<seclabel type=%.50q>: only dynamic is taken, as this host chooses "+
					"how it confines QEMU",
				kind,
			)
		}
	case "sysinfo":
		if kind := e.attrs["type"]; kind != "smbios" {
			return fmt.Errorf("<sysinfo type=%.50q>: only smbios is taken", kind)
		}
	case "devices/disk":
		switch kind := e.attrs["device"]; kind {
		case "", "disk", "cdrom", "floppy":
		default:
			return fmt.Errorf("<disk device=%.50q>: a device of the host is not taken", kind)
		}
		if e.attrs["rawio"] != "" || e.attrs["sgio"] != "" {
			return errors.New("<disk> wants raw access to a device of the host")
		}
	case "devices/disk/mirror":
		return errors.New("<disk> has a block job: wait for its end")
	case "devices/interface":
		if e.attrs["type"] == "user" {
			return c.network("network", "user") // its guest reaches what listens on this host alone
		}
	case "devices/interface/script", "devices/interface/downscript":
		return fmt.Errorf("<%s> names a command", e.name)
	case "devices/interface/portForward":
		return errors.New("<interface> listens on the host")
	case "devices/interface/source":
		for _, key := range []string{"network", "bridge"} {
			if n := e.attrs[key]; n != "" {
				if err := c.network(key, n); err != nil {
					return err
				}
			}
		}
		if e.attrs["dev"] != "" || e.attrs["mode"] != "" {
			return errors.New("<interface> names a network card of the host")
		}
	case "devices/rng/backend":
		if kind := e.attrs["model"]; kind != "random" && kind != "builtin" {
			return fmt.Errorf("<rng> from %.50q: only random and builtin are taken", kind)
		}
	case "devices/tpm/backend":
		if !slices.Contains(types["backend"], e.attrs["type"]) {
			return fmt.Errorf("<tpm> of type %.50q: only emulator is taken", e.attrs["type"])
		}
	}
	if e.name == "seclabel" && len(c.stack) > 2 && e.attrs["relabel"] != "no" ||
		e.name == "baselabel" {
		return fmt.Errorf(
			"<%s> in <%s>: this host chooses how it confines QEMU",
			e.name,
			c.stack[len(c.stack)-2].name,
		)
	}
	if c.inside("devices") && len(c.stack) > 3 && c.stack[2].name == "disk" {
		if err := c.diskSource(e); err != nil {
			return err
		}
	}
	return c.attributes(e)
}

func (c *checker) network(kind, name string) error {
	if slices.Contains(c.policy.Networks, name) {
		return nil
	}
	return fmt.Errorf(
		"<interface> is on the %s %.100q, and this host allows %q: add it to networks in its "+
			"configuration of libvirt",
		kind,
		name,
		c.policy.Networks,
	)
}

// diskSource checks the source of a disk, or of a layer of it.
func (c *checker) diskSource(e *element) error {
	if e.name == "backingStore" && e.attrs["type"] != "" &&
		!slices.Contains(types["backing"], e.attrs["type"]) {
		return fmt.Errorf("<backingStore type=%.50q> is not taken", e.attrs["type"])
	}
	if e.name != "source" {
		return nil
	}
	if e.attrs["pool"] != "" || e.attrs["volume"] != "" {
		name := "pool:" + e.attrs["pool"] + "/" + e.attrs["volume"]
		return c.named("volume", name)
	}
	if protocol, ok := e.attrs["protocol"]; ok {
		return c.named("image", protocol+":"+e.attrs["name"])
	}
	if e.attrs["type"] == "pci" || e.attrs["namespace"] != "" {
		return errors.New("<disk> is a device of the host")
	}
	return nil
}

// named checks what is no path, but has an entry like one in the policy's paths: "rbd:pool/".
func (c *checker) named(what, name string) error {
	for _, p := range c.policy.Paths {
		prefix := strings.TrimSuffix(p, "/") + "/"
		if !filepath.IsAbs(p) && strings.HasPrefix(name, prefix) &&
			!slices.Contains(strings.Split(name, "/"), "..") {
			return nil
		}
	}
	return c.outside(what, name)
}

func (c *checker) outside(what, name string) error {
	return fmt.Errorf(
		"<%s> names %.200q, which is outside of %q: add its directory to paths in this host's "+
			"configuration of libvirt, if VMs of other hosts may use it",
		what,
		name,
		c.policy.Paths,
	)
}

// within makes sure that a path is below a directory of the policy's.
func (c *checker) within(what, path string) error {
	if filepath.IsAbs(path) && filepath.Clean(path) == path {
		for _, p := range c.policy.Paths {
			if filepath.IsAbs(p) && strings.HasPrefix(path, strings.TrimSuffix(p, "/")+"/") {
				return nil
			}
		}
	}
	return c.outside(what, path)
}

// attributes checks those that name something of the host, and all that look like it.
func (c *checker) attributes(e *element) error {
	place := c.path()
	for key, value := range e.attrs {
		device := key == "dev" && e.name != "target" && e.name != "boot"
		if !device && !slices.Contains(pathAttrs, key) && !suspicious(value) {
			continue
		}
		switch {
		case value == "" && !device:
			continue
		case place == "os/nvram" && key == "template" && c.firmware(value):
			continue
		case place == "os/nvram/source" && key == "file":
			c.nvram = append(c.nvram, value)
			continue
		}
		if err := c.within(e.name+" "+key, value); err != nil {
			return err
		}
	}
	return nil
}

// suspicious reports whether a value is, or hides, a path.
func suspicious(value string) bool {
	v := strings.TrimSpace(value)
	return strings.HasPrefix(v, "/") || strings.Contains(v, "../")
}

// firmwareDirs are of distributions: what is there can be read by everybody.
var firmwareDirs = words("/usr/share/OVMF/ /usr/share/edk2/ /usr/share/qemu/ /usr/share/AAVMF/")

func (c *checker) firmware(path string) bool {
	if filepath.Clean(path) != path {
		return false
	}
	return slices.ContainsFunc(
		firmwareDirs,
		func(d string) bool { return strings.HasPrefix(path, d) },
	)
}

// end checks the text of an element.
func (c *checker) end() error {
	e, place := c.top(), c.path()
	free := c.inside("metadata") || place == "os/cmdline" || place == "title" ||
		place == "description" ||
		c.inside("sysinfo")
	text := e.text.String()
	if len(c.stack) > 1 && !free {
		if err := c.content(e, place, text); err != nil {
			return err
		}
	}
	c.stack = c.stack[:len(c.stack)-1]
	c.out.WriteString("</" + e.name + ">")
	return nil
}

func (c *checker) content(e *element, place, text string) (err error) {
	switch place {
	case "name":
		if c.name != "" || text == "" || strings.ContainsAny(text, "/\n") || len(text) > 200 ||
			text[0] == '.' {
			return fmt.Errorf("%.100q cannot be the name of a domain", text)
		}
		c.name = text
		return nil
	case "uuid":
		if c.uuid != (UUID{}) {
			return errors.New("it has two UUIDs")
		}
		c.uuid, err = ParseUUID(text)
		return err
	case "devices/emulator":
		if !slices.Contains(c.policy.Emulators, text) {
			return fmt.Errorf(
				"the emulator %.200q is none of %q: add it to emulators in this host's "+
					"configuration of libvirt",
				text,
				c.policy.Emulators,
			)
		}
		return nil
	case "os/loader":
		if text != "" && c.firmware(text) && e.attrs["readonly"] == "yes" {
			return nil
		}
	case "os/nvram":
		if text != "" {
			c.nvram = append(c.nvram, text)
			return nil
		}
	case "devices/rng/backend":
		if e.attrs["model"] == "random" &&
			(text == "/dev/urandom" || text == "/dev/random" || text == "/dev/hwrng") {
			return nil
		}
	case "resource/partition":
		if text == "/machine" {
			return nil
		}
		return fmt.Errorf("the partition %.100q is not taken", text)
	}
	if text != "" && slices.Contains(pathTexts, e.name) || suspicious(text) {
		return c.within(e.name, text)
	}
	return nil
}

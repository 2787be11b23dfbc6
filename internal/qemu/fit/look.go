package fit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"vacate/internal/qemu/qmp"

	"golang.org/x/sys/unix"
)

// DisksOf asks a QEMU for its drives, and looks at the very files that it has open. It changes
// nothing. The replies are those of qapi/block-core.json of QEMU 7.2 and 11.1.
func DisksOf(ctx context.Context, q *qmp.Client) (Disks, error) {
	d := Disks{Boot: word("/proc/sys/kernel/random/boot_id")}
	var g graph
	if err := g.ask(ctx, q); err != nil {
		return d, err
	}
	o, err := openFiles(ctx, q)
	if err != nil {
		return d, err
	}
	d.Network = o.network
	if d.Drives, err = g.drives(o.look); err != nil {
		return d, err
	}
	d.Volatile = g.volatile()
	return d, d.Check()
}

// graph is what QEMU says of its block layer.
type graph struct {
	Blocks []blockInfo
	Nodes  []nodeInfo
	Edges  edges
	Kinds  map[string]string // QOM types of devices, by path
}

// blockInfo is part of QEMU's BlockInfo.
type blockInfo struct {
	Device   string `json:"device"`
	QDev     string `json:"qdev"`
	Inserted *struct {
		Node     string `json:"node-name"`
		Active   *bool  `json:"active"` // from QEMU 10.0 on
		ReadOnly bool   `json:"ro"`
	} `json:"inserted"`
}

// nodeInfo is part of QEMU's BlockDeviceInfo.
type nodeInfo struct {
	Name     string `json:"node-name"`
	Driver   string `json:"drv"`
	File     string `json:"file"`
	ReadOnly bool   `json:"ro"`
	Cache    struct {
		Direct  bool `json:"direct"`
		NoFlush bool `json:"no-flush"`
	} `json:"cache"`
	Image struct {
		Size int64 `json:"virtual-size"`
	} `json:"image"`
	Bitmaps []struct {
		Name       string `json:"name"`
		Persistent bool   `json:"persistent"`
	} `json:"dirty-bitmaps"`
}

// edges is QEMU's XDbgBlockGraph: which node is whose child, and as what.
type edges struct {
	Nodes []struct {
		ID   uint64 `json:"id"`
		Type string `json:"type"`
		Name string `json:"name"`
	} `json:"nodes"`
	Edges []struct {
		Parent uint64   `json:"parent"`
		Child  uint64   `json:"child"`
		Name   string   `json:"name"`
		Needs  []string `json:"perm"`
		Allows []string `json:"shared-perm"` // others to need
	} `json:"edges"`
}

func (g *graph) ask(ctx context.Context, q *qmp.Client) error {
	if err := q.Run(ctx, "query-block", nil, &g.Blocks); err != nil {
		return err
	}
	err := q.Run(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &g.Nodes)
	var refusal *qmp.Error
	if errors.As(err, &refusal) { // before QEMU 5.0
		err = q.Run(ctx, "query-named-block-nodes", nil, &g.Nodes)
	}
	if err != nil {
		return err
	}
	if err := q.Run(ctx, "x-debug-query-block-graph", nil, &g.Edges); err != nil {
		return err
	}
	if len(g.Blocks) > maxDrives {
		return fmt.Errorf("%w: QEMU has %d drives", ErrFacts, len(g.Blocks))
	}
	kinds := make([]string, len(g.Blocks))
	err = each(len(g.Blocks), func(i int) error {
		if !strings.HasPrefix(g.Blocks[i].QDev, "/") {
			return nil
		}
		err := q.Run(ctx, "qom-get", map[string]any{"path": g.Blocks[i].QDev, "property": "type"},
			&kinds[i])
		if errors.As(err, &refusal) {
			err = nil // the device is just being unplugged
		}
		return err
	})
	g.Kinds = map[string]string{}
	for i, b := range g.Blocks {
		g.Kinds[b.QDev] = kinds[i]
	}
	return err
}

// drives returns the drives that devices use. Look looks at a file that QEMU calls by a name.
func (g *graph) drives(look func(name string, whole bool) File) (all []Drive, _ error) {
	t := layers{look: look, nodes: map[string]nodeInfo{}, children: map[string][]childNode{}}
	for _, n := range g.Nodes {
		t.nodes[n.Name] = n
	}
	names := map[uint64]string{}
	for _, n := range g.Edges.Nodes {
		if n.Type == "block-driver" {
			names[n.ID] = n.Name
		}
	}
	for _, e := range g.Edges.Edges {
		parent, child := names[e.Parent], names[e.Child]
		if parent != "" && child != "" {
			t.children[parent] = append(t.children[parent], childNode{e.Name, child})
		}
	}
	for _, b := range g.Blocks {
		if b.QDev == "" {
			continue // no device of the guest has it
		}
		d := Drive{Name: b.name(), Device: b.QDev,
			Carried: strings.HasPrefix(g.Kinds[b.QDev], "cfi.pflash")}
		if in := b.Inserted; in != nil {
			d.ReadOnly = in.ReadOnly
			root, err := t.node("", in.Node, 1)
			if err != nil {
				return nil, fmt.Errorf("disk %q: %w", d.Name, err)
			}
			d.Root = &root
		}
		all = append(all, d)
	}
	return all, nil
}

// name is what a drive is called: as it was named, or its device.
func (b blockInfo) name() string {
	if b.Device != "" {
		return b.Device
	}
	if rest, ok := strings.CutPrefix(b.QDev, "/machine/peripheral/"); ok {
		id, _, _ := strings.Cut(rest, "/")
		return id
	}
	return b.QDev
}

type childNode struct{ role, name string }

// layers makes Nodes of what QEMU says.
type layers struct {
	look     func(name string, whole bool) File
	nodes    map[string]nodeInfo
	children map[string][]childNode
	made     int
}

// filters are drivers that hand on all data as they get it.
var filters = []string{"throttle", "copy-on-read", "compress", "preallocate"}

// errChanging is wrapped where the block nodes do not belong together.
var errChanging = errors.New("its block nodes are being changed right now: try again")

func (t *layers) node(role, name string, depth int) (Node, error) {
	if t.made++; t.made > maxNodes || depth > maxLayers {
		return Node{}, fmt.Errorf("%w: more than %d nodes, or %d deep", ErrFacts, maxNodes,
			maxLayers)
	}
	info, ok := t.nodes[name]
	if !ok {
		return Node{}, fmt.Errorf("%w (node %q is gone)", errChanging, name)
	}
	children := t.children[name]
	if slices.Contains(filters, info.Driver) && len(children) == 1 {
		return t.node(role, children[0].name, depth+1)
	}
	n := Node{
		Role: role, Driver: info.Driver, Size: uint64(max(info.Image.Size, 0)),
		ReadOnly: info.ReadOnly,
		Direct:   info.Cache.Direct, NoFlush: info.Cache.NoFlush,
	}
	switch info.Driver {
	case "file", "host_device", "host_cdrom":
		path, ok := filename(info.File)
		f := File{Path: path, Error: "QEMU does not name the file"}
		if ok {
			f = t.look(path, info.ReadOnly)
		}
		n.File, n.Size = &f, 0 // which grows
		return n, nil
	}
	if len(children) == 0 {
		n.Address, n.Own = Address(info.Driver, info.File)
		return n, nil
	}
	n.Options = options(info.File)
	for _, c := range children {
		child, err := t.node(c.role, c.name, depth+1)
		if err != nil {
			return n, err
		}
		n.Children = append(n.Children, child)
	}
	slices.SortStableFunc(n.Children,
		func(a, b Node) int { return strings.Compare(a.Role, b.Role) })
	// The file first, then what is behind it.
	slices.SortStableFunc(n.Children, func(a, b Node) int {
		return rank(a.Role) - rank(b.Role)
	})
	return n, nil
}

func rank(role string) int {
	switch role {
	case "file":
		return 0
	case "backing":
		return 2
	}
	return 1
}

// volatile names the dirty bitmaps that are in QEMU's memory only. Those without a name are its
// own.
func (g *graph) volatile() (all []string) {
	for _, n := range g.Nodes {
		for _, b := range n.Bitmaps {
			if b.Name != "" && !b.Persistent && len(all) < maxNodes {
				all = append(all, fmt.Sprintf("%q of node %q", b.Name, n.Name))
			}
		}
	}
	return all
}

// opened is what a QEMU's process has open.
type opened struct {
	pid     int
	cwd     string // "" if it cannot be told
	network uint64
	fds     []openFile
	sets    map[int]int // descriptor of each set of descriptors
}

type openFile struct {
	fd             int
	device, number uint64
	link           string // its path now, with " (deleted)" behind it if it has none
}

// maxFDs bounds what is looked at.
const maxFDs = 100_000

// openFiles lists the files and block devices that a QEMU has open.
func openFiles(ctx context.Context, q *qmp.Client) (*opened, error) {
	o := &opened{pid: q.PeerPID(), sets: map[int]int{}}
	proc := fmt.Sprintf("/proc/%d", o.pid)
	o.cwd, _ = os.Readlink(proc + "/cwd")
	var st unix.Stat_t
	if unix.Stat(proc+"/ns/net", &st) == nil {
		o.network = st.Ino
	}
	dir, err := os.Open(proc + "/fd")
	if err != nil {
		return nil, fmt.Errorf("look at the files that QEMU has open: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(maxFDs)
	if err != nil {
		return nil, fmt.Errorf("look at the files that QEMU has open: %w", err)
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil || unix.Stat(filepath.Join(dir.Name(), name), &st) != nil {
			continue // closed by now
		}
		if f, ok := fileOf(st); ok {
			f.fd = fd
			f.link, _ = os.Readlink(filepath.Join(dir.Name(), name))
			o.fds = append(o.fds, f)
		}
	}
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			FD int `json:"fd"`
		} `json:"fds"`
	}
	var refusal *qmp.Error
	if err := q.Run(ctx, "query-fdsets", nil, &sets); err != nil && !errors.As(err, &refusal) {
		return nil, err
	}
	for _, s := range sets {
		if len(s.FDs) > 0 {
			o.sets[s.ID] = s.FDs[0].FD
		}
	}
	return o, nil
}

// fileOf names what stat found, if it is a file or a block device.
func fileOf(st unix.Stat_t) (openFile, bool) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return openFile{device: st.Dev, number: st.Ino}, true
	case unix.S_IFBLK:
		return openFile{device: st.Rdev}, true
	}
	return openFile{}, false
}

// look looks at the file that QEMU opened by a name: at that very one, whatever has the name now.
func (o *opened) look(name string, whole bool) File {
	path := name
	if !filepath.IsAbs(path) && o.cwd != "" {
		path = filepath.Join(o.cwd, path)
	}
	fd, err := o.find(name, path)
	if err != nil {
		return File{Path: path, Error: err.Error()}
	}
	return lookAt(path, fmt.Sprintf("/proc/%d/fd/%d", o.pid, fd),
		fmt.Sprintf("/proc/%d/mountinfo", o.pid), whole)
}

// find returns the descriptor of a file.
func (o *opened) find(name, path string) (int, error) {
	if set, ok := strings.CutPrefix(name, "/dev/fdset/"); ok {
		if n, err := strconv.Atoi(set); err == nil {
			if fd, ok := o.sets[n]; ok {
				return fd, nil
			}
		}
	}
	var named []openFile
	if st, err := o.stat(name); err == nil {
		if want, ok := fileOf(st); ok {
			named = slices.DeleteFunc(slices.Clone(o.fds), func(f openFile) bool {
				return f.device != want.device || f.number != want.number
			})
		}
	}
	// Another file may have the name by now, or none.
	for _, f := range o.fds {
		if f.link == path+" (deleted)" || len(named) == 0 && f.link == path {
			named = append(named, f)
		}
	}
	if len(named) == 0 {
		return 0, errors.New("QEMU has no file of this name open")
	}
	for _, f := range named {
		if f.device != named[0].device || f.number != named[0].number {
			return 0, errors.New("QEMU has two files open that have, or had, this name")
		}
	}
	return named[0].fd, nil
}

// stat looks up a name as the QEMU would: from its root, or from its working directory.
func (o *opened) stat(name string) (st unix.Stat_t, err error) {
	from, how := "cwd", unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC}
	if filepath.IsAbs(name) {
		from, how.Resolve = "root", unix.RESOLVE_IN_ROOT
	}
	at, err := unix.Open(fmt.Sprintf("/proc/%d/%s", o.pid, from), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return st, err
	}
	defer unix.Close(at)
	fd, err := unix.Openat2(at, name, &how)
	if errors.Is(err, unix.ENOSYS) { // before Linux 5.6
		fd, err = unix.Open(name, unix.O_PATH|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return st, err
	}
	defer unix.Close(fd)
	return st, unix.Fstat(fd, &st)
}

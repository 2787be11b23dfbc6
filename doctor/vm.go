package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"vacate/fit"
	"vacate/guestmem"
	"vacate/qmp"
)

// VM asks a running QEMU what matters of its VM, by commands that only query, and looks at its
// images and its process. The replies are those of qapi/*.json of QEMU 7.2, 10.0 and 11.1. An error
// means that QEMU does not answer, or not as a QEMU does.
func VM(ctx context.Context, q *qmp.Client) (VMFacts, error) {
	v := VMFacts{QEMU: q.Version().String()}
	status, err := q.QueryStatus(ctx)
	if err != nil {
		return v, err
	}
	v.State = status.Status
	if v.Machine, err = q.QueryMachine(ctx); err != nil {
		return v, err
	}
	m, err := q.QueryMigrate(ctx)
	if err != nil {
		return v, err
	}
	v.Migration = m.Status
	if v.Held, err = fit.Held(ctx, q); err != nil {
		return v, err
	}
	all, err := fit.DevicesOf(ctx, q)
	if err != nil {
		return v, err
	}
	v.Held = append(v.Held, all.Held()...)
	caps, err := q.QueryMigrationCapabilities(ctx)
	if err != nil {
		return v, err
	}
	_, v.Postcopy = caps["postcopy-ram"]
	for _, name := range slices.Sorted(maps.Keys(caps)) {
		if caps[name] {
			v.Settings = append(v.Settings, name)
		}
	}
	reasons, err := fit.Supported(ctx, q)
	if err != nil {
		return v, err
	}
	if v.Held = append(v.Held, reasons...); reasons == nil {
		if v.CPUs, err = fit.CPUsOf(ctx, q); err != nil {
			return v, err
		}
	}
	var memory struct {
		Base uint64 `json:"base-memory"`
	}
	if err := q.Run(ctx, "query-memory-size-summary", nil, &memory); err != nil && !errors.Is(err, qmp.ErrCommandNotFound) {
		return v, err
	}
	v.Main = memory.Base
	for _, at := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		if err := v.devices(ctx, q, at); err != nil {
			return v, err
		}
	}
	text, err := q.HMP(ctx, "info network")
	if err != nil {
		return v, err
	}
	v.Networks = fit.Networks(text)

	dir := "" // QEMU's working directory
	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		v.MemoryErr = err.Error()
	} else {
		defer mem.Close()
		dir, _ = os.Readlink(fmt.Sprintf("/proc/%d/cwd", mem.PID()))
		for _, b := range mem.Blocks() {
			v.Memory = append(v.Memory, MemoryFacts{b.Name, b.Size, b.PageSize})
		}
		v.Used = parseUsed(head(fmt.Sprintf("/proc/%d/status", mem.PID()), 16<<10))
	}
	if v.Disks, err = disks(ctx, q, dir); err != nil {
		return v, err
	}
	clip(&v)
	return v, nil
}

var child = regexp.MustCompile(`^child<(.+)>$`)

// devices adds what was made with -device or device_add.
func (v *VMFacts) devices(ctx context.Context, q *qmp.Client, at string) error {
	var list []struct {
		Name string `json:"name"`
		Type string `json:"type"`
	}
	if err := q.Run(ctx, "qom-list", map[string]any{"path": at}, &list); err != nil {
		return err
	}
	for _, d := range list {
		m := child.FindStringSubmatch(d.Type)
		if m == nil {
			continue
		}
		if strings.HasSuffix(at, "-anon") {
			d.Name = ""
		}
		v.Devices = append(v.Devices, DeviceFacts{d.Name, m[1]})
	}
	return nil
}

// parseUsed sums up what a process holds, from /proc/PID/status.
func parseUsed(b []byte) (used uint64) {
	sizes := parseMeminfo(b)
	return sizes["VmRSS"] + sizes["VmSwap"] + sizes["HugetlbPages"]
}

// blockImage is the part of QEMU's ImageInfo that names files.
type blockImage struct {
	Filename string      `json:"filename"`
	Format   string      `json:"format"`
	Backing  *blockImage `json:"backing-image"`
}

// blockDrive is the part of QEMU's BlockInfo that says where a drive's data is.
type blockDrive struct {
	Device   string `json:"device"`
	QDev     string `json:"qdev"`
	Inserted *struct {
		File     string     `json:"file"`
		Node     string     `json:"node-name"`
		ReadOnly bool       `json:"ro"`
		Driver   string     `json:"drv"`
		Image    blockImage `json:"image"`
		Cache    struct {
			Direct bool `json:"direct"`
		} `json:"cache"`
	} `json:"inserted"`
}

func disks(ctx context.Context, q *qmp.Client, dir string) (all []DiskFacts, _ error) {
	var list []blockDrive
	if err := q.Run(ctx, "query-block", nil, &list); err != nil {
		return nil, err
	}
	for _, d := range list {
		all = append(all, d.images(dir)...)
	}
	return all, nil
}

// images returns what a drive's data is in: its image and those that back it. Names are relative to dir,
// QEMU's working directory.
func (d blockDrive) images(dir string) (all []DiskFacts) {
	in := d.Inserted
	if in == nil {
		return nil // no medium
	}
	name := d.Device
	for _, other := range []string{in.Node, d.QDev} {
		if name == "" && !strings.HasPrefix(other, "#") {
			name = other
		}
	}
	for im, n := &in.Image, 0; im != nil && n < maxChain; im, n = im.Backing, n+1 {
		disk := DiskFacts{Drive: name, Driver: im.Format, ReadOnly: in.ReadOnly || n > 0, Direct: in.Cache.Direct}
		switch path, local := localFile(im.Filename); {
		case !local:
			disk.URL = im.Filename
		case filepath.IsAbs(path) || dir != "":
			if !filepath.IsAbs(path) {
				path = filepath.Join(dir, path)
			}
			disk.File = lookAt(path)
		default:
			disk.File = FileFacts{Path: path, Error: "its directory is unknown: QEMU's process cannot be looked at"}
		}
		if n == 0 && strings.HasPrefix(disk.URL, "null-") {
			return nil // holds nothing
		}
		all = append(all, disk)
	}
	return all
}

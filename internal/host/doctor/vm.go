package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/guestmem"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/room"
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
	if err := q.Run(ctx, "query-memory-size-summary", nil, &memory); err != nil &&
		!errors.Is(err, qmp.ErrCommandNotFound) {
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

	mem, err := guestmem.Attach(ctx, q)
	if err != nil {
		v.MemoryErr = err.Error()
	} else {
		defer mem.Close()
		for _, b := range mem.Blocks() {
			v.Memory = append(v.Memory, MemoryFacts{b.Name, b.Size, b.PageSize})
		}
		v.Used = parseUsed(head(fmt.Sprintf("/proc/%d/status", mem.PID()), 16<<10))
	}
	disks, err := fit.DisksOf(ctx, q)
	if err != nil {
		return v, err
	}
	v.Disks, v.Bitmaps = disksOf(disks), disks.Volatile
	if v.Work, err = fit.WorkOf(ctx, q); err != nil {
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
	sizes := room.Meminfo(b)
	return sizes["VmRSS"] + sizes["VmSwap"] + sizes["HugetlbPages"]
}

// disksOf lists what drives read and write: the files, or what there is in their place.
func disksOf(d fit.Disks) (all []DiskFacts) {
	for _, drive := range d.Drives {
		var walk func(n fit.Node, driver string)
		walk = func(n fit.Node, driver string) {
			for _, c := range n.Children {
				walk(c, n.Driver)
			}
			switch {
			case n.File != nil:
				all = append(all, DiskFacts{
					Drive: drive.Name, Driver: driver, ReadOnly: n.ReadOnly, Direct: n.Direct,
					NoFlush: n.NoFlush, Carried: drive.Carried, File: *n.File,
				})
			case len(n.Children) == 0 && !strings.HasPrefix(n.Driver, "null-"):
				// which hold nothing
				all = append(all,
					DiskFacts{Drive: drive.Name, Driver: driver, ReadOnly: n.ReadOnly,
						URL: n.Address})
			}
		}
		if drive.Root != nil {
			walk(*drive.Root, drive.Root.Driver)
		}
	}
	return all
}

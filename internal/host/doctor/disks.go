package doctor

import (
	"fmt"
	"slices"

	"vacate/internal/qemu/fit"
)

// disks checks that the destination sees the images of the VM. What an eviction would refuse is
// fatal here.
func (r *report) disks(source HostFacts, vm VMFacts, h HostFacts, twin TwinFacts) {
	const check = "disk"
	if twin.Error != "" {
		return
	}
	oneMachine := source.BootID != "" && source.BootID == h.BootID
	if len(vm.Disks) == 0 {
		r.add(OK, h.Name, check, "the VM has none", "")
	}
	for _, d := range vm.Disks {
		name := fmt.Sprintf("%s, %s", d.Drive, or(d.URL, d.File.Path))
		share :=
			fmt.Sprintf("put it where both hosts see it (NFS, Ceph, iSCSI…), and mount that on "+
				"%s as on %s", h.Name, source.Name)
		trust :=
			fmt.Sprintf("; or, if you know that both hosts have the same image, say so with "+
				"`trust_disks = [%q]` in the VM's description on %s", d.Drive, source.Name)
		switch {
		case d.Carried:
			r.add(OK, h.Name, check, name+": a flash, whose content moves with the VM's memory", "")
			continue
		case slices.Contains(vm.Trusted, d.Drive):
			r.add(Note, h.Name, check,
				name+
					": taken for the same on both hosts, as the VM's description says "+
					"(trust_disks)", "")
			continue
		}
		if d.URL != "" {
			if slices.Contains(twin.URLs, d.URL) {
				r.add(Note, h.Name, check,
					name+": QEMU itself connects to it; that it can from there was not tried", "")
			} else {
				r.add(Warning, h.Name, check, name+": the VM's description there does not name it",
					fmt.Sprintf("name it in the VM's description on %s", h.Name))
			}
			continue
		}
		f := d.File
		if f.Error != "" {
			r.add(Fatal, source.Name, check,
				fmt.Sprintf("%s: cannot be looked at (%s); it may be a temporary file "+
					"(snapshot=on), which cannot move", name, f.Error),
				"restart the VM without snapshot=on, or with the image at a path that vacated "+
					"can read; "+share+trust)
			continue
		}
		there, how, why := match(f, twin.Disks, oneMachine)
		switch {
		case there == nil:
			r.add(Fatal, h.Name, check,
				name+
					": the VM's description there names neither that path nor this file by another",
				fmt.Sprintf("name it in the VM's description on %s; or, where it is not shared "+
					"yet, %s", h.Name, share))
			continue
		case there.Error != "":
			r.add(Fatal, h.Name, check, fmt.Sprintf("%s: not visible there: %s", name, there.Error),
				share)
			continue
		case how == fit.Same:
			r.add(OK, h.Name, check, fmt.Sprintf("%s: %s", name, why), "")
		case how == fit.Copies && d.ReadOnly:
			r.add(Note, h.Name, check,
				fmt.Sprintf("%s: %s; their content is equal, and the VM only reads it", name, why),
				"")
			continue
		case how == fit.Unproven:
			r.add(Fatal, h.Name, check,
				fmt.Sprintf("%s: that both hosts see the same cannot be proven: %s", name, why),
				share+trust)
			continue
		default:
			r.add(Fatal, h.Name, check, fmt.Sprintf("%s: not shared: %s", name, why), share+trust)
			continue
		}
		if why := fit.UnsafeCache(f, d.ReadOnly, d.Direct, d.NoFlush, oneMachine); why != "" {
			r.add(Fatal, source.Name, "disk cache", fmt.Sprintf("%s: %s", name, why),
				"restart the VM with `cache=none` (or directsync) for this drive: "+
					"`cache.direct=on` with -blockdev"+trust)
		}
	}
}

// match finds the destination's file for one of the source's: that of the same path; else
// one that is proven to be the same, or an equal copy.
func match(f fit.File, there []fit.File, oneMachine bool) (*fit.File, fit.Sameness, string) {
	if i := slices.IndexFunc(there, func(t fit.File) bool { return t.Path == f.Path }); i >= 0 {
		how, why := fit.SameFile(f, there[i], oneMachine)
		return &there[i], how, why
	}
	for _, want := range []fit.Sameness{fit.Same, fit.Copies} {
		for i := range there {
			if how, why := fit.SameFile(f, there[i], oneMachine); there[i].Error == "" &&
				how == want {
				return &there[i], how, why
			}
		}
	}
	return nil, fit.Different, ""
}

// work checks that the VM's QEMU is in the middle of nothing that an eviction would break or lose.
func (r *report) work(h HostFacts, vm VMFacts) {
	for _, w := range vm.Work {
		r.add(Fatal, h.Name, "work", "the VM has "+w.Text, w.Remedy)
	}
	if len(vm.Work) == 0 {
		r.add(OK, h.Name, "work", "no job, export or dump is unfinished", "")
	}
	for _, b := range vm.Bitmaps {
		r.add(Warning, h.Name, "dirty bitmap",
			b+
				" is in QEMU's memory only, and does not move: the next backup of this disk "+
				"must be a full one",
			"make it persistent: `block-dirty-bitmap-add` with persistent=true on a qcow2 "+
				"image; or plan the full backup")
	}
}

package doctor

import (
	"fmt"
	"slices"
	"strings"
)

// shared are file systems that several hosts mount at once, by their name in mountinfo. On all others
// two hosts have two files.
var shared = []string{"nfs", "nfs4", "ceph", "fuse.ceph", "fuse.ceph-fuse", "glusterfs", "fuse.glusterfs", "gfs2", "ocfs2", "lustre",
	"gpfs", "cifs", "smb3", "9p", "virtiofs", "afs", "orangefs", "beegfs", "fuse.juicefs", "fuse.sshfs", "fuse.moosefs"}

// sameness is what two hosts' looks at a file amount to.
type sameness int

const (
	different sameness = iota // proven
	unproven
	copies // two files, of equal content as far as was looked at
	same   // proven
)

// compareFiles says whether two hosts, one machine or two, see one file, and why.
func compareFiles(a, b FileFacts, oneMachine bool) (sameness, string) {
	alike := a.Size == b.Size && a.Head == b.Head && a.Head != ""
	switch {
	case a.Block != b.Block:
		return different, "one is a file, the other a block device"
	case oneMachine:
		if a.Device == b.Device && a.Inode == b.Inode {
			return same, "one machine, one file"
		}
		if alike {
			return copies, "two files of one machine"
		}
		return different, "two files of one machine"
	case a.Block && a.WWN != "" && b.WWN != "":
		if a.WWN != b.WWN {
			return different, fmt.Sprintf("two devices: %s and %s", a.WWN, b.WWN)
		}
		return same, "one device: " + a.WWN
	case a.Block && a.Size != b.Size:
		return different, fmt.Sprintf("devices of %s and %s", size(a.Size), size(b.Size))
	case a.Block:
		return unproven, "the devices have no names that are the same everywhere"
	}
	for _, f := range []FileFacts{a, b} {
		if !slices.Contains(shared, f.FS) && !strings.HasPrefix(f.FS, "fuse") {
			if alike {
				return copies, fmt.Sprintf("each host has its own file, on %s", or(f.FS, "an unknown file system"))
			}
			return different, fmt.Sprintf("each host has its own file, on %s", or(f.FS, "an unknown file system"))
		}
	}
	switch {
	case a.FS == b.FS && a.Export == b.Export && a.Export != "" && a.Inode == b.Inode:
		return same, fmt.Sprintf("one file of %s (%s)", a.Export, a.FS)
	case a.Inode == b.Inode && alike && a.Locked && b.Locked:
		return same, "equal content and number, and both hosts see it locked by a QEMU"
	}
	return unproven, fmt.Sprintf("it lies on %s (%s) at the source, on %s (%s) there", a.Export, a.FS, b.Export, b.FS)
}

// disks checks that the destination sees the images of the VM.
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
		share := fmt.Sprintf("put it where both hosts see it (NFS, Ceph, iSCSI…), and mount that on %s as on %s", h.Name, source.Name)
		if d.URL != "" {
			if slices.Contains(twin.URLs, d.URL) {
				r.add(Note, h.Name, check, name+": QEMU itself connects to it; that it can from there was not tried", "")
			} else {
				r.add(Warning, h.Name, check, name+": the VM's description there does not name it", fmt.Sprintf("name it in the VM's description on %s", h.Name))
			}
			continue
		}
		f := d.File
		if f.Error != "" {
			r.add(Fatal, source.Name, check, fmt.Sprintf("%s: cannot be looked at (%s); it may be a temporary file (snapshot=on), which cannot move", name, f.Error), "restart the VM without snapshot=on, or with the image at a path that vacated can read; "+share)
			continue
		}
		there, how, why := match(f, twin.Disks, oneMachine)
		switch {
		case there == nil:
			r.add(Fatal, h.Name, check, name+": the VM's description there names neither that path nor this file by another", fmt.Sprintf("name it in the VM's description on %s; or, where it is not shared yet, %s", h.Name, share))
			continue
		case there.Error != "":
			r.add(Fatal, h.Name, check, fmt.Sprintf("%s: not visible there: %s", name, there.Error), share)
			continue
		case how == same:
			r.add(OK, h.Name, check, fmt.Sprintf("%s: %s", name, why), "")
		case how == copies && d.ReadOnly:
			r.add(Note, h.Name, check, fmt.Sprintf("%s: %s; its size and beginning are equal, and the VM only reads it", name, why), "")
			continue
		case how == unproven && d.Driver == "raw" && f.Size != there.Size && f.Size != 0:
			r.add(Fatal, h.Name, check, fmt.Sprintf("%s: another file there, of %s and not %s", name, size(there.Size), size(f.Size)), share)
			continue
		case how == unproven:
			r.add(Warning, h.Name, check, fmt.Sprintf("%s: that both hosts see the same could not be proven: %s", name, why), fmt.Sprintf("make sure by hand: compare `stat %s` here with `stat %s` on %s", f.Path, there.Path, h.Name))
		default:
			r.add(Fatal, h.Name, check, fmt.Sprintf("%s: not shared: %s", name, why), share)
			continue
		}
		if !d.Direct && !d.ReadOnly && !oneMachine {
			r.add(Warning, source.Name, "disk cache", fmt.Sprintf("%s: the host caches it, so the destination may read old data", name), "restart the VM with `cache=none` (or directsync) for this drive: `cache.direct=on` with -blockdev")
		}
	}
}

// match finds the destination's file for one of the source's: that of the same path; else
// one that is proven to be the same, or an equal copy.
func match(f FileFacts, there []FileFacts, oneMachine bool) (*FileFacts, sameness, string) {
	if i := slices.IndexFunc(there, func(t FileFacts) bool { return t.Path == f.Path }); i >= 0 {
		how, why := compareFiles(f, there[i], oneMachine)
		return &there[i], how, why
	}
	for _, want := range []sameness{same, copies} {
		for i := range there {
			if how, why := compareFiles(f, there[i], oneMachine); there[i].Error == "" && how == want {
				return &there[i], how, why
			}
		}
	}
	return nil, different, ""
}

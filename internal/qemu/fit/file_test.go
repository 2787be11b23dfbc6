package fit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// put writes a file, and makes the directories that it is in.
func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestLookAt(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	put(t, path, strings.Repeat("x", 100<<10))
	old := unix.Timespec{Sec: 1000}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{old, old}, 0); err != nil {
		t.Fatal(err)
	}
	f := LookAt(path, false)
	if f.Error != "" || f.Block || f.Size != 100<<10 || f.Inode == 0 || len(f.Head) != 32 ||
		f.FS == "" || f.Export == "" || f.Locked {
		t.Errorf("%+v", f)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Atim != old || st.Mtim != old {
		t.Errorf("its times became %v, %v: %v", st.Atim, st.Mtim, err)
	}
	if how, why := SameFile(f, LookAt(path, false), true); how != Same {
		t.Errorf("one file twice: %v, %s", how, why)
	}

	// Somebody else's lock is seen, and none is left behind.
	h, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 203, Len: 1}
	if err := unix.FcntlFlock(h.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	if !LookAt(path, false).Locked {
		t.Error("a lock was not seen")
	}

	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"fifo", "none", "."} {
		if f := LookAt(filepath.Join(dir, bad), false); f.Error == "" {
			t.Errorf("%+v", f)
		}
	}
}

func TestMount(t *testing.T) {
	table := []byte("22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n" +
		"36 22 0:32 /vms /mnt/vms rw shared:2 master:1 - nfs4 filer:/export rw,vers=4.2\n" +
		"broken\n37 22 0:33 /x\n")
	for _, tt := range []struct {
		id         uint64
		fs, export string
	}{{22, "ext4", "/dev/vda/"}, {36, "nfs4", "filer:/export/vms"}, {37, "", ""}, {1, "", ""}} {
		if fs, export := parseMount(table, tt.id); fs != tt.fs || export != tt.export {
			t.Errorf("%d: %q, %q", tt.id, fs, export)
		}
	}
}

func TestWorldWideName(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "nvme/wwid"), "eui.1\n")
	put(t, filepath.Join(dir, "sda/device/wwid"), "naa.2\n")
	put(t, filepath.Join(dir, "sda/sda3/partition"), "3\n")
	put(t, filepath.Join(dir, "dm-0/dm/uuid"), "LVM-3\n")
	put(t, filepath.Join(dir, "rbd0/device/cluster_fsid"), "c4\n")
	put(t, filepath.Join(dir, "rbd0/device/pool"), "p\n")
	put(t, filepath.Join(dir, "rbd0/device/name"), "im\n")
	put(t, filepath.Join(dir, "rbd0/device/current_snap"), "-\n")
	put(t, filepath.Join(dir, "loop0/size"), "8\n")
	put(t, filepath.Join(dir, "loop0/loop0p1/partition"), "1\n")
	if err := os.Symlink(filepath.Join(dir, "sda/sda3"), filepath.Join(dir, "8:3")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"nvme": "eui.1", "sda": "naa.2", "8:3": "naa.2 part 3", "dm-0": "LVM-3",
		"rbd0": "rbd c4 p/im@-", "loop0": "", "loop0/loop0p1": "", "none": "",
	} {
		if got := worldWideName(filepath.Join(dir, name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// on is a file of a file system of the network.
func on(fs, export string, inode uint64) File {
	return File{Path: "/vms/web1.raw", Size: 8 << 30, FS: fs, Export: export, Device: 40,
		Inode: inode, Head: "0123"}
}

// What proves that two files are one on two machines does, and nothing else.
func TestSameFile(t *testing.T) {
	device := func(wwn string, size uint64) File {
		return File{Path: "/dev/sdb", Block: true, Size: size, WWN: wwn}
	}
	local := func(digest string) File {
		return File{Path: "/x", Size: 5, FS: "ext4", Export: "/dev/vda1/", Inode: 7, Head: digest,
			Digest: digest}
	}
	with := func(f File, change func(*File)) File {
		change(&f)
		return f
	}
	lockedFile := with(on("nfs4", "filer:/vms/", 77), func(f *File) { f.Locked = true })
	for name, c := range map[string]struct {
		a, b File
		want Sameness
		says string
	}{
		"one file of a server": {on("nfs4", "filer:/vms/", 77), on("nfs4", "filer:/vms/", 77),
			Same, "one file of filer:/vms/"},
		"grown meanwhile": {on("nfs4", "filer:/vms/", 77),
			with(on("nfs4", "filer:/vms/", 77), func(f *File) { f.Size++ }), Same, "one file"},
		"two files of a server": {on("nfs4", "filer:/vms/", 77), on("nfs4", "filer:/vms/", 78),
			Different, "two files of filer:/vms/"},
		"two exports": {on("nfs4", "filer:/vms/", 77), on("nfs4", "filer2:/vms/", 77),
			Unproven, "filer2:/vms/ (nfs4) there"},
		"one server, two names": {lockedFile,
			with(lockedFile, func(f *File) { f.Export = "10.0.0.9:/vms/" }), Same, "locked"},
		"each host its own server": {on("nfs4", "localhost:/vms/", 77),
			on("nfs4", "localhost:/vms/", 77), Unproven, "localhost"},
		"a cluster's file": {with(on("gfs2", "/dev/sdb/", 9),
			func(f *File) { f.FSID = "12" }),
			with(on("gfs2", "/dev/sdc/", 9), func(f *File) { f.FSID = "12" }), Same, "gfs2"},
		"two clusters' devices": {with(on("gfs2", "/dev/sdb/", 9),
			func(f *File) { f.FSID = "12" }),
			with(on("gfs2", "/dev/sdb/", 9), func(f *File) { f.FSID = "13" }), Unproven, "gfs2"},
		"numbers of a client": {on("fuse.sshfs", "filer:/vms/", 2),
			on("fuse.sshfs", "filer:/vms/", 2), Unproven, "fuse.sshfs"},
		"tags of two machines": {on("virtiofs", "shared/", 2), on("virtiofs", "shared/", 2),
			Unproven, "virtiofs"},
		"each host its own file": {local("a"), local("b"), Different, "its own file, on ext4"},
		"a copy":                 {local("a"), local("a"), Copies, "its own file, on ext4"},
		"not looked at":          {local("a"), File{Error: "ENOENT"}, Unproven, "ENOENT"},
		"one device":             {device("naa.1", 8<<30), device("naa.1", 8<<30), Same, "naa.1"},
		"two devices": {device("naa.1", 8<<30), device("naa.2", 8<<30), Different,
			"naa.2"},
		"devices of equal serial numbers": {device("t10.QEMU QEMU HARDDISK drive-scsi0", 8<<30),
			device("t10.QEMU QEMU HARDDISK drive-scsi0", 8<<30), Unproven, "other devices may be"},
		"parts of such": {device("nvme.1b36-31-51454d55 part 1", 8<<30),
			device("nvme.1b36-31-51454d55 part 1", 8<<30), Unproven, "other devices may be"},
		"two of them": {device("t10.IET 00010001", 8<<30), device("t10.IET 00010002", 8<<30),
			Different, "two devices"},
		"paths to one device": {device("mpath-3600a0980", 8<<30), device("mpath-3600a0980", 8<<30),
			Same, "one device"},
		"paths to devices of equal serial numbers": {device("part1-mpath-1IET_00010001", 8<<30),
			device("part1-mpath-1IET_00010001", 8<<30), Unproven, "other devices may be"},
		"devices without a name": {device("", 8<<30), device("", 8<<30), Unproven, "no names"},
		"devices of unlike size": {device("", 8<<30), device("", 4<<30), Different,
			"8 GiB and 4 GiB"},
		"a file and a device": {local("a"), device("", 5), Different, "block device"},
		"nothing known":       {File{}, File{}, Different, "an unknown file system"},
	} {
		how, why := SameFile(c.a, c.b, false)
		if how != c.want || !strings.Contains(why, c.says) {
			t.Errorf("%s: %v, %s", name, how, why)
		}
		if back, _ := SameFile(c.b, c.a, false); back != how {
			t.Errorf("%s: %v one way, %v the other", name, how, back)
		}
	}
	a := local("a")
	if how, _ := SameFile(a, a, true); how != Same {
		t.Errorf("one file of one machine: %v", how)
	}
	if how, _ := SameFile(a, with(a, func(f *File) { f.Inode++ }), true); how != Copies {
		t.Errorf("a copy on one machine: %v", how)
	}
	if how, _ := SameFile(a, with(a, func(f *File) { f.Inode, f.Digest = 9, "c" }),
		true); how != Different {
		t.Errorf("two files of one machine: %v", how)
	}
}

// Only a small file is summed up whole, and only when asked to.
func TestDigest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	put(t, path, "text")
	if a, b := LookAt(path, false), LookAt(path, true); a.Digest != "" || b.Digest == "" {
		t.Errorf("%q, %q", a.Digest, b.Digest)
	}
	if err := os.Truncate(path, mostWhole+1); err != nil {
		t.Fatal(err)
	}
	if f := LookAt(path, true); f.Digest != "" || f.Error != "" {
		t.Errorf("%+v", f)
	}
}

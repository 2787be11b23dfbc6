package fit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"vacate/internal/sys/units"

	"golang.org/x/sys/unix"
)

// File is what can be told of a file or block device without changing it, for two hosts to compare.
// See [SameFile] for what proves that two are one.
type File struct {
	Path   string `json:"path"`
	Error  string `json:"error,omitempty"` // why it cannot be looked at
	Block  bool   `json:"block,omitempty"` // a block device, else a regular file
	Size   uint64 `json:"size"`
	FS     string `json:"fs"`     // type of the file system it lies on, as in /proc/self/mountinfo
	Export string `json:"export"` // what is mounted, and the mount's root in it: "filer:/vms/"
	// FSID is what statfs(2) calls the file system; "" where it calls it nothing.
	FSID string `json:"fsid,omitempty"`
	// number: of the device itself, or of the one that the file lies on
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	WWN    string `json:"wwn,omitempty"`  // of a block device, the same on all hosts
	Head   string `json:"head,omitempty"` // hash of the first 64 KiB; "" if unreadable
	// Digest is a hash of all its bytes; "" unless it was asked for, and the file is small.
	Digest string `json:"digest,omitempty"`
	Locked bool   `json:"locked,omitempty"` // a QEMU holds its locks on it, as this host sees it
}

const (
	headSize  = 64 << 10 // bytes that go into File.Head
	mostWhole = 64 << 20 // bytes of a file, for a File.Digest
	mostMount = 4 << 20  // bytes of a mountinfo
)

// LookAt gathers the facts of a regular file or a block device. Whole asks for a Digest. It reads
// with O_NOATIME where it may, and neither locks nor writes.
func LookAt(path string, whole bool) File {
	return lookAt(path, path, "/proc/self/mountinfo", whole)
}

// lookAt looks at what is called path by way of another path, in the mount namespace of a table.
func lookAt(path, way, mounts string, whole bool) File {
	f := File{Path: path}
	if err := f.look(way, mounts, whole); err != nil {
		f.Error = err.Error()
	}
	return f
}

func (f *File) look(way, mounts string, whole bool) error {
	// A path only, first: to open a fifo or a tape is to use it.
	fd, err := unix.Open(way, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: f.Path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st)
	if err != nil {
		return &os.PathError{Op: "statx", Path: f.Path, Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if st.Nlink == 0 {
			return errors.New("it was deleted, as the temporary file of snapshot=on is")
		}
		f.Size, f.Inode = st.Size, st.Ino
		f.Device = unix.Mkdev(st.Dev_major, st.Dev_minor)
	case unix.S_IFBLK:
		f.Block = true
		f.Device = unix.Mkdev(st.Rdev_major, st.Rdev_minor)
		f.WWN = worldWideName(fmt.Sprintf("/sys/dev/block/%d:%d", st.Rdev_major, st.Rdev_minor))
	default:
		return errors.New("neither a file nor a block device")
	}
	if st.Mask&unix.STATX_MNT_ID != 0 {
		f.FS, f.Export = parseMount(beginning(mounts, mostMount), st.Mnt_id)
	}
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Fsid.Val != [2]int32{} {
		f.FSID = fmt.Sprintf("%08x%08x", uint32(fs.Fsid.Val[0]), uint32(fs.Fsid.Val[1]))
	}
	// What was looked at is what is opened.
	r, err := openQuietly(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return &os.PathError{Op: "open", Path: f.Path, Err: errors.Unwrap(err)}
	}
	defer r.Close()
	if f.Block {
		if n, err := r.Seek(0, io.SeekEnd); err == nil {
			f.Size = uint64(n)
		}
	}
	f.Head, _ = hash(r, headSize)
	if whole && f.Size <= mostWhole {
		if digest, n := hash(r, mostWhole+1); n == int64(f.Size) {
			f.Digest = digest
		}
	}
	f.Locked = locked(r)
	return nil
}

// hash sums up the first bytes of a file, and returns how many they were. The sum of a file that
// cannot be read is "".
func hash(r io.ReaderAt, most int64) (string, int64) {
	sum := sha256.New()
	n, err := io.Copy(sum, io.NewSectionReader(r, 0, most))
	if err != nil {
		return "", 0
	}
	return hex.EncodeToString(sum.Sum(nil)[:16]), n
}

// openQuietly opens a file for reading, without leaving a time of access where that is allowed.
func openQuietly(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	return f, err
}

// locked reports whether somebody holds locks where QEMU puts its own: bytes 100 to 163 and 200 to
// 263 (RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE in block/file-posix.c). It only asks. Over a
// network file system that carries locks, the destination sees those of the source.
func locked(f *os.File) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: 100, Len: 164}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// worldWideName names a block device by what is the same on every host: what SCSI and NVMe report,
// a device mapper's UUID, or the image of a Ceph cluster. A partition has its number, too.
func worldWideName(sys string) string {
	dir, err := filepath.EvalSymlinks(sys)
	if err != nil {
		return ""
	}
	if n := word(filepath.Join(dir, "partition")); n != "" {
		if whole := deviceName(filepath.Dir(dir)); whole != "" {
			return whole + " part " + n
		}
		return ""
	}
	return deviceName(dir)
}

func deviceName(dir string) string {
	for _, file := range []string{"wwid", "device/wwid", "dm/uuid"} {
		if w := word(filepath.Join(dir, file)); w != "" {
			return w
		}
	}
	rbd := func(name string) string { return word(filepath.Join(dir, "device", name)) }
	if cluster := rbd("cluster_fsid"); cluster != "" {
		return "rbd " + cluster + " " + rbd("pool") + "/" + rbd("name") + "@" + rbd("current_snap")
	}
	return ""
}

// worldWide reports whether no other device has a name. Names by vendor, model and serial number
// are not of that kind: two virtual machines, say, each have a disk of their own that is called
// "t10.QEMU QEMU HARDDISK drive-scsi0", and "t10.IET 00010001" is the first disk of many a server.
func worldWide(wwn string) bool {
	if part, rest, ok := strings.Cut(wwn, "-"); ok && strings.HasPrefix(part, "part") {
		wwn = rest // a partition of device mapper's
	}
	if by, ok := strings.CutPrefix(wwn, "mpath-"); ok {
		// EUI-64, NAA, or a name of SCSI's own kind: see scsi_id(8)
		return by != "" && strings.Contains("238", by[:1])
	}
	return !strings.HasPrefix(wwn, "t10.") && !strings.HasPrefix(wwn, "nvme.")
}

// parseMount finds a mount in a mountinfo by its number: the type of its file system, and its
// source with its root in that. See proc_pid_mountinfo(5).
func parseMount(b []byte, id uint64) (fs, export string) {
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		a, z := strings.Fields(before), strings.Fields(after)
		if !ok || len(a) < 6 || len(z) < 2 || a[0] != strconv.FormatUint(id, 10) {
			continue
		}
		return z[0], z[1] + a[3]
	}
	return "", ""
}

// beginning reads the first bytes of a file; none of one that cannot be read.
func beginning(path string, most int64) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, most))
	return b
}

// word reads a short file without the spaces around.
func word(path string) string { return strings.TrimSpace(string(beginning(path, 4096))) }

// numbered are file systems that several hosts mount at once, whose servers number the files: a
// number means the same file on every host.
var numbered = []string{"nfs", "nfs4", "ceph", "fuse.ceph", "fuse.ceph-fuse", "glusterfs",
	"fuse.glusterfs", "gfs2", "ocfs2", "lustre",
	"gpfs", "afs", "orangefs", "beegfs", "fuse.juicefs", "fuse.moosefs"}

// coherent are those on which no host ever sees what another host has overwritten.
var coherent = []string{"ceph", "fuse.ceph", "fuse.ceph-fuse", "gfs2", "ocfs2", "lustre", "gpfs"}

// unsure are file systems whose files several hosts may share, and whose numbers prove nothing:
// hosts make them up, or have equal ones for files of other servers.
func unsure(fs string) bool {
	return slices.Contains([]string{"cifs", "smb3", "9p", "virtiofs"}, fs) ||
		strings.HasPrefix(fs, "fuse")
}

// OfOneHost reports whether a file lies on a file system that only one host mounts at a time.
func (f File) OfOneHost() bool {
	return !f.Block && !slices.Contains(numbered, f.FS) && !unsure(f.FS)
}

// Sameness is what two hosts' looks at a file amount to.
type Sameness int

// The results of SameFile.
const (
	Different Sameness = iota // proven
	Unproven
	Copies // proven: two files, of equal content
	Same   // proven
)

// SameFile says whether two hosts see one file, and why. OneKernel means that both are one machine.
// That two files are one is proven by: an equal world-wide name of block devices; equal export, or
// file system's ID, and number on a file system of the network; or equal device and number on one
// machine. Equal content proves nothing, as copies have that too.
func SameFile(a, b File, oneKernel bool) (Sameness, string) {
	separate := func(why string) (Sameness, string) {
		if a.Digest != "" && a.Digest == b.Digest && a.Size == b.Size {
			return Copies, why
		}
		return Different, why
	}
	switch {
	case a.Error != "" || b.Error != "":
		return Unproven, "it cannot be looked at: " + either(a.Error, b.Error)
	case a.Block != b.Block:
		return Different, "one is a file, the other a block device"
	case oneKernel && a.Device == b.Device && a.Inode == b.Inode:
		return Same, "one machine, one file"
	case oneKernel:
		return separate("two files of one machine")
	case a.Block && a.WWN != "" && b.WWN != "":
		if a.WWN != b.WWN {
			return Different, fmt.Sprintf("two devices: %s and %s", a.WWN, b.WWN)
		}
		if !worldWide(a.WWN) {
			return Unproven, fmt.Sprintf("both are called %s, and other devices may be, too", a.WWN)
		}
		return Same, "one device: " + a.WWN
	case a.Block && a.Size != b.Size:
		return Different, fmt.Sprintf("devices of %s and %s", units.Exact(a.Size),
			units.Exact(b.Size))
	case a.Block:
		return Unproven, "the devices have no names that are the same everywhere"
	}
	for _, f := range []File{a, b} {
		if f.OfOneHost() {
			return separate(fmt.Sprintf("each host has its own file, on %s",
				either(f.FS, "an unknown file system")))
		}
	}
	alike := a.Size == b.Size && a.Head == b.Head && a.Head != ""
	oneServer := a.FS == b.FS && slices.Contains(numbered, a.FS) &&
		(a.Export == b.Export && elsewhere(a.Export) || a.FSID == b.FSID && a.FSID != "")
	switch {
	case oneServer && a.Inode == b.Inode:
		return Same, fmt.Sprintf("one file of %s (%s)", a.Export, a.FS)
	case oneServer && a.Export == b.Export:
		return separate(fmt.Sprintf("two files of %s (%s)", a.Export, a.FS))
	case a.Inode == b.Inode && alike && a.Locked && b.Locked:
		return Same, "equal content and number, and both hosts see it locked by a QEMU"
	}
	return Unproven, fmt.Sprintf("it lies on %s (%s) at the source, on %s (%s) there", a.Export,
		a.FS, b.Export, b.FS)
}

// elsewhere reports whether an export names a server that is not the host itself: "filer:/vms"
// does, while "/dev/sdb" and "localhost:/vms" are something else on each host.
func elsewhere(export string) bool {
	host, _, ok := strings.Cut(export, ":/")
	if !ok {
		host, _, ok = strings.Cut(export, "=/") // "user@cluster.name=/" of Ceph
	}
	return ok && !ownHost(host)
}

// ownHost reports whether a host's name, or address, means the host itself.
func ownHost(host string) bool {
	host = strings.ToLower(strings.Trim(host, "[]"))
	return host == "" || host == "localhost" || strings.HasPrefix(host, "localhost.") ||
		host == "::1" || host == "ip6-localhost" ||
		strings.HasPrefix(host, "127.") || host == "0.0.0.0" || host == "::"
}

func either(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

package doctor

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// headSize is how much of a file goes into FileFacts.Head.
const headSize = 64 << 10

// lookAt gathers the facts of a regular file or a block device. It reads with O_NOATIME where it may, and
// neither locks nor writes.
func lookAt(path string) FileFacts {
	f := FileFacts{Path: path}
	if err := f.look(); err != nil {
		f.Error = err.Error()
	}
	return f
}

func (f *FileFacts) look() error {
	// A path only, first: to open a fifo or a tape is to use it.
	fd, err := unix.Open(f.Path, unix.O_PATH|unix.O_CLOEXEC, 0)
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
		f.FS, f.Export = parseMount(head("/proc/self/mountinfo", 4<<20), st.Mnt_id)
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
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(r, 0, headSize)); err == nil {
		f.Head = hex.EncodeToString(hash.Sum(nil)[:16])
	}
	f.Locked = locked(r)
	return nil
}

// openQuietly opens a file for reading, without leaving a time of access where that is allowed.
func openQuietly(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	return f, err
}

// locked tells whether somebody holds locks where QEMU puts its own: bytes 100 to 163 and 200 to
// 263 (RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE in block/file-posix.c). It only asks. Over a
// network file system that carries locks, the destination sees those of the source.
func locked(f *os.File) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: 100, Len: 164}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// worldWideName names a block device by what is the same on every host: what SCSI and NVMe
// report, a device mapper's UUID, or the image of a Ceph cluster; a partition with its number.
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

// parseMount finds a mount in /proc/self/mountinfo by its number: the type of its file system, and
// its source with its root in that. See proc_pid_mountinfo(5).
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

// maxChain is how many images may back one another.
const maxChain = 32

// backedBy returns the name in a qcow2 image's header of what it is backed by, or "". See
// docs/interop/qcow2.txt of QEMU: magic, u32 version, u64 offset and u32 length of the name.
func backedBy(path string) string {
	f, err := openQuietly(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() && st.Mode()&os.ModeDevice == 0 {
		return ""
	}
	var h [20]byte
	if _, err := f.ReadAt(h[:], 0); err != nil || string(h[:4]) != "QFI\xfb" {
		return ""
	}
	at, n := binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:])
	if at == 0 || at > 1<<30 || n == 0 || n > 1023 {
		return ""
	}
	name := make([]byte, n)
	if _, err := f.ReadAt(name, int64(at)); err != nil {
		return ""
	}
	return string(name)
}

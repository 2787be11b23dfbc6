package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"vacate/internal/qemu/fit"

	"golang.org/x/sys/unix"
)

// TwinOptions is a VM's description, as the destination has it.
type TwinOptions struct {
	Name    string
	Error   string   // why there is none, or why it cannot be used
	Args    []string // QEMU's program, an absolute path, and its arguments, placeholders filled in
	Dir     string   // its working directory; "" is the root
	User    string   // that it will run as, a name or number; "" is the daemon's
	Running bool     // a QEMU of that name runs here already
}

// Twin gathers what this host has for a VM that may come. It looks at no file but those that the
// description names, and those that back them.
func Twin(ctx context.Context, o TwinOptions) TwinFacts {
	t := TwinFacts{Name: o.Name, Error: o.Error, Running: o.Running, User: o.User}
	if t.Error == "" && len(o.Args) == 0 {
		t.Error = "the description names no program"
	}
	if t.Error != "" {
		clip(&t)
		return t
	}
	var asking sync.WaitGroup
	asking.Go(func() { t.QEMU = askQEMU(ctx, o.Args[0]) })
	asking.Go(func() {
		var err error
		if t.CPUs, err = askCPUs(ctx, o.Args[0], o.Args[1:]); err != nil {
			t.CPUs, t.CPUError = fit.CPUs{}, err.Error()
		}
	})
	asking.Wait()
	t.Backends = memoryFiles(o.Args[1:], cmp.Or(o.Dir, "/"))
	t.Main = memoryOf(o.Args[1:])
	t.Userfaultfd = told(mayUserfault(o.User, t.QEMU.Version))
	for _, im := range images(o.Args[1:]) {
		t.add(im, cmp.Or(o.Dir, "/"))
	}
	clip(&t)
	return t
}

// add looks at an image and those that back it.
func (t *TwinFacts) add(im image, dir string) {
	for range maxChain {
		path, ok := localFile(im.name)
		if !ok {
			if name, _ := fit.Address(im.driver, im.name); !slices.Contains(t.URLs, name) {
				t.URLs = append(t.URLs, name)
			}
			return
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if slices.ContainsFunc(t.Disks, func(f fit.File) bool { return f.Path == path }) ||
			len(t.Disks) >= maxList {
			return
		}
		t.Disks = append(t.Disks, fit.LookAt(path, true))
		if im.driver != "qcow2" {
			return // a guest can write what looks like a header into a raw image
		}
		back := backedBy(path)
		if back == "" {
			return
		}
		// What backs it may be raw and once have been a guest's: only a name that says so goes on.
		im = image{name: back}
		if strings.HasSuffix(back, ".qcow2") {
			im.driver = "qcow2"
		}
		dir = filepath.Dir(path)
	}
}

// memoryFiles returns the memory back ends of QEMU's arguments that are files. A userfaultfd
// catches no page of a file, but for those of tmpfs and hugetlbfs.
func memoryFiles(args []string, dir string) (all []BackendFacts) {
	for i := 0; i+1 < len(args) && len(all) < maxList; i++ {
		b := BackendFacts{ID: "the main memory"}
		switch strings.TrimPrefix(args[i], "-") {
		case "-object", "object":
			o, err := parseOptions(args[i+1])
			_, first := o["memory-backend-file"]
			if err != nil || !first && o["qom-type"] != "memory-backend-file" {
				continue
			}
			b.ID, b.Path = o["id"], o["mem-path"]
		case "-mem-path", "mem-path":
			b.Path = args[i+1]
		default:
			continue
		}
		if !filepath.IsAbs(b.Path) {
			b.Path = filepath.Join(dir, b.Path)
		}
		var fs unix.Statfs_t
		// A file that QEMU is yet to make will be on its directory's.
		if unix.Statfs(b.Path, &fs) == nil || unix.Statfs(filepath.Dir(b.Path), &fs) == nil {
			b.FS = fmt.Sprintf("type %#x", uint32(fs.Type)) // #nosec G115 -- a magic number of 32 bits
			switch fs.Type {
			case unix.TMPFS_MAGIC:
				b.FS = "tmpfs"
			case unix.HUGETLBFS_MAGIC:
				b.FS = "hugetlbfs"
			}
		}
		all = append(all, b)
	}
	return all
}

// MayUserfault says why a user's QEMU of some version may not have a userfaultfd, and what to do.
func MayUserfault(user, version string) (problem, remedy string) {
	err := mayUserfault(user, version)
	if err == nil {
		return "", ""
	}
	return fmt.Sprintf("the twin may not use userfaultfd as user %s: %v", user, err),
		userfaultRemedy(user)
}

// userfaultRemedy lets a user's QEMU have a userfaultfd.
func userfaultRemedy(user string) string {
	return fmt.Sprintf("`sysctl -w vm.unprivileged_userfaultfd=1`; from QEMU 8.0 on, `setfacl "+
		"-m u:%s:rw /dev/userfaultfd` does as well", user)
}

// mayUserfault says why a user's QEMU of some version may not have a userfaultfd.
func mayUserfault(name, version string) error {
	if name == "" || name == "root" || name == "0" {
		return nil // what the daemon may, HostFacts say
	}
	if word("/proc/sys/vm/unprivileged_userfaultfd") == "1" {
		return nil
	}
	const dev = "/dev/userfaultfd"
	var major int
	fmt.Sscan(version, &major)
	if major < 8 {
		return fmt.Errorf("vm.unprivileged_userfaultfd is 0, and QEMU uses %s only from 8.0 on",
			dev)
	}
	ok, err := mayUse(name, dev)
	if err == nil && !ok {
		err = fmt.Errorf("vm.unprivileged_userfaultfd is 0, and user %s may not open %s", name, dev)
	}
	return err
}

// mayUse tells, by its mode, whether a user may read and write a file. Access lists are not looked
// at.
func mayUse(name, path string) (bool, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return false, err
		}
	}
	groups, err := u.GroupIds()
	if err != nil {
		return false, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	id := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	switch {
	case id(st.Uid) == u.Uid:
		return st.Mode&0o600 == 0o600, nil
	case id(st.Gid) == u.Gid || slices.Contains(groups, id(st.Gid)):
		return st.Mode&0o060 == 0o060, nil
	}
	return st.Mode&0o006 == 0o006, nil
}

// image is one that QEMU's arguments name.
type image struct{ name, driver string }

// Options whose value is a file name, and what that file is.
var fileOptions = []string{"hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "pflash", "sd",
	"mtdblock"}

// images returns the images that QEMU's arguments name: as -drive file=…, -blockdev with a file
// name at any depth, or -hda and its kin. See "Block device options" of qemu(1). An image counts as
// qcow2 only where the arguments say so.
func images(args []string) []image {
	var all []image
	nodes := map[string]int{}   // index of the image of each node
	over := map[string]string{} // formats of nodes, by the node beneath
	for i := 0; i+1 < len(args); i++ {
		option := strings.TrimPrefix(strings.TrimPrefix(args[i], "-"), "-")
		if option == args[i] {
			continue
		}
		value := args[i+1]
		switch {
		case slices.Contains(fileOptions, option):
			all = append(all, image{name: value})
		case option == "drive" || option == "blockdev":
			o, err := parseOptions(value)
			if err != nil {
				continue // QEMU refuses it, too
			}
			for _, key := range slices.Sorted(maps.Keys(o)) {
				last := key[strings.LastIndexByte(key, '.')+1:]
				if last != "filename" && (key != "file" || option == "blockdev") || o[key] == "" {
					continue
				}
				all = append(all, image{o[key], cmp.Or(o["format"], o["driver"])})
				if n := o["node-name"]; n != "" {
					nodes[n] = len(all) - 1
				}
			}
			if option == "blockdev" && o["file"] != "" {
				over[o["file"]] = o["driver"]
			}
		}
	}
	for node, format := range over {
		if i, ok := nodes[node]; ok {
			all[i].driver = format
		}
	}
	return all
}

// parseOptions reads "key=value,key=value", where ",," is a comma, or a JSON object, whose members
// within members get keys with dots.
func parseOptions(s string) (map[string]string, error) {
	o := map[string]string{}
	if strings.HasPrefix(s, "{") {
		var v map[string]any
		if err := json.Unmarshal([]byte(s), &v); err != nil {
			return nil, err
		}
		flatten(o, "", v)
		return o, nil
	}
	const comma = "\x00"
	if strings.Contains(s, comma) {
		return nil, errors.New("a zero byte")
	}
	for part := range strings.SplitSeq(strings.ReplaceAll(s, ",,", comma), ",") {
		k, v, _ := strings.Cut(strings.ReplaceAll(part, comma, ","), "=")
		o[k] = v
	}
	return o, nil
}

func flatten(o map[string]string, prefix string, v map[string]any) {
	for k, x := range v {
		switch x := x.(type) {
		case string:
			o[prefix+k] = x
		case map[string]any:
			flatten(o, prefix+k+".", x)
		}
	}
}

// localFile returns the file that QEMU's name of an image means, and false for what QEMU reaches
// otherwise.
func localFile(name string) (string, bool) {
	if s, ok := strings.CutPrefix(name, "json:"); ok {
		return jsonFile(s)
	}
	for _, p := range []string{"file:", "host_device:", "host_cdrom:"} {
		if s, ok := strings.CutPrefix(name, p); ok {
			return s, true
		}
	}
	// As path_has_protocol in QEMU's block.c: a colon before any slash.
	colon, slash := strings.IndexByte(name, ':'), strings.IndexByte(name, '/')
	return name, name != "" && (colon < 0 || slash >= 0 && slash < colon)
}

// jsonFile follows the description of an image down to its file.
func jsonFile(s string) (string, bool) {
	var v map[string]any
	if json.Unmarshal([]byte(s), &v) != nil {
		return "", false
	}
	for range maxChain {
		if name, ok := v["filename"].(string); ok {
			driver, _ := v["driver"].(string)
			return name, slices.Contains([]string{"file", "host_device", "host_cdrom"}, driver)
		}
		next, ok := v["file"].(map[string]any)
		if !ok {
			if next, ok = v["image"].(map[string]any); !ok { // of blkdebug
				return "", false
			}
		}
		v = next
	}
	return "", false
}

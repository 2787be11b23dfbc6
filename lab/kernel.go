package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// Kernel is one of Debian's kernels for amd64, of the cloud flavour. The zero
// value is that of this machine's own release.
type Kernel struct {
	Name  string // what the lab calls it, such as "6.12"
	Suite string // where Debian has it, such as "trixie-backports"
}

// Kernels are those that the lab is tried with, the oldest first: the stable
// releases' by their series, and the newest there are.
var Kernels = []Kernel{
	{"5.10", "bullseye"},
	{"6.1", "bookworm"},
	{"6.12", "trixie"},
	{"sid", "sid"},
	{"backports", "trixie-backports"},
}

// FindKernel returns the kernel of a name; none is this machine's own.
func FindKernel(name string) (Kernel, error) {
	if name == "" {
		return Kernel{}, nil
	}
	var names []string
	for _, k := range Kernels {
		if k.Name == name {
			return k, nil
		}
		names = append(names, k.Name)
	}
	return Kernel{}, fmt.Errorf("no kernel %q: there are %s", name, strings.Join(names, ", "))
}

// FindKernels returns the kernels of several names, with commas between; "all" is all of them.
func FindKernels(names string) ([]Kernel, error) {
	if names == "all" {
		return Kernels, nil
	}
	var found []Kernel
	for name := range strings.SplitSeq(names, ",") {
		k, err := FindKernel(name)
		if err != nil {
			return nil, err
		}
		found = append(found, k)
	}
	return found, nil
}

// modules are the drivers a guest may need, the needed before those that need
// them. One that the kernel package does not have is built in: in 5.10 and 6.1
// none is; from 6.12 on virtio itself, its PCI transport and the console
// (serial ports) are, so that disk, network and balloon only are modules.
var modules = []string{
	"virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"virtio_blk", "failover", "net_failover", "virtio_net", "virtio_console", "virtio_balloon",
}

// diskModules are those for the disk of a server.
var diskModules = []string{"crc32c_generic", "crc16", "mbcache", "jbd2", "ext4"}

// FetchKernel returns the directory of a cache, dir, that has the kernel's vmlinuz, release,
// modules/NN-NAME.ko and disk-modules/NN-NAME.ko; it downloads what is missing there.
func FetchKernel(ctx context.Context, dir string, k Kernel, log *slog.Logger) (string, error) {
	own, err := debianCodename()
	if err != nil {
		return "", err
	}
	name := "linux"
	if k.Suite != "" && k.Suite != own {
		name += "-" + k.Name
	}
	name = filepath.Join(dir, name)
	err = makeDir(ctx, name, func(tmp string) error {
		log.Info("fetching a guest kernel", "name", k.Name)
		_, repos, err := debianRepos(ctx)
		if err == nil && k.Suite != "" && k.Suite != own {
			repos, err = suiteRepos(own, repos, k.Suite)
		}
		if err != nil {
			return err
		}
		return fetchKernel(ctx, tmp, repos)
	})
	if err != nil && k.Suite != "" {
		err = fmt.Errorf("%s of Debian %s: %w", k.Name, k.Suite, err)
	}
	return name, err
}

// fetchKernel downloads Debian's newest cloud kernel of the given sources and
// keeps what FetchKernel returns. Nothing is installed.
func fetchKernel(ctx context.Context, dir string, repos []repo) error {
	work := filepath.Join(dir, "work")
	apt, err := newPrivateApt(ctx, work, repos)
	if err != nil {
		return err
	}
	const meta = "linux-image-cloud-amd64"
	depends, err := apt.depends(ctx, meta, "linux-image-")
	if err != nil {
		return err
	}
	if len(depends) != 1 {
		return fmt.Errorf("package %s depends on the kernels %q, want one", meta, depends)
	}
	release := strings.TrimPrefix(depends[0], "linux-image-")
	// Since 7.1 or so that package is empty, and depends on some with the parts.
	parts, err := apt.depends(ctx, depends[0], "linux-")
	if err != nil {
		return err
	}
	packages := depends
	release = strings.TrimSuffix(release, "-unsigned")
	for _, p := range parts {
		if strings.HasSuffix(p, "-"+release) {
			packages = append(packages, p)
		}
	}
	tree, err := apt.unpacked(ctx, packages)
	if err != nil {
		return err
	}
	lib := filepath.Join(tree, "usr/lib/modules", release)
	if _, err := os.Stat(lib); errors.Is(err, os.ErrNotExist) {
		lib = filepath.Join(tree, "lib/modules", release) // until 6.1
	}
	err = os.Rename(filepath.Join(tree, "boot", "vmlinuz-"+release), filepath.Join(dir, "vmlinuz"))
	if errors.Is(err, os.ErrNotExist) {
		err = os.Rename(filepath.Join(lib, "vmlinuz"), filepath.Join(dir, "vmlinuz"))
	}
	if err != nil {
		return err
	}
	kinds := map[string][]string{"modules": modules, "disk-modules": diskModules}
	for kind := range kinds {
		if err := os.Mkdir(filepath.Join(dir, kind), 0o755); err != nil {
			return err
		}
	}
	err = filepath.WalkDir(lib, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		file := filepath.Base(path)
		for kind, names := range kinds {
			for i, m := range names {
				// The kernels that have compressed modules unpack them themselves.
				if file == m+".ko" || file == m+".ko.xz" || file == m+".ko.zst" {
					return os.Rename(path,
						filepath.Join(dir, kind, fmt.Sprintf("%02d-%s", i, file)))
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "release"), []byte(release+"\n"), 0o644); err != nil {
		return err
	}
	return os.RemoveAll(work)
}

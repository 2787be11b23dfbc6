package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// image is what QEMU boots.
type image struct {
	kernel, initrd string // files
	release        string // such as 6.1.0-56-cloud-amd64
}

// modules are the drivers a guest may need, the needed before those
// that need them. One that the kernel package does not have is built in.
var modules = []string{
	"virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
	"virtio_blk", "failover", "net_failover", "virtio_net", "virtio_console", "virtio_balloon",
}

// onceImage builds the image once; what fails is tried again.
func onceImage(dir string, log *slog.Logger) func(context.Context) (*image, error) {
	var mu sync.Mutex
	var built *image
	return func(ctx context.Context) (*image, error) {
		mu.Lock()
		defer mu.Unlock()
		if built == nil {
			img, err := buildImage(ctx, dir, log)
			if err != nil {
				return nil, fmt.Errorf("build guest image: %w", err)
			}
			built = img
		}
		return built, nil
	}
}

// buildImage returns the image in the cache; it makes what is missing there.
// The name of the initramfs is a hash of what is in it.
func buildImage(ctx context.Context, dir string, log *slog.Logger) (*image, error) {
	kernel := filepath.Join(dir, "kernel")
	err := makeDir(ctx, kernel, func(tmp string) error {
		log.Info("fetching the guest kernel")
		return fetchKernel(ctx, tmp)
	})
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	release, err := os.ReadFile(filepath.Join(kernel, "release"))
	if err != nil {
		return nil, err
	}
	load, err := guestLoad(ctx)
	if err != nil {
		return nil, fmt.Errorf("guest load: %w", err)
	}
	var b bytes.Buffer
	c := cpio{w: &b}
	c.add("dev", dirMode, nil)
	c.add("proc", dirMode, nil)
	c.add("modules", dirMode, nil)
	files, err := filepath.Glob(filepath.Join(kernel, "modules", "*"))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		c.add("modules/"+filepath.Base(f), fileMode, data)
	}
	c.add("init", execMode, load)
	c.end()
	img := &image{
		kernel:  filepath.Join(kernel, "vmlinuz"),
		initrd:  filepath.Join(dir, fmt.Sprintf("initrd-%.8x", sha256.Sum256(b.Bytes()))),
		release: strings.TrimSpace(string(release)),
	}
	if _, err := os.Stat(img.initrd); err == nil {
		return img, nil
	}
	return img, writeFile(img.initrd, b.Bytes())
}

// fetchKernel downloads Debian's cloud kernel and keeps vmlinuz, release and
// modules/NN-NAME.ko. Nothing is installed.
func fetchKernel(ctx context.Context, dir string) error {
	_, repos, err := debianRepos(ctx)
	if err != nil {
		return err
	}
	work := filepath.Join(dir, "work")
	apt, err := newPrivateApt(ctx, work, repos)
	if err != nil {
		return err
	}
	const meta = "linux-image-cloud-amd64"
	depends, err := apt.run(ctx, "apt-cache", "depends", "--important", meta)
	if err != nil {
		return err
	}
	var pkg string
	for line := range strings.Lines(string(depends)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			pkg = "linux-image-" + name
		}
	}
	if pkg == "" {
		return fmt.Errorf("package %s depends on no kernel", meta)
	}
	if _, err := apt.run(ctx, "apt-get", "download", pkg); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil {
		return err
	}
	tree := filepath.Join(work, "tree")
	if err := unpack(ctx, debs, tree); err != nil {
		return err
	}
	release := strings.TrimPrefix(pkg, "linux-image-")
	release = strings.TrimSuffix(release, "-unsigned")
	if err := os.Rename(filepath.Join(tree, "boot", "vmlinuz-"+release), filepath.Join(dir, "vmlinuz")); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "modules"), 0o755); err != nil {
		return err
	}
	lib := filepath.Join(tree, "lib/modules", release)
	if _, err := os.Stat(lib); errors.Is(err, os.ErrNotExist) {
		lib = filepath.Join(tree, "usr/lib/modules", release)
	}
	err = filepath.WalkDir(lib, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		file := filepath.Base(path)
		for i, m := range modules {
			if file == m+".ko" || file == m+".ko.xz" {
				return os.Rename(path, filepath.Join(dir, "modules", fmt.Sprintf("%02d-%s", i, file)))
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

// guestLoad returns the guest load's binary: the file "guestload" beside this
// program if there is one, else it is built from the source tree.
func guestLoad(ctx context.Context) ([]byte, error) {
	if self, err := os.Executable(); err == nil {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(self), "guestload"))
		if !errors.Is(err, os.ErrNotExist) {
			return data, err
		}
	}
	tmp, err := os.MkdirTemp("", "guestload")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "guestload")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, "vacate/cmd/guestload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if _, err := output(cmd); err != nil {
		return nil, fmt.Errorf("%w\nput a built guestload beside this program, or run it inside the source tree", err)
	}
	return os.ReadFile(out)
}

const (
	dirMode  = 0o040755
	fileMode = 0o100644
	execMode = 0o100755
)

// cpio writes an archive in the "newc" format that Linux takes as initramfs
// (Documentation/driver-api/early-userspace/buffer-format.rst): a header of 6
// magic digits and 13 numbers of 8 hex digits, the name with a NUL, the data;
// name and data each padded to 4 bytes.
type cpio struct {
	w     *bytes.Buffer
	inode int
}

func (c *cpio) add(name string, mode int, data []byte) {
	c.inode++
	fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	c.w.WriteString(name)
	c.w.WriteByte(0)
	c.pad()
	c.w.Write(data)
	c.pad()
}

func (c *cpio) pad() {
	for c.w.Len()%4 != 0 {
		c.w.WriteByte(0)
	}
}

func (c *cpio) end() { c.add("TRAILER!!!", 0, nil) }

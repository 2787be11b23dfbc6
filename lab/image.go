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

	"vacate/lab/bareguest"
)

// image is what QEMU boots.
type image struct {
	kernel, initrd string // files; the bare guest has no initrd
	release        string // such as 6.1.0-56-cloud-amd64, or bareguest-6ac1fe4b
}

// images makes images in a lab's directory.
type images struct {
	dir string
	log *slog.Logger
}

// built are the images that this process has made, for all labs: the programs are built once. What
// fails is tried again.
var built = struct {
	sync.Mutex
	images map[string]*image
}{images: map[string]*image{}}

// get returns the image with the kernel and programs that a VM is to have.
func (is *images) get(ctx context.Context, s *Spec) (*image, error) {
	built.Lock()
	defer built.Unlock()
	if s.BareMetal {
		return bareImage(is.dir)
	}
	programs, _ := s.programs()
	key := fmt.Sprint(is.dir, s.Kernel, programs)
	if img := built.images[key]; img != nil {
		return img, nil
	}
	img, err := buildImage(ctx, is.dir, s.Kernel, programs, is.log)
	if err != nil {
		return nil, fmt.Errorf("build guest image: %w", err)
	}
	built.images[key] = img
	return img, nil
}

// bareImage returns the image of the bare guest; it puts the file into the cache if it is missing.
func bareImage(dir string) (*image, error) {
	release := fmt.Sprintf("bareguest-%.4x", sha256.Sum256(bareguest.ELF))
	img := &image{kernel: filepath.Join(dir, release), release: release}
	if _, err := os.Stat(img.kernel); err == nil {
		return img, nil
	}
	return img, writeFile(img.kernel, bareguest.ELF)
}

// buildImage returns the image in the cache with a kernel and programs of this module (see build).
// The first program is init. It makes what is missing. The name of the initramfs is a hash of its
// content.
func buildImage(ctx context.Context, dir string, k Kernel, programs []string,
	log *slog.Logger) (*image, error) {
	kernel, err := FetchKernel(ctx, dir, k, log)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	release, err := os.ReadFile(filepath.Join(kernel, "release"))
	if err != nil {
		return nil, err
	}
	binaries, err := build(ctx, programs)
	if err != nil {
		return nil, fmt.Errorf("programs: %w", err)
	}
	var b bytes.Buffer
	c := cpio{w: &b}
	c.add("dev", dirMode, nil)
	c.add("proc", dirMode, nil)
	c.add("sys", dirMode, nil)
	c.add("server", dirMode, nil)
	for _, kind := range []string{"modules", "disk-modules"} {
		c.add(kind, dirMode, nil)
		files, err := filepath.Glob(filepath.Join(kernel, kind, "*"))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				return nil, err
			}
			c.add(kind+"/"+filepath.Base(f), fileMode, data)
		}
	}
	for i, name := range programs {
		if i == 0 {
			name = "init"
		}
		c.add(name, execMode, binaries[i])
	}
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

// Program returns the path of a program of this module, which lies beside the running one.
func Program(name string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	file := filepath.Join(filepath.Dir(self), name)
	if _, err := os.Stat(file); err != nil {
		return "", fmt.Errorf("%w: make build puts %s beside %s", err, name, filepath.Base(self))
	}
	return file, nil
}

// build returns the binaries of this module's programs, by their directories' names in cmd or
// lab/cmd. It takes the files of these names beside this program, or else builds them from the
// source tree.
func build(ctx context.Context, programs []string) ([][]byte, error) {
	binaries := make([][]byte, len(programs))
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp("", "vacate-lab")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", tmp + "/"}
	missing := len(args)
	for i, name := range programs {
		binaries[i], err = os.ReadFile(filepath.Join(filepath.Dir(self), name))
		if errors.Is(err, os.ErrNotExist) {
			dir := "vacate/lab/cmd/"
			if name == guestAgent { // part of the product
				dir = "vacate/cmd/"
			}
			args = append(args, dir+name)
		} else if err != nil {
			return nil, err
		}
	}
	if len(args) == missing {
		return binaries, nil
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if _, err := output(cmd); err != nil {
		return nil,
			fmt.Errorf("%w\nput them, built, beside this program, or run it inside the source tree",
				err)
	}
	for i, name := range programs {
		if binaries[i] == nil {
			if binaries[i], err = os.ReadFile(filepath.Join(tmp, name)); err != nil {
				return nil, err
			}
		}
	}
	return binaries, nil
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

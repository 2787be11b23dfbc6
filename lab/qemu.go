package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// QEMU is one installed, or privately unpacked, QEMU.
type QEMU struct {
	Name    string // such as "stock" or "trixie-backports"
	Path    string // one executable
	Version string // such as "7.2.22"
}

// Probe says whether this machine can run a lab; the error says what is
// missing and how to get it.
func Probe() error {
	if os.Geteuid() != 0 {
		return errors.New("a lab needs root, for network namespaces: run it with sudo")
	}
	var missing []string
	for _, tool := range []string{stockQEMU, "apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if missing != nil {
		return fmt.Errorf("a lab needs %s: apt-get install %s", strings.Join(missing, ", "),
			Packages)
	}
	return nil
}

const stockQEMU = "qemu-system-x86_64"

// StockQEMU returns the QEMU in PATH.
func StockQEMU(ctx context.Context) (QEMU, error) {
	path, err := exec.LookPath(stockQEMU)
	if err != nil {
		return QEMU{}, fmt.Errorf("stock qemu: %w: apt-get install %s", err, Packages)
	}
	if path, err = filepath.Abs(path); err != nil {
		return QEMU{}, err
	}
	version, err := qemuVersion(ctx, path)
	return QEMU{"stock", path, version}, err
}

var versionLine = regexp.MustCompile(`^QEMU emulator version (\d+\.\d+\.\d+)`)

func qemuVersion(ctx context.Context, path string) (string, error) {
	out, err := output(exec.CommandContext(ctx, path, "--version"))
	if err != nil {
		return "", err
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("%s --version: no version in its first line", path)
	}
	return string(m[1]), nil
}

// BackportsQEMU returns the newest QEMU in Debian's backports (11.1 in those
// of Debian 13), unpacked beside its own libraries in the lab directory dir,
// and never installed. The first call downloads about 50 MB; apt checks all
// signatures. If this machine has no keys for Debian 13 it is that of the
// backports of Debian 12; its Name says so.
func BackportsQEMU(ctx context.Context, dir string) (QEMU, error) {
	q, err := backports(ctx, dir, "trixie")
	if err == nil || ctx.Err() != nil {
		return q, err
	}
	q, err12 := Backports12QEMU(ctx, dir)
	if err12 != nil {
		return q, errors.Join(err, err12)
	}
	return q, nil
}

// Backports12QEMU returns the QEMU of the backports of Debian 12 (10.0), like
// BackportsQEMU.
func Backports12QEMU(ctx context.Context, dir string) (QEMU, error) {
	return backports(ctx, dir, "bookworm")
}

func backports(ctx context.Context, dir, codename string) (QEMU, error) {
	dir, err := absDir(dir)
	if err != nil {
		return QEMU{}, err
	}
	name := codename + "-backports"
	prefix := filepath.Join(dir, "qemu-"+name)
	err = makeDir(ctx, prefix, func(tmp string) error { return fetchQEMU(ctx, tmp, codename) })
	if err != nil {
		return QEMU{}, fmt.Errorf("fetch qemu of %s: %w", name, err)
	}
	path := filepath.Join(prefix, stockQEMU)
	version, err := qemuVersion(ctx, path)
	return QEMU{name, path, version}, err
}

func fetchQEMU(ctx context.Context, dir, codename string) error {
	own, repos, err := debianRepos(ctx)
	if err != nil {
		return err
	}
	from := codename + "-backports"
	release, err := suiteRepos(own, repos, codename)
	if err != nil {
		return err
	}
	work := filepath.Join(dir, "work")
	apt, err := newPrivateApt(ctx, work, append(release, repo{release[0].uri, from, "main"}))
	if err != nil {
		return err
	}
	if _, err := apt.run(ctx, "apt-get", "install", "-y", "--download-only", "-t", from,
		"qemu-system-x86"); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(work, "cache/archives/*.deb"))
	if err != nil {
		return err
	}
	if err := unpack(ctx, debs, filepath.Join(dir, "root")); err != nil {
		return err
	}
	wrapper, err := wrapQEMU(filepath.Join(dir, "root"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, stockQEMU), []byte(wrapper), 0o755); err != nil {
		return err
	}
	return os.RemoveAll(work)
}

// wrapQEMU returns a script, to lie beside root, that becomes the QEMU in
// root: with the dynamic loader, libraries and firmware that came with it.
func wrapQEMU(root string) (string, error) {
	var loader string
	var libs []string
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := "$root" + strings.TrimPrefix(path, root)
		if e.Type().IsRegular() && e.Name() == "ld-linux-x86-64.so.2" {
			loader = rel
		}
		if e.IsDir() && e.Name() == "x86_64-linux-gnu" &&
			filepath.Base(filepath.Dir(path)) == "lib" {
			libs = append(libs, rel)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if loader == "" {
		return "", errors.New("no dynamic loader among the packages")
	}
	return fmt.Sprintf(`#!/bin/sh
root=${0%%/*}/root
exec %q --argv0 %q --library-path "%s" \
	"$root/usr/bin/qemu-system-x86_64" \
	-L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
`, loader, stockQEMU, strings.Join(libs, ":")), nil
}

// Accelerator returns under what a VM would run whose Accel is left open: "kvm" if a guest like its
// own runs under it here, else "tcg".
func (l *Lab) Accelerator(ctx context.Context, spec Spec) (string, error) {
	if err := spec.fill(ctx); err != nil {
		return "", err
	}
	img, err := l.image.get(ctx, &spec)
	if err != nil {
		return "", err
	}
	return l.accelerator(ctx, spec, img)
}

// accelerator returns "kvm" if a guest like the VM's really runs under it, else "tcg". That
// /dev/kvm opens proves nothing. The bare guest is tried first: where that does not run, nothing
// does, and where it does, Linux may still not. Answers are kept in the lab directory; the
// environment variable VACATE_ACCEL overrides them.
func (l *Lab) accelerator(ctx context.Context, spec Spec, img *image) (string, error) {
	if a := os.Getenv("VACATE_ACCEL"); a != "" {
		if a != "kvm" && a != "tcg" {
			return "", fmt.Errorf("VACATE_ACCEL is %q: want kvm or tcg", a)
		}
		return a, nil
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg", nil
	}
	f.Close()
	l.kvm.Lock()
	defer l.kvm.Unlock()
	bare, err := bareImage(l.dir)
	if err != nil {
		return "", err
	}
	accel, err := l.try(ctx, Spec{QEMU: spec.QEMU, BareMetal: true}, bare)
	if err != nil || accel == "tcg" || spec.BareMetal {
		return accel, err
	}
	return l.try(ctx, Spec{QEMU: spec.QEMU, Kernel: spec.Kernel}, img)
}

// try boots a guest under KVM, unless it is known what comes of that, and returns "kvm" or "tcg".
func (l *Lab) try(ctx context.Context, spec Spec, img *image) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	key := fmt.Sprintf("accel-%s-%s-%s", spec.QEMU.Version, img.release,
		unix.ByteSliceToString(u.Release[:]))
	file := filepath.Join(l.dir, key)
	if known, err := os.ReadFile(file); err == nil &&
		(string(known) == "kvm" || string(known) == "tcg") {
		return string(known), nil
	}
	l.log.Info("trying whether a guest boots under KVM", "guest", img.release)
	short, cancel := context.WithTimeout(ctx, kvmBootTime)
	defer cancel()
	accel := "kvm"
	spec.Accel, spec.MemoryMiB = "kvm", 256
	vm, err := l.A.Boot(short, spec)
	if err == nil {
		vm.Kill()
	} else if ctx.Err() != nil {
		return "", err
	} else {
		l.log.Info("the guest does not boot under KVM here: using software emulation", "guest",
			img.release, "error", err)
		accel = "tcg"
	}
	return accel, writeFile(file, []byte(accel))
}

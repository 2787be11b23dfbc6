package lab

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vacate/lab/loadproto"
)

// With Options.BootOnce a guest of each kind boots once. It is saved before it loads a module or
// knows its load. VMs start from the file, and get the time, chance and parameters of their own.

// bootedDir is where the files are, in the lab's directory.
const bootedDir = "booted"

// bootedFor is how long a file stays that no VM starts from.
const bootedFor = 24 * time.Hour

// startsBooted reports whether a VM may start from a guest that has booted. What names a file or an
// address is a kind of its own, and boots.
func (s *Spec) startsBooted() bool {
	return s.Init == guestLoad && !s.BareMetal && s.Accel == "tcg" && !s.Tap &&
		!slices.ContainsFunc(s.Extra, func(a string) bool { return strings.Contains(a, "/") })
}

// launchBooted starts a VM from a guest that has booted, and gives it its parameters.
func (h *Host) launchBooted(ctx context.Context, spec Spec) (*VM, error) {
	file, err := h.booted(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("have a guest boot for others to start from: %w", err)
	}
	vm, err := h.launch(ctx, spec, newGuest(), "-incoming", "exec:cat "+file)
	if err != nil {
		return nil, err
	}
	// What comes to the port before is lost.
	for err == nil {
		var status string
		if status, err = vm.Status(ctx); err == nil && status == "running" {
			break
		}
		select {
		case <-vm.done:
			err = errors.New("qemu has exited")
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(10 * time.Millisecond):
			err = nil // its monitor comes late
		}
	}
	if err == nil {
		err = vm.Begin()
	}
	if err != nil {
		vm.Kill()
		return nil, err
	}
	return vm, nil
}

// Begin gives a guest that has booted, and runs, the time, chance and the parameters of its load.
func (vm *VM) Begin() error {
	return vm.command(fmt.Sprintf("%s %d %d%s", loadproto.CommandBegin, time.Now().UnixNano(),
		rand.Uint64(), vm.Spec.loadParameters()))
}

// Waits waits until the VM's guest has booted, and expects its parameters.
func (vm *VM) Waits(ctx context.Context) error {
	return vm.Guest.wait(ctx, "the guest to boot", vm.done,
		func() bool { return vm.Guest.ready })
}

// booted returns the file with a guest of a VM's kind, whose process 1 waits for its parameters.
func (h *Host) booted(ctx context.Context, spec Spec) (string, error) {
	l := h.lab
	spec.waits, spec.Disk, spec.Load = true, "", Load{}
	p, err := h.prepare(ctx, spec, newGuest())
	if err != nil {
		return "", err
	}
	p.reports.Close()
	os.Remove(p.file("disk.raw"))
	// The command line is all that makes a kind. The names of images tell their content, and that
	// of a QEMU its version.
	kind := strings.NewReplacer(l.run, "", p.name, "").Replace(strings.Join(p.args, "\n")) +
		spec.QEMU.Version
	return l.BootedOnce(ctx, kind, p.args[slices.Index(p.args, "-kernel")+1],
		func(file string) error {
			vm, err := h.launch(ctx, spec, newGuest())
			if err != nil {
				return err
			}
			defer vm.Kill()
			if err = vm.Waits(ctx); err == nil {
				err = vm.saveTo(ctx, file)
			}
			if err != nil {
				return vm.explain(err)
			}
			return dropZeroes(file)
		})
}

// BootedOnce returns the file with a guest of a kind that has booted. If there is none, save writes
// it. The kernel's size and age are part of the kind.
func (l *Lab) BootedOnce(ctx context.Context, kind, kernel string,
	save func(file string) error) (string, error) {
	if info, err := os.Stat(kernel); err == nil {
		kind += fmt.Sprint(info.Size(), info.ModTime().Unix())
	}
	dir := filepath.Join(l.dir, bootedDir)
	file := filepath.Join(dir, fmt.Sprintf("%.8x", sha256.Sum256([]byte(kind))))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	unlock, err := lockFile(ctx, file+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	now := time.Now()
	if os.Chtimes(file, now, now) == nil {
		return file, nil
	}
	removeOld(dir, now.Add(-bootedFor))
	l.log.Info("a guest boots, for others of its kind to start from", "kind", filepath.Base(file))
	defer os.Remove(file + ".new")
	if err := save(file + ".new"); err != nil {
		return "", err
	}
	return file, os.Rename(file+".new", file)
}

// removeOld removes the files of a directory that have not been used since a time, but for locks.
func removeOld(dir string, since time.Time) {
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		if info, err := f.Info(); err == nil && info.ModTime().Before(since) &&
			filepath.Ext(f.Name()) != ".lock" {
			os.Remove(filepath.Join(dir, f.Name()))
		}
	}
}

package lab

import (
	"context"
	"debug/elf"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// memcached in a guest: Debian's, of this machine's release, with the libraries it needs.
// Nothing is evicted from it: it refuses what does not fit.
const (
	memcached     = "memcached"
	memcachedPort = 11211
	// memcachedNeeds is what it needs besides its memory for items, in MiB: its image twice,
	// while the kernel unpacks it, and its tables.
	memcachedNeeds = 64
)

// Memcached returns the address of the memcached in the guest, for the lab's client.
func (vm *VM) Memcached() string { return vm.Spec.memcachedAddr() }

func (s *Spec) memcachedAddr() string { return s.Addr + ":" + strconv.Itoa(memcachedPort) }

// memcachedArgs are arguments without commas, which separate them for guestload.
func (s *Spec) memcachedArgs() []string {
	return []string{"-u", "root", "-l", s.Addr, "-p", strconv.Itoa(memcachedPort), "-U", "0",
		"-t", strconv.Itoa(s.VCPUs), "-m", strconv.Itoa(s.MemcachedMiB), "-M"}
}

// fetchMemcached returns the directory of a cache, dir, that has the files memcached, its
// libraries and their loader; it downloads what is missing there.
func fetchMemcached(ctx context.Context, dir string, log *slog.Logger) (string, error) {
	name := filepath.Join(dir, memcached)
	return name, makeDir(ctx, name, func(tmp string) error {
		log.Info("fetching memcached")
		_, repos, err := debianRepos(ctx)
		if err != nil {
			return err
		}
		work := filepath.Join(tmp, "work")
		apt, err := newPrivateApt(ctx, work, repos)
		if err != nil {
			return err
		}
		// It and the libraries that it depends on, without what it needs to be installed.
		packages := []string{memcached}
		for i := 0; i < len(packages); i++ {
			more, err := apt.depends(ctx, packages[i], "lib")
			if err != nil {
				return err
			}
			packages = appendNew(packages, more...)
		}
		tree, err := apt.unpacked(ctx, packages)
		if err != nil {
			return err
		}
		if err := pickLinked(filepath.Join(tree, "usr/bin", memcached), tree, tmp); err != nil {
			return err
		}
		return os.RemoveAll(work)
	})
}

// pickLinked copies a program, and what it is linked to, from a tree of unpacked packages into a
// directory.
func pickLinked(program, tree, into string) error {
	files := []string{program}
	for i := 0; i < len(files); i++ {
		f, err := elf.Open(files[i])
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(files[i]), err)
		}
		libs, err := f.ImportedLibraries()
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(files[i]), err)
		}
		for _, lib := range libs {
			// The loader is among them: libraries are linked to it.
			found := filepath.Join(tree, "lib/x86_64-linux-gnu", lib)
			if _, err := os.Stat(found); err != nil {
				found = filepath.Join(tree, "usr/lib/x86_64-linux-gnu", lib)
			}
			files = appendNew(files, found)
		}
	}
	for _, name := range files {
		if err := copyFile(filepath.Join(into, filepath.Base(name)), name); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// appendNew appends what is not there yet.
func appendNew(list []string, more ...string) []string {
	for _, m := range more {
		if !slices.Contains(list, m) {
			list = append(list, m)
		}
	}
	return list
}

// addMemcached adds the program, its libraries where the loader looks for them, and the user
// that it runs as.
func addMemcached(c *cpio, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	const libs, loader = "lib/x86_64-linux-gnu", "lib64"
	for _, d := range []string{"etc", "lib", libs, loader} {
		c.add(d, dirMode, nil)
	}
	c.add("etc/passwd", fileMode, []byte("root:x:0:0::/:\n"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		name := filepath.Base(f)
		switch {
		case strings.HasPrefix(name, "ld-linux"):
			name = filepath.Join(loader, name)
		case name != memcached:
			name = filepath.Join(libs, name)
		}
		c.add(name, execMode, data)
	}
	return nil
}

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// Release returns a directory of the cache dir that has packages of one of Debian's releases, and
// what they need, below "usr" and "etc". Their programs run where the two are in place of the
// machine's own. The first call downloads them: no script of theirs runs, and nothing is installed.
func Release(ctx context.Context, dir, codename string, packages ...string) (string, error) {
	dir, err := absDir(dir)
	if err != nil {
		return "", err
	}
	root := filepath.Join(dir, "debian-"+codename)
	err = makeDir(ctx, root, func(tmp string) error {
		own, repos, err := debianRepos(ctx)
		if err != nil {
			return err
		}
		if repos, err = suiteRepos(own, repos, codename); err != nil {
			return err
		}
		work := filepath.Join(tmp, "work")
		apt, err := newPrivateApt(ctx, work, repos)
		if err != nil {
			return err
		}
		if _, err := apt.run(ctx, "apt-get", append([]string{"install", "-y", "--download-only"},
			packages...)...); err != nil {
			return err
		}
		debs, err := filepath.Glob(filepath.Join(work, "cache/archives/*.deb"))
		if err != nil {
			return err
		}
		if err := unpack(ctx, debs, tmp); err != nil {
			return err
		}
		// Packages of some releases have files outside of /usr, where a system has links into it.
		for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
			from := filepath.Join(tmp, name)
			if info, err := os.Lstat(from); err != nil || !info.IsDir() {
				continue
			}
			if _, err := output(exec.CommandContext(ctx, "cp", "-a", from,
				filepath.Join(tmp, "usr"))); err != nil {
				return err
			}
		}
		return os.RemoveAll(work)
	})
	if err != nil {
		return "", fmt.Errorf("fetch packages of Debian %s: %w", codename, err)
	}
	return root, nil
}

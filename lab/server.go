package lab

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Server is a program with which a guest with a Tap serves clients. It is Debian's, of this
// machine's release, on a disk of its own that has what the program needs and nothing else. The
// disk is one file that both hosts have, as shared disks are.
type Server string

// The servers.
const (
	NoServer Server = ""
	// refuses what does not fit in its memory, and so loses nothing
	Memcached Server = "memcached"
	Redis     Server = "redis" // keeps all in memory
	// has a database vacate, of the user postgres, with a table of items
	PostgreSQL Server = "postgresql"
)

// Servers are all of them.
func Servers() []Server { return []Server{Memcached, Redis, PostgreSQL} }

// serverUser is whom servers run as in the guest, by number.
const serverUser = 999

// recipe is how a server is put on a disk and started.
type recipe struct {
	port int
	// MiB of the guest's memory beside what it serves
	needs int
	// Debian's; the one that it stands for where its name ends in a dash
	debian string
	more   []string // more packages
	// path in a tree of unpacked packages
	program func(tree string) (string, error)
	// patterns of what else it needs, in such a tree
	files []string
	// prepares the root of its disk; may be nil
	set  func(ctx context.Context, root string, mib int) error
	args func(s *Spec) []string
}

var recipes = map[Server]recipe{
	Memcached: {
		port: 11211, needs: 64, debian: "memcached", program: at("usr/bin/memcached"),
		args: func(s *Spec) []string {
			return []string{"-l", s.Addr, "-U", "0", "-t", strconv.Itoa(s.VCPUs), "-m",
				strconv.Itoa(s.ServerMiB), "-M"}
		},
	},
	Redis: {
		port: 6379, needs: 64, debian: "redis-server", more: []string{"redis-tools"},
		program: at("usr/bin/redis-server"),
		args: func(s *Spec) []string {
			return []string{"--bind", s.Addr, "--protected-mode", "no", "--save", "",
				"--maxmemory-policy", "noeviction"}
		},
	},
	PostgreSQL: {
		port: 5432, needs: 192, debian: "postgresql-", more: []string{"tzdata", "dash", "zlib1g"},
		program: at("usr/lib/postgresql/*/bin/postgres"),
		files: []string{"usr/lib/postgresql/*/bin/initdb", "usr/lib/postgresql/*/lib/*.so",
			"usr/share/postgresql/*", "usr/share/zoneinfo", "bin/dash"},
		set: makeDatabase,
		args: func(s *Spec) []string {
			return []string{"-D", "/data", "-c", "listen_addresses=" + s.Addr, "-c",
				"shared_buffers=128MB", "-c", "max_connections=20"}
		},
	},
}

func at(pattern string) func(string) (string, error) {
	return func(tree string) (string, error) {
		found, err := filepath.Glob(filepath.Join(tree, pattern))
		if err == nil && len(found) != 1 {
			err = fmt.Errorf("its packages have %d files %s", len(found), pattern)
		}
		if err != nil {
			return "", err
		}
		return found[0], nil
	}
}

// ServerAddr returns the address of the server in the guest, for the lab's client.
func (vm *VM) ServerAddr() string {
	return vm.Spec.Addr + ":" + strconv.Itoa(recipes[vm.Spec.Server].port)
}

// serve is the kernel's parameter that has guestload start the server.
func (s *Spec) serve(program string) string {
	return fmt.Sprintf(" vacate.serve=%d,%s,%s", serverUser, program,
		strings.Join(recipes[s.Server].args(s), ","))
}

// server is a disk with a server, in the cache.
type server struct {
	disk    string // ext4, raw
	program string // path on it
}

// fetchServer returns the disk of a server that is to serve so much memory; it makes one that is
// missing in the cache, dir.
func fetchServer(ctx context.Context, dir string, kind Server, mib int,
	log *slog.Logger) (server, error) {
	r, ok := recipes[kind]
	if !ok {
		return server{}, fmt.Errorf("no server %q: there are %v", kind, Servers())
	}
	name := filepath.Join(dir, "server-"+string(kind))
	if r.set != nil {
		name += "-" + strconv.Itoa(mib)
	}
	err := makeDir(ctx, name, func(tmp string) error {
		log.Info("making the disk of a server", "server", kind)
		work := filepath.Join(tmp, "work")
		tree, err := serverPackages(ctx, work, r)
		if err != nil {
			return err
		}
		root := filepath.Join(work, "root")
		program, err := plant(tree, root, r)
		if err != nil {
			return err
		}
		if r.set != nil {
			if err := r.set(ctx, root, mib); err != nil {
				return err
			}
		}
		if err := makeDisk(ctx, root, filepath.Join(tmp, "disk.raw"), mib); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tmp, "program"), []byte(program), 0o644); err != nil {
			return err
		}
		return os.RemoveAll(work)
	})
	if err != nil {
		return server{}, fmt.Errorf("server %s: %w", kind, err)
	}
	program, err := os.ReadFile(filepath.Join(name, "program"))
	return server{filepath.Join(name, "disk.raw"), string(program)}, err
}

// serverPackages unpacks a server's packages, and the libraries that they depend on, without what
// they need to be installed.
func serverPackages(ctx context.Context, work string, r recipe) (tree string, err error) {
	_, repos, err := debianRepos(ctx)
	if err != nil {
		return "", err
	}
	apt, err := newPrivateApt(ctx, work, repos)
	if err != nil {
		return "", err
	}
	packages := []string{r.debian}
	if base, meta := strings.CutSuffix(r.debian, "-"); meta {
		if packages, err = apt.depends(ctx, base, r.debian); err != nil {
			return "", err
		}
		if len(packages) != 1 {
			return "", fmt.Errorf("package %s depends on %q, want one", base, packages)
		}
	}
	packages = append(packages, r.more...)
	for i := 0; i < len(packages); i++ {
		more, err := apt.depends(ctx, packages[i], "lib")
		if err != nil {
			return "", err
		}
		// Which is large, and compiles queries where that is worth the time.
		more = slices.DeleteFunc(more,
			func(p string) bool { return strings.HasPrefix(p, "libllvm") })
		packages = appendNew(packages, more...)
	}
	return apt.unpacked(ctx, packages)
}

// plant copies a server from a tree of unpacked packages into the root of its disk. The libraries
// that it is linked to go where the loader looks for them. It returns the program's path there.
func plant(tree, root string, r recipe) (program string, err error) {
	if err := prepareRoot(root); err != nil {
		return "", err
	}
	found, err := r.program(tree)
	if err != nil {
		return "", err
	}
	files := []string{found}
	for _, pattern := range r.files {
		more, err := filepath.Glob(filepath.Join(tree, pattern))
		if err != nil {
			return "", err
		}
		if len(more) == 0 {
			return "", fmt.Errorf("its packages have no %s", pattern)
		}
		files = append(files, more...)
	}
	for i := 0; i < len(files); i++ {
		more, err := plantFile(tree, root, files[i])
		if err != nil {
			return "", err
		}
		files = appendNew(files, more...)
	}
	name, err := filepath.Rel(tree, found)
	return "/" + name, err
}

// prepareRoot makes what every server's root has.
func prepareRoot(root string) error {
	for _, d := range []string{"dev", "proc", "tmp", "etc", "bin", "data", "run"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"tmp", "data", "run"} {
		if err := os.Chown(filepath.Join(root, d), serverUser, serverUser); err != nil {
			return err
		}
	}
	users := fmt.Sprintf("root:x:0:0::/:/bin/sh\npostgres:x:%d:%[1]d::/data:/bin/sh\n", serverUser)
	return os.WriteFile(filepath.Join(root, "etc/passwd"), []byte(users), 0o644)
}

// plantFile copies a file of a tree to where it belongs in the root. It returns the files that go
// with it: those of a directory, and the libraries of a program.
func plantFile(tree, root, file string) (more []string, err error) {
	name, err := filepath.Rel(tree, file)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		entries, err := os.ReadDir(file)
		for _, e := range entries {
			more = append(more, filepath.Join(file, e.Name()))
		}
		return more, err
	}
	libs, err := linked(file)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(libs, func(l string) bool { return strings.HasPrefix(l, "libLLVM") }) {
		return nil, nil // the servers do without what needs it
	}
	for _, lib := range libs {
		more = append(more, inTree(tree, lib))
	}
	switch base := filepath.Base(file); {
	case strings.HasPrefix(base, "ld-linux"):
		name = filepath.Join("lib64", base)
	case base == "dash":
		name = "bin/sh"
	case strings.Contains(name, "lib/x86_64-linux-gnu/"):
		name = filepath.Join("lib/x86_64-linux-gnu", base)
	}
	to := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return nil, err
	}
	return more, copyFile(to, file, info.Mode().Perm()|0o444)
}

// inTree is where a tree of packages has a library.
func inTree(tree, lib string) string {
	found := filepath.Join(tree, "lib/x86_64-linux-gnu", lib)
	if _, err := os.Stat(found); err != nil {
		found = filepath.Join(tree, "usr/lib/x86_64-linux-gnu", lib)
	}
	return found
}

// linked returns the libraries that a program or library is linked to, the loader among them; none
// of another file.
func linked(file string) ([]string, error) {
	f, err := elf.Open(file)
	var format *elf.FormatError
	if errors.As(err, &format) || errors.Is(err, io.EOF) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(file), err)
	}
	return libs, nil
}

func copyFile(to, from string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if errors.Is(err, fs.ErrExist) {
		return nil // by two ways
	} else if err != nil {
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

// makeDisk makes a file system of what is in a directory, with room for as much again as it may
// serve.
func makeDisk(ctx context.Context, root, file string, mib int) error {
	size := int64(0)
	err := filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size() + 4096
		}
		return err
	})
	if err != nil {
		return err
	}
	_, err = output(exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-d", root, file,
		strconv.FormatInt(size>>20*5/4+int64(mib)+96, 10)+"M"))
	return err
}

// ItemBytes is how much memory an item of the PostgreSQL server's table takes, about, with all that
// belongs to it.
const ItemBytes = 330

// makeDatabase makes a database with a table of items: id, from 1 on; version, 0; and value, which
// is the MD5 of "id-version" in hex, eight times over.
func makeDatabase(ctx context.Context, root string, mib int) error {
	inside := func(input, program string, args ...string) error {
		found, err := at(filepath.Join("usr/lib/postgresql/*/bin", program))(root)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, found)
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "/"+name, args...)
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=/bin", "LC_ALL=C", "TZ=UTC"}
		cmd.Stdin = strings.NewReader(input)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root,
			Credential: &syscall.Credential{Uid: serverUser, Gid: serverUser}}
		_, err = output(cmd)
		return err
	}
	// What it is of the machine that it needs.
	null := filepath.Join(root, "dev/null")
	if err := syscall.Mknod(null, syscall.S_IFCHR|0o666, 1<<8|3); err != nil {
		return err
	}
	if err := os.Chmod(null, 0o666); err != nil {
		return err
	}
	random := filepath.Join(root, "dev/urandom")
	if err := syscall.Mknod(random, syscall.S_IFCHR|0o444, 1<<8|9); err != nil {
		return err
	}
	if err := inside("", "initdb", "-D", "/data", "-U", "postgres", "-A", "trust", "--locale=C",
		"--encoding=UTF8", "--no-sync"); err != nil {
		return err
	}
	conf := "jit = off\nsynchronous_commit = off\ndynamic_shared_memory_type = " +
		"mmap\nunix_socket_directories = '/tmp'\nautovacuum = off\ncheckpoint_timeout = " +
		"1h\nmax_wal_size = 1GB\n"
	f, err := os.OpenFile(filepath.Join(root, "data/postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(conf)
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(root, "data/pg_hba.conf"),
			[]byte("host all all 10.77.0.0/16 trust\n"), 0o644)
	}
	if err != nil {
		return err
	}
	rows := mib << 20 / ItemBytes
	sql := fmt.Sprintf(
		"create table items (id int primary key, version bigint not null, value text not null) "+
			"with (fillfactor = 90)\n"+
			"insert into items select i, 0, repeat(md5(i || '-0'), 8) from generate_series(1, "+
			"%d) i\n"+"vacuum analyze items\ncheckpoint\n", rows)
	if err := inside("create database vacate\n", "postgres", "--single", "-D", "/data",
		"postgres"); err != nil {
		return err
	}
	return inside(sql, "postgres", "--single", "-D", "/data", "vacate")
}

package host

import (
	"fmt"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"vacate/internal/link/certs"
)

// Of what is at the path of the socket, only a socket that a daemon of ours left is removed.
func TestSocketOfOthers(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("passwd"), []byte("root:x:0:0"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(path("passwd"), path("link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	dead := func(name string, mode os.FileMode) {
		t.Helper()
		l, err := net.Listen("unix", path(name))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		if err := os.Chmod(path(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	dead("others", 0o666)
	dead("ours", 0o700)
	for _, name := range []string{"passwd", "link", "dir", "others"} {
		before, err := os.Lstat(path(name))
		if err != nil {
			t.Fatal(err)
		}
		l, err := listenUnix(path(name), "")
		if err == nil {
			l.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "not touched") {
			t.Errorf("%s: %v", name, err)
		}
		after, err := os.Lstat(path(name))
		if err != nil || !os.SameFile(before, after) || before.Mode() != after.Mode() {
			t.Errorf("%s is no longer what it was: %v, %v", name, after, err)
		}
	}
	for _, name := range []string{"ours", "new"} {
		l, err := listenUnix(path(name), "")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if _, err := listenUnix(path(name), ""); err == nil ||
			!strings.Contains(err.Error(), "another daemon") {
			t.Errorf("%s has two daemons: %v", name, err)
		}
	}
}

// The group that is configured may use the socket, nobody else; and the next daemon takes its
// place.
func TestSocketGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give a file to a group")
	}
	path := filepath.Join(t.TempDir(), "sock")
	if _, err := listenUnix(path, "no-such-group"); err == nil ||
		!strings.Contains(err.Error(), "addgroup --system no-such-group") {
		t.Errorf("%v", err)
	}
	for range 2 {
		l, err := listenUnix(path, "daemon")
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		group, err := user.LookupGroupId(fmt.Sprint(info.Sys().(*syscall.Stat_t).Gid))
		if err != nil || group.Name != "daemon" || info.Mode().Perm() != 0o660 {
			t.Errorf("the socket has group %v and mode %v, %v", group, info.Mode(), err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false) // as if killed
		l.Close()
	}
}

// A check finds what would keep a daemon from its work, touches nothing, and says what is there.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := certs.Init(path("ca")); err != nil {
		t.Fatal(err)
	}
	if err := certs.Issue(path("ca"), "hosta", path("certs"), certs.DefaultDays,
		false); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"vms", "foreign"} {
		if err := os.Mkdir(path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"foreign/passwd": "root:x:0:0", "file": "",
		"vms/web1.toml": "command = [\"/bin/true\", \"-qmp\", " +
			"\"unix:{qmp},server=on,wait=off\", \"{incoming}\"]\nqmp = \"/run/x.qmp\"\n"} {
		if err := os.WriteFile(path(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	good := Config{
		Certs: path("certs"), Socket: path("run/sock"), Journal: path("journal"), VMs: path("vms"),
		Peers: map[string]Peer{"hostb": {Address: "hostb:7601"}},
	}
	says, err := good.Check()
	if err != nil || !strings.Contains(says, "host hosta, peers hostb, 1 VMs") {
		t.Errorf("%q, %v", says, err)
	}
	for _, made := range []string{"run", "journal"} {
		if _, err := os.Lstat(path(made)); err == nil {
			t.Errorf("the check made %s", made)
		}
	}
	for want, change := range map[string]func(*Config){
		"certs = ":         func(c *Config) { c.Certs = path("nowhere") },
		"vms: ":            func(c *Config) { c.VMs = path("nowhere") },
		"no directory":     func(c *Config) { c.VMs = path("file") },
		"journal: ":        func(c *Config) { c.Journal = path("nowhere/at/all") },
		"no journal of":    func(c *Config) { c.Journal = path("foreign") },
		"something else":   func(c *Config) { c.Socket = path("file") },
		"this host itself": func(c *Config) { c.Peers = map[string]Peer{"hosta": {}} },
		"paths: " + path("file") + ": it is no directory": func(c *Config) {
			c.Libvirt = &Libvirt{URI: path("none"), Paths: []string{"rbd:vms", path("file")}}
		},
		"emulators: ": func(c *Config) {
			c.Libvirt = &Libvirt{URI: path("none"), Emulators: []string{path("qemu")}}
		},
		"migrations: " + path("file") + ": it is no directory": func(c *Config) {
			c.Libvirt = &Libvirt{URI: path("none"), Migrations: path("file")}
		},
		"start libvirtd": func(c *Config) { c.Libvirt = &Libvirt{URI: path("none")} },
	} {
		c := good
		change(&c)
		if says, err := c.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q, %v; want something about %q", says, err, want)
		}
	}
	for want, change := range map[string][2]string{
		"command: ": {"/bin/true", "/nowhere/qemu"},
		"user = ":   {"qmp = ", "user = \"nobody-of-that-name\"\nqmp = "},
	} {
		file := path("vms/web1.toml")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		wrong := strings.Replace(string(text), change[0], change[1], 1)
		if err := os.WriteFile(file, []byte(wrong), 0o644); err != nil {
			t.Fatal(err)
		}
		if says, err := good.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q, %v; want something about %q", says, err, want)
		}
		if err := os.WriteFile(file, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	self := good
	self.Peers = map[string]Peer{"hosta": {}}
	if h, err := Open(self, "test", nil); err == nil ||
		!strings.Contains(err.Error(), "this host itself") {
		t.Errorf("a daemon has itself as its peer: %v", err)
		if err == nil {
			h.close()
		}
	}
}

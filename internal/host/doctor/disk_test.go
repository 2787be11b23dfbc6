package doctor

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// qcow2 returns the beginning of an image that is backed by another.
func qcow2(backing string) string {
	h := make([]byte, 104)
	copy(h, "QFI\xfb")
	binary.BigEndian.PutUint32(h[4:], 3)
	binary.BigEndian.PutUint64(h[8:], 104)
	binary.BigEndian.PutUint32(h[16:], uint32(len(backing)))
	return string(h) + backing
}

func FuzzBackedBy(f *testing.F) {
	f.Add([]byte(qcow2("base.raw")))
	f.Add([]byte(qcow2(strings.Repeat("x", 1024))))
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if name := backedBy(path); len(name) > 1023 || !strings.Contains(string(b), name) {
			t.Errorf("%q", name)
		}
	})
}

func TestTwin(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "sub/top.qcow2"), qcow2("mid.qcow2"))
	put(t, filepath.Join(dir, "sub/mid.qcow2"), qcow2("../base.raw"))
	put(t, filepath.Join(dir, "base.raw"), qcow2("/etc/passwd")) // as its guest wrote it
	put(t, filepath.Join(dir, "evil.raw"), qcow2("/etc/passwd"))
	put(t, filepath.Join(dir, "loop.qcow2"), qcow2("loop.qcow2"))
	tw := Twin(t.Context(), TwinOptions{Name: "web1", Dir: dir, User: "nobody",
		Args: []string{"/no/qemu", "-m", "1G",
			"-drive", "if=none,format=qcow2,file=sub/top.qcow2", "-drive",
			"file=evil.raw,format=raw", "-drive", "file=evil.raw",
			"-drive", "file=loop.qcow2,format=qcow2", "-cdrom", "missing.iso", "-drive",
			"file=nbd://filer:1/x,format=raw"}})
	var paths []string
	for _, d := range tw.Disks {
		rel, err := filepath.Rel(dir, d.Path)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, rel)
		if (d.Error != "") != (rel == "missing.iso") {
			t.Errorf("%+v", d)
		}
	}
	if want := []string{"sub/top.qcow2", "sub/mid.qcow2", "base.raw", "evil.raw", "loop.qcow2",
		"missing.iso"}; !slices.Equal(paths, want) {
		t.Errorf("looked at %q", paths)
	}
	if !slices.Equal(tw.URLs, []string{"nbd://filer:1/x"}) || tw.QEMU.Error == "" ||
		tw.Error != "" {
		t.Errorf("%+v", tw)
	}
	if word("/proc/sys/vm/unprivileged_userfaultfd") == "0" &&
		!strings.Contains(tw.Userfaultfd, "unprivileged_userfaultfd is 0") {
		t.Errorf("nobody may use userfaultfd: %q", tw.Userfaultfd)
	}
	if tw := Twin(t.Context(), TwinOptions{Name: "x"}); tw.Error == "" {
		t.Error("a description without a program")
	}
	if tw := Twin(t.Context(),
		TwinOptions{Name: "x", Error: "none", Args: []string{"/bin/sh"}}); tw.Error != "none" {
		t.Errorf("%+v", tw)
	}
}

func TestMayUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	put(t, path, "")
	for mode, want := range map[os.FileMode]bool{0o666: true, 0o660: false, 0o644: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if ok, err := mayUse("nobody", path); err != nil || ok != want {
			t.Errorf("%o: %v, %v", mode, ok, err)
		}
	}
	if _, err := mayUse("no-such-user", path); err == nil {
		t.Error("a user that does not exist")
	}
}

func TestImages(t *testing.T) {
	for _, tt := range []struct {
		args string // separated by bars
		want []image
	}{
		{"-hda|a.img|--cdrom|b.iso", []image{{"a.img", ""}, {"b.iso", ""}}},
		{"-drive|if=none,file=a,,b.raw,format=raw", []image{{"a,b.raw", "raw"}}},
		{"-drive|file.driver=file,file.filename=/x,driver=qcow2", []image{{"/x", "qcow2"}}},
		{"-blockdev|driver=file,filename=/x,node-name=f|-blockdev|driver=qcow2,file=f,node-name=q",
			[]image{{"/x", "qcow2"}}},
		{"-blockdev|driver=qcow2,file=f|-blockdev|driver=host_device,filename=/dev/sdb,node-name=f",
			[]image{{"/dev/sdb", "qcow2"}}},
		{`-blockdev|{"driver":"qcow2","file":{"driver":"file","filename":"/x,y"}}`,
			[]image{{"/x,y", "qcow2"}}},
		{`-blockdev|{"driver"|-drive|if=none|-device|virtio-blk-pci,file=no|-drive`, nil},
		{"file=x|-m|1", nil},
	} {
		if got := images(strings.Split(tt.args, "|")); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v", tt.args, got)
		}
	}
}

func TestLocalFile(t *testing.T) {
	for name, want := range map[string]string{
		"/x": "/x", "x": "x", "file:x": "x", "/a:b": "/a:b", "host_device:/dev/sdb": "/dev/sdb",
		"nbd://h/x": "", "rbd:pool/x": "", "": "", "json:{": "",
		`json:{"driver":"qcow2","file":{"driver":"file","filename":"/var/tmp/vl.1"},"backing":{"driver":"raw"}}`: "/var/tmp/vl.1",
		`json:{"driver":"blkdebug","image":{"driver":"file","filename":"d"}}`:                                    "d",
		`json:{"driver":"raw","file":{"driver":"https","filename":"d"}}`:                                         "",
		`json:{"driver":"raw","file":{"driver":"nbd","host":"h"}}`:                                               "",
		"json:" + strings.Repeat(`{"file":`, 100) + "{}" +
			strings.Repeat("}", 100): "",
	} {
		got, ok := localFile(name)
		if ok != (want != "") || ok && got != want {
			t.Errorf("%.60s: %q, %v", name, got, ok)
		}
	}
}

func FuzzImages(f *testing.F) {
	f.Add("-drive", "if=none,file=a,,b,format=raw")
	f.Add("-blockdev", `{"driver":"qcow2","file":{"driver":"file","filename":"/x"}}`)
	f.Fuzz(func(t *testing.T, option, value string) {
		for _, im := range images([]string{option, value}) {
			localFile(im.name)
			localFile("json:" + im.name)
		}
	})
}

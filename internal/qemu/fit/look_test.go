package fit

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
)

// launch starts a QEMU in a directory, for its drives only.
func launch(t *testing.T, dir string, args ...string) *qmp.Client {
	t.Helper()
	program, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("needs qemu-system-x86_64: install the package qemu-system-x86")
	}
	sock := filepath.Join(t.TempDir(), "qmp")
	cmd := exec.Command(program,
		append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-machine",
			"pc,accel=tcg", "-m", "64", "-S",
			"-qmp", "unix:" + sock + ",server=on,wait=off"}, args...)...)
	cmd.Dir = dir
	var said strings.Builder
	cmd.Stderr = &said
	if err := process.StartBound(cmd, cmd.Start); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for {
		q, err := qmp.Dial(t.Context(), sock)
		if err == nil {
			t.Cleanup(func() { q.Close() })
			return q
		}
		select {
		case <-ended:
			t.Fatalf("QEMU ended: %s", said.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// run gives QEMU a command.
func run(t *testing.T, q *qmp.Client, command string, args any) {
	t.Helper()
	if err := q.Run(t.Context(), command, args, nil); err != nil {
		t.Fatal(err)
	}
}

// create has QEMU make an image.
func create(t *testing.T, q *qmp.Client, path string, options map[string]any) {
	t.Helper()
	put(t, path, "")
	run(t, q, "blockdev-add", map[string]any{"driver": "file", "filename": path,
		"node-name": "new"})
	options["file"] = "new"
	for tries := 10; ; tries-- {
		said := job(t, q, "blockdev-create", map[string]any{"job-id": "create", "options": options})
		if said == "" {
			break
		}
		// QEMU measures how fast it makes a key for LUKS, and gives up where it hardly gets the
		// CPU.
		if !strings.Contains(said, "CPU usage") || tries == 0 {
			t.Fatal(said)
		}
	}
	run(t, q, "blockdev-del", map[string]any{"node-name": "new"})
}

// job runs a job named "create" to its end, and returns its error; "" if there is none.
func job(t *testing.T, q *qmp.Client, command string, args map[string]any) string {
	t.Helper()
	run(t, q, command, args)
	for {
		var jobs []struct{ Status, Error string }
		if err := q.Run(t.Context(), "query-jobs", nil, &jobs); err != nil || len(jobs) != 1 {
			t.Fatal(jobs, err)
		}
		if jobs[0].Status == "concluded" {
			run(t, q, "job-dismiss", map[string]any{"id": "create"})
			return jobs[0].Error
		}
		time.Sleep(time.Millisecond)
	}
}

func disksOf(t *testing.T, q *qmp.Client) Disks {
	t.Helper()
	d, err := DisksOf(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	return copied(t, d)
}

// Real QEMUs' drives are told apart as far as they are apart, however they are set up.
func TestDisksOfQEMU(t *testing.T) {
	if testing.Short() {
		t.Skip("starts some 50 QEMUs")
	}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	const megabyte = 1 << 20
	for _, name := range []string{"a.raw", "b.raw", "data.raw", "sub/c.raw", "floppy.img"} {
		put(t, at(name), "")
		if err := os.Truncate(at(name), megabyte); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(at("floppy.img"), 1440<<10); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink("a.raw", at("link.raw")),
		os.Symlink(at("sub"), at("way"))); err != nil {
		t.Fatal(err)
	}
	maker := launch(t, dir, "-object", "secret,id=s,data=secret")
	create(t, maker, at("base.qcow2"), map[string]any{"driver": "qcow2", "size": megabyte})
	create(t, maker, at("top.qcow2"),
		map[string]any{"driver": "qcow2", "size": megabyte, "backing-file": at("base.qcow2"),
			"backing-fmt": "qcow2"})
	create(t, maker, at("disk.luks"),
		map[string]any{"driver": "luks", "size": megabyte, "key-secret": "s", "iter-time": 10})
	put(t, at("outside.raw"), "")
	run(t, maker, "blockdev-add",
		map[string]any{"driver": "file", "filename": at("outside.raw"), "node-name": "outside"})
	create(t, maker, at("apart.qcow2"),
		map[string]any{"driver": "qcow2", "size": megabyte, "data-file": "outside",
			"data-file-raw": true})
	run(t, maker, "quit", nil)

	drive := func(option string) []string {
		return []string{"-drive", "if=none,id=d," + option, "-device", "virtio-blk-pci,drive=d"}
	}
	for name, c := range map[string]struct {
		source, twin []string
		says         string // of what is wrong; "" for nothing
	}{
		"raw": {drive("file=a.raw,format=raw"),
			drive("file=" + at("a.raw") + ",format=raw"), ""},
		"by a link": {drive("file=a.raw,format=raw"), drive("file=link.raw,format=raw"),
			""},
		"by a linked directory": {drive("file=sub/c.raw,format=raw"),
			drive("file=" + at("way/c.raw") + ",format=raw"), ""},
		"another": {drive("file=a.raw,format=raw"), drive("file=b.raw,format=raw"),
			"two files of one machine"},
		"another name for the drive": {drive("file=a.raw,format=raw"),
			[]string{"-blockdev", "driver=raw,node-name=n,file.driver=file,file.filename=a.raw",
				"-device", "virtio-blk-pci,drive=n"}, ""},
		"a chain": {drive("file=top.qcow2,format=qcow2"),
			drive("file=top.qcow2,format=qcow2"), ""},
		"without its base": {drive("file=top.qcow2,format=qcow2"),
			drive("file=base.qcow2,format=qcow2"),
			"backed by qcow2 " + at("base.qcow2") + " on the source"},
		"as raw": {drive("file=top.qcow2,format=qcow2"),
			drive("file=top.qcow2,format=raw"), "on the destination"},
		"an encrypted one": {append([]string{"-object", "secret,id=s,data=secret"},
			drive("file=disk.luks,format=luks,key-secret=s")...),
			append([]string{"-object", "secret,id=other,data=secret"},
				drive("file=disk.luks,format=luks,key-secret=other")...), ""},
		"a file for the data": {drive("file=apart.qcow2,format=qcow2"),
			drive("file=apart.qcow2,format=qcow2"), ""},
		"another file for the data": {drive("file=apart.qcow2,format=qcow2"),
			drive("file=apart.qcow2,format=qcow2,data-file.driver=file,data-file.filename=b.raw"),
			"b.raw on the destination is another"},
		"a temporary one": {drive("file=a.raw,format=raw,snapshot=on"),
			drive("file=a.raw,format=raw,snapshot=on"), "deleted"},
		"filters": {[]string{"-object", "throttle-group,id=g", "-blockdev",
			"driver=throttle,throttle-group=g,node-name=n,file.driver=copy-on-read,file.file.driver=qcow2,file.file.file.driver=file,file.file.file.filename=top.qcow2",
			"-device", "virtio-blk-pci,drive=n"}, drive("file=top.qcow2,format=qcow2"), ""},
		"a floppy": {[]string{"-fda", "floppy.img"}, []string{"-fda", "floppy.img"}, ""},
		"another floppy": {[]string{"-fda", "floppy.img"}, []string{"-fda", "link.raw"},
			"disk \"floppy0\""},
		"a directory": {drive("file=fat:sub,format=raw,readonly=on"),
			drive("file=fat:sub,format=raw,readonly=on"), ""},
		"nothing":         {drive("driver=null-co,size=1M"), drive("driver=null-co,size=1M"), ""},
		"no drive at all": {nil, nil, ""},
		"unplugged":       {drive("file=a.raw,format=raw"), nil, "the destination has none there"},
		"ejected": {[]string{"-drive", "if=none,id=cd,media=cdrom", "-device", "ide-cd,drive=cd"},
			[]string{"-drive", "if=none,id=cd,media=cdrom,file=a.raw,format=raw", "-device",
				"ide-cd,drive=cd"}, `disk "cd" is empty on the source`},
		"not of a device": {[]string{"-drive", "if=none,id=spare,file=a.raw,format=raw"}, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			source := disksOf(t, launch(t, dir, c.source...))
			twin := disksOf(t, launch(t, dir, append(c.twin, "-incoming", "defer")...))
			found := source.Against(twin)
			if c.says == "" && len(found) > 0 || c.says != "" &&
				(len(found) != 1 || !strings.Contains(found.Err().Error(), c.says)) {
				t.Errorf("%v; want %q", found, c.says)
			}
			if c.says != "" {
				return
			}
			// On two machines, each with files of its own, nothing is the same but what holds no
			// file.
			twin.Boot = "another"
			files := 0
			for _, d := range source.Drives {
				if d.Root != nil && d.Root.Driver != "null-co" {
					files++
				}
			}
			if found := source.Against(twin); len(found) != files {
				t.Errorf("%d files, on two machines: %v", files, found)
			}
		})
	}

	// What counts is the file that QEMU has open, and not what has its name by now.
	t.Run("replaced", func(t *testing.T) {
		source := launch(t, dir, drive("file=a.raw,format=raw,file.locking=off")...)
		if err := os.Rename(at("b.raw"), at("a.raw")); err != nil {
			t.Fatal(err)
		}
		twin := launch(t, dir,
			append(drive("file=a.raw,format=raw,file.locking=off"), "-incoming", "defer")...)
		found := disksOf(t, source).Against(disksOf(t, twin))
		if len(found) != 1 || !strings.Contains(found[0].Text, "deleted") {
			t.Errorf("%v", found)
		}
	})
	t.Run("renamed", func(t *testing.T) {
		source := launch(t, dir, drive("file=sub/c.raw,format=raw")...)
		if err := errors.Join(os.Rename(at("sub/c.raw"), at("sub/old.raw")),
			os.WriteFile(at("sub/c.raw"), make([]byte, megabyte), 0o600)); err != nil {
			t.Fatal(err)
		}
		twin := launch(t, dir, append(drive("file=sub/c.raw,format=raw"), "-incoming", "defer")...)
		if found := disksOf(t, source).Against(disksOf(t, twin)); len(found) != 1 ||
			!strings.Contains(found[0].Text, "no file of this name open") {
			t.Errorf("%v", found)
		}
	})
}

package fit

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// web1 is a VM's drives: an overlay on the network, a flash, and an empty CD-ROM.
func web1() Disks {
	overlay, base := on("nfs4", "filer:/vms/", 77), on("nfs4", "filer:/vms/", 78)
	overlay.Path, base.Path = "/vms/web1.qcow2", "/vms/base.raw"
	vars := on("ext4", "/dev/vda1/", 5)
	return Disks{Boot: "a", Network: 3, Drives: []Drive{
		{Name: "vd0", Device: "/machine/peripheral/vd0/virtio-backend",
			Root: &Node{Driver: "qcow2", Size: 8 << 30, Direct: true, Children: []Node{
				{Role: "file", Driver: "file", Direct: true, File: &overlay},
				{Role: "backing", Driver: "raw", Size: 8 << 30, ReadOnly: true,
					Children: []Node{{Role: "file", Driver: "file", ReadOnly: true, File: &base}}},
			}}},
		{Name: "pflash1", Device: "/machine/system.flash1", Carried: true,
			Root: &Node{Driver: "raw", Size: 64 << 10,
				Children: []Node{{Role: "file", Driver: "file", File: &vars}}}},
		{Name: "cd", Device: "/machine/unattached/device[20]"},
	}}
}

// copied returns facts that share nothing with others, by way of the wire.
func copied(t *testing.T, d Disks) Disks {
	t.Helper()
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	var c Disks
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// On two machines a disk passes if it is proven to be the same. Each difference is named. An
// operator's word lets those pass that nobody else can know.
func TestDisksAgainst(t *testing.T) {
	file := func(d *Disks) *File { return d.Drives[0].Root.Children[0].File }
	address := func(d *Disks, driver, name string) {
		text, own := Address(driver, name)
		d.Drives[0].Root.Children[0] = Node{Role: "file", Driver: driver, Address: text, Own: own}
	}
	for _, c := range []struct {
		name   string
		change func(a, b *Disks)
		says   string // of the mismatch; "" for none
		trust  bool   // a word helps
	}{
		{"the same", func(a, b *Disks) {}, "", false},
		{"numbered otherwise by another QEMU",
			func(a, b *Disks) { b.Drives[2].Device = "/machine/unattached/device[23]" }, "", false},
		{"of another name", func(a, b *Disks) {
			b.Drives[0].Name, b.Drives[0].Device = "hd0", "/machine/peripheral/hd0/virtio-backend"
		}, "", false},
		{"flashes of unlike size", func(a, b *Disks) { b.Drives[1].Root.Size = 4 << 20 },
			`disk "pflash1" has 64 KiB on the source, 4 MiB on the destination`, false},
		{"missing", func(a, b *Disks) { b.Drives = b.Drives[1:] },
			`the source has disk "vd0" (/machine/peripheral/vd0/virtio-backend) and the destination has none there`, false},
		{"one too many", func(a, b *Disks) { a.Drives = a.Drives[1:] },
			`the destination has disk "vd0" (/machine/peripheral/vd0/virtio-backend) and the source has none there`, false},
		{"a medium there", func(a, b *Disks) { b.Drives[2].Root = b.Drives[0].Root },
			`disk "cd" is empty on the source, and the destination has qcow2 /vms/web1.qcow2, backed by raw /vms/base.raw in it`, false},
		{"a medium here", func(a, b *Disks) { a.Drives[2].Root = a.Drives[0].Root },
			`disk "cd" is empty on the destination, and the source has qcow2 /vms/web1.qcow2`,
			false},
		{"resized", func(a, b *Disks) { a.Drives[0].Root.Size = 9 << 30 },
			`disk "vd0" has 9 GiB on the source, 8 GiB on the destination`, false},
		{"read-only there", func(a, b *Disks) { b.Drives[0].ReadOnly = true },
			`disk "vd0" is writable on the source and read-only on the destination`, false},
		{"a snapshot more", func(a, b *Disks) { b.Drives[0].Root = &a.Drives[0].Root.Children[1] },
			`disk "vd0" is qcow2 /vms/web1.qcow2, backed by raw /vms/base.raw on the source, raw /vms/base.raw on the destination`, true},
		{"another format", func(a, b *Disks) { b.Drives[0].Root.Driver = "raw" },
			`raw /vms/web1.qcow2, backed by raw /vms/base.raw on the destination`, true},
		{"another layer", func(a, b *Disks) {
			b.Drives[0].Root.Children[1].Children[0].File.Inode = 99
		},
			`disk "vd0" is /vms/base.raw on the source, and /vms/base.raw on the destination is another: two files of filer:/vms/`, true},
		{"another file", func(a, b *Disks) { file(b).Inode = 99 },
			"two files of filer:/vms/ (nfs4)", true},
		{"a local file", func(a, b *Disks) { file(a).FS, file(b).FS = "ext4", "ext4" },
			"is another: each host has its own file, on ext4", true},
		{"another server", func(a, b *Disks) { file(b).Export = "filer2:/vms/" },
			"it cannot be shown that /vms/web1.qcow2 on the destination is the same", true},
		{"not to be looked at", func(a, b *Disks) { *file(b) = File{Path: "/x", Error: "EACCES"} },
			"EACCES", true},
		{"a local file, kept equal", func(a, b *Disks) {
			for _, d := range []*Disks{a, b} {
				f := d.Drives[0].Root.Children[1].Children[0].File
				f.FS, f.Digest = "ext4", "equal"
			}
		}, "", false},
		{"a local file, equal now", func(a, b *Disks) {
			for _, d := range []*Disks{a, b} {
				file(d).FS, file(d).Digest = "ext4", "equal"
			}
		}, "is another", true},
		{"cached here", func(a, b *Disks) { a.Drives[0].Root.Children[0].Direct = false },
			"(/vms/web1.qcow2): the host caches it, so the destination may read old data: start " +
				"the VM, or reopen the drive", true},
		{"cached there", func(a, b *Disks) { b.Drives[0].Root.Children[0].Direct = false },
			"on the destination: the host caches it", true},
		{"cached on a cluster", func(a, b *Disks) {
			for _, d := range []*Disks{a, b} {
				d.Drives[0].Root.Children[0].Direct, file(d).FS, file(d).FSID = false, "ceph", "7"
			}
		}, "", false},
		{"not flushed", func(a, b *Disks) { a.Drives[0].Root.Children[0].NoFlush = true },
			"cache=unsafe", true},
		{"one server of disks", func(a, b *Disks) {
			address(a, "nbd", "nbd://filer:10809/web1")
			address(b, "nbd", "nbd://filer:10809/web1")
		}, "", false},
		{"two disks of a server", func(a, b *Disks) {
			address(a, "nbd", "nbd://filer:10809/web1")
			address(b, "nbd", "nbd://filer:10809/web2")
		}, "is nbd://filer:10809/web1 on the source, nbd://filer:10809/web2 on the destination",
			true},
		{"each host its own server of disks", func(a, b *Disks) {
			address(a, "nbd", "nbd://localhost:10809/web1")
			address(b, "nbd", "nbd://localhost:10809/web1")
		}, "is nbd://localhost:10809/web1, which means another thing on each host", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := copied(t, web1()), copied(t, web1())
			b.Boot = "b"
			c.change(&a, &b)
			if err := errors.Join(a.Check(), b.Check()); err != nil {
				t.Fatal(err)
			}
			found := a.Against(b)
			if c.says == "" {
				if len(found) > 0 {
					t.Errorf("%v", found)
				}
				return
			}
			if len(found) != 1 || !strings.Contains(found.Err().Error(), c.says) ||
				found[0].Remedy == "" {
				t.Fatalf("%v; want %q", found, c.says)
			}
			_, rest, _ := strings.Cut(found[0].Text, `disk "`)
			drive, _, _ := strings.Cut(rest, `"`)
			if named := strings.Contains(found[0].Remedy, "--trust-disk "+drive); named != c.trust {
				t.Errorf("the remedy names trust: %v: %s", named, found[0].Remedy)
			}
			if a.Trust([]string{drive}) == nil {
				if left := a.Against(b); (len(left) == 0) != c.trust {
					t.Errorf("with trust: %v", left)
				}
			}
		})
	}
}

// On one machine neither caches nor addresses of its own tell two hosts apart.
func TestOneMachine(t *testing.T) {
	a, b := web1(), web1()
	for _, d := range []*Disks{&a, &b} {
		d.Drives[0].Root.Children[0].Direct, d.Drives[0].Root.Children[0].File.FS = false, "ext4"
		text, own := Address("nbd", "nbd+unix:///x?socket=/run/x")
		d.Drives = append(d.Drives,
			Drive{Name: "n", Device: "n", Root: &Node{Driver: "nbd", Address: text, Own: own}})
	}
	if found := a.Against(b); len(found) > 0 {
		t.Errorf("%v", found)
	}
	b.Network++
	if found := a.Against(b); len(found) != 1 || !strings.Contains(found[0].Text, `disk "n"`) {
		t.Errorf("%v", found)
	}
}

func TestTrust(t *testing.T) {
	d := web1()
	if err := d.Trust([]string{"vd0", "hda"}); err == nil ||
		!strings.Contains(err.Error(), `no disk "hda" to trust: it has "vd0", "pflash1", "cd"`) {
		t.Error(err)
	}
	if err := d.Trust([]string{"vd0"}); err != nil || len(d.Trusted) != 1 {
		t.Error(err)
	}
}

func TestAddress(t *testing.T) {
	for name, c := range map[string]struct {
		driver, text string
		own          bool
	}{
		"nbd://Filer:10809/x":                {"nbd", "nbd://Filer:10809/x", false},
		"nbd://127.0.0.1/x":                  {"nbd", "nbd://127.0.0.1/x", true},
		"nbd+unix:///x?socket=/run/x":        {"nbd", "nbd+unix:///x?socket=/run/x", true},
		"nbd:localhost:1:exportname=x":       {"nbd", "nbd:localhost:1:exportname=x", true},
		"iscsi://bob%25secret@filer/iqn.1/0": {"iscsi", "iscsi://filer/iqn.1/0", false},
		"https://bob:secret@filer/x.iso":     {"https", "https://filer/x.iso", false},
		"rbd:pool/image:conf=/etc/ceph.conf": {"rbd", "rbd:pool/image:conf=/etc/ceph.conf", false},
		"fat:rw:/srv":                        {"vvfat", "fat:rw:/srv", true},
		`json:{"driver":"rbd","pool":"p","image":"i","user":"bob","key-secret":"s"}`: {"rbd",
			"driver=rbd,image=i,pool=p", false},
		`json:{"driver":"nbd","server":{"type":"unix","path":"/x"}}`: {"nbd",
			"driver=nbd,server.path=/x,server.type=unix", true},
		`json:{"driver":"nbd","server":{"type":"inet","host":"::1","port":"1"}}`: {"nbd",
			"driver=nbd,server.host=::1,server.port=1,server.type=inet", true},
		`json:{"driver":"gluster","server":[{"host":"a"},{"host":"b"}],"debug":4,"x":true}`: {
			"gluster", "debug=4,driver=gluster,server.0.host=a,server.1.host=b,x=true", false},
		`json:{`: {"nbd", "nbd", true},
		`json:{"driver":"nvme","device":"0000:01:00.0"}`: {"nvme",
			"device=0000:01:00.0,driver=nvme", true},
	} {
		if text, own := Address(c.driver, name); text != c.text || own != c.own {
			t.Errorf("%s: %q, %v", name, text, own)
		}
	}
}

// What a peer sends is bounded before it is compared.
func TestDisksCheck(t *testing.T) {
	deep := Node{}
	for range maxLayers {
		deep = Node{Children: []Node{deep}}
	}
	wide := Node{Children: make([]Node, maxNodes)}
	drive := func(n Node) Disks { return Disks{Drives: []Drive{{Root: &n}}} }
	for name, d := range map[string]Disks{
		"deep":        drive(deep),
		"wide":        drive(wide),
		"drives":      {Drives: make([]Drive, maxDrives+1)},
		"trusted":     {Trusted: make([]string, maxDrives+1)},
		"long":        {Boot: strings.Repeat("x", maxPath+1)},
		"no UTF-8":    {Trusted: []string{"\xff"}},
		"long path":   drive(Node{File: &File{Path: strings.Repeat("x", maxPath+1)}}),
		"long digest": drive(Node{File: &File{Digest: strings.Repeat("x", maxPath+1)}}),
		"huge":        drive(Node{Size: maxSize + 1}),
	} {
		if err := d.Check(); !errors.Is(err, ErrFacts) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := web1().Check(); err != nil {
		t.Error(err)
	}
}

// Whatever a peer says of its disks is turned away, or compared without harm; and what is equal to
// itself passes on one machine where it can be looked at.
func FuzzDisks(f *testing.F) {
	b, err := json.Marshal(web1())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, b)
	f.Add(
		[]byte(
			`{"boot":"a","drives":[{"name":"x","root":{"address":"nbd://h/x","children":[{"file":{}}]}}]}`), b)
	f.Fuzz(func(t *testing.T, one, other []byte) {
		var a, b Disks
		if json.Unmarshal(one, &a) != nil || json.Unmarshal(other, &b) != nil || a.Check() != nil ||
			b.Check() != nil {
			return
		}
		for _, m := range append(a.Against(b), b.Against(a)...) {
			if n := len(m.Text) + len(m.Remedy); n > 20*maxPath {
				t.Errorf("%d bytes", n)
			}
		}
	})
}

// FuzzGraph has what QEMU may say of its block layer become drives within bounds.
func FuzzGraph(f *testing.F) {
	recordings, err := filepath.Glob("../../host/doctor/testdata/*.jsonl")
	if err != nil || len(recordings) == 0 {
		f.Fatal("no recordings", err)
	}
	for _, file := range recordings {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		replies := map[string]string{}
		for line := range strings.Lines(string(b)) {
			var x struct {
				Execute string
				Return  json.RawMessage
			}
			if json.Unmarshal([]byte(line), &x) == nil {
				replies[x.Execute] = string(x.Return)
			}
		}
		f.Add(
			fmt.Sprintf(`{"Blocks":%s,"Nodes":%s,"Edges":%s,"Kinds":{"/machine/x":"cfi.pflash01"}}`,
				replies["query-block"], replies["query-named-block-nodes"],
				replies["x-debug-query-block-graph"]))
	}
	f.Add(`{"Blocks":[{"qdev":"x","inserted":{"node-name":"a"}}],"Nodes":[{"node-name":"a","drv":"raw"},{"node-name":"b","drv":"throttle"}],
		"Edges":{"nodes":[{"id":1,"type":"block-driver","name":"a"},{"id":2,"type":"block-driver","name":"b"}],
		"edges":[{"parent":1,"child":2,"name":"file"},{"parent":2,"child":1,"name":"file"}]}}`)
	f.Fuzz(func(t *testing.T, said string) {
		var g graph
		if json.Unmarshal([]byte(said), &g) != nil {
			return
		}
		drives, err := g.drives(func(name string, _ bool) File { return File{Path: name} })
		if err != nil {
			return
		}
		g.volatile()
		d := Disks{Drives: drives}
		if d.Check() == nil {
			d.Against(d)
		}
	})
}

// Work is named with what to do about it; what is over is not.
func TestWork(t *testing.T) {
	for _, c := range []struct{ said, want string }{
		{`{}`, ""},
		{
			`{"Jobs":[{"id":"j","type":"create","status":"concluded"},{"id":"k","type":"create","status":"null"}],"Dump":{"status":"none"}}`, ""},
		{`{"Jobs":[{"id":"backup0","type":"backup","status":"running","current-progress":37,"total-progress":100}],
			"BlockJobs":[{"device":"backup0","type":"backup","status":"running"}]}`,
			"an unfinished job \"backup0\" (backup, running, 37 %): wait for its end, or end " +
				"it: `job-cancel` with id \"backup0\" in QEMU's monitor"},
		{`{"BlockJobs":[{"device":"d","type":"mirror","status":"ready","len":4,"offset":4}]}`,
			"an unfinished job \"d\" (mirror, ready, 100 %): end it: `job-complete` or " +
				"`job-cancel` with id \"d\" in QEMU's monitor"},
		{`{"Exports":[{"id":"e","type":"nbd","node-name":"n"}]}`,
			"an export \"e\" of its disk \"n\" (nbd): end it: `block-export-del` with id \"e\" " +
				"in QEMU's monitor"},
		{`{"Dump":{"status":"active","completed":1,"total":0}}`,
			"an unfinished dump of its memory (0 %): wait for its end"},
		{`{"Snapshot":true}`,
			"an unfinished snapshot of its memory (background-snapshot): wait for its end, or " +
				"`migrate_cancel` in QEMU's monitor"},
	} {
		var r replies
		if err := json.Unmarshal([]byte(c.said), &r); err != nil {
			t.Fatal(err)
		}
		var said []string
		for _, w := range r.work() {
			said = append(said, w.Text+": "+w.Remedy)
		}
		if got := strings.Join(said, "\n"); got != c.want {
			t.Errorf("%s: %q", c.said, got)
		}
	}
}

func FuzzWork(f *testing.F) {
	f.Add(
		`{"Jobs":[{"id":"j","type":"mirror","status":"ready","current-progress":-1,"total-progress":9223372036854775807}],"Dump":{"status":"active"}}`)
	f.Fuzz(func(t *testing.T, said string) {
		var r replies
		if json.Unmarshal([]byte(said), &r) != nil {
			return
		}
		work := r.work()
		if len(work) > maxWork {
			t.Errorf("%d things", len(work))
		}
		for _, w := range work {
			if len(w.Text) > 20*maxName || w.Remedy == "" {
				t.Errorf("%+v", w)
			}
		}
	})
}

package doctor

import (
	"strings"
	"testing"

	"vacate/internal/qemu/fit"
)

func TestDomain(t *testing.T) {
	on := func(fs string) []DiskFacts {
		return []DiskFacts{{Drive: "vda", File: fit.File{Path: "/srv/vms/web1.raw", FS: fs}}}
	}
	for name, c := range map[string]struct {
		devices   string
		rest      string
		snapshots int
		disks     []DiskFacts
		trusted   bool
		state     string
		level     Level
		says      string
	}{
		"clean": {disks: on("nfs4"), level: OK, says: "nothing"},
		"host's device": {devices: "<hostdev type='pci'><alias name='hostdev0'/></hostdev>",
			level: Fatal, says: "hostdev0 (pci)"},
		"network card of the host": {
			devices: "<interface type='hostdev'><alias name='hostdev1'/></interface>",
			level:   Fatal, says: "hostdev1"},
		"virtiofs": {devices: "<filesystem><driver type='virtiofs'/><target dir='share'/>" +
			"</filesystem>", level: Fatal, says: `"share"`},
		"shared memory": {devices: "<shmem name='glass'/>", level: Fatal, says: `"glass"`},
		"transient disk": {devices: "<disk><driver cache='none'/><target dev='vdb'/>" +
			"<transient/></disk>",
			level: Fatal, says: "disk vdb is transient"},
		"block job": {devices: "<disk><driver cache='none'/><target dev='vdb'/>" +
			"<mirror type='file'/></disk>",
			level: Fatal, says: "block job"},
		"arguments": {rest: "<qemu:commandline><qemu:arg value='-S'/></qemu:commandline>",
			level: Fatal, says: "qemu:commandline"},
		"snapshots":  {snapshots: 2, level: Fatal, says: "it has 2"},
		"local disk": {disks: on("ext4"), level: Fatal, says: "vda (/srv/vms/web1.raw on ext4)"},
		"local disk that is said to be the same": {disks: on("ext4"), trusted: true, level: Note,
			says: "vda (/srv/vms/web1.raw on ext4)"},
		"cached disk": {devices: "<disk><driver cache='writeback'/><target dev='vdb'/></disk>",
			level: Fatal, says: "caches what the guest writes to vdb"},
		"cached disk that is trusted": {devices: "<disk><target dev='vdb'/></disk>", trusted: true,
			level: OK, says: "nothing"},
		"standing": {state: "paused", level: Fatal, says: "only while it runs"},
	} {
		t.Run(name, func(t *testing.T) {
			found, err := Domain("hosta", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/"+
				"qemu/1.0'><devices>"+c.devices+"</devices>"+c.rest+"</domain>", c.snapshots,
				VMFacts{State: c.state, Disks: c.disks}, c.trusted)
			if err != nil || len(found) != 1 {
				t.Fatalf("%+v, %v", found, err)
			}
			f := found[0]
			if f.Level != c.level || !strings.Contains(f.Text, c.says) ||
				(f.Remedy == "") != (c.level <= Note) {
				t.Errorf("%+v; want %v: %s", f, c.level, c.says)
			}
		})
	}
	if found, err := Domain("hosta", "<domain>", 0, VMFacts{}, false); err == nil {
		t.Errorf("%+v", found)
	}
}

package doctor

import (
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
)

// Domain finds what of a domain of libvirt's blocks an eviction, by its live description and by
// what its QEMU says. The other host is asked besides what its description may name. trusted is
// that the operator says of the disks that both hosts have them.
func Domain(host, description string, snapshots int, vm VMFacts,
	trusted bool) ([]Finding, error) {
	var d struct {
		Devices struct {
			Hostdevs []struct {
				Type  string    `xml:"type,attr"`
				Alias nameValue `xml:"alias"`
			} `xml:"hostdev"`
			Filesystems []struct {
				Target struct {
					Dir string `xml:"dir,attr"`
				} `xml:"target"`
			} `xml:"filesystem"`
			Shmem []nameValue `xml:"shmem"`
			Disks []struct {
				Target struct {
					Dev string `xml:"dev,attr"`
				} `xml:"target"`
				Device string `xml:"device,attr"`
				Driver struct {
					Cache string `xml:"cache,attr"`
				} `xml:"driver"`
				ReadOnly  *struct{} `xml:"readonly"`
				Shareable *struct{} `xml:"shareable"`
				Source    struct {
					Protocol string `xml:"protocol,attr"`
				} `xml:"source"`
				Transient *struct{} `xml:"transient"`
				Mirror    *struct{} `xml:"mirror"`
			} `xml:"disk"`
			Interfaces []struct {
				Type  string    `xml:"type,attr"`
				Alias nameValue `xml:"alias"`
			} `xml:"interface"`
		} `xml:"devices"`
		Arguments []*struct{} `xml:"commandline>arg"`
	}
	if err := xml.Unmarshal([]byte(description), &d); err != nil {
		return nil, fmt.Errorf("its description: %w", err)
	}
	var r report
	fatal := func(text, remedy string) { r.add(Fatal, host, "libvirt", text, remedy) }
	for _, x := range d.Devices.Hostdevs {
		fatal(
			fmt.Sprintf(
				"it has a device of this host, %s (%s), which cannot move",
				x.Alias.Name,
				x.Type,
			),
			fmt.Sprintf("detach it: `virsh detach-device-alias DOMAIN %s --live`", x.Alias.Name),
		)
	}
	for _, x := range d.Devices.Interfaces {
		if x.Type == "hostdev" {
			fatal(
				fmt.Sprintf(
					"its network card %s is a device of this host, which cannot move",
					x.Alias.Name,
				),
				fmt.Sprintf(
					"detach it: `virsh detach-device-alias DOMAIN %s --live`",
					x.Alias.Name,
				),
			)
		}
	}
	for _, x := range d.Devices.Filesystems {
		fatal(
			fmt.Sprintf("it shares a directory of this host, %q, which cannot move", x.Target.Dir),
			"unmount it in the guest and detach it: `virsh detach-device`",
		)
	}
	for _, x := range d.Devices.Shmem {
		fatal(fmt.Sprintf("it has memory that others of this host use, %q", x.Name),
			"detach it: `virsh detach-device`")
	}
	for _, x := range d.Devices.Disks {
		if x.Transient != nil {
			fatal(
				fmt.Sprintf(
					"its disk %s is transient: what the guest wrote there would be lost",
					x.Target.Dev,
				),
				"shut it down, and make the disk lasting: `virsh edit`",
			)
		}
		if x.Mirror != nil {
			fatal(
				fmt.Sprintf("its disk %s has a block job", x.Target.Dev),
				fmt.Sprintf(
					"wait for its end, or end it: `virsh blockjob DOMAIN %s --abort`",
					x.Target.Dev,
				),
			)
		}
	}
	if len(d.Arguments) > 0 {
		fatal(
			"its description has arguments for QEMU (qemu:commandline), which no other host takes",
			"shut it down, and take them out: `virsh edit`",
		)
	}
	if snapshots > 0 {
		fatal(fmt.Sprintf("libvirt moves no domain that has snapshots, and it has %d", snapshots),
			"`virsh snapshot-delete DOMAIN NAME`, with `--metadata` to keep what is in the image")
	}
	if vm.State != "" && vm.State != "running" {
		fatal(fmt.Sprintf("it stands (%s), and a domain is evicted only while it runs", vm.State),
			"`virsh resume DOMAIN`, or move it with `virsh migrate`")
	}
	var local, cached []string
	for _, x := range vm.Disks {
		if x.URL == "" && !x.ReadOnly && !x.Carried && x.File.Error == "" && x.File.OfOneHost() {
			local = append(local, fmt.Sprintf("%s (%s on %s)", x.Drive, x.File.Path, x.File.FS))
		}
	}
	for _, x := range d.Devices.Disks { // as qemuMigrationSrcIsSafe of libvirt judges
		if x.ReadOnly == nil && x.Shareable == nil && x.Source.Protocol == "" &&
			x.Device != "cdrom" &&
			!slices.Contains([]string{"none", "directsync"}, x.Driver.Cache) {
			cached = append(cached, x.Target.Dev)
		}
	}
	const trust = "; if both hosts do see the same, say `trust_disks = true` in [libvirt] of this " +
		"host's vacated.toml"
	if local = slices.Compact(local); local != nil && !trusted {
		r.add(Fatal, host, "storage", "another machine does not have "+strings.Join(local, ", "),
			"move the image to storage that both hosts have: `virsh blockcopy`"+trust)
	} else if cached != nil && !trusted {
		r.add(Fatal, host, "storage", "this host caches what the guest writes to "+
			strings.Join(cached, ", ")+", and libvirt moves no such disk",
			"shut it down, and say cache='none' in the driver of the disk: `virsh edit`"+trust)
	} else if local != nil {
		r.add(Note, host, "storage", "trust_disks says that another machine has "+
			strings.Join(local, ", "), "")
	}
	if r.findings == nil {
		r.add(OK, host, "libvirt", "nothing in its description blocks an eviction", "")
	}
	return r.findings, nil
}

type nameValue struct {
	Name string `xml:"name,attr"`
}

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"vacate/lab"
	"vacate/lab/libvirtlab"
)

// startLibvirt gives each host a libvirt.
func (d *demo) startLibvirt(ctx context.Context, l *lab.Lab) (*libvirtlab.Hosts, error) {
	hosts, err := libvirtlab.New(ctx, l)
	if err != nil {
		return nil, err
	}
	version, err := hosts.A.Virsh(ctx, "version", "--daemon")
	if err != nil {
		hosts.Close()
		return nil, err
	}
	running := ""
	for line := range strings.Lines(version) {
		if what, is, _ := strings.Cut(line, ": "); what == "Running against daemon" {
			running = strings.TrimSpace(is) + ", "
		}
	}
	d.say("Each host has a libvirt of its own: libvirtd, %sunmodified, with its own /etc,\n"+
		"/run and /var/lib. It keeps its QEMUs on the core of its host.", running)
	return hosts, nil
}

// lists shows what virsh lists on both hosts.
func (d *demo) lists(ctx context.Context, site *demoSite) error {
	for _, h := range []*libvirtlab.Host{site.libvirt.A, site.libvirt.B} {
		list, err := h.Virsh(ctx, "list", "--all")
		if err != nil {
			return err
		}
		if list == "" {
			list = "(none)"
		}
		d.quote(fmt.Sprintf("host%s# virsh -q list --all\n%s", h.Name, " "+list))
	}
	return nil
}

// watch shows what virsh says on both hosts; and, when what it returns is called, what it said
// meanwhile, and says then.
func (d *demo) watch(ctx context.Context, site *demoSite, vms []*demoVM) (func(), error) {
	d.say("What virsh lists on both hosts:")
	if err := d.lists(ctx, site); err != nil {
		return nil, err
	}
	var names []string
	for _, v := range vms {
		names = append(names, v.name)
	}
	var moments []libvirtlab.Moment
	stop := site.libvirt.Watch(ctx, func(m libvirtlab.Moment) { moments = append(moments, m) },
		names...)
	return func() {
		stop()
		d.say(
			"Meanwhile virsh said on both hosts, by virsh domstate --reason (virsh list has the\n" +
				"first word):")
		var text strings.Builder
		t := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "SECONDS\tHOSTA\tHOSTB")
		for i, m := range moments {
			at := "before"
			if i > 0 {
				at = fmt.Sprintf("%.1f", m.At.Sub(moments[1].At).Seconds())
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", at, states(m.States[0]), states(m.States[1]))
		}
		t.Flush()
		d.quote(text.String())
		if err := d.lists(ctx, site); err != nil {
			d.say("virsh does not answer: %v", err)
		}
	}, nil
}

// states writes what a libvirt says of domains.
func states(of map[string]string) string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(of)) {
		list = append(list, name+" "+of[name])
	}
	if list == nil {
		return "-"
	}
	return strings.Join(list, ", ")
}

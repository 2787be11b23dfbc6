package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"vacate/internal/qemu/qmp"
)

var (
	// ErrNoPort is wrapped by Find's error for a VM without the port.
	ErrNoPort = errors.New("the VM has no virtio-serial port " + PortName +
		" on a unix socket that QEMU listens on")
	// ErrNotRunning is wrapped by Find's error when nothing in the guest has opened the port.
	ErrNotRunning = errors.New("no agent runs in the guest: nothing has opened its port " +
		PortName)
)

// Find returns the path, as QEMU sees it, of the unix socket behind the agent's port. It
// asks with query-chardev and with qom-list and qom-get below /machine/peripheral and
// /machine/peripheral-anon, where QEMU (7.2 to 11.1) keeps what -device and device_add made.
func Find(ctx context.Context, c *qmp.Client) (string, error) {
	path, err := find(ctx, c)
	if err != nil {
		return "", fmt.Errorf("find the guest's agent: %w", err)
	}
	return path, nil
}

// maxDevices bounds how many devices are looked at.
const maxDevices = 4096

func find(ctx context.Context, c *qmp.Client) (string, error) {
	var chardevs []struct {
		Label    string
		Filename string
		Open     bool `json:"frontend-open"`
	}
	if err := c.Run(ctx, "query-chardev", nil, &chardevs); err != nil {
		return "", err
	}
	label, err := findPort(ctx, c)
	if err != nil {
		return "", err
	}
	for _, d := range chardevs {
		path, ok := listener(d.Filename)
		if d.Label != label || !ok {
			continue
		}
		if !d.Open {
			return "", ErrNotRunning
		}
		return path, nil
	}
	return "", ErrNoPort
}

// findPort returns the label of the chardev behind the port, "" if there is none.
func findPort(ctx context.Context, c *qmp.Client) (string, error) {
	get := func(path, property string) (v string, err error) {
		err = c.Run(ctx, "qom-get", map[string]any{"path": path, "property": property}, &v)
		return v, err
	}
	for _, dir := range []string{"/machine/peripheral", "/machine/peripheral-anon"} {
		var devices []struct{ Name, Type string }
		if err := c.Run(ctx, "qom-list", map[string]any{"path": dir}, &devices); err != nil {
			return "", err
		}
		for _, d := range devices[:min(len(devices), maxDevices)] {
			if d.Type != "child<virtserialport>" {
				continue
			}
			name, err := get(dir+"/"+d.Name, "name")
			if err != nil {
				return "", err
			}
			if name == PortName {
				return get(dir+"/"+d.Name, "chardev")
			}
		}
	}
	return "", nil
}

// listener takes QEMU's description of a chardev apart: "unix:PATH,server=on", behind
// "disconnected:" while it has no client (char-socket.c, qemu_chr_compute_filename).
func listener(filename string) (path string, ok bool) {
	filename = strings.TrimPrefix(filename, "disconnected:")
	path, ok = strings.CutPrefix(filename, "unix:")
	if !ok {
		return "", false
	}
	path, ok = strings.CutSuffix(path, ",server=on")
	return path, ok && path != ""
}

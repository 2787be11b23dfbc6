package host

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"vacate/internal/evict/journal"
	"vacate/internal/host/hypervisor"
	"vacate/internal/link/certs"
)

// Check looks at all that a daemon with this configuration needs on this host, and touches nothing.
// It returns what there is, in a sentence; or everything that is wrong, joined.
func (c Config) Check() (string, error) {
	var errs []error
	name := c.Name
	if !c.Plain {
		info, err := certs.Inspect(c.Certs)
		if err != nil {
			errs = append(errs, fmt.Errorf("certs = %q: %w", c.Certs, err))
		}
		if name = info.Name; name != "" {
			if _, ok := c.Peers[name]; ok {
				errs = append(errs, selfPeer(name))
			}
		}
	}
	if err := journal.Check(c.Journal); err != nil {
		errs = append(errs, err)
	}
	if _, err := groupID(c.Group); err != nil {
		errs = append(errs, err)
	}
	if _, err := ownSocket(c.Socket); err != nil {
		errs = append(errs, err)
	}
	// What is missing of the last two, a daemon makes: more than one directory looks like a
	// mistake.
	for _, d := range []struct{ setting, path string }{
		{"vms", c.VMs}, {"journal", filepath.Dir(c.Journal)},
		{"socket", filepath.Dir(filepath.Dir(c.Socket))},
	} {
		if info, err := os.Stat(d.path); err != nil {
			errs = append(errs,
				fmt.Errorf("%s: %w: make the directory, or name another", d.setting, err))
		} else if !info.IsDir() {
			errs = append(errs, fmt.Errorf("%s: %s is no directory", d.setting, d.path))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Peers)) {
		if p := c.Peers[name]; len(p.Fence) > 0 {
			if _, err := exec.LookPath(p.Fence[0]); err != nil {
				errs = append(errs, fmt.Errorf("peers.%s: fence: %w", name, err))
			}
		}
	}
	domains := ""
	if c.Libvirt != nil {
		there, err := c.Libvirt.look()
		if err != nil {
			errs = append(errs, err)
		}
		domains = ", " + there
	}
	vms, err := hypervisor.Load(c.VMs)
	if err != nil {
		errs = append(errs, err)
	}
	for _, vm := range vms {
		if err := vm.Check(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return "", err
	}
	peers := "no peers"
	if len(c.Peers) > 0 {
		peers = "peers " + strings.Join(slices.Sorted(maps.Keys(c.Peers)), ", ")
	}
	return fmt.Sprintf("host %s, %s, %d VMs described in %s%s", name, peers, len(vms), c.VMs,
		domains), nil
}

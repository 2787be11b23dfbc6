package libvirt

import (
	"context"
	"encoding/hex"
	"fmt"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// UUID is that of a domain.
type UUID [16]byte

func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// ParseUUID reads what String writes, and what XML has.
func ParseUUID(s string) (u UUID, err error) {
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(s), "-", ""))
	if err != nil || len(b) != len(u) {
		return u, fmt.Errorf("%.50q is no UUID", s)
	}
	return UUID(b), nil
}

// A Domain is one that libvirt knows. ID is -1 if it is not active.
type Domain struct {
	Name string
	UUID UUID
	ID   int
}

func domainOf(d golibvirt.Domain) Domain { return Domain{d.Name, UUID(d.UUID), int(d.ID)} }

func (d Domain) raw() golibvirt.Domain {
	return golibvirt.Domain{Name: d.Name, UUID: golibvirt.UUID(d.UUID), ID: int32(d.ID)}
}

// State is a virDomainState and, as a number that belongs to it, why it is so.
type State struct {
	State  RunState
	Reason int
}

// RunState is a virDomainState.
type RunState int

// What a domain does.
const (
	NoState RunState = iota
	Running
	Blocked
	Paused
	ShuttingDown
	ShutOff
	HasCrashed
	IsPMSuspended
)

// Why a domain is as it is, as far as an eviction wants to know.
const (
	RunningMigrated          = int(golibvirt.DomainRunningMigrated)          // of Running
	RunningMigrationCanceled = int(golibvirt.DomainRunningMigrationCanceled) // the same
	RunningPostcopy          = int(golibvirt.DomainRunningPostcopy)          // the same
	PausedUser               = int(golibvirt.DomainPausedUser)               // of Paused
	PausedMigration          = int(golibvirt.DomainPausedMigration)          // the same
	PausedPostcopy           = int(golibvirt.DomainPausedPostcopy)           // the same
	PausedPostcopyFailed     = int(golibvirt.DomainPausedPostcopyFailed)     // the same
	ShutOffShutdown          = int(golibvirt.DomainShutoffShutdown)          // of ShutOff
	ShutOffDestroyed         = int(golibvirt.DomainShutoffDestroyed)         // the same
	ShutOffCrashed           = int(golibvirt.DomainShutoffCrashed)           // the same
	ShutOffMigrated          = int(golibvirt.DomainShutoffMigrated)          // the same
)

// reasons are virsh's words.
var reasons = map[RunState][]string{
	Running: {
		"unknown",
		"booted",
		"migrated",
		"restored",
		"from snapshot",
		"unpaused",
		"migration canceled",
		"save canceled",
		"event wakeup",
		"crashed",
		"post-copy",
		"post-copy failed",
	},
	Paused: {
		"unknown",
		"user",
		"migrating",
		"saving",
		"dumping",
		"I/O error",
		"watchdog",
		"from snapshot",
		"shutting down",
		"creating snapshot",
		"crashed",
		"starting up",
		"post-copy",
		"post-copy failed",
		"api error",
	},
	ShutOff: {
		"unknown",
		"shutdown",
		"destroyed",
		"crashed",
		"migrated",
		"saved",
		"failed",
		"from snapshot",
		"daemon",
	},
	HasCrashed:    {"unknown", "panicked"},
	ShuttingDown:  {"unknown", "user"},
	IsPMSuspended: {"unknown"},
}

// String writes what "virsh domstate --reason" prints.
func (s State) String() string {
	names := []string{
		"no state",
		"running",
		"idle",
		"paused",
		"in shutdown",
		"shut off",
		"crashed",
		"pmsuspended",
	}
	if s.State < 0 || int(s.State) >= len(names) {
		return fmt.Sprintf("state %d (reason %d)", int(s.State), s.Reason)
	}
	why := fmt.Sprint(s.Reason)
	if list := reasons[s.State]; s.Reason >= 0 && s.Reason < len(list) {
		why = list[s.Reason]
	}
	return fmt.Sprintf("%s (%s)", names[s.State], why)
}

// Info is what libvirt knows of a domain.
type Info struct {
	Domain
	State      State
	Persistent bool
	Autostart  bool
	Memory     uint64 // bytes that it has at most
	VCPUs      int
}

// List returns all domains.
func (c *Conn) List(ctx context.Context) ([]Domain, error) {
	return call(ctx, c, "list the domains", func() (all []Domain, err error) {
		list, _, err := c.l.ConnectListAllDomains(
			1,
			golibvirt.ConnectListDomainsActive|golibvirt.ConnectListDomainsInactive,
		)
		for _, d := range list {
			all = append(all, domainOf(d))
		}
		return all, err
	})
}

// Find returns a domain by its name. The error matches ErrNoDomain if there is none.
func (c *Conn) Find(ctx context.Context, name string) (Domain, error) {
	d, err := call(
		ctx,
		c,
		"find the domain "+name,
		func() (golibvirt.Domain, error) { return c.l.DomainLookupByName(name) },
	)
	return domainOf(d), err
}

// Info returns what libvirt knows of a domain. QEMU is not asked.
func (c *Conn) Info(ctx context.Context, d Domain) (Info, error) {
	info := Info{Domain: d}
	var err error
	if info.State, err = c.State(ctx, d); err != nil {
		return info, err
	}
	persistent, err := call(
		ctx,
		c,
		"learn whether the domain "+d.Name+" is persistent",
		func() (int32, error) { return c.l.DomainIsPersistent(d.raw()) },
	)
	if err != nil {
		return info, err
	}
	if info.Persistent = persistent != 0; info.Persistent {
		autostart, err := call(
			ctx,
			c,
			"learn whether the domain "+d.Name+" starts by itself",
			func() (int32, error) { return c.l.DomainGetAutostart(d.raw()) },
		)
		if err != nil {
			return info, err
		}
		info.Autostart = autostart != 0
	}
	type size struct {
		memory uint64
		vcpus  int
	}
	n, err := call(ctx, c, "tell the size of the domain "+d.Name, func() (size, error) {
		_, kib, _, vcpus, _, err := c.l.DomainGetInfo(d.raw())
		return size{kib << 10, int(vcpus)}, err
	})
	if err != nil {
		return info, err
	}
	info.Memory, info.VCPUs = n.memory, n.vcpus
	return info, nil
}

// State returns what a domain does.
func (c *Conn) State(ctx context.Context, d Domain) (State, error) {
	return call(ctx, c, "tell the state of the domain "+d.Name, func() (State, error) {
		state, reason, err := c.l.DomainGetState(d.raw(), 0)
		return State{RunState(state), int(reason)}, err
	})
}

// XMLKind says which description of a domain is wanted.
type XMLKind int

// The descriptions of a domain.
const (
	Live       XMLKind = iota // as it runs
	Inactive                  // as it will be started the next time
	Migratable                // as another host, or another version, is told of it
)

// XML returns a description of a domain, passwords included.
func (c *Conn) XML(ctx context.Context, d Domain, kind XMLKind) (string, error) {
	flags := golibvirt.DomainXMLSecure
	switch kind {
	case Inactive:
		flags |= golibvirt.DomainXMLInactive
	case Migratable:
		flags |= golibvirt.DomainXMLMigratable
	}
	return call(
		ctx,
		c,
		"describe the domain "+d.Name,
		func() (string, error) { return c.l.DomainGetXMLDesc(d.raw(), flags) },
	)
}

// Suspend pauses a domain, also while its migration's job is held by this connection.
func (c *Conn) Suspend(ctx context.Context, d Domain) error {
	return do(
		ctx,
		c,
		"suspend the domain "+d.Name,
		func() error { return c.l.DomainSuspend(d.raw()) },
	)
}

// Resume runs a domain that is paused.
func (c *Conn) Resume(ctx context.Context, d Domain) error {
	return do(
		ctx,
		c,
		"resume the domain "+d.Name,
		func() error { return c.l.DomainResume(d.raw()) },
	)
}

// Destroy ends a domain's QEMU (SIGTERM, then SIGKILL).
func (c *Conn) Destroy(ctx context.Context, d Domain) error {
	return do(
		ctx,
		c,
		"destroy the domain "+d.Name,
		func() error { return c.l.DomainDestroy(d.raw()) },
	)
}

// Define makes a domain persistent, as the description says.
func (c *Conn) Define(ctx context.Context, xml string) (Domain, error) {
	d, err := call(
		ctx,
		c,
		"define the domain",
		func() (golibvirt.Domain, error) { return c.l.DomainDefineXML(xml) },
	)
	return domainOf(d), err
}

// Undefine makes a domain transient, or forgets it. NVRAM and TPM state stay.
func (c *Conn) Undefine(ctx context.Context, d Domain) error {
	return do(ctx, c, "undefine the domain "+d.Name, func() error {
		return c.l.DomainUndefineFlags(
			d.raw(),
			golibvirt.DomainUndefineKeepNvram|golibvirt.DomainUndefineKeepTpm,
		)
	})
}

// SetAutostart says whether a domain starts with its host.
func (c *Conn) SetAutostart(ctx context.Context, d Domain, on bool) error {
	v := int32(0)
	if on {
		v = 1
	}
	return do(
		ctx,
		c,
		"set the autostart of the domain "+d.Name,
		func() error { return c.l.DomainSetAutostart(d.raw(), v) },
	)
}

// Snapshots returns how many snapshots libvirt has of a domain.
func (c *Conn) Snapshots(ctx context.Context, d Domain) (int, error) {
	return call(ctx, c, "count the snapshots of the domain "+d.Name, func() (int, error) {
		n, err := c.l.DomainSnapshotNum(d.raw(), 0)
		return int(n), err
	})
}

package qmp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
)

// The reply types below hold what an eviction needs, from qapi/*.json of QEMU
// 7.2, and tried with 10.0. Members that they do not name are skipped, as versions differ
// in them; members they name must have the right type.

// Status is the run state of the VM: "running", "paused", "prelaunch",
// "inmigrate", "finish-migrate", "postmigrate"…
type Status struct {
	Status  string `json:"status"`
	Running bool   `json:"running"`
}

// QueryStatus returns the run state.
func (c *Client) QueryStatus(ctx context.Context) (Status, error) {
	var s Status
	err := c.Run(ctx, "query-status", nil, &s)
	if err == nil && s.Status == "" {
		err = errors.New("decode reply to query-status: no status")
	}
	return s, err
}

// Migration is the state of a migration. Status is empty before the first one
// (on an incoming QEMU: before it listens). Times are in milliseconds and nil
// where this state or version does not report them.
type Migration struct {
	Status    string `json:"status"`
	ErrorDesc string `json:"error-desc"`
	// Blocked says why the VM cannot be migrated. QEMU tells from 6.0 on.
	Blocked   []string      `json:"blocked-reasons"`
	RAM       *MigrationRAM `json:"ram"`
	TotalTime *uint64       `json:"total-time"`
	SetupTime *uint64       `json:"setup-time"`
	Downtime  *uint64       `json:"downtime"`
}

// MigrationRAM counts memory; all in bytes unless named otherwise.
type MigrationRAM struct {
	Transferred         uint64  `json:"transferred"`
	Remaining           uint64  `json:"remaining"`
	Total               uint64  `json:"total"`
	Duplicate           uint64  `json:"duplicate"` // zero pages
	Normal              uint64  `json:"normal"`    // pages
	NormalBytes         uint64  `json:"normal-bytes"`
	DirtyPagesRate      uint64  `json:"dirty-pages-rate"` // pages per second
	Mbps                float64 `json:"mbps"`
	DirtySyncCount      uint64  `json:"dirty-sync-count"`
	PageSize            uint64  `json:"page-size"`
	PostcopyRequests    uint64  `json:"postcopy-requests"` // pages
	PrecopyBytes        uint64  `json:"precopy-bytes"`
	DowntimeBytes       uint64  `json:"downtime-bytes"`
	PostcopyBytes       uint64  `json:"postcopy-bytes"`
	DirtySyncMissedZero uint64  `json:"dirty-sync-missed-zero-copy"`
}

// QueryMigrate returns the state of the current or last migration.
func (c *Client) QueryMigrate(ctx context.Context) (Migration, error) {
	var m Migration
	err := c.Run(ctx, "query-migrate", nil, &m)
	return m, err
}

type capability struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

// SetMigrationCapabilities switches capabilities on or off. QEMU refuses names
// that it does not know, and changes during a migration.
func (c *Client) SetMigrationCapabilities(ctx context.Context, caps map[string]bool) error {
	list := make([]capability, 0, len(caps))
	for name, on := range caps {
		list = append(list, capability{name, on})
	}
	return c.Run(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// QueryMigrationCapabilities returns every capability that this QEMU knows and
// whether it is on.
func (c *Client) QueryMigrationCapabilities(ctx context.Context) (map[string]bool, error) {
	var list []capability
	if err := c.Run(ctx, "query-migrate-capabilities", nil, &list); err != nil {
		return nil, err
	}
	caps := make(map[string]bool, len(list))
	for _, x := range list {
		if _, twice := caps[x.Capability]; twice || x.Capability == "" {
			return nil, fmt.Errorf("decode reply to query-migrate-capabilities: bad capability %q",
				x.Capability)
		}
		caps[x.Capability] = x.State
	}
	return caps, nil
}

// MigrateParameters are those that all supported versions have.
type MigrateParameters struct {
	MaxBandwidth         *uint64 `json:"max-bandwidth"`          // bytes per second; 0 is unlimited
	MaxPostcopyBandwidth *uint64 `json:"max-postcopy-bandwidth"` // bytes per second; 0 is unlimited
	DowntimeLimit        *uint64 `json:"downtime-limit"`         // milliseconds
	TLSCreds             string  `json:"tls-creds"`
	MultifdChannels      *uint64 `json:"multifd-channels"`
}

// QueryMigrateParameters returns the parameters in force.
func (c *Client) QueryMigrateParameters(ctx context.Context) (MigrateParameters, error) {
	var p MigrateParameters
	err := c.Run(ctx, "query-migrate-parameters", nil, &p)
	return p, err
}

// SetMigrationParameters sets parameters by their QMP names, such as
// "max-bandwidth" in bytes per second. QEMU refuses those it does not know.
func (c *Client) SetMigrationParameters(ctx context.Context, params map[string]any) error {
	return c.Run(ctx, "migrate-set-parameters", params, nil)
}

// GetFD gives QEMU a copy of a descriptor under a name, for "fd:NAME" in a
// migration URI. It belongs to this monitor connection: QEMU forgets an
// unused one when the connection ends.
func (c *Client) GetFD(ctx context.Context, name string, fd int) error {
	return c.RunFD(ctx, "getfd", map[string]any{"fdname": name}, nil, fd)
}

// CloseFD has QEMU close a descriptor that it was handed with GetFD.
func (c *Client) CloseFD(ctx context.Context, name string) error {
	return c.Run(ctx, "closefd", map[string]any{"fdname": name}, nil)
}

// Migrate starts a migration to uri ("fd:NAME", "unix:PATH"); with resume,
// continues one that is "postcopy-paused". It returns when it has begun.
func (c *Client) Migrate(ctx context.Context, uri string, resume bool) error {
	args := map[string]any{"uri": uri}
	if resume {
		args["resume"] = true
	}
	return c.Run(ctx, "migrate", args, nil)
}

// MigrateIncoming makes a QEMU started with "-incoming defer" listen on uri.
func (c *Client) MigrateIncoming(ctx context.Context, uri string) error {
	return c.Run(ctx, "migrate-incoming", map[string]any{"uri": uri}, nil)
}

// MigrateStartPostcopy asks an active migration to switch to post-copy.
func (c *Client) MigrateStartPostcopy(ctx context.Context) error {
	return c.Run(ctx, "migrate-start-postcopy", nil, nil)
}

// MigrateCancel cancels a migration. Never after the device state was sent:
// some versions get stuck for ever.
func (c *Client) MigrateCancel(ctx context.Context) error {
	return c.Run(ctx, "migrate_cancel", nil, nil)
}

// MigrateRecover gives a destination in "postcopy-paused" a new stream, out of band.
func (c *Client) MigrateRecover(ctx context.Context, uri string) error {
	return c.RunOOB(ctx, "migrate-recover", map[string]any{"uri": uri}, nil)
}

// MigratePause breaks a post-copy migration's connection, out of band.
func (c *Client) MigratePause(ctx context.Context) error {
	return c.RunOOB(ctx, "migrate-pause", nil, nil)
}

// Cont runs the VM.
func (c *Client) Cont(ctx context.Context) error { return c.Run(ctx, "cont", nil, nil) }

// Stop pauses the VM.
func (c *Client) Stop(ctx context.Context) error { return c.Run(ctx, "stop", nil, nil) }

// Quit ends QEMU. It returns nil also when QEMU drops the connection before it
// replies. The process may take a moment longer to exit.
func (c *Client) Quit(ctx context.Context) error {
	err := c.Run(ctx, "quit", nil, nil)
	if errors.Is(err, ErrClosed) && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		return nil
	}
	return err
}

// QueryMachine returns the machine type with its version, such as
// "pc-i440fx-7.2": both ends of a migration must agree on it.
func (c *Client) QueryMachine(ctx context.Context) (string, error) {
	var t string
	if err := c.Run(ctx, "qom-get", map[string]any{"path": "/machine", "property": "type"},
		&t); err != nil {
		return "", err
	}
	name, ok := strings.CutSuffix(t, "-machine")
	if !ok || name == "" {
		return "", fmt.Errorf("decode machine type: %q is not a machine", t)
	}
	return name, nil
}

// BlockDevice is a drive as the guest sees it. Inserted is nil without a medium.
type BlockDevice struct {
	Device   string       `json:"device"` // may be empty where QDev is set
	QDev     string       `json:"qdev"`
	Inserted *BlockMedium `json:"inserted"`
}

// BlockMedium is what a drive holds.
type BlockMedium struct {
	File     string `json:"file"` // file name or a json: description
	Node     string `json:"node-name"`
	Driver   string `json:"drv"`
	ReadOnly bool   `json:"ro"`
}

// QueryBlock lists the drives.
func (c *Client) QueryBlock(ctx context.Context) ([]BlockDevice, error) {
	var list []BlockDevice
	err := c.Run(ctx, "query-block", nil, &list)
	return list, err
}

// CPU is one virtual CPU.
type CPU struct {
	Index    int    `json:"cpu-index"`
	ThreadID int    `json:"thread-id"` // in QEMU's own PID namespace; see Process
	Path     string `json:"qom-path"`
}

// QueryCPUs lists the virtual CPUs without disturbing them (query-cpus-fast).
func (c *Client) QueryCPUs(ctx context.Context) ([]CPU, error) {
	var list []CPU
	err := c.Run(ctx, "query-cpus-fast", nil, &list)
	return list, err
}

// VirtioDevice names a virtio device.
type VirtioDevice struct {
	Path string `json:"path"` // in QEMU's object tree
	Name string `json:"name"` // "virtio-net", "virtio-blk"…
}

// QueryVirtio lists the virtio devices. QEMU before 7.2 has no such command:
// the error then matches ErrCommandNotFound.
func (c *Client) QueryVirtio(ctx context.Context) ([]VirtioDevice, error) {
	var list []VirtioDevice
	err := c.Run(ctx, "x-query-virtio", nil, &list)
	return list, err
}

// VirtioQueue describes one ring. Addresses are guest-physical; zero until the
// guest's driver has set the ring up.
type VirtioQueue struct {
	Index uint16 `json:"queue-index"`
	Num   uint32 `json:"vring-num"` // entries
	Desc  uint64 `json:"vring-desc"`
	Avail uint64 `json:"vring-avail"`
	Used  uint64 `json:"vring-used"`
}

// maxVirtioQueues is VIRTIO_QUEUE_MAX of QEMU's hw/virtio.
const maxVirtioQueues = 1024

// QueryVirtioQueue returns the ring of one queue of a device.
func (c *Client) QueryVirtioQueue(ctx context.Context, path string,
	queue int) (VirtioQueue, error) {
	var q VirtioQueue
	err := c.Run(ctx, "x-query-virtio-queue-status", map[string]any{"path": path, "queue": queue},
		&q)
	return q, err
}

// QueryVirtioQueues returns the rings that the device has set up. QEMU
// numbers them from 0 without gaps and refuses the first that does not exist.
func (c *Client) QueryVirtioQueues(ctx context.Context, path string) ([]VirtioQueue, error) {
	var rings []VirtioQueue
	for i := range maxVirtioQueues {
		q, err := c.QueryVirtioQueue(ctx, path, i)
		var refused *Error
		if errors.As(err, &refused) && refused.Class == "GenericError" && i > 0 {
			break
		}
		if err != nil {
			return nil, err
		}
		if q.Desc != 0 {
			rings = append(rings, q)
		}
	}
	return rings, nil
}

// QueryVersion asks for the version again; Version is what the greeting said.
func (c *Client) QueryVersion(ctx context.Context) (Version, error) {
	var v struct {
		QEMU    *Version `json:"qemu"`
		Package string   `json:"package"`
	}
	if err := c.Run(ctx, "query-version", nil, &v); err != nil {
		return Version{}, err
	}
	if v.QEMU == nil {
		return Version{}, errors.New("decode reply to query-version: no version")
	}
	v.QEMU.Package = v.Package
	return *v.QEMU, nil
}

package evict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"vacate/internal/qemu/libvirt"
	"vacate/internal/sys/process"

	"golang.org/x/sys/unix"
)

// Libvirt says that the VM's QEMU belongs to this host's libvirt.
type Libvirt struct {
	URI    string // of the daemon; empty: qemu:///system
	Domain string // its name at the source
	// Policy limits what the description of an offered domain may name on this host.
	Policy libvirt.Policy
	// TrustDisks makes libvirt skip its check that both hosts reach the domain's disks.
	TrustDisks bool
	Autostart  bool // a received domain starts with this host if it did with the other
	// Hold starts a process that does nothing but keep files open, as its descriptors from 3 on. It
	// outlives this process. Without it, the death of an engine at the destination costs the VM.
	Hold func(name string, files ...*os.File) (process.Process, error)
}

// migrateFlags are those of all phases.
const migrateFlags = libvirt.MigrateLive | libvirt.Postcopy

// bounds of what an offer says of a domain, in bytes.
const (
	maxDomainXML = 256 << 10
	maxCookie    = 64 << 10
)

// domainOffer is what libvirt at the destination needs to know about a domain. The destination must
// not trust any of it.
type domainOffer struct {
	Name       string `json:"name"`
	XML        string `json:"xml"`    // as the source's libvirt wants it at the destination
	Cookie     []byte `json:"cookie"` // of Begin3
	Persistent bool   `json:"persistent"`
	Inactive   string `json:"inactive,omitempty"` // the definition of a persistent domain
	Autostart  bool   `json:"autostart,omitempty"`
	// Totals is the size to which each block of memory may grow, in their order.
	Totals []uint64 `json:"totals"`
}

func (d *domainOffer) check() error {
	switch {
	case d == nil:
		return nil
	case d.Name == "" || strings.Contains(d.Name, "/"):
		return fmt.Errorf("%w: a domain named %.40q", errFrame, d.Name)
	case len(d.XML) > maxDomainXML || len(d.Inactive) > maxDomainXML || len(d.Cookie) > maxCookie:
		return fmt.Errorf("%w: a domain's description of %d and %d bytes, a cookie of %d", errFrame,
			len(d.XML), len(d.Inactive), len(d.Cookie))
	}
	return nil
}

// domainFacts are what another engine must know of a domain. The journal has them before libvirt is
// told anything.
type domainFacts struct {
	Name string       `json:"name"`
	UUID libvirt.UUID `json:"uuid"`
	// Holder keeps the connection to libvirt open on which the migration began, and at the
	// destination the stream to the twin. Zero: the engine alone does.
	Holder     process.Process `json:"holder"`
	Flags      libvirt.Flags   `json:"flags"` // of all calls of the migration
	Persistent bool            `json:"persistent"`
	Autostart  bool            `json:"autostart"`          // before the eviction
	Inactive   string          `json:"inactive,omitempty"` // destination: the definition
}

// What a holder keeps, in order.
const (
	heldConnection = iota
	heldStream
)

// domainFlags returns the flags of a domain's migration.
func domainFlags(persistent, trust bool) libvirt.Flags {
	f := migrateFlags
	if persistent {
		f |= libvirt.PersistDest | libvirt.UndefineSource
	}
	if trust {
		f |= libvirt.Unsafe
	}
	return f
}

func (f *domainFacts) keep(j Journal) error {
	b, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode the facts about the domain: %w", err)
	}
	return keep(j, keptDomain, b)
}

// recallDomain reads a domain's facts; nil if the journal has none.
func recallDomain(j Journal) (*domainFacts, error) {
	if j == nil {
		return nil, nil
	}
	b, err := j.Kept(keptDomain)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	f := new(domainFacts)
	if err == nil {
		err = json.Unmarshal(b, f)
	}
	if err != nil {
		return nil, fmt.Errorf("read from the journal what describes the domain: %w", err)
	}
	return f, nil
}

// keepOpen has a process keep files open, whatever happens to this one.
func (l Libvirt) keepOpen(f *domainFacts, files ...*os.File) (err error) {
	if l.Hold == nil {
		return nil
	}
	f.Holder, err = l.Hold(f.Name, files...)
	for _, file := range files { // Go makes what it hands over block, for all who have it
		err = errors.Join(err, unix.SetNonblock(int(file.Fd()), true))
	}
	return err
}

// taken returns a descriptor of what a holder keeps.
func (f *domainFacts) taken(what int) (*os.File, error) {
	pidfd, err := f.Holder.Open()
	if err != nil {
		return nil, fmt.Errorf("process %d, which kept it open: %w", f.Holder.PID, err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, 3+what, 0)
	if err != nil {
		return nil, fmt.Errorf("take it from process %d: %w", f.Holder.PID,
			os.NewSyscallError("pidfd_getfd", err))
	}
	return os.NewFile(uintptr(fd), "kept"), nil
}

// release ends the holder. libvirt then ends what was begun on the connection, if it goes on still.
func (f *domainFacts) release(ctx context.Context) error {
	if f == nil || f.Holder.PID <= 0 {
		return nil
	}
	return f.Holder.Kill(ctx)
}

// ReleaseDomain ends the process that keeps open what an eviction of a domain needs. The eviction
// is over.
func ReleaseDomain(ctx context.Context, j Journal) error {
	f, err := recallDomain(j)
	if err != nil {
		return err
	}
	return f.release(ctx)
}

// redial connects to libvirt, and waits for one that is being started anew.
func redial(ctx context.Context, uri string) (*libvirt.Conn, error) {
	for {
		conn, err := libvirt.Dial(ctx, uri)
		if err == nil || !errors.Is(err, libvirt.ErrNone) && !errors.Is(err, libvirt.ErrClosed) {
			return conn, err
		}
		select {
		case <-time.After(firstPause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// find finds the domain. The error wraps libvirt.ErrNoDomain if there is none, or another of its
// name.
func (f *domainFacts) find(ctx context.Context, conn *libvirt.Conn) (libvirt.Domain, error) {
	d, err := conn.Find(ctx, f.Name)
	if err == nil && d.UUID != f.UUID {
		err = fmt.Errorf("%w: another one is named %s now", libvirt.ErrNoDomain, f.Name)
	}
	return d, err
}

// undefine makes libvirt forget a domain whose QEMU has ended, or is about to. A domain that has
// not the UUID is left alone.
func undefine(ctx context.Context, conn *libvirt.Conn, f *domainFacts) error {
	for {
		d, err := f.find(ctx, conn)
		switch {
		case errors.Is(err, libvirt.ErrNoDomain):
			return nil
		case err != nil:
			return err
		case d.ID < 0:
			return conn.Undefine(ctx, d)
		}
		select {
		case <-time.After(firstPause):
		case <-ctx.Done():
			return fmt.Errorf("libvirt still takes the domain %s for running: %w", f.Name,
				context.Cause(ctx))
		}
	}
}

// isRefused reports whether libvirt answered that it does not do something.
func isRefused(err error) bool {
	var refusal *libvirt.Error
	return errors.As(err, &refusal)
}

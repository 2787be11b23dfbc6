// Package daemons runs vacated on both hosts of a lab as an operator does: with a certificate each,
// a configuration that has the other as its peer, and descriptions of VMs or a libvirt.
package daemons

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vacate/lab"
	"vacate/lab/libvirtlab"
)

// port is where the daemons listen for each other.
const port = 7601

// Site is what the two daemons have on disk, and the daemons. They are called hosta and hostb.
type Site struct {
	lab     *lab.Lab
	libvirt *libvirtlab.Hosts // nil: VMs are described
	dir     string
	vacate  string // the program; vacated is beside it
	daemons []daemon
}

// daemon is one that was started. ended is closed when it has ended.
type daemon struct {
	*exec.Cmd
	ended chan struct{}
}

// New makes the directories and certificates of both hosts. With libvirt the daemons know its
// domains. [Site.Start] starts each daemon. Close the site before libvirt and the lab.
func New(ctx context.Context, l *lab.Lab, vacate string, libvirt *libvirtlab.Hosts) (*Site, error) {
	dir, err := os.MkdirTemp("", "vacate") // short, as paths of sockets have to be
	if err != nil {
		return nil, err
	}
	s := &Site{lab: l, libvirt: libvirt, dir: dir, vacate: vacate}
	ca := filepath.Join(dir, "ca")
	err = s.certs(ctx, "init", "--dir", ca)
	for _, h := range []*lab.Host{l.A, l.B} {
		if err == nil {
			err = s.certs(ctx, "issue", "--dir", ca, "--name", name(h), "--out",
				filepath.Join(s.home(h), "certs"))
		}
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Site) certs(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, s.vacate, append([]string{"certs"}, args...)...).
		CombinedOutput()
	if err != nil {
		return fmt.Errorf("vacate certs %s: %w: %s", args[0], err, out)
	}
	return nil
}

func name(h *lab.Host) string { return "host" + h.Name }

func (s *Site) home(h *lab.Host) string { return filepath.Join(s.dir, name(h)) }

// Config is the file with the configuration of a host's daemon.
func (s *Site) Config(h *lab.Host) string { return filepath.Join(s.home(h), "vacated.toml") }

// Socket is where a host's daemon can be asked.
func (s *Site) Socket(h *lab.Host) string { return filepath.Join(s.home(h), "vacated.sock") }

// Describe gives a host the description of a VM.
func (s *Site) Describe(h *lab.Host, name, qmp string, args []string) error {
	dir := filepath.Join(s.home(h), "vms")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var vm strings.Builder
	fmt.Fprintf(&vm, "qmp = %q\nlog = %q\ncommand = [", qmp, filepath.Join(s.home(h), name+".log"))
	for _, a := range args {
		fmt.Fprintf(&vm, "\n  %q,", a)
	}
	vm.WriteString("\n]\n")
	return os.WriteFile(filepath.Join(dir, name+".toml"), []byte(vm.String()), 0o644)
}

// section is what a host's daemon is told of libvirt.
func (s *Site) section(ctx context.Context, h *lab.Host) (string, error) {
	paths, err := json.Marshal(s.libvirt.Paths()) // a list of strings is the same in TOML
	if err != nil {
		return "", err
	}
	emulator, err := lab.StockQEMU(ctx)
	if err != nil {
		return "", err
	}
	of := s.libvirt.A
	if h == s.lab.B {
		of = s.libvirt.B
	}
	// The images are the same files for both hosts, which libvirt cannot know.
	return fmt.Sprintf(`
[libvirt]
uri         = %q
paths       = %s
networks    = ["user", %q]
emulators   = [%q]
trust_disks = true
`, of.Socket, strings.ReplaceAll(string(paths), ",", ", "), lab.Bridge, emulator.Path), nil
}

// Start starts a host's daemon, and waits until it serves.
func (s *Site) Start(ctx context.Context, h *lab.Host) error {
	peer := s.lab.A
	if h == peer {
		peer = s.lab.B
	}
	config := fmt.Sprintf(`certs   = "certs"
vms     = "vms"
journal = "journal"
socket  = "vacated.sock"
listen  = "%s:%d"

[peers.%s]
address  = "%s:%d"
may_send = true
`, h.Addr, port, name(peer), peer.Addr, port)
	if s.libvirt != nil {
		more, err := s.section(ctx, h)
		if err != nil {
			return err
		}
		config += more
	}
	if err := os.WriteFile(s.Config(h), []byte(config), 0o644); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(s.home(h), "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(filepath.Dir(s.vacate), "vacated"), "--config",
		s.Config(h))
	cmd.Stderr = log
	if err := h.Start(cmd); err != nil {
		return fmt.Errorf("start vacated: %w", err)
	}
	d := daemon{cmd, make(chan struct{})}
	go func() {
		defer close(d.ended)
		cmd.Wait()
	}()
	s.daemons = append(s.daemons, d)
	for {
		c, err := net.Dial("unix", s.Socket(h))
		if err == nil {
			return c.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-d.ended:
			return fmt.Errorf("vacated on host %s ended: %s", h.Name, s.Said(h))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Said is the end of what a host's daemon wrote to its log.
func (s *Site) Said(h *lab.Host) string {
	b, _ := os.ReadFile(filepath.Join(s.home(h), "log"))
	return string(b[max(0, len(b)-5000):])
}

// Command is vacate, as an operator on a host runs it.
func (s *Site) Command(ctx context.Context, h *lab.Host, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, s.vacate, args...)
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	c.Env = append(os.Environ(), "VACATE_SOCKET="+s.Socket(h))
	return c
}

// Close stops the daemons, and removes what they had.
func (s *Site) Close() error {
	for _, d := range s.daemons {
		d.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(20*time.Second, func() { d.Process.Kill() })
		<-d.ended
		kill.Stop()
	}
	return os.RemoveAll(s.dir)
}

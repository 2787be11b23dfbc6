package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// usualFence is how long a fencing command may take unless its peer's fence_time says
	// otherwise.
	usualFence = 2 * time.Minute
	mostFence  = time.Hour
	// maxFenceArgs and maxFenceArg bound a fencing command, and maxFenceOutput what is heard of it,
	// in bytes.
	maxFenceArgs   = 64
	maxFenceArg    = 4096
	maxFenceOutput = 8 << 10
	// fenceEnd is how long what a fencing command leaves behind may keep its output open.
	fenceEnd = time.Second
)

// fencedHost stands for the other host's name in a fencing command.
const fencedHost = "{host}"

// checkFence says what is wrong with a peer's fencing command.
func (p Peer) checkFence() error {
	if p.FenceTime < 0 || p.FenceTime > mostFence {
		return fmt.Errorf("fence_time = %v: want more than 0, and %v at most", p.FenceTime,
			mostFence)
	}
	if len(p.Fence) == 0 {
		return nil
	}
	if !strings.HasPrefix(p.Fence[0], "/") {
		return fmt.Errorf("fence: %q is no absolute path of a program: it is run without a shell",
			p.Fence[0])
	}
	if len(p.Fence) > maxFenceArgs {
		return fmt.Errorf("fence: %d words are more than %d", len(p.Fence), maxFenceArgs)
	}
	for _, a := range p.Fence {
		if len(a) > maxFenceArg || strings.ContainsRune(a, 0) {
			return fmt.Errorf("fence: %.40q… has more than %d bytes, or a zero byte", a,
				maxFenceArg)
		}
	}
	return nil
}

// head keeps the first bytes of what is written to it.
type head struct{ kept []byte }

func (h *head) Write(b []byte) (int, error) {
	h.kept = append(h.kept, b[:min(len(b), maxFenceOutput-len(h.kept))]...)
	return len(b), nil
}

// fence runs the fencing command of a peer. Without an error the command says that the peer is
// fenced.
func (h *Host) fence(peer string) error {
	p := h.config.Peers[peer]
	if len(p.Fence) == 0 {
		return fmt.Errorf(
			"there is no command to fence host %s: [peers.%[1]s] wants fence = [\"/PROGRAM\", "+
				"\"{host}\"] "+
				"in the configuration of vacated on host %s", peer, h.name())
	}
	args := make([]string, len(p.Fence))
	for i, a := range p.Fence {
		args[i] = strings.ReplaceAll(a, fencedHost, peer)
	}
	limit := cmp.Or(p.FenceTime, usualFence)
	late := fmt.Errorf("it did not end within %v, and was killed", limit)
	ctx, cancel := context.WithTimeoutCause(context.Background(), limit, late)
	defer cancel()
	// #nosec G702 -- what is run is what the host's own configuration says
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var out head
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, fenceEnd
	// With all that it started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	h.log.Warn("a host is being fenced", "peer", peer, "command", args)
	err := cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
		err = nil // something that it started goes on
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	said := strings.TrimSpace(string(out.kept))
	if err != nil {
		h.log.Error("a host could not be fenced", "peer", peer, "error", err, "output", said)
		if said != "" {
			err = fmt.Errorf("%w; it said %q", err, said)
		}
		return fmt.Errorf("host %s could not be fenced: %s: %w", peer, args[0], err)
	}
	h.log.Warn("a host was fenced", "peer", peer, "output", said)
	return nil
}

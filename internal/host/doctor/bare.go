package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"vacate/internal/qemu/fit"
	"vacate/internal/qemu/qmp"
	"vacate/internal/sys/process"
	"vacate/internal/sys/sched"
)

// bareArgs returns those of QEMU's arguments that make a VM's CPUs, and nothing else: with them no
// file is opened, no memory taken, and no network touched.
func bareArgs(args []string) (bare []string) {
	bare = []string{"-nodefaults", "-no-user-config", "-display", "none", "-S", "-m", "64"}
	for i, a := range args {
		option, ok := strings.CutPrefix(a, "-")
		option = strings.TrimPrefix(option, "-")
		value := ""
		if i+1 < len(args) {
			value = args[i+1]
		}
		switch {
		case !ok:
		case option == "enable-kvm":
			bare = append(bare, "-enable-kvm")
		case option == "cpu" || option == "smp" || option == "accel":
			bare = append(bare, "-"+option, value)
		case option == "global" && strings.Contains(value, "-cpu."):
			bare = append(bare, "-global", value)
		case option == "machine" || option == "M":
			var kept []string
			for n, part := range strings.Split(value, ",") {
				key, _, pair := strings.Cut(part, "=")
				if n == 0 && !pair || key == "type" || key == "accel" || key == "kernel_irqchip" ||
					key == "kernel-irqchip" {
					kept = append(kept, part)
				}
			}
			if kept != nil {
				bare = append(bare, "-machine", strings.Join(kept, ","))
			}
		}
	}
	return bare
}

// askCPUs returns the CPUs that a VM of QEMU's arguments would have here. It starts a QEMU for a
// moment.
func askCPUs(ctx context.Context, path string, args []string) (c fit.CPUs, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, askTime,
		fmt.Errorf("%s took longer than %v", path, askTime))
	defer cancel()
	dir, err := os.MkdirTemp("", "vacate-")
	if err != nil {
		return c, err
	}
	defer os.RemoveAll(dir)
	monitor := filepath.Join(dir, "qmp")
	cmd := exec.Command(path, append(bareArgs(args), "-qmp", "unix:"+monitor+",server=on,wait=off")...) // #nosec G204 -- of the VM's description
	cmd.Dir = "/"
	said := limited{left: maxSaid}
	cmd.Stderr = &said
	if err := process.StartBound(cmd, func() error { return sched.Usual(cmd.Start) }); err != nil {
		return c, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	running := true
	defer func() {
		if running {
			cmd.Process.Kill()
			<-ended
		}
	}()
	for {
		q, err := qmp.Dial(ctx, monitor)
		if err == nil {
			defer q.Close()
			return fit.CPUsOf(ctx, q)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			return c, err
		}
		select {
		case err := <-ended:
			running = false
			return c, fmt.Errorf("%s: %v: %s", path, err, strings.TrimSpace(string(said.b)))
		case <-ctx.Done():
			return c, context.Cause(ctx)
		case <-time.After(5 * time.Millisecond): // until QEMU listens
		}
	}
}

package evict_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/link"
	"vacate/lab/labtest"
)

// The source refuses what QEMU or the engine cannot migrate, before it asks a destination.
func TestHeldVMs(t *testing.T) {
	disk := []string{"-drive", "if=none,id=a,file=null-co://,format=raw"}
	for name, c := range map[string]struct {
		args []string
		says []string
	}{
		"NVMe": {append(disk, "-device", "nvme,id=n,serial=1,drive=a"),
			[]string{"QEMU refuses to migrate", "/nvme", "device_del"}},
		"virtio-crypto": {[]string{"-object", "cryptodev-backend-builtin,id=c", "-device",
			"virtio-crypto-pci,cryptodev=c"}, []string{"QEMU refuses to migrate", "virtio-crypto"}},
		"AMD's IOMMU": {[]string{"-M", "q35", "-device", "amd-iommu"},
			[]string{"QEMU refuses to migrate", "iommu"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			refused(t, evictNowhere(t, runQEMU(t, c.args...)),
				append(c.says, "The VM runs on, untouched")...)
		})
	}
	t.Run("architecture", func(t *testing.T) {
		monitor := speak(t, filepath.Join(t.TempDir(), "arm.sock"), qmpGreeting(7, 2),
			map[string]string{
				"query-status":               `{"status": "running", "running": true, "singlestep": false}`,
				"query-migrate":              `{}`,
				"query-migrate-capabilities": `[{"capability": "postcopy-ram", "state": false}]`,
				"query-migrate-parameters":   `{}`,
				"query-target":               `{"arch": "aarch64"}`,
				"xen-save-devices-state":     "", // it is there, and refuses what lacks arguments
			})
		refused(t, evictNowhere(t, monitor),
			"the VM's architecture is aarch64, and only x86 VMs can be evicted")
	})
}

func evictNowhere(t *testing.T, monitor string) error {
	_, err := evict.Source{QMP: monitor, Connect: func(context.Context) (*link.Session, error) {
		return nil, errors.New("nobody is there")
	}}.Evict(labtest.Within(t, time.Minute))
	return err
}

// runQEMU starts a QEMU whose guest has only its firmware, and returns its monitor.
func runQEMU(t *testing.T, args ...string) (monitor string) {
	t.Helper()
	monitor = filepath.Join(t.TempDir(), "qmp")
	q, err := startQEMU(t, monitor, append([]string{"-m", "32"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	q.Close()
	return monitor
}

// An abort while QEMU is being asked names who aborted, and not the question.
func TestAbortWhileAsking(t *testing.T) {
	asked, aborted := make(chan struct{}), make(chan struct{})
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "qmp"))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Serve(t, ln, func(c net.Conn) {
		io.WriteString(c, qmpGreeting(7, 2))
		for lines := bufio.NewScanner(c); lines.Scan(); {
			if !strings.Contains(lines.Text(), "qmp_capabilities") {
				close(asked)
				<-aborted // and never answer
				return
			}
			var command struct{ ID int }
			json.Unmarshal(lines.Bytes(), &command)
			fmt.Fprintf(c, `{"return": {}, "id": %d}`+"\r\n", command.ID)
		}
	})
	ctx, cancel := context.WithCancelCause(labtest.Within(t, time.Minute))
	go func() {
		<-asked
		cancel(fmt.Errorf("%w by an operator", evict.ErrAbort))
		close(aborted)
	}()
	_, err = evict.Source{QMP: ln.Addr().String(),
		Connect: func(ctx context.Context) (*link.Session, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}.Evict(ctx)
	if !errors.Is(err, evict.ErrAborted) ||
		!strings.Contains(err.Error(), "it was told to abort by an operator") ||
		strings.Contains(err.Error(), "context canceled") {
		t.Error(err)
	}
}

package evict_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"vacate/lab"
	"vacate/lab/labtest"
)

// VMs in PID namespaces of their own move, although their QEMUs number their threads otherwise than
// the host.
func TestContained(t *testing.T) {
	if testing.Short() {
		t.Skip("short: boots VMs")
	}
	q, err := lab.StockQEMU(t.Context())
	labtest.Need(t, err)
	script := fmt.Sprintf("#!/bin/sh\nexec unshare --pid --fork --kill-child %s \"$@\"\n", q.Path)
	q.Path = filepath.Join(t.TempDir(), "contained")
	if err := os.WriteFile(q.Path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	v := standingCase{state: "running", code: counterROM}.begin(t, q)
	v.counts("source")
	report, err, destErr := v.evict(true)
	if err != nil || destErr != nil {
		t.Fatalf("source: %v; destination: %v", err, destErr)
	}
	if report.Down == nil {
		t.Error("the report does not say how long the VM stood still")
	}
	v.counts("twin")
}

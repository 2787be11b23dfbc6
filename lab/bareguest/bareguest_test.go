package bareguest_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"vacate/lab/bareguest"
)

// The tools that made the file in the repository. Others make other bytes of the same source.
var tools = map[string]string{
	"gcc": "gcc (Debian 12.2.0-14+deb12u1) 12.2.0",
	"ld":  "GNU ld (GNU Binutils for Debian) 2.40",
}

// The guest in the repository is what its source builds.
func TestBuiltFromSource(t *testing.T) {
	for tool, want := range tools {
		out, err := exec.Command(tool, "--version").Output()
		if err != nil {
			t.Skipf("the guest can be built with Debian 12's gcc and binutils: %v", err)
		}
		if got, _, _ := strings.Cut(string(out), "\n"); got != want {
			t.Skipf("the guest was built by %q, here is %q", want, got)
		}
	}
	built := filepath.Join(t.TempDir(), "guest.elf")
	if out, err := exec.Command("src/build", built).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bareguest.ELF) {
		t.Error("guest.elf is not what its source builds: run lab/bareguest/src/build " +
			"lab/bareguest/guest.elf")
	}
}

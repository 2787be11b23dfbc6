package main

import (
	"io"
	"strings"
	"testing"
)

// What is wrong is said before anything is made.
func TestLabRefuses(t *testing.T) {
	for args, want := range map[string]string{
		"bench --json /no/such/dir/x": "result file",
		"bench --svg /no/such/dir/x":  "result file",
		"bench --profile /dev/null/x": "directory for profiles",
		"bench --memory 1":            "want a whole number",
		"bench --link fast":           "want none",
		"bench --machine z":           `machine "z"`,
		"bench --devices z":           `devices "z"`,
		"bench --qemu z":              `qemu "z"`,
		"bench --load z":              `no load "z"`,
		"bench --kernel z":            `no kernel "z"`,
		"bench --vcpus 0":             "at least 1 CPU",
		"bench --accel z":             `accelerator "z"`,
		"bench --guest z":             `guest "z"`,
		"bench --access z":            `access "z"`,
		"bench --place z":             `place "z"`,
		"up --rate 1":                 "want none",
		"exec a ip":                   "want a host, --",
		"exec -- ip":                  "want a host, --",
		"exec --dir TMP a -- ip":      "no lab is up",
		"status --dir TMP":            "no lab is up",
		"down --dir TMP":              "no lab is up",
	} {
		c := rootCommand()
		c.SilenceErrors, c.SilenceUsage = true, true
		c.SetOut(io.Discard)
		c.SetArgs(strings.Fields(strings.ReplaceAll(args, "TMP", t.TempDir())))
		if err := c.ExecuteContext(t.Context()); err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("vacate-lab %s: error %v, want one with %q", args, err, want)
		}
	}
}

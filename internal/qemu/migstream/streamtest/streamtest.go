// Package streamtest has what tests of several packages do with recorded migration streams.
package streamtest

import (
	"compress/gzip"
	"io"
	"os"
	"testing"
)

// Recorded returns what a file holds that was compressed with gzip.
func Recorded(t testing.TB, file string) []byte {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

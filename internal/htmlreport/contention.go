package htmlreport

import (
	"io"

	"vacate/lab/bench"
)

// WriteContention writes the page of what was measured of VMs that contend.
func WriteContention(w io.Writer, c bench.Contention) error {
	return write(w, "Eviction under contention", "contention", c)
}

package htmlreport

import "io"

// WriteContention writes the page of what was measured of VMs that contend: the JSON of the lab's
// bench.Contention.
func WriteContention(w io.Writer, result any) error {
	return write(w, "Eviction under contention", "contention", result)
}

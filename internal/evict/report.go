package evict

import "time"

// Progress is a moment of an eviction, as the source sees it. Pages only ever grow, as
// each is sent once.
type Progress struct {
	State   State
	Elapsed time.Duration
	// Stands is QEMU's word for the state that the VM stood in when it was looked at or frozen;
	// empty of one that runs.
	Stands string
	Pages  int    // sent, or free and left out
	Total  int    // pages of the VM
	Bytes  uint64 // sent over the link
	// bytes per second since the push began in the present session; 0 while nothing is pushed
	Rate    float64
	Fetches int // pages that the VM waited for
	// Down is how long the VM stood still until it ran on the destination; 0 before, of a VM that
	// stood, and where it is not known.
	Down time.Duration
	// Awaits is what the destination does before it can take the offer, in its own words; empty for
	// nothing.
	Awaits string
	// AwaitedFor is since when.
	AwaitedFor time.Duration
	// ETA is the time until all pages are sent at the present rate; 0 if not known, as while there
	// is no link.
	ETA time.Duration
	// Short says that the destination has no memory for the VM's pages, so that the VM waits, why,
	// and what to do; "" if it has.
	Short string
}

// Report is what an eviction did, as the source saw it. Times are in seconds; those that
// were never reached are nil.
type Report struct {
	Outcome string `json:"outcome"` // completed, shut down, refused, aborted, lost contact
	Reason  string `json:"reason,omitempty"`
	// Warnings tell what the move costs besides time, such as dirty bitmaps.
	Warnings []string `json:"warnings,omitempty"`
	Machine  string   `json:"machine,omitempty"`
	QEMU     string   `json:"qemu,omitempty"`
	Phases   []Phase  `json:"phases"`
	// Begun is when the VM was first touched, by having its QEMU migrate: what came before
	// took Prepare and left it alone.
	Begun   *time.Time `json:"begun"`
	Prepare *float64   `json:"prepare_s"`
	// begun until the VM ran on the destination for the first time
	Transfer *float64 `json:"execution_transfer_s"`
	Down     *float64 `json:"down_time_s"` // frozen until then; nil of a VM that stood
	// Stood is QEMU's word for the state that the VM stood in all along; empty of one that ran.
	// Then Transfer is until it might have run there.
	Stood string   `json:"stood,omitempty"`
	Total *float64 `json:"total_s"` // begun until the source holds nothing any more

	Order         string       `json:"order"`         // of the push
	Enlightenment Enlightening `json:"enlightenment"` // what was known of the guest's pages
	Pages         PageCounts   `json:"pages"`
	LinkBytes     uint64       `json:"link_bytes"` // payload of the connections, both ways
	// sent, while pages were pushed; times without a link do not count
	Rate      float64    `json:"rate_bytes_per_s"`
	RoundTrip float64    `json:"round_trip_s"` // of the push, uncongested
	Fetch     *Quantiles `json:"fetch_latency_s"`
	// Gaps are the times after the commit in which there was no link: the first and the last of
	// very many.
	Gaps []Gap `json:"gaps,omitempty"`
}

// Phase is a period in one state. A state that was entered again, as after a lost link, has
// several.
type Phase struct {
	State State   `json:"state"`
	At    float64 `json:"at_s"`            // when it began, since the start
	For   float64 `json:"for_s,omitempty"` // how long it took; 0 of the last one
}

// PageCounts counts pages by how they came to the destination. Early, Pushed, Near, Fetched,
// Skipped, Unused and Before add up to Total; Zero tells how many of all were sent as a mark only.
type PageCounts struct {
	Total   int `json:"total"`
	Early   int `json:"early"`   // ahead of the device state, which needs them
	Pushed  int `json:"pushed"`  // by the plan
	Near    int `json:"near"`    // as neighbours of fetched ones
	Fetched int `json:"fetched"` // because the guest waited
	Zero    int `json:"zero"`
	Skipped int `json:"skipped"` // free in the guest, never sent
	// not there at the source, as the VM never used them or gave them back; never sent
	Unused int `json:"unused"`
	// SkippedTouched are pages of these two that the guest asked for before the end; each got
	// zeroes from the destination at once.
	SkippedTouched int `json:"skipped_touched"`
	Duplicate      int `json:"duplicate"` // sent twice
	// Before are those that were there when this engine took the eviction up.
	Before int `json:"before,omitempty"`
	// GivenBack is how many the source gave back to its host before the end.
	GivenBack int `json:"given_back,omitempty"`
}

// Quantiles sums up latencies, in seconds.
type Quantiles struct {
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
	Sum   float64 `json:"sum"`
	Count int     `json:"count"`
}

// quantiles sums up sorted latencies; nil if there are none.
func quantiles(sorted []float64) *Quantiles {
	if len(sorted) == 0 {
		return nil
	}
	q := &Quantiles{
		P50: sorted[len(sorted)/2], P99: sorted[len(sorted)*99/100],
		Max: sorted[len(sorted)-1], Count: len(sorted),
	}
	for _, v := range sorted {
		q.Sum += v
	}
	return q
}

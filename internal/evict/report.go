package evict

import "time"

// Progress is a moment of an eviction, as the source sees it. Pages never shrinks, as each page is
// sent once.
type Progress struct {
	State   State
	Elapsed time.Duration
	// Stands is QEMU's word for the state that the VM stood in when it was checked or frozen. It is
	// empty if the VM runs.
	Stands string
	Pages  int    // sent, or free and left out
	Total  int    // pages of the VM
	Bytes  uint64 // sent over the link
	// bytes per second since the push began in the present session; 0 while nothing is pushed
	Rate    float64
	Fetches int // pages that the VM waited for
	// Down is how long the VM stood still until it ran on the destination. It is 0 before that, for
	// a VM that stood, and if it is not known.
	Down time.Duration
	// Awaits is what the destination does before it can accept the offer, in its own words. It is
	// empty if there is nothing to wait for.
	Awaits string
	// AwaitedFor is how long Awaits has lasted.
	AwaitedFor time.Duration
	// ETA is the time until all pages are sent at the present rate. It is 0 if that is not known,
	// as without a link.
	ETA time.Duration
	// Short is not empty if the destination has no memory for the VM's pages, so that the VM waits.
	// It says why, and what to do.
	Short string
	// Apart says why the destination could not be asked, or what it answered, when that was tried
	// last. It is empty while there is a session.
	Apart string
}

// Report is what an eviction did, as the source saw it. Times are in seconds; those that
// were never reached are nil.
type Report struct {
	Outcome string `json:"outcome"` // completed, shut down, refused, aborted, lost contact
	Reason  string `json:"reason,omitempty"`
	// Warnings say what the move costs besides time, such as dirty bitmaps.
	Warnings []string `json:"warnings,omitempty"`
	Machine  string   `json:"machine,omitempty"`
	QEMU     string   `json:"qemu,omitempty"`
	Phases   []Phase  `json:"phases"`
	// Begun is when the engine first changed the VM, at the freeze. Prepare is the time before
	// that, which did not affect the VM.
	Begun   *time.Time `json:"begun"`
	Prepare *float64   `json:"prepare_s"`
	// begun until the VM ran on the destination for the first time
	Transfer *float64 `json:"execution_transfer_s"`
	Down     *float64 `json:"down_time_s"` // frozen until then; nil for a VM that stood
	// Stood is QEMU's word for the state that the VM stood in all along; empty if it ran. Transfer
	// then ends when the VM might have run there.
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
	// Gaps are the periods after the commit without a link. If there are very many, they are the
	// first and the last.
	Gaps []Gap `json:"gaps,omitempty"`
}

// Phase is a period in one state. A state may have several, as after a lost link.
type Phase struct {
	State State   `json:"state"`
	At    float64 `json:"at_s"`            // when it began, since the start
	For   float64 `json:"for_s,omitempty"` // how long it took; 0 for the last one
}

// PageCounts counts pages by how they came to the destination. Early, Pushed, Near, Fetched,
// Skipped, Unused and Before add up to Total. Zero counts those that were sent as a mark only.
type PageCounts struct {
	Total   int `json:"total"`
	Early   int `json:"early"`   // ahead of the device state, which needs them
	Pushed  int `json:"pushed"`  // by the plan
	Near    int `json:"near"`    // as neighbours of fetched ones
	Fetched int `json:"fetched"` // because the guest waited
	Zero    int `json:"zero"`
	Skipped int `json:"skipped"` // free in the guest, never sent
	// without memory at the source, as the VM never used them or gave them back; never sent
	Unused int `json:"unused"`
	// SkippedTouched counts the pages of these two that the guest requested before the end. The
	// destination gave it zeroes at once.
	SkippedTouched int `json:"skipped_touched"`
	Duplicate      int `json:"duplicate"` // sent twice
	// Before counts the pages that were there when this engine resumed the eviction.
	Before int `json:"before,omitempty"`
	// GivenBack counts the pages that the source gave back to its host before the end.
	GivenBack int `json:"given_back,omitempty"`
}

// Quantiles summarises latencies, in seconds.
type Quantiles struct {
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
	Sum   float64 `json:"sum"`
	Count int     `json:"count"`
}

// quantiles summarises sorted latencies; nil if there are none.
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

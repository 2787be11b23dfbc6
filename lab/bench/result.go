package bench

import (
	"encoding/json"
	"math"
)

// Version of the JSON form of Result. It rises when a field changes its
// meaning or goes; new fields may come without.
const Version = 1

// Result is what a benchmark measured. docs/bench.md describes its JSON form.
type Result struct {
	Version int     `json:"version"`
	Machine Machine `json:"machine"`
	VM      VM      `json:"vm"`
	Runs    []Run   `json:"runs"` // in the order they ran
}

// Machine is what the benchmark ran on.
type Machine struct {
	CPU         string  `json:"cpu"`
	Cores       int     `json:"cores"`
	MemoryBytes uint64  `json:"memory_bytes"`
	Kernel      string  `json:"kernel"`
	QEMU        string  `json:"qemu"`  // version
	Accel       string  `json:"accel"` // kvm or tcg
	GuestKernel string  `json:"guest_kernel"`
	Link        *uint64 `json:"link_bits_per_s"`        // each way; nil: unshaped
	Congestion  string  `json:"tcp_congestion_control"` // on both hosts
	Pinned      bool    `json:"pinned"`                 // each host to a core of its own
	Libvirt     *string `json:"libvirt"`                // version; nil: VMs are not domains
}

// VM is what was moved.
type VM struct {
	Machine   string `json:"machine"` // QEMU's machine type
	MemoryMiB int    `json:"memory_mib"`
	VCPUs     int    `json:"vcpus"`
	Devices   string `json:"devices"`
	Memfd     bool   `json:"memfd"`
	HotMiB    int    `json:"hot_mib"`
	IdleMiB   int    `json:"idle_mib"`
	OtherMiB  int    `json:"other_mib"`
	CacheMiB  int    `json:"cache_mib"`
	Guest     string `json:"guest"`  // linux or bare
	Access    string `json:"access"` // to hot pages: uniform or zipf
	Place     string `json:"place"`  // of hot pages: together or scattered
	Agent     bool   `json:"agent"`  // in the guest
}

// bareGuest is VM.Guest where package bareguest's runs.
const bareGuest = "bare"

// Outcomes of a run.
const (
	Completed    = "completed"
	NotConverged = "not converged" // pre-copy, given up: the guest ran on
	Unsupported  = "unsupported"   // this QEMU has no such thing
	Damaged      = "damaged"       // the guest, by QEMU's own migration
	Failed       = "failed"
)

// Run is one eviction. Times are in seconds since its start, and nil where the
// strategy has no such figure or never came so far.
type Run struct {
	Strategy string `json:"strategy"`
	Load     string `json:"load"`
	Rep      int    `json:"rep"` // from 1
	// EvictedBefore is how often this very guest was: 0 if it has just booted.
	EvictedBefore int    `json:"evicted_before"`
	Outcome       string `json:"outcome"`
	Reason        string `json:"reason,omitempty"`

	Prepare   *float64 `json:"prepare_s"` // before the start
	Transfer  *float64 `json:"execution_transfer_s"`
	Down      *float64 `json:"down_time_s"`
	Total     *float64 `json:"total_s"`
	LinkBytes *uint64  `json:"link_bytes"` // both ways, headers included
	// EngineCPU is what the engines used, from their start to their end. It is nil where daemons
	// evict, as they do more than that.
	EngineCPU *EngineCPU `json:"engine_cpu_s"`

	Pages    *Pages     `json:"pages"`
	Stall    *Quantiles `json:"stall_s"`
	Fetch    *Quantiles `json:"fetch_latency_s"`
	Recovery *float64   `json:"recovery_90_s"`
	WorkLost *float64   `json:"work_lost_s"`
	Bad      *uint64    `json:"bad_pages"`
	Before   *float64   `json:"before_ops_per_s"`

	// Throughput in steps of 100 ms, each as its begin and its rate.
	Throughput []Point `json:"throughput"`
	// Engine is the engine's own report.
	Engine json.RawMessage `json:"engine"`
	// Fetches are those that the kernel's events showed, if Options.Trace asks for them.
	Fetches []Fetch `json:"-"`
}

// EngineCPU is seconds of CPU, the kernel's work for the engine included.
type EngineCPU struct {
	Source      float64 `json:"source"`
	Destination float64 `json:"destination"`
}

// Pages counts pages of 4096 bytes.
type Pages struct {
	Pushed    *uint64 `json:"pushed"`    // sent unasked
	Fetched   *uint64 `json:"fetched"`   // asked for by the destination
	Zero      *uint64 `json:"zero"`      // of all that were sent, those sent as a mark only
	Skipped   *uint64 `json:"skipped"`   // never sent
	Duplicate *uint64 `json:"duplicate"` // sent once more
}

// Quantiles sums up durations, in seconds.
type Quantiles struct {
	P50   float64 `json:"p50"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
	Sum   float64 `json:"sum"`
	Count uint64  `json:"count"`
}

// Point is a time in seconds and a rate per second.
type Point [2]float64

// round keeps microseconds, so that figures are easy to read.
func round(x float64) float64 { return math.Round(x*1e6) / 1e6 }

func seconds(x float64) *float64 {
	x = round(x)
	return &x
}

func ptr[T any](x T) *T { return &x }

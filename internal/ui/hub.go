package ui

import (
	"cmp"
	"encoding/json"
	"maps"
	"math"
	"reflect"
	"slices"
	"strconv"
	"sync"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	hostv1 "vacate/internal/host/api/v1"

	"google.golang.org/protobuf/proto"
)

// Host is a host as viewers see it. Poll feeds a Hub with those of daemons, PollFleet with those of
// a fleet.
type Host struct {
	// Key tells the host from others, also before its name is known.
	Key  string `json:"key"`
	Name string `json:"name"`
	// Error is why it could not be asked; empty if it could.
	Error string `json:"error,omitempty"`
	// At is when it was last heard, in milliseconds since 1970; 0: never. A host whose word is old
	// is late, not dead.
	At      int64  `json:"at_ms"`
	Version string `json:"version"`
	// Guard is what the daemon that evicts by itself makes of the host.
	Guard string `json:"guard,omitempty"`
	// Peers are the hosts that VMs can be evicted to from here.
	Peers []string `json:"peers"`

	CPUs      Num    `json:"cpus"`
	Cores     Num    `json:"cpu_cores"`     // in use, by anything
	Waiting   Num    `json:"waiting_cores"` // that vCPUs wanted beyond what they had
	Memory    uint64 `json:"memory_bytes"`
	Available uint64 `json:"available_bytes"`
	// Stalls are the shares of the time in which some task stood still for want of something.
	Stalls   map[string]Num `json:"stalls,omitempty"`
	VMs      []VM           `json:"vms"`
	Problems []string       `json:"problems,omitempty"`

	// What a fleet's leader says of it. State is reporting, late or new; empty: there is no fleet.
	State       string            `json:"state,omitempty"`
	Maintenance *Maintenance      `json:"maintenance,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Num is a number that is written with three decimals: pages of many hosts get many of them. One
// that JSON cannot have is 0.
type Num float64

// MarshalJSON implements json.Marshaler.
func (n Num) MarshalJSON() ([]byte, error) {
	if math.IsNaN(float64(n)) || math.Abs(float64(n)) > 1e15 {
		return []byte("0"), nil
	}
	return strconv.AppendFloat(nil, math.Round(float64(n)*1000)/1000, 'f', -1, 64), nil
}

// VM is a VM of a host.
type VM struct {
	Name     string `json:"name"`
	State    string `json:"state"`
	Memory   uint64 `json:"memory_bytes"`
	VCPUs    uint32 `json:"vcpus"`
	Cores    Num    `json:"cpu_cores"`
	Waiting  Num    `json:"waiting_cores"`
	Steal    Num    `json:"steal"`
	Resident uint64 `json:"resident_bytes"`
	Swapped  uint64 `json:"swapped_bytes,omitempty"`
	Eviction string `json:"eviction_id,omitempty"`
	Problem  string `json:"problem,omitempty"`
	Libvirt  bool   `json:"libvirt,omitempty"`
}

// Eviction is one as a host sees it; two hosts see most.
type Eviction struct {
	Host string `json:"host"` // the key of the host that says so
	// Says is where the VM is, in a sentence. Empty of one that has ended.
	Says string `json:"says"`
	// Of is the API's message, without its report.
	Of json.RawMessage `json:"of"`
	// Down, Transfer and Total are the report's, in seconds; nil if not known.
	Down     *float64 `json:"down_time_s"`
	Transfer *float64 `json:"execution_transfer_s"`
	Total    *float64 `json:"total_s"`
	Bytes    uint64   `json:"link_bytes"`
	Fetches  uint64   `json:"fetches"`
	Report   bool     `json:"report"` // there is one here

	id   string
	open bool
}

func (e *Eviction) key() string { return e.Host + "/" + e.id }

// Job is what the page was told to do that takes several evictions.
type Job struct {
	ID    int      `json:"id"`
	Host  string   `json:"host"`
	Kind  string   `json:"kind"`
	Lines []string `json:"lines"`
	Ended bool     `json:"ended"`
}

// Map is the memory of a VM that is being evicted, part by part.
type Map struct {
	Host, ID string
	*hostv1.GetMapResponse
}

func (m Map) key() string { return m.Host + "/" + m.ID }

// A Hub holds what is known, and tells each viewer what has changed.
type Hub struct {
	mu        sync.Mutex
	hosts     map[string]*Host
	evictions map[string]*Eviction
	jobs      map[int]*Job
	maps      map[string]Map
	fleet     *Fleet
	decisions []*fleetv1.Decision
	viewers   map[*viewer]bool
	looked    chan struct{} // closed when the first viewer comes
}

// viewer is a page that is open somewhere.
type viewer struct {
	wake      chan struct{} // holds one value when something has changed
	hosts     map[string]bool
	evictions map[string]bool
	jobs      map[int]bool
	maps      map[string]bool
	fleet     bool
	decisions bool
}

// NewHub makes a hub that knows nothing.
func NewHub() *Hub {
	return &Hub{hosts: map[string]*Host{}, evictions: map[string]*Eviction{}, jobs: map[int]*Job{},
		maps: map[string]Map{}, viewers: map[*viewer]bool{}, looked: make(chan struct{})}
}

// Watched returns a channel that is closed while anybody looks.
func (h *Hub) Watched() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.looked
}

// changed is called with mu held.
func (h *Hub) changed(mark func(*viewer)) {
	for v := range h.viewers {
		mark(v)
		select {
		case v.wake <- struct{}{}:
		default:
		}
	}
}

// PutHost replaces what is known of a host.
func (h *Hub) PutHost(host *Host) { h.PutHosts([]*Host{host}) }

// Host returns what is known of a host; nil for nothing.
func (h *Hub) Host(key string) *Host {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hosts[key]
}

// PutHosts does so with several at once.
func (h *Hub) PutHosts(list []*Host) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, host := range list {
		h.hosts[host.Key] = host
	}
	h.changed(func(v *viewer) {
		for _, host := range list {
			v.hosts[host.Key] = true
		}
	})
}

// keep forgets all hosts but some.
func (h *Hub) keep(there map[string]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key := range h.hosts {
		if !there[key] {
			delete(h.hosts, key)
			h.changed(func(v *viewer) { v.hosts[key] = true })
		}
	}
}

// dropEvictions forgets what a host said of evictions.
func (h *Hub) dropEvictions(host string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, e := range h.evictions {
		if e.Host == host {
			delete(h.evictions, key)
			delete(h.maps, key)
			h.changed(func(v *viewer) { v.evictions[key] = true })
		}
	}
}

// Fleet returns what is known of the fleet; nil for nothing.
func (h *Hub) Fleet() *Fleet {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.fleet
}

// PutFleet replaces what is known of the fleet.
func (h *Hub) PutFleet(f *Fleet) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if reflect.DeepEqual(f, h.fleet) {
		return
	}
	h.fleet = f
	h.changed(func(v *viewer) { v.fleet = true })
}

// PutDecisions replaces what is known of the fleet's decisions.
func (h *Hub) PutDecisions(list []*fleetv1.Decision) {
	list = slices.SortedFunc(slices.Values(list), byTime)
	list = list[:min(len(list), mostDecisions)]
	h.mu.Lock()
	defer h.mu.Unlock()
	if slices.EqualFunc(list, h.decisions, func(a, b *fleetv1.Decision) bool {
		return proto.Equal(a, b)
	}) {
		return
	}
	h.decisions = list
	h.changed(func(v *viewer) { v.decisions = true })
}

// Decisions returns what is known of the fleet's decisions.
func (h *Hub) Decisions() []*fleetv1.Decision {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.decisions
}

// decision returns one; nil if there is none.
func (h *Hub) decision(id string) *fleetv1.Decision {
	for _, d := range h.Decisions() {
		if d.Id == id {
			return d
		}
	}
	return nil
}

// waiting is how many decisions wait for an operator.
func (h *Hub) waiting() (n int) {
	for _, d := range h.Decisions() {
		if d.State == "waits" {
			n++
		}
	}
	return n
}

// PutEviction replaces what a host says of an eviction.
func (h *Hub) PutEviction(e *Eviction) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if was := h.evictions[e.key()]; was != nil && string(was.Of) == string(e.Of) &&
		was.Says == e.Says {
		return
	}
	h.evictions[e.key()] = e
	if !e.open {
		delete(h.maps, e.key())
	}
	h.changed(func(v *viewer) { v.evictions[e.key()] = true })
}

// PutMap replaces the map of an eviction's memory.
func (h *Hub) PutMap(m Map) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.maps[m.key()] = m
	h.changed(func(v *viewer) { v.maps[m.key()] = true })
}

// putJob adds a line to a job.
func (h *Hub) putJob(j *Job, line string, ended bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if j.ID == 0 {
		j.ID = len(h.jobs) + 1
	}
	if line != "" {
		j.Lines = append(j.Lines, line)
	}
	j.Ended = ended
	kept := *j
	h.jobs[j.ID] = &kept
	h.changed(func(v *viewer) { v.jobs[j.ID] = true })
}

// look begins to tell a viewer of changes; all that there is has changed for it.
func (h *Hub) look() *viewer {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := &viewer{fleet: true, decisions: true, wake: make(chan struct{}, 1),
		hosts:     map[string]bool{},
		evictions: map[string]bool{}, jobs: map[int]bool{}, maps: map[string]bool{}}
	for key := range h.hosts {
		v.hosts[key] = true
	}
	for key := range h.evictions {
		v.evictions[key] = true
	}
	for id := range h.jobs {
		v.jobs[id] = true
	}
	for key := range h.maps {
		v.maps[key] = true
	}
	v.wake <- struct{}{}
	if len(h.viewers) == 0 {
		close(h.looked)
	}
	h.viewers[v] = true
	return v
}

// Attend is for those who look at Hosts and Open. changed holds a value when they have changed,
// until leave is called.
func (h *Hub) Attend() (changed <-chan struct{}, leave func()) {
	v := h.look()
	return v.wake, func() { h.leave(v) }
}

// leave ends that.
func (h *Hub) leave(v *viewer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.viewers, v)
	if len(h.viewers) == 0 {
		h.looked = make(chan struct{})
	}
}

// mapJSON is a map as the page gets it: bytes in base64.
type mapJSON struct {
	Key     string   `json:"key"`
	Pages   uint32   `json:"pages"`
	Came    []byte   `json:"came"`
	Why     []byte   `json:"why"`
	Class   []byte   `json:"class"`
	Reasons []string `json:"reasons"`
	Classes []string `json:"classes"`
}

// change is what a viewer is told.
type change struct {
	Now       int64              `json:"now_ms"`
	Hosts     []*Host            `json:"hosts,omitempty"`
	Evictions []*Eviction        `json:"evictions,omitempty"`
	Jobs      []*Job             `json:"jobs,omitempty"`
	Maps      []mapJSON          `json:"maps,omitempty"`
	Fleet     *Fleet             `json:"fleet,omitempty"`
	Decisions *[]json.RawMessage `json:"decisions,omitempty"`
	// Gone are keys of hosts and evictions that there are no more.
	Gone []string `json:"gone,omitempty"`
}

// take returns what has changed for a viewer since it last took.
func (h *Hub) take(v *viewer) change {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := change{Now: time.Now().UnixMilli()}
	for _, key := range slices.Sorted(maps.Keys(v.hosts)) {
		if host := h.hosts[key]; host != nil {
			c.Hosts = append(c.Hosts, host)
		} else {
			c.Gone = append(c.Gone, key)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(v.evictions)) {
		if e := h.evictions[key]; e != nil {
			c.Evictions = append(c.Evictions, e)
		} else {
			c.Gone = append(c.Gone, key)
		}
	}
	if v.fleet {
		c.Fleet = h.fleet
	}
	if v.decisions && h.fleet != nil {
		list := make([]json.RawMessage, 0, len(h.decisions))
		for _, d := range h.decisions {
			if b := hostv1.JSON(d); len(b) <= mostOfOne {
				list = append(list, b)
			}
		}
		c.Decisions = &list
	}
	v.fleet, v.decisions = false, false
	for _, id := range slices.Sorted(maps.Keys(v.jobs)) {
		c.Jobs = append(c.Jobs, h.jobs[id])
	}
	for _, key := range slices.Sorted(maps.Keys(v.maps)) {
		if m, ok := h.maps[key]; ok {
			c.Maps = append(c.Maps, mapJSON{key, m.PagesPerPart, m.Came, m.Why, m.Class,
				m.Reasons, m.Classes})
		}
	}
	clear(v.hosts)
	clear(v.evictions)
	clear(v.jobs)
	clear(v.maps)
	return c
}

// Hosts returns all hosts, in order of name.
func (h *Hub) Hosts() []*Host {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.SortedFunc(maps.Values(h.hosts), func(a, b *Host) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Key, b.Key))
	})
}

// Open returns what hosts say of evictions that have not ended, in order of their keys.
func (h *Hub) Open() (list []*Eviction) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(h.evictions)) {
		if e := h.evictions[key]; e.open {
			list = append(list, e)
		}
	}
	return list
}

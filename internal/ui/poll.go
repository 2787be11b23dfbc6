package ui

import (
	"context"
	"fmt"
	"sync"
	"time"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
)

// Remote is a daemon that is asked.
type Remote struct {
	hostv1.HostClient
	// Key tells it from others. Label names it as long as it has not said its name.
	Key, Label string
	// Explain puts an error of it in words.
	Explain func(error) error
}

// How often daemons are asked.
const (
	pollPause = time.Second // beside the time over which pressure is measured
	overMS    = 2000
	callLimit = 15 * time.Second
	allEvery  = 15 // polls: then all evictions are listed, not only those under way
	mapPause  = 300 * time.Millisecond
	mapParts  = 2048
)

// Poll keeps a hub up to date about a daemon until ctx is done, while anybody looks.
func (h *Hub) Poll(ctx context.Context, d Remote, tell func(*hostv1.Eviction) string) {
	p := &poller{life: ctx, hub: h, d: d, tell: tell, following: map[string]bool{}}
	defer p.tasks.Wait()
	for n := 0; ; n++ {
		select {
		case <-h.Watched():
		case <-ctx.Done():
			return
		}
		p.poll(ctx, n%allEvery == 0)
		select {
		case <-time.After(pollPause):
		case <-ctx.Done():
			return
		}
	}
}

type poller struct {
	life  context.Context // ends all that follows evictions
	hub   *Hub
	d     Remote
	tell  func(*hostv1.Eviction) string
	tasks sync.WaitGroup

	mu        sync.Mutex
	following map[string]bool // by ID; guarded by mu
	asking    bool            // by open; guarded by mu
}

// open asks for evictions that have not ended.
func (p *poller) open() error {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.asking = false
	}()
	ctx, cancel := context.WithTimeout(p.life, callLimit)
	defer cancel()
	r, err := p.d.ListEvictions(ctx,
		connect.NewRequest(&hostv1.ListEvictionsRequest{OpenOnly: true}))
	if err != nil {
		return p.d.Explain(err)
	}
	p.list(r.Msg.Evictions)
	return nil
}

// idle reports whether nothing is asked, and no eviction is followed.
func (p *poller) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.asking && len(p.following) == 0
}

// poll asks once.
func (p *poller) poll(ctx context.Context, all bool) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	host := &Host{Key: p.d.Key, Name: p.d.Label, Peers: []string{}, VMs: []VM{}}
	var asking sync.WaitGroup
	var status *hostv1.StatusResponse
	var vms *hostv1.ListVMsResponse
	var load *hostv1.PressureResponse
	var failed [4]error
	asking.Go(func() {
		r, err := p.d.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
		if failed[0] = err; err == nil {
			status = r.Msg
		}
	})
	asking.Go(func() {
		r, err := p.d.ListVMs(ctx, connect.NewRequest(&hostv1.ListVMsRequest{}))
		if failed[1] = err; err == nil {
			vms = r.Msg
		}
	})
	asking.Go(func() {
		r, err := p.d.Pressure(ctx, connect.NewRequest(&hostv1.PressureRequest{OverMs: overMS}))
		if failed[2] = err; err == nil {
			load = r.Msg
		}
	})
	asking.Go(func() {
		r, err := p.d.ListEvictions(ctx,
			connect.NewRequest(&hostv1.ListEvictionsRequest{OpenOnly: !all}))
		if failed[3] = err; err == nil {
			p.list(r.Msg.Evictions)
		}
	})
	asking.Wait()
	for _, err := range failed {
		if err == nil {
			continue
		}
		if ctx.Err() != nil && context.Cause(ctx) == context.Canceled {
			return
		}
		if was := p.hub.Host(p.d.Key); was != nil {
			kept := *was
			host = &kept
		}
		host.Error = brief(p.d.Explain(err).Error())
		p.hub.PutHost(host)
		return
	}
	p.hub.PutHost(newHost(host, status, vms, load))
}

// newHost fills in what a daemon said of its host.
func newHost(h *Host, s *hostv1.StatusResponse, vms *hostv1.ListVMsResponse,
	load *hostv1.PressureResponse) *Host {
	h.Name, h.Version, h.Guard = brief(s.Host), brief(s.Version), brief(s.Guard)
	h.At = time.Now().UnixMilli()
	for _, p := range s.Peers[:min(len(s.Peers), mostPeers)] {
		if p.Address != "" {
			h.Peers = append(h.Peers, brief(p.Name))
		}
	}
	h.CPUs, h.Cores, h.Waiting = Num(load.Cpus), Num(load.CpuCores), Num(load.WaitingCores)
	h.Memory, h.Available = load.MemoryBytes, load.AvailableBytes
	h.Stalls, h.Problems = map[string]Num{}, briefs(vms.Problems)
	for what, s := range load.Stalls {
		if len(h.Stalls) < mostStalls {
			h.Stalls[brief(what)] = Num(s.Some)
		}
	}
	fares := map[string]*hostv1.VMPressure{}
	for _, v := range load.Vms {
		fares[v.Name] = v
	}
	if n := len(vms.Vms) - mostVMs; n > 0 {
		h.Problems = append(h.Problems, fmt.Sprintf("It tells of %d more VMs", n))
	}
	for _, v := range vms.Vms[:min(len(vms.Vms), mostVMs)] {
		f := fares[v.Name]
		vm := VM{Name: brief(v.Name), State: brief(v.State), Memory: v.MemoryBytes,
			VCPUs: v.Vcpus, Eviction: brief(v.EvictionId), Problem: brief(v.Problem),
			Libvirt: v.Libvirt}
		if f != nil {
			vm.Cores, vm.Waiting, vm.Steal = Num(f.CpuCores), Num(f.WaitingCores), Num(f.Steal)
			vm.Resident, vm.Swapped = f.ResidentBytes, f.SwappedBytes
		}
		h.VMs = append(h.VMs, vm)
	}
	return h
}

// list takes a list of evictions, and follows those that have not ended.
func (p *poller) list(list []*hostv1.Eviction) {
	for _, e := range list[max(0, len(list)-mostListed):] {
		if !p.put(e) {
			continue
		}
		p.mu.Lock()
		follow := e.EndedAt == nil && e.Damage == "" && !p.following[e.Id] &&
			len(p.following) < mostAtOnce
		if follow {
			p.following[e.Id] = true
		}
		p.mu.Unlock()
		if follow {
			p.tasks.Go(func() { p.follow(e) })
		}
	}
}

// NewEviction is what a host says of an eviction. tell puts in a sentence where the VM is.
func NewEviction(host string, e *hostv1.Eviction, tell func(*hostv1.Eviction) string) *Eviction {
	out := &Eviction{Host: host, id: e.Id, open: e.EndedAt == nil}
	if r := e.Report; r != nil {
		out.Down, out.Transfer = finite(r.DownTimeS), finite(r.ExecutionTransferS)
		out.Total = finite(r.TotalS)
		out.Bytes, out.Fetches, out.Report = r.LinkBytes, r.GetPages().GetFetched(), true
		e = proto.CloneOf(e)
		e.Report = nil
	}
	if out.open {
		out.Says = brief(tell(e))
	}
	out.Of = hostv1.JSON(e)
	return out
}

// put takes what a daemon says of an eviction, unless that is more than any daemon says.
func (p *poller) put(e *hostv1.Eviction) bool {
	out := NewEviction(p.d.Key, e, p.tell)
	if len(out.Of) > mostOfOne {
		return false
	}
	p.hub.PutEviction(out)
	return true
}

// follow keeps the hub up to date about an eviction until the daemon tells no more.
func (p *poller) follow(e *hostv1.Eviction) {
	ctx, cancel := context.WithCancel(p.life)
	defer cancel()
	var mapping sync.WaitGroup
	defer mapping.Wait()
	defer cancel()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.following, e.Id)
	}()
	if e.Role == "source" {
		mapping.Go(func() { p.mapping(ctx, e.Id) })
	}
	stream, err := p.d.WatchEviction(ctx,
		connect.NewRequest(&hostv1.WatchEvictionRequest{Id: e.Id}))
	if err != nil {
		return // the next poll tries again
	}
	defer stream.Close()
	for stream.Receive() {
		p.put(stream.Msg())
	}
}

// mapping keeps the map of an eviction up to date.
func (p *poller) mapping(ctx context.Context, id string) {
	for ctx.Err() == nil {
		r, err := p.d.GetMap(ctx,
			connect.NewRequest(&hostv1.GetMapRequest{Id: id, Parts: mapParts}))
		if err == nil && ctx.Err() == nil && !odd(r.Msg) {
			p.hub.PutMap(Map{p.d.Key, id, r.Msg})
		}
		select {
		case <-time.After(mapPause):
		case <-ctx.Done():
		}
	}
}

package fleethosts

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"time"

	hostv1 "vacate/internal/host/api/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// daemon answers for a host's.
type daemon struct {
	hostv1.UnimplementedHostHandler
	*host
}

// handler serves the API of all hosts.
func (f *Fleet) handler() http.Handler {
	mux := http.NewServeMux()
	for _, h := range f.hosts {
		path, handler := hostv1.NewHostHandler(daemon{host: h})
		mux.Handle("/"+h.name+path, http.StripPrefix("/"+h.name, handler))
	}
	return mux
}

// share is how much of the memory has gone.
func (e *eviction) share(now time.Time) float64 {
	if e.outcome != "" {
		return 1
	}
	return min(0.999, max(0, (now.Sub(e.began)-transfer).Seconds()/(e.takes-transfer).Seconds()))
}

func (e *eviction) state(now time.Time) string {
	switch {
	case e.outcome != "":
		return e.outcome
	case e.there:
		return "pushing"
	case now.Sub(e.began) < transfer/2:
		return "preparing"
	}
	return "switching"
}

// message is the eviction as the daemon tells.
func (e *eviction) message(now time.Time) *hostv1.Eviction {
	m := &hostv1.Eviction{Id: e.id, Vm: e.of.name, Role: "source", Peer: e.to, State: e.state(now),
		Outcome: e.outcome, Abortable: !e.there, StartedAt: timestamppb.New(e.began)}
	share, spent := e.share(now), now.Sub(e.began).Seconds()
	m.Progress = &hostv1.Progress{ElapsedS: spent, State: m.State,
		PagesTotal: e.of.size / pageSize, LinkBytes: uint64(share * float64(e.of.resident)),
		Fetches: uint64(400 * math.Sqrt(share))}
	m.Progress.PagesSent = uint64(share * float64(m.Progress.PagesTotal))
	if e.there {
		down := 0.031
		m.Progress.DownTimeS = &down
	}
	if e.outcome == "" {
		left := max(0, e.takes.Seconds()-spent)
		m.Progress.EtaS = &left
		if e.there {
			m.Progress.RateBytesPerS = float64(e.of.resident) /
				max(0.1, (e.takes-transfer).Seconds()) * (0.85 + 0.15*math.Sin(spent))
		}
		return m
	}
	total, down := e.ended.Sub(e.began).Seconds(), 0.031
	m.EndedAt = timestamppb.New(e.ended)
	m.Report = &hostv1.Report{Outcome: e.outcome, TotalS: &total, DownTimeS: &down,
		LinkBytes: e.of.resident}
	return m
}

// find returns an eviction. It is called with mu held.
func (d daemon) find(id string) (*eviction, error) {
	for _, e := range d.evictions {
		if e.id == id {
			return e, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no eviction %s", id))
}

// Status implements hostv1.HostHandler.
func (d daemon) Status(context.Context, *connect.Request[hostv1.StatusRequest]) (
	*connect.Response[hostv1.StatusResponse], error) {
	return connect.NewResponse(&hostv1.StatusResponse{Host: d.name}), nil
}

// GetTrace implements hostv1.HostHandler.
func (d daemon) GetTrace(context.Context, *connect.Request[hostv1.GetTraceRequest]) (
	*connect.Response[hostv1.GetTraceResponse], error) {
	return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no trace"))
}

// ListEvictions implements hostv1.HostHandler.
func (d daemon) ListEvictions(_ context.Context,
	q *connect.Request[hostv1.ListEvictionsRequest]) (
	*connect.Response[hostv1.ListEvictionsResponse], error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	d.move(now)
	r := &hostv1.ListEvictionsResponse{}
	for _, e := range d.evictions {
		if e.outcome == "" || !q.Msg.OpenOnly {
			r.Evictions = append(r.Evictions, e.message(now))
		}
	}
	return connect.NewResponse(r), nil
}

// GetEviction implements hostv1.HostHandler.
func (d daemon) GetEviction(_ context.Context, q *connect.Request[hostv1.GetEvictionRequest]) (
	*connect.Response[hostv1.Eviction], error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, err := d.find(q.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(e.message(time.Now())), nil
}

// WatchEviction implements hostv1.HostHandler.
func (d daemon) WatchEviction(ctx context.Context,
	q *connect.Request[hostv1.WatchEvictionRequest],
	stream *connect.ServerStream[hostv1.Eviction]) error {
	for {
		d.mu.Lock()
		now := time.Now()
		d.move(now)
		e, err := d.find(q.Msg.Id)
		var m *hostv1.Eviction
		if err == nil {
			m = e.message(now)
		}
		d.mu.Unlock()
		if err != nil {
			return err
		}
		if err := stream.Send(m); err != nil || m.Outcome != "" {
			return err
		}
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Abort implements hostv1.HostHandler.
func (d daemon) Abort(_ context.Context, q *connect.Request[hostv1.AbortRequest]) (
	*connect.Response[hostv1.Eviction], error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, err := d.find(q.Msg.Id)
	if err != nil {
		return nil, err
	}
	if e.there || e.outcome != "" {
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("the VM runs on host %s", e.to))
	}
	e.outcome, e.ended, e.of.leaves = "aborted", time.Now(), nil
	return connect.NewResponse(e.message(time.Now())), nil
}

// classes are what memory is used for, and how much of it.
var classes = []struct {
	name  string
	share float64
}{{"kernel", 0.05}, {"kernel code", 0.02}, {"page table", 0.03}, {"user code", 0.06},
	{"user data", 0.4}, {"file active", 0.14}, {"file inactive", 0.3}}

// GetMap implements hostv1.HostHandler. What is resident is used; the rest is free, and never sent.
// Parts go in an order in which none is beside the one before.
func (d daemon) GetMap(_ context.Context, q *connect.Request[hostv1.GetMapRequest]) (
	*connect.Response[hostv1.GetMapResponse], error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	e, err := d.find(q.Msg.Id)
	if err != nil {
		return nil, err
	}
	parts := int(q.Msg.Parts)
	if parts < 1 || parts > 1<<16 {
		parts = 2048
	}
	r := &hostv1.GetMapResponse{PagesPerPart: uint32(e.of.size / pageSize / uint64(parts)),
		Came: make([]byte, parts), Why: make([]byte, parts), Class: make([]byte, parts),
		Reasons: []string{"planned", "fetched", "skipped"}}
	for _, c := range classes {
		r.Classes = append(r.Classes, c.name)
	}
	seed := uint64(e.id[0])<<8 | uint64(e.id[1])
	used := float64(e.of.resident) / float64(e.of.size)
	gone := e.share(time.Now())
	for i := range parts {
		// Runs of some parts are of one class, and used or free.
		x := mix(seed + uint64(i/9)*31)
		at := 0
		for s := x; at < len(classes)-1 && s > classes[at].share; at++ {
			s -= classes[at].share
		}
		r.Class[i] = byte(at)
		if mix(seed+uint64(i/23)*77+5) > used {
			r.Why[i] = 2
			if e.there {
				r.Came[i] = 255
			}
			continue
		}
		turn := (float64(at)/float64(len(classes)) + mix(seed+uint64(i/3)*13+9)) / 2
		part := min(1, max(0, (gone*1.15-turn)/0.15))
		r.Came[i] = byte(255 * part)
		if part > 0 && mix(seed+uint64(i)*3+1) < 0.02 {
			r.Why[i] = 1
		}
	}
	return connect.NewResponse(r), nil
}

// mix is a number from 0 to 1 that looks like one of chance.
func mix(x uint64) float64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return float64((x^x>>31)>>11) / (1 << 53)
}

package fleetfaults

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/internal/link/certs"
	"vacate/lab/daemons"

	"connectrpc.com/connect"
)

// deposed is a leader that was cut off, and goes on as if it led: with its own certificate, at its
// own address, in the epoch in which it did lead. It orders each host that comes to evict each VM.
type deposed struct {
	epoch          uint64
	vms, to        []string
	heard, ordered atomic.Int32
}

// deposedID is the ID of the plan of each of its orders.
const deposedID = "deadbeefdeadbeefdeadbeefdeadbeef"

// Join implements fleetv1.HostsHandler.
func (d *deposed) Join(_ context.Context,
	s *connect.BidiStream[fleetv1.HostSays, fleetv1.LeaderSays]) error {
	if _, err := s.Receive(); err != nil {
		return err
	}
	d.heard.Add(1)
	if err := s.Send(&fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Welcome{
		Welcome: &fleetv1.Welcome{Epoch: d.epoch}}}); err != nil {
		return err
	}
	number := uint64(1) << 60
	for _, vm := range d.vms {
		for _, to := range d.to {
			number++
			if err := s.Send(&fleetv1.LeaderSays{What: &fleetv1.LeaderSays_Order{
				Order: &fleetv1.Order{Epoch: d.epoch, Plan: number, PlanId: deposedID, Vm: vm,
					To: to}}}); err != nil {
				return err
			}
			d.ordered.Add(1)
		}
	}
	s.Receive()
	return nil
}

// talksOn has the leader talk on when another one leads, and has hosts come to it: the new leader
// is killed, and they look for another.
func (r *run) talksOn(ctx context.Context) error {
	old := r.leader
	_, status := r.Leads(ctx)
	if status == nil {
		return fmt.Errorf("nobody leads")
	}
	r.keep.hold(old, true)
	defer r.keep.hold(old, false)
	old.Kill()
	short, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	next, err := r.Leader(short, true)
	if err != nil {
		return err
	}
	d := &deposed{epoch: status.Epoch}
	for _, v := range r.vms {
		d.vms = append(d.vms, v.Name)
	}
	for _, h := range r.Hosts {
		d.to = append(d.to, daemons.Name(h))
	}
	identity, err := certs.Load(old.Certs(), nil)
	if err != nil {
		return err
	}
	var ln net.Listener
	if err := old.Host.Do(func() (err error) {
		ln, err = net.Listen("tcp", old.Address())
		return err
	}); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(fleetv1.NewHostsHandler(d))
	server := &http.Server{Handler: mux, TLSConfig: identity.Web(func(string) error {
		return nil
	}), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
		ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() {
		server.ServeTLS(ln, "", "")
		close(served)
	}()
	next.Kill() // and is started again at once
	err = wait(ctx, away)
	server.Close()
	<-served
	r.note("%d hosts came to it, and were sent %d orders", d.heard.Load(), d.ordered.Load())
	r.talk += int(d.heard.Load())
	return err
}

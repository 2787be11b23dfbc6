package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	fleetv1 "vacate/internal/fleet/api/v1"
	"vacate/lab/bench"
	"vacate/lab/daemons"
)

// fleetDemo is what the demo of a fleet has.
type fleetDemo struct {
	*demo
	fleet *daemons.Fleet
	busy  []*fleetVM // starve each other, and have clients
	all   []*fleetVM
}

type fleetVM struct {
	*daemons.VM
	client bench.Loader // nil: it has none
}

// relieved is how long the fleet may take to relieve a host of its own accord; beyond, the machine
// is busy with something else, and the operator helps.
const relieved = 75 * time.Second

// showFleet shows a fleet that relieves a host by itself, and empties another by a deadline.
func (d *demo) showFleet(ctx context.Context) (err error) {
	d.say(`Five hosts, a to e, on this machine: each is a network namespace of its own; a and b
are pinned to one core each. The fleet's brain has three members, vacate-fleet, in
namespaces of their own. Each keeps a copy of the store, etcd; one leads. Each host has a
certificate and a daemon, vacated, that joins the leader:`)
	f, err := newFleet(ctx, d.opts, 5)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	s := &fleetDemo{demo: d, fleet: f}
	defer func() {
		for _, v := range s.all {
			if v.client != nil {
				v.client.Stop()
			}
		}
	}()
	if err := s.vacate(ctx, "status"); err != nil {
		return err
	}
	for _, step := range []func(context.Context) error{s.boot, s.relieve, s.drain, s.restore,
		s.check} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// vacate runs vacate fleet on a host of the lab that has no VM, and shows what it says.
func (d *fleetDemo) vacate(ctx context.Context, args ...string) error {
	c := d.fleet.Vacate(ctx, args...)
	var said strings.Builder
	c.Stdout, c.Stderr = &said, &said
	if err := d.fleet.Lab.Client.Run(c); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("vacate fleet %s: %s", args[0], said.String())
		}
		return err
	}
	for i, a := range args {
		if strings.ContainsAny(a, " *") {
			args[i] = `"` + a + `"`
		}
	}
	d.quote("admin$ vacate fleet " + strings.Join(args, " ") + "\n" + said.String())
	return nil
}

// boot boots VMs: two on host a that want more than its core, and three that rest on host c.
func (d *fleetDemo) boot(ctx context.Context) error {
	for _, v := range demoVMs() {
		vm, err := d.fleet.Boot(ctx, d.fleet.Hosts[0], v.name, v.spec)
		if err != nil {
			return err
		}
		here, err := vm.Only(ctx)
		if err != nil {
			return err
		}
		client, err := bench.Load(ctx, d.fleet.Lab, here, bench.UsualClients)
		if err != nil {
			return err
		}
		d.busy = append(d.busy, &fleetVM{vm, client})
	}
	d.all = d.busy
	for i := range 3 {
		vm, err := d.fleet.Boot(ctx, d.fleet.Hosts[2], fmt.Sprint("db", i+1), restingVM(i))
		if err != nil {
			return err
		}
		d.all = append(d.all, &fleetVM{VM: vm})
	}
	if _, err := bench.SetPace(ctx, []bench.Loader{d.busy[0].client, d.busy[1].client},
		0.6); err != nil {
		return err
	}
	d.say(`On host a two VMs have booted, web1 and web2, with Debian's kernel and memcached, and
on host c three that rest, db1 to db3. Clients of web1 and web2 ask each for as much as six
tenths of a core can answer, and check each answer. There is one core for both.`)
	time.Sleep(3 * time.Second)
	return d.vacate(ctx, "hosts", "--vms")
}

// ended waits until a decision of a cause has ended well, and returns it; nil if the time is up.
func (d *fleetDemo) ended(ctx context.Context, cause string, limit time.Duration) (
	*fleetv1.Decision, error) {
	for end := time.Now().Add(limit); time.Now().Before(end); {
		list, err := daemons.Ask(ctx, d.fleet, fleetv1.FleetClient.ListDecisions,
			&fleetv1.ListDecisionsRequest{})
		if err != nil {
			return nil, err
		}
		for _, x := range list.Decisions {
			if x.Cause == cause && x.State == "completed" {
				return x, nil
			}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return nil, nil
}

// relieve has the fleet relieve host a by itself.
func (d *fleetDemo) relieve(ctx context.Context) error {
	d.say(`So far the fleet only watches. The operator has it act by itself, once VMs have starved
for 10 seconds:`)
	if err := d.vacate(ctx, "policy", "--sustain", "10s", "--settle", "15s"); err != nil {
		return err
	}
	if err := d.vacate(ctx, "mode", "auto"); err != nil {
		return err
	}
	began := time.Now()
	x, err := d.ended(ctx, "relieve", relieved)
	if err == nil && x == nil {
		d.say(`No host has room by the fleet's rules: something else keeps this machine busy. The
operator lets hosts be loaded further:`)
		if err := d.vacate(ctx, "policy", "--max-load", "3", "--starving", "0.95",
			"--min-gain", "0.02"); err != nil {
			return err
		}
		x, err = d.ended(ctx, "relieve", relieved)
	}
	if err != nil {
		return err
	}
	if x == nil {
		return errors.New("the fleet relieved no host: the machine is too busy for a demo")
	}
	time.Sleep(3 * time.Second)
	d.say(`The leader has seen the VMs starve, and had one evicted. Its reasons, what it predicted,
and what came:`)
	if err := d.vacate(ctx, "decisions", "--most", "1"); err != nil {
		return err
	}
	now := time.Now()
	text := ""
	for _, v := range d.busy {
		text += fmt.Sprintf("\n%s answers %.0f requests a second now, %.0f before.", v.Name,
			perSecond(v.client, now.Add(-2*time.Second), now),
			perSecond(v.client, began.Add(-2*time.Second), began))
	}
	if x.From == daemons.Name(d.fleet.Hosts[0]) {
		d.say("Each has a core for itself:%s", text)
	} else { // the hosts share the machine's few cores
		d.say("That relieved %s, where VMs starved as well. Those of host a still share its "+
			"core:%s",
			x.From, text)
	}
	return nil
}

// drain empties host c by a deadline.
func (d *fleetDemo) drain(ctx context.Context) error {
	by := time.Now().Add(2 * time.Minute).Format("15:04")
	d.say(`Host c needs new memory. The operator asks what it takes to empty it, where VMs named
not share a host with another one, too:`)
	if err := d.vacate(ctx, "rules", "--set", "db", "vms name=db* should run apart"); err != nil {
		return err
	}
	if err := d.vacate(ctx, "drain", "hostc", "--dry-run"); err != nil {
		return err
	}
	began := time.Now()
	if err := d.vacate(ctx, "drain", "hostc", "--by", by, "--reason", "new memory"); err != nil {
		return err
	}
	if err := d.phase(ctx, "hostc", "drained"); err != nil {
		return err
	}
	d.say("Host c is empty, %.0f seconds after that was asked for; no VM was stopped. It stays "+
		"empty, also\nwhen hosts and brains are restarted:", time.Since(began).Seconds())
	return d.vacate(ctx, "hosts")
}

// phase waits until a host's maintenance is in a phase.
func (d *fleetDemo) phase(ctx context.Context, host, phase string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		h, err := d.fleet.Told(ctx, host)
		if err != nil {
			return err
		}
		if h.Maintenance == phase {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s is %q for minutes, not %q: %v", host, h.Maintenance, phase,
				h.Staying)
		}
	}
}

// restore has host c in service again, while the leader dies.
func (d *fleetDemo) restore(ctx context.Context) error {
	b, err := d.fleet.Leader(ctx, true)
	if err != nil {
		return err
	}
	d.say(`Now the member that leads, %s, is killed. VMs run on meanwhile; another member leads
soon, and knows all that was decided:`, b.Name)
	began := time.Now()
	b.Kill()
	if _, err := d.fleet.Leader(ctx, true); err != nil {
		return err
	}
	took := time.Since(began)
	if err := b.Start(); err != nil {
		return err
	}
	if err := d.vacate(ctx, "status"); err != nil {
		return err
	}
	d.say(`That took %.0f seconds. The memory is in, and host c takes VMs again. Those come back for
which it is better:`, took.Seconds())
	if err := d.vacate(ctx, "restore", "hostc"); err != nil {
		return err
	}
	if err := d.phase(ctx, "hostc", ""); err != nil {
		return err
	}
	return d.vacate(ctx, "decisions")
}

// check says whether a client or a guest noticed anything.
func (d *fleetDemo) check(ctx context.Context) error {
	for _, v := range d.busy {
		s := v.client.Stop()
		if s.Wrong != 0 || s.Broken != 0 {
			return errors.Join(append([]error{
				fmt.Errorf("a client of %s noticed: %d wrong answers, %d broken connections",
					v.Name, s.Wrong, s.Broken)}, s.Errors...)...)
		}
	}
	pages := uint64(0)
	for _, v := range d.all {
		n, err := v.Check(ctx)
		if err != nil {
			return err
		}
		pages += n
	}
	d.say(`No client had a wrong answer, and none of their connections broke. The VMs have now
checked each of the %d pages whose content they know: 0 bad pages.

To try a fleet by hand, and see it on a page: bin/vacate-lab fleet`, pages)
	return nil
}

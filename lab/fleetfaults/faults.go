package fleetfaults

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"vacate/lab"
	"vacate/lab/daemons"
)

// A Fault is what happens to a fleet while it moves VMs.
type Fault struct {
	Name string
	do   func(context.Context, *run) error
}

// How long faults last.
const (
	away  = 12 * time.Second
	long  = 40 * time.Second // a leader's lease, 20 s, runs out, and another one leads
	brief = time.Second      // as systemd waits before it starts a daemon again
)

// while is how long a member is out of reach: shorter than a leader's lease or longer.
func (r *run) while() time.Duration {
	d := []time.Duration{away, long}[r.random.IntN(2)]
	r.note("for %v", d)
	return d
}

// Faults are all.
var Faults = []Fault{
	{"leader killed", func(ctx context.Context, r *run) error {
		return r.down(ctx, brief, r.leader)
	}},
	{"other member killed", func(ctx context.Context, r *run) error {
		return r.down(ctx, brief, r.others()[0])
	}},
	{"leader lost for a while", func(ctx context.Context, r *run) error {
		return r.down(ctx, r.while(), r.leader)
	}},
	{"other member lost for a while", func(ctx context.Context, r *run) error {
		return r.down(ctx, r.while(), r.others()[0])
	}},
	{"majority lost for a while, with the leader", func(ctx context.Context, r *run) error {
		return r.down(ctx, r.while(), r.leader, r.others()[0])
	}},
	{"majority lost for a while, but the leader", func(ctx context.Context, r *run) error {
		return r.down(ctx, r.while(), r.others()...)
	}},
	{"all members lost for a while", func(ctx context.Context, r *run) error {
		return r.down(ctx, r.while(), r.Brains...)
	}},
	{"leader cut off from all", func(ctx context.Context, r *run) error {
		return r.part(ctx, r.leader, append(r.hostsOf(r.others()), r.Hosts...))
	}},
	{"leader cut off from members, hosts hear it", func(ctx context.Context, r *run) error {
		return r.part(ctx, r.leader, r.hostsOf(r.others()))
	}},
	{"leader cut off from hosts", func(ctx context.Context, r *run) error {
		return r.part(ctx, r.leader, r.Hosts)
	}},
	{"leader stopped for a while, then goes on", func(ctx context.Context, r *run) error {
		return r.stopped(ctx, r.leader)
	}},
	{"deposed leader talks on", func(ctx context.Context, r *run) error {
		return r.talksOn(ctx)
	}},
	{"leader's clock jumps", func(ctx context.Context, r *run) error {
		return r.jump(ctx, r.leader.PID())
	}},
	{"other member's clock jumps", func(ctx context.Context, r *run) error {
		return r.jump(ctx, r.others()[0].PID())
	}},
	{"hosts' clocks jump", func(ctx context.Context, r *run) error {
		var pids []int
		for _, h := range r.Hosts {
			if r.random.IntN(2) == 0 {
				pids = append(pids, r.PID(h))
			}
		}
		return r.jump(ctx, pids...)
	}},
	{"leader's disk slow, 1 s a sync", func(ctx context.Context, r *run) error {
		return r.slow(ctx, r.leader)
	}},
	{"all members' disks slow, 1 s a sync", func(ctx context.Context, r *run) error {
		return r.slow(ctx, r.Brains...)
	}},
	{"leader's disk full", func(ctx context.Context, r *run) error {
		return r.full(ctx, r.leader)
	}},
	{"disks of all members full", func(ctx context.Context, r *run) error {
		return r.full(ctx, r.Brains...)
	}},
	{"source's vacated killed", func(ctx context.Context, r *run) error {
		return r.restart(ctx, r.drained)
	}},
	{"targets' vacated killed", func(ctx context.Context, r *run) error {
		return r.restart(ctx, r.targets()...)
	}},
	{"all vacated killed", func(ctx context.Context, r *run) error {
		return r.restart(ctx, r.Hosts...)
	}},
	{"leader and source's vacated killed", func(ctx context.Context, r *run) error {
		return errors.Join(r.down(ctx, 0, r.leader), r.restart(ctx, r.drained))
	}},
}

// others are the members that do not lead, in any order.
func (r *run) others() (list []*daemons.Brain) {
	for _, i := range r.random.Perm(len(r.Brains)) {
		if r.Brains[i] != r.leader {
			list = append(list, r.Brains[i])
		}
	}
	return list
}

func (r *run) hostsOf(brains []*daemons.Brain) (list []*lab.Host) {
	for _, b := range brains {
		list = append(list, b.Host)
	}
	return list
}

// targets are all hosts but the one that is drained.
func (r *run) targets() (list []*lab.Host) {
	for _, h := range r.Hosts {
		if h != r.drained {
			list = append(list, h)
		}
	}
	return list
}

// wait waits, and returns sooner when the campaign ends.
func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// down kills members, and keeps them from being started for a time.
func (r *run) down(ctx context.Context, d time.Duration, brains ...*daemons.Brain) error {
	for _, b := range brains {
		r.keep.hold(b, true)
		b.Kill()
	}
	err := wait(ctx, d)
	for _, b := range brains {
		r.keep.hold(b, false)
	}
	return err
}

// part has a member reach none of some hosts for a while, nor they it.
func (r *run) part(ctx context.Context, b *daemons.Brain, from []*lab.Host) error {
	set := func(apart bool) (err error) {
		for _, h := range from {
			err = errors.Join(err, lab.Part(b.Host, h, apart))
		}
		return err
	}
	return errors.Join(set(true), wait(ctx, r.while()), set(false))
}

// stopped stops a member for a while, which does not know of it.
func (r *run) stopped(ctx context.Context, b *daemons.Brain) error {
	pid := b.PID()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	return errors.Join(wait(ctx, r.while()), syscall.Kill(pid, syscall.SIGCONT))
}

// jump has clocks jump to and fro.
func (r *run) jump(ctx context.Context, pids ...int) error {
	set := func(by time.Duration) (err error) {
		for _, pid := range pids {
			err = errors.Join(err, lab.JumpClock(pid, by))
		}
		return err
	}
	by := []time.Duration{time.Minute, time.Hour, 24 * time.Hour}[r.random.IntN(3)]
	if r.random.IntN(2) == 0 {
		by = -by
	}
	r.note("by %v", by)
	return errors.Join(set(by), wait(ctx, away), set(-by/2), wait(ctx, time.Second), set(0))
}

// slow has each sync of members' files take a second. strace holds the system calls up.
func (r *run) slow(ctx context.Context, brains ...*daemons.Brain) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all []*exec.Cmd
	for _, b := range brains {
		c := exec.Command("strace", "-f", "-qqq", "-o", "/dev/null", "-e",
			"trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_enter=1000000", "-p",
			strconv.Itoa(b.PID()))
		c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
		if e := c.Start(); e != nil {
			err = errors.Join(err, fmt.Errorf("%w: apt-get install strace", e))
			continue
		}
		all = append(all, c)
	}
	err = errors.Join(err, wait(ctx, away))
	for _, c := range all {
		c.Process.Signal(syscall.SIGTERM) // it lets the process go then
	}
	for _, c := range all {
		c.Wait()
	}
	return err
}

// full has members' disks be full for a time. What etcd has set aside may last for longer, so they
// may have to start on a full disk, too.
func (r *run) full(ctx context.Context, brains ...*daemons.Brain) (err error) {
	for _, b := range brains {
		err = errors.Join(err, b.Disk.Fill())
	}
	if r.random.IntN(2) == 0 {
		r.note("and started anew")
		for _, b := range brains {
			b.Kill()
		}
	}
	err = errors.Join(err, wait(ctx, away))
	for _, b := range brains {
		err = errors.Join(err, b.Disk.Free())
	}
	return err
}

// restart kills hosts' daemons, and starts them again.
func (r *run) restart(ctx context.Context, hosts ...*lab.Host) (err error) {
	for _, h := range hosts {
		r.Kill(h)
	}
	err = wait(ctx, time.Duration(r.random.IntN(1000))*time.Millisecond)
	for _, h := range hosts {
		err = errors.Join(err, r.Start(ctx, h))
	}
	return err
}

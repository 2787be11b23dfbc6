package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"vacate/internal/cli"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/doctor"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// runByName has this host's daemon evict a VM, and follows it.
func (o evictOptions) runByName(ctx context.Context, vm string) error {
	if err := o.daemon.open(); err != nil {
		return err
	}
	file, err := o.reserve()
	if err != nil {
		return err
	}
	s := o.screen(scene{vm: clean(vm), other: clean(o.to), verbose: o.verbose})
	defer s.close()
	if !o.skipChecks {
		if err := o.preflight(ctx, vm, s); err != nil {
			return err
		}
	}
	started, err := o.daemon.Evict(ctx,
		connect.NewRequest(&hostv1.EvictRequest{Vm: vm, To: o.to, Options: &hostv1.EvictOptions{
			Order: o.order, Enlightenment: o.enlighten, SendFree: o.source.SendFree,
			RateLimit: uint64(o.rate) / 8, Yield: o.yield, SkipChecks: true,
			Force: o.force,
		}}))
	if unanswered(err) && !untaken(err) {
		return o.daemon.beginUnknown(vm, err)
	} else if err != nil {
		return refused(o.daemon.explain(err))
	}
	id := started.Msg.Id
	if o.detach && o.json {
		return writeLine(os.Stdout, "eviction", started.Msg)
	} else if o.detach {
		fmt.Fprintln(os.Stdout, id)
		return nil
	}
	last, err := o.daemon.attend(ctx, id, s, o.patience)
	if err != nil {
		return err
	}
	report, err := last.Report.Engine()
	told := err == nil
	if file != nil && told {
		if err := file.write(report); err != nil {
			s.note("vacate: warning: the report could not be written: %s", clean(err.Error()))
		}
	}
	s.close()
	if told {
		o.close(sceneOf(last, o.verbose), report)
	}
	return failure(last)
}

// preflight shows what would block an eviction, and refuses it if anything would make it fail.
func (o evictOptions) preflight(ctx context.Context, vm string, s *screen) error {
	r, err := o.daemon.Doctor(ctx, connect.NewRequest(&hostv1.DoctorRequest{Vm: vm, To: o.to}))
	if err != nil {
		return refused(o.daemon.explain(err))
	}
	var fatal []string
	for _, f := range findings(r.Msg.Findings) {
		if o.force && f.Check == doctor.Fleet {
			f.Level = doctor.Warning
		}
		switch f.Level {
		case doctor.Warning:
			s.note("warning: %s", findingLine(f))
		case doctor.Fatal:
			fatal = append(fatal, findingLine(f))
		}
	}
	if fatal != nil {
		return refused(errors.New(strings.Join(fatal, "; ")))
	}
	return nil
}

// findingLine is a finding in one line.
func findingLine(f doctor.Finding) string {
	where := f.Check
	if f.Host != "" {
		where = f.Host + ": " + f.Check
	}
	line := where + ": " + f.Text
	if f.Remedy != "" {
		line += "; " + f.Remedy
	}
	return clean(line)
}

// stuckError is the error of an eviction that is followed no longer, as it makes no progress. It
// may yet, in the daemon.
type stuckError struct {
	last *hostv1.Eviction
	over time.Duration
}

func (e *stuckError) Error() string {
	return fmt.Sprintf("the eviction of VM %s has made no progress for %v: it is %q", e.last.Vm,
		e.over,
		e.last.State)
}

// attend follows an eviction; where patience is not 0, until that makes no progress for so long.
// SIGINT, SIGTERM and SIGHUP have it aborted if that is possible, on a terminal when that was
// confirmed; the second one ends the command alone.
func (d *daemon) attend(ctx context.Context, id string, s *screen,
	patience time.Duration) (*hostv1.Eviction, error) {
	var mu sync.Mutex
	var now *hostv1.Eviction
	abort := func(why string) {
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if _, err := d.Abort(ctx,
			connect.NewRequest(&hostv1.AbortRequest{Id: id, Reason: why})); err != nil {
			s.note("vacate: %s. Going on.", clean(d.explain(err).Error()))
		}
	}
	var tasks sync.WaitGroup
	defer tasks.Wait()
	asked := false
	watching, stop := cli.OnSignal(ctx, func(sig syscall.Signal) error {
		name := unix.SignalName(sig)
		mu.Lock()
		can := now == nil || now.Abortable
		mu.Unlock()
		switch {
		case asked:
			return cli.Interrupted{Signal: sig}
		case !can:
			s.note("%s: the eviction cannot be aborted any more. The VM was told to run on the "+
				"destination.\nThe daemon goes on with it without this command. Interrupt once "+
				"more to end this command.", name)
		case sig == unix.SIGINT && term.IsTerminal(int(os.Stdin.Fd())):
			s.note("%s: abort the eviction? The VM stays on this host. [y/N]", name)
			// Not waited for: nothing interrupts who reads from a terminal.
			go func() {
				line, _ := bufio.NewReader(os.Stdin).ReadString('\n')
				if strings.EqualFold(strings.TrimSpace(line), "y") {
					abort(name)
					return
				}
				s.note("Going on.")
			}()
		default:
			s.note("%s: aborting; the VM stays on this host.", name)
			tasks.Go(func() { abort(name) })
		}
		asked = true
		return nil
	})
	defer stop()
	watching, give := context.WithCancelCause(watching)
	defer give(nil)
	idle := time.AfterFunc(time.Hour, func() {
		mu.Lock()
		defer mu.Unlock()
		give(&stuckError{now, patience})
	})
	idle.Stop()
	last, err := d.follow(watching, id, s, func(e *hostv1.Eviction) {
		mu.Lock()
		before := now
		now = e
		mu.Unlock()
		if patience > 0 && (before == nil || before.State != e.State ||
			before.GetProgress().GetPagesSent() != e.GetProgress().GetPagesSent()) {
			idle.Reset(patience)
		}
	})
	idle.Stop()
	var signal cli.Interrupted
	if errors.As(err, &signal) {
		return nil, fmt.Errorf("%w %s", errDetached, id)
	}
	return last, err
}

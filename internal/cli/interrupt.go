// Package cli has what the commands share: signals, sizes and rates.
package cli

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Interrupted is why a context ended: a signal.
type Interrupted struct{ Signal syscall.Signal }

func (i Interrupted) Error() string { return "interrupted by " + unix.SignalName(i.Signal) }

// Is lets errors.Is find a cancellation in it.
func (i Interrupted) Is(target error) bool { return target == context.Canceled }

// OnSignal calls ask for each SIGINT, SIGTERM and SIGHUP, one at a time, until stop is called. The
// context ends with the error that ask returns, or goes on if that is nil. A broken pipe is from
// then on an error of the write alone: an eviction does not die because its output went away.
// Signals that the process was started with as ignored, as by nohup, stay ignored.
func OnSignal(ctx context.Context,
	ask func(syscall.Signal) error) (_ context.Context, stop func()) {
	signal.Ignore(syscall.SIGPIPE)
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 4)
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	var wait sync.WaitGroup
	wait.Go(func() {
		for s := range signals {
			if cause := ask(s.(syscall.Signal)); cause != nil {
				cancel(cause)
			}
		}
	})
	return ctx, sync.OnceFunc(func() {
		signal.Stop(signals)
		close(signals)
		wait.Wait()
		cancel(nil)
	})
}

package libvirtlab

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
)

// A Moment is what libvirt says of domains from a time on.
type Moment struct {
	At time.Time
	// States has what "virsh domstate --reason" says on host a and on host b, by domain; its first
	// word is what "virsh list" has. A domain that a host does not have is not there.
	States [2]map[string]string
}

// Watch asks both daemons for the states of domains, again and again, until what it returns is
// called. It tells how it is in the beginning, and each change.
func (h *Hosts) Watch(ctx context.Context, tell func(Moment), names ...string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		last := ""
		for {
			m := Moment{At: time.Now()}
			var both sync.WaitGroup
			for i, x := range []*Host{h.A, h.B} {
				both.Go(func() { m.States[i] = x.states(ctx, names) })
			}
			both.Wait()
			if ctx.Err() != nil { // which may have cut the answers short
				return
			}
			if now := fmt.Sprint(m.States); now != last {
				tell(m)
				last = now
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// states asks for the states of domains.
func (h *Host) states(ctx context.Context, names []string) map[string]string {
	var ask []string
	for _, name := range names {
		ask = append(ask, "echo @"+name+"=", "domstate --reason "+name)
	}
	// It fails for a domain that is not there, and goes on with the next.
	out, _ := h.Virsh(ctx, strings.Join(ask, "; "))
	states := map[string]string{}
	for part := range strings.SplitSeq(out, "@") {
		name, state, _ := strings.Cut(part, "=")
		if state = strings.TrimSpace(state); state != "" {
			states[name] = state
		}
	}
	return states
}

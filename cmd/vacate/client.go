package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/link/certs"
	"vacate/internal/ui"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// defaultSocket is where a host's daemon is asked, unless VACATE_SOCKET or --socket tell.
const defaultSocket = "/run/vacate/vacated.sock"

// daemon is a host's daemon, as a command asks it.
type daemon struct {
	hostv1.HostClient
	socket string
	host   string // NAME or NAME@HOST:PORT of another host's; empty: this one's
	certs  string // directory of an operator's certificate, to ask another host's
	// patience is how long it may be away before its eviction is followed no longer; 0: awayTime.
	patience time.Duration
}

// apiPort is where a daemon is asked by operators from elsewhere, unless they say another.
const apiPort = "7600"

// idleTime is how long a connection stays that nothing is asked over.
const idleTime = time.Minute

// socketFlag gives a command the flags for the daemon that it asks.
func socketFlag(c *cobra.Command, d *daemon) {
	c.Flags().StringVar(&d.socket, "socket", cmp.Or(os.Getenv("VACATE_SOCKET"), defaultSocket),
		"`SOCKET` of this host's daemon; VACATE_SOCKET sets the default")
	c.Flags().StringVar(&d.host, "host", "",
		"ask the daemon of another host, `NAME[@HOST:PORT]`: the name in its certificate, and "+
			"its api.listen (default port 7600)")
	c.Flags().StringVar(&d.certs, "operator-certs", "/etc/vacate/certs",
		"directory of your certificate, for --host")
}

// open gets ready to ask.
func (d *daemon) open() error {
	if d.host == "" {
		d.HostClient = hostv1.Dial(d.socket)
		return nil
	}
	name, address, err := splitName("--host", d.host, apiPort)
	if err != nil {
		return err
	}
	identity, err := certs.Load(d.certs, func(error) {})
	if err != nil {
		return refused(
			fmt.Errorf("%w: --host needs an operator's certificate, see --operator-certs", err))
	}
	d.HostClient = hostv1.NewHostClient(overTLS(identity, name), "https://"+address,
		connect.WithReadMaxBytes(ui.MaxAnswer))
	return nil
}

// overTLS is a client of one server alone, the one whose certificate has this name.
func overTLS(identity *certs.Identity, name string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: identity.Client(name), IdleConnTimeout: idleTime,
		DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext}}
}

// splitName parts what a flag names: NAME, or NAME@HOST:PORT. Without an address it is at the
// usual port of the host NAME.
func splitName(flag, text, usualPort string) (name, address string, err error) {
	name, address, given := strings.Cut(text, "@")
	if !given {
		address = net.JoinHostPort(name, usualPort)
	}
	if _, _, err := net.SplitHostPort(address); err != nil || name == "" {
		return "", "", refused(fmt.Errorf("%s %q: want NAME or NAME@HOST:PORT", flag, text))
	}
	return name, address, nil
}

// where says which daemon is asked.
func (d *daemon) where() string {
	if d.host != "" {
		return "of host " + d.host
	}
	return "at " + d.socket
}

// explain adds to the error of a call what to do, where nobody answers.
func (d *daemon) explain(err error) error {
	var said *connect.Error
	switch {
	case err == nil:
		return nil
	case d.host != "" && turnedAway(err):
		return fmt.Errorf("the daemon of %s does not take the certificate in %s: its name must be "+
			"among api.operators there, and both need the same CA: %w", d.host, d.certs, err)
	case d.host != "" && (connect.CodeOf(err) == connect.CodeUnavailable ||
		errors.Is(err, context.DeadlineExceeded)):
		return fmt.Errorf("the daemon of %s does not answer; it needs api.listen and "+
			"api.operators in its configuration: %w", d.host, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("only root and members of the group that socket_group in vacated.toml "+
			"names may use %s: %w", d.socket, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no daemon answers at %s: start it (systemctl start vacated), or say "+
			"where it is (--socket, VACATE_SOCKET)", d.socket)
	case unanswered(err):
		return fmt.Errorf("vacated %s ended before it answered: `vacate status` says what "+
			"became of it, once vacated is back", d.where())
	case errors.As(err, &said):
		return errors.New(said.Message())
	}
	return err
}

// turnedAway reports whether another host's daemon ended the connection over the certificate. In
// TLS 1.3 that may come as late as the request.
func turnedAway(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error" || errors.Is(err, syscall.EPIPE)
}

// away reports whether an error says that the daemon went away, or is stopping. One that is
// stopping cancels what it was asked; whether this command did that, the caller knows.
func away(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeCanceled:
		return true
	}
	return unanswered(err)
}

// unanswered reports whether a call ended without a word of the daemon, as it was killed, say.
// Whether it did what it was asked to is not known then, unless nobody took the call.
func unanswered(err error) bool {
	var said *connect.Error
	if !errors.As(err, &said) || connect.IsWireError(err) || errors.Is(err, fs.ErrPermission) {
		return false
	}
	return said.Code() != connect.CodeCanceled && said.Code() != connect.CodeDeadlineExceeded
}

// untaken reports whether a call was never taken, as no daemon listens.
func untaken(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) ||
		errors.Is(err, syscall.ECONNREFUSED)
}

// find returns the eviction that a word means: an ID, the first digits of one, or a VM. Of a VM's
// evictions it is the one under way, or else the latest.
func (d *daemon) find(ctx context.Context, word string) (*hostv1.Eviction, error) {
	r, err := d.ListEvictions(ctx, connect.NewRequest(&hostv1.ListEvictionsRequest{}))
	if err != nil {
		return nil, d.explain(err)
	}
	var byVM, byID *hostv1.Eviction
	several := false
	for _, e := range r.Msg.Evictions {
		if e.Vm == word && (byVM == nil || byVM.EndedAt != nil || e.EndedAt == nil) {
			byVM = e
		}
		if len(word) >= 4 && strings.HasPrefix(e.Id, word) {
			several = byID != nil
			byID = e
		}
	}
	switch {
	case byVM != nil:
		return byVM, nil
	case several:
		return nil, fmt.Errorf("the IDs of several evictions begin with %q: give more digits", word)
	case byID != nil:
		return byID, nil
	}
	return nil,
		fmt.Errorf("no eviction on this host has this ID, or is of this VM: %q. See vacate "+
			"status", word)
}

// progressOf is an eviction's progress as screens show it.
func progressOf(e *hostv1.Eviction) (evict.Progress, bool) {
	p := e.GetProgress()
	if p == nil || e.State == "" {
		return evict.Progress{}, false
	}
	m := p.Moment()
	m.State = evict.State(e.State)
	return m, true
}

// failure is how an eviction ended, as an error; nil if it ended well: the VM runs on the other
// host, or its guest ended itself there.
func failure(e *hostv1.Eviction) error {
	outcome := map[string]error{"refused": evict.ErrRefused, "aborted": evict.ErrAborted,
		"lost contact": evict.ErrLost}[e.Outcome]
	switch {
	case e.Outcome == string(evict.Completed), e.Outcome == string(evict.ShutDown):
		return nil
	case e.Outcome == "resumed here":
		return &ended{outcome: evict.ErrAborted, text: fmt.Sprintf(
			"VM %s is on the source again, by an operator's word: %s", e.Vm, e.Reason)}
	case outcome == nil:
		return &ended{outcome: evict.ErrLost, text: fmt.Sprintf(
			"an operator ended the eviction of VM %s: %s", e.Vm, e.Outcome)}
	}
	return &ended{outcome: outcome, text: e.Reason, advice: e.Advice, remedy: e.Remedy}
}

// ended is how an eviction of a daemon failed.
type ended struct {
	outcome error
	text    string
	advice  string   // where the VM is, what to look at; may be empty
	remedy  []string // commands to choose one of; may be empty
}

func (e *ended) Error() string {
	text := e.text
	if e.advice != "" {
		text += "\n" + e.advice + "."
	}
	if len(e.remedy) > 0 {
		text += "\nChoose one of:\n  " + strings.Join(e.remedy, "\n  ")
	}
	return text
}

func (e *ended) Unwrap() error { return e.outcome }

// cleanLines is clean for a text of several lines.
func cleanLines(s string) string {
	var lines []string
	for l := range strings.Lines(s) {
		indent := l[:len(l)-len(strings.TrimLeft(l, " "))]
		lines = append(lines, indent+clean(l))
	}
	return strings.Join(lines, "\n")
}

// errDetached: the command ends, the eviction goes on.
var errDetached = errors.New("the eviction goes on in the daemon: see vacate watch")

// detached is an errDetached that says something else.
type detached struct{ text string }

func (d detached) Error() string        { return d.text }
func (d detached) Is(target error) bool { return target == errDetached }

// beginUnknown says that nobody knows whether an eviction began, as the daemon was asked and did
// not answer.
func (d *daemon) beginUnknown(vm string, err error) error {
	return detached{
		fmt.Sprintf("%v. It is not known whether the eviction of VM %s began: see `vacate "+
			"status %[2]s`", d.explain(err), vm)}
}

// goesOn says what becomes of an eviction while its daemon is away.
func goesOn(e *hostv1.Eviction) string {
	vm, peer := clean(e.GetVm()), clean(e.GetPeer())
	if e == nil {
		return "The eviction goes on as soon as it is back"
	}
	if e.Role == "destination" {
		return fmt.Sprintf(
			"If VM %s was told to run on this host, it runs here with the memory that has come. "+
				"The rest comes when vacated is back. Otherwise the VM stays on host %s", vm, peer)
	}
	switch evict.State(e.State) {
	case evict.Preparing, evict.Switching, evict.Loading:
		// These take moments, so the daemon may have got further than it said.
		return fmt.Sprintf("When it last answered, VM %s was not told to run on host %s yet. It "+
			"may have been since: do not start it by hand. It runs on, here or there, at the "+
			"latest when vacated is back", vm, peer)
	case evict.RollingBack:
		return fmt.Sprintf("VM %s stays on this host, and runs on at the latest when vacated is "+
			"back", vm)
	}
	return fmt.Sprintf("VM %s runs, or may run, on host %s with the memory that went there. The "+
		"rest follows when vacated is back", vm, peer)
}

// awayTime is how long a daemon may be away before its eviction is watched no longer.
const awayTime = 2 * time.Minute

// follow shows an eviction until it has ended, and returns it as it was then. seen, which may be
// nil, is told of each message.
func (d *daemon) follow(ctx context.Context, id string, s *screen,
	seen func(*hostv1.Eviction)) (*hostv1.Eviction, error) {
	gone := time.Time{}
	patience := cmp.Or(d.patience, awayTime)
	var known *hostv1.Eviction
	for {
		last, err := d.stream(ctx, id, s, seen)
		if last != nil {
			known = last
		}
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case last != nil && err == nil:
			return last, nil
		case err != nil && !away(err):
			return nil, d.explain(err)
		case last != nil || gone.IsZero():
			gone = time.Now()
			s.note("vacated does not answer. %s. Waiting for it, %v at most.", goesOn(known),
				patience)
		case time.Since(gone) > patience:
			return nil,
				detached{
					fmt.Sprintf("vacated has not answered for %v: start it (systemctl start "+
						"vacated), then type `vacate watch %.8s`. %s",
						patience, clean(id), goesOn(known))}
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// stream follows an eviction as far as the daemon tells. An eviction without an error is one that
// has ended.
func (d *daemon) stream(ctx context.Context, id string, s *screen,
	seen func(*hostv1.Eviction)) (last *hostv1.Eviction, err error) {
	stream, err := d.WatchEviction(ctx, connect.NewRequest(&hostv1.WatchEvictionRequest{Id: id}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	why := ""
	for stream.Receive() {
		last = stream.Msg()
		if last.Outcome == "" && last.Reason != why {
			if why = last.Reason; why != "" {
				s.note("%s", clean(why))
			}
		}
		if p, ok := progressOf(last); ok {
			s.show(p)
		}
		if seen != nil {
			seen(last)
		}
	}
	if err := stream.Err(); err != nil {
		return last, err
	}
	if last == nil || last.Outcome == "" {
		return last, connect.NewError(connect.CodeUnavailable,
			errors.New("the daemon ended the watch"))
	}
	return last, nil
}

package host

import (
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"vacate/internal/evict"
	"vacate/internal/evict/journal"
	"vacate/internal/link"
	"vacate/lab/labtest"
)

// A daemon that answers that a VM is whole keeps it that the source has heard that: such a source
// is not believed any more when it says that an operator had the VM resumed there.
func TestAcknowledged(t *testing.T) {
	for mark, want := range map[evict.Mark]bool{evict.MarkCompleted: true, evict.MarkLost: false} {
		dir := t.TempDir()
		var entries []*journal.Entry
		id := journal.NewID()
		for role, first := range map[journal.Role]evict.Mark{journal.Source: evict.MarkMayRun,
			journal.Destination: mark} {
			j, err := journal.Open(filepath.Join(dir, string(role)))
			if err != nil {
				t.Fatal(err)
			}
			defer j.Close()
			e, err := j.Create(journal.Record{ID: id, Role: role, VM: "web1", Peer: "host",
				Mark: string(first)})
			if err != nil {
				t.Fatal(err)
			}
			if role == journal.Source {
				entries = append([]*journal.Entry{e}, entries...)
			} else {
				entries = append(entries, e)
			}
		}
		if err := entries[1].Finish(string(mark), "", nil); err != nil {
			t.Fatal(err)
		}
		h := &Host{started: time.Now(), config: Config{Name: "hostb"},
			log: slog.New(slog.DiscardHandler)}
		v := h.newEviction(entries[1])
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		sessions := link.NewListener(ln, link.ListenOptions{})
		defer sessions.Close()
		answered := make(chan error, 1)
		go func() {
			s, err := sessions.Accept(t.Context())
			if err == nil {
				var r *evict.Request
				if r, err = evict.ReadRequest(t.Context(), s); err == nil {
					v.answer(r)
				}
			}
			answered <- err
		}()
		s := evict.Source{Eviction: id, VM: "web1", QMP: filepath.Join(dir, "none"),
			Journal: record{entries[0]}, Connect: link.Dialer{Addr: ln.Addr().String()}.Session}
		report, err := s.Resume(labtest.Within(t, 10*time.Second), evict.MarkMayRun)
		if serr := <-answered; serr != nil {
			t.Fatal(serr)
		}
		if v.acknowledged() != want {
			t.Errorf("at the mark %q the source ended as %q, %v; that it has heard is kept: %v",
				mark, report.Outcome, err, v.acknowledged())
		}
	}
}

package ui

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"vacate/internal/htmlreport"
)

// reportOf names an eviction.
type reportOf struct {
	Host string `json:"host"`
	ID   string `json:"id"`
}

// report writes the report of an eviction, and returns where it can be fetched, once: a frame can
// send no key.
func (s *Server) report(ctx context.Context, q reportOf) (any, error) {
	d, err := s.remote(q.Host)
	if err != nil {
		return nil, err
	}
	e, err := eviction(ctx, d, q.ID)
	if err != nil {
		return nil, err
	}
	if e.Report == nil {
		return nil, errors.New("this host has no report of the eviction: it is on the host that " +
			"the VM left, once the eviction has ended")
	}
	p, err := htmlreport.Gather(ctx, d, e)
	if err != nil {
		return nil, d.Explain(err)
	}
	var b bytes.Buffer
	if err := htmlreport.Write(&b, p); err != nil {
		return nil, err
	}
	if b.Len() > mostReport {
		return nil,
			fmt.Errorf("the report has %d MB: `vacate report --html` on that host writes it",
				b.Len()>>20)
	}
	ticket := secret()
	s.mu.Lock()
	defer s.mu.Unlock()
	for t, r := range s.reports {
		if time.Now().After(r.until) {
			delete(s.reports, t)
		}
	}
	s.reports[ticket] = ticketed{b.Bytes(), time.Now().Add(ticketTime)}
	return map[string]string{"url": "/report/" + ticket}, nil
}

// showReport shows a report, once.
func (s *Server) showReport(w http.ResponseWriter, r *http.Request) {
	ticket := r.PathValue("ticket")
	s.mu.Lock()
	of, ok := s.reports[ticket]
	delete(s.reports, ticket)
	s.mu.Unlock()
	if !ok || time.Now().After(of.until) || !s.holds(r, false) {
		http.Error(w, "this report was shown already: open it from the page once more",
			http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Security-Policy", reportPolicy)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write(of.page) // #nosec G705 -- htmlreport puts in all texts as texts, and it has no origin
}

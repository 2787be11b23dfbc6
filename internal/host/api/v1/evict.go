package hostv1

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"vacate/internal/evict"

	"google.golang.org/protobuf/encoding/protojson"
)

// NewProgress returns the progress of an engine as the API has it.
func NewProgress(p evict.Progress) *Progress {
	m := &Progress{
		State: string(p.State), ElapsedS: p.Elapsed.Seconds(), PagesSent: uint64(p.Pages),
		PagesTotal: uint64(p.Total), LinkBytes: p.Bytes, RateBytesPerS: p.Rate,
		Fetches: uint64(p.Fetches), Awaits: p.Awaits, AwaitedS: p.AwaitedFor.Seconds(),
		Stands: p.Stands, Short: p.Short,
	}
	if p.ETA > 0 {
		m.EtaS = new(p.ETA.Seconds())
	}
	if p.Down > 0 {
		m.DownTimeS = new(p.Down.Seconds())
	}
	return m
}

// Moment returns what NewProgress was made from.
func (p *Progress) Moment() evict.Progress {
	seconds := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
	return evict.Progress{
		State: evict.State(p.State), Elapsed: seconds(p.ElapsedS), Pages: int(p.PagesSent),
		Total: int(p.PagesTotal), Bytes: p.LinkBytes, Rate: p.RateBytesPerS,
		Fetches: int(p.Fetches), ETA: seconds(p.GetEtaS()), Awaits: p.Awaits,
		AwaitedFor: seconds(p.AwaitedS), Stands: p.Stands, Short: p.Short,
		Down: seconds(p.GetDownTimeS()),
	}
}

// NewReport returns the report of an engine as the API has it. Both have the same names in JSON.
func NewReport(r evict.Report) (*Report, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	m := new(Report)
	if err := protojson.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("the report: %w", err)
	}
	return m, nil
}

// Engine returns what NewReport was made from.
func (r *Report) Engine() (evict.Report, error) {
	var e evict.Report
	if r == nil {
		return e, errors.New("there is no report")
	}
	if err := json.Unmarshal(JSON(r), &e); err != nil {
		return e, fmt.Errorf("the report: %w", err)
	}
	return e, nil
}

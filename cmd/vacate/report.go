package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/qemu/fit"
)

// reportText sums an eviction up for people, as far as it came, in at most 80 columns.
func reportText(r evict.Report) string {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-20s%s\n", name, strings.TrimRight(fmt.Sprintf(format, args...), " "))
	}
	seconds := func(name string, s *float64, what string) {
		if s != nil {
			row(name, "%9.3f s  %s", *s, what)
		}
	}
	row("outcome", "%s", r.Outcome)
	if r.Reason != "" {
		row("", "%s", clean(r.Reason))
	}
	for _, w := range r.Warnings {
		row("warning", "%s", clean(w))
	}
	if r.Machine != "" {
		row("machine", "%s, QEMU %s", clean(r.Machine), clean(r.QEMU))
	}
	seconds("preparation", r.Prepare, "in which the VM was left alone")
	if r.Stood == "" {
		seconds("execution transfer", r.Transfer, "from then until it ran on the destination")
		seconds("down time", r.Down, "in which it stood still")
	} else {
		seconds("execution transfer", r.Transfer, "from then until it might run on the destination")
		row("down time", "        -    it stood all along: it %s", fit.Stands(clean(r.Stood)))
	}
	seconds("total", r.Total, "from then until the source was empty")
	gapsText(row, r.Gaps)
	if p := r.Pages; p.Total > 0 {
		row("pages", "%9d", p.Total)
		for _, k := range []struct {
			name  string
			count int
			what  string
		}{
			{"early", p.Early, "ahead of the devices, which need them"},
			{"pushed", p.Pushed, "by the plan"},
			{"near", p.Near, "as neighbours of fetched ones"},
			{"fetched", p.Fetched, "because the VM waited"},
			{"skipped", p.Skipped, "free in the guest, never sent"},
			{"unused", p.Unused, "not there at the source, never sent"},
		} {
			if k.name == "unused" && k.count == 0 {
				continue
			}
			row("  "+k.name, "%9d %5.1f%%  %s", k.count, 100*float64(k.count)/float64(p.Total),
				k.what)
		}
		row("of them zero", "%9d %5.1f%%  sent as a mark only", p.Zero,
			100*float64(p.Zero)/float64(p.Total))
		if p.Duplicate > 0 {
			row("sent twice", "%9d", p.Duplicate)
		}
	}
	enlightenmentText(row, r)
	if r.LinkBytes > 0 {
		row("link", "%9s  both ways", bytesText(float64(r.LinkBytes)))
	}
	if r.Rate > 0 {
		row("delivery rate", "%9s/s, round trip %s", bytesText(r.Rate), shortText(r.RoundTrip))
	}
	if f := r.Fetch; f != nil {
		row("fetch latency", "p50 %s, p99 %s, max %s, %d fetches", shortText(f.P50),
			shortText(f.P99), shortText(f.Max), f.Count)
	}
	for i, p := range r.Phases {
		name := ""
		if i == 0 {
			name = "phases"
		}
		if i+1 < len(r.Phases) {
			row(name, "%9.3f s  %-13s for %.3f s", p.At, p.State, p.For)
		} else {
			row(name, "%9.3f s  %s", p.At, p.State)
		}
	}
	return b.String()
}

// gapsText tells of the times without a link.
func gapsText(row func(name, format string, args ...any), gaps []evict.Gap) {
	if len(gaps) == 0 {
		return
	}
	sum, again := 0.0, 0
	for _, g := range gaps {
		sum += g.For
		again += g.Again
	}
	row("link lost", "%9.3f s  %d times, %d pages sent again", sum, len(gaps), again)
	row("", "the first: %.48s", clean(gaps[0].Why))
}

// enlightenmentText tells what was known of the guest's pages, and what came of it.
func enlightenmentText(row func(name, format string, args ...any), r evict.Report) {
	if r.Pages.Total == 0 {
		return
	}
	row("order", "%s", r.Order)
	e := r.Enlightenment
	if e.Doubts != "" {
		row("not known", "%s", clean(e.Doubts))
	}
	if e.Source == evict.Off {
		return
	}
	row("enlightenment", "by the %s, Linux %s", e.Source, clean(e.Kernel))
	row("", "ready in %s; survey %s, known %s after the freeze", shortText(e.Attach),
		shortText(e.Survey), shortText(e.Known))
	for _, n := range e.Notes {
		row("", "%s", clean(n))
	}
	row("  class", "%9s %8s %8s %8s %8s %8s", "pages", "skipped", "pushed", "near", "fetched",
		"late")
	for _, c := range e.Classes {
		row("  "+c.Class.String(), "%9d %8d %8d %8d %8d %8d", c.Pages, c.Skipped+c.Unused,
			c.Early+c.Pushed, c.Near, c.Fetched, c.Late)
	}
}

// shortText writes a short time, given in seconds, in milliseconds.
func shortText(seconds float64) string {
	return fmt.Sprintf("%.3g ms", seconds*1000)
}

// reportFile is the file that a report will be in. Until then what is to become it lies
// beside it, with its room on the disk already taken.
type reportFile struct {
	name string
	temp *os.File
}

// reportRoom is more than a report takes, in bytes.
const reportRoom = 64 << 10

// reserveReport makes sure, before an eviction, that its report can be written to a file. A file
// of that name stays what it is until write.
func reserveReport(name string) (_ *reportFile, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("--report: %w", err)
		}
	}()
	if real, err := filepath.EvalSymlinks(name); err == nil {
		name = real
	}
	if fi, err := os.Stat(name); err == nil && !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file: name one, or a new one", name)
	}
	r := &reportFile{name: name}
	if r.temp, err = beside(name); err != nil {
		return nil, err
	}
	if _, err = r.temp.Write(make([]byte, reportRoom)); err == nil {
		err = r.temp.Sync()
	}
	if err != nil {
		r.discard()
		return nil, err
	}
	return r, nil
}

// write puts the report in place, whole or not at all.
func (r *reportFile) write(report evict.Report) error {
	m, err := hostv1.NewReport(report)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	var out bytes.Buffer
	if err := writeJSON(&out, m); err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	b := out.Bytes()
	if _, err = r.temp.WriteAt(b, 0); err == nil {
		err = r.temp.Truncate(int64(len(b)))
	}
	if err == nil {
		err = r.temp.Sync()
	}
	if err == nil {
		err = os.Rename(r.temp.Name(), r.name)
	}
	if err != nil {
		r.discard()
		return fmt.Errorf("--report: %w", err)
	}
	return errors.Join(r.temp.Close(), syncDir(filepath.Dir(r.name)))
}

// discard gives the room back.
func (r *reportFile) discard() {
	r.temp.Close()
	os.Remove(r.temp.Name())
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("--report: %w", err)
	}
	return nil
}

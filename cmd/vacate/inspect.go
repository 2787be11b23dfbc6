package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"vacate/internal/guest/inspect"
	"vacate/internal/sys/units"

	"github.com/spf13/cobra"
)

func inspectCommand() *cobra.Command {
	c := &cobra.Command{Use: "inspect",
		Short: "Look into a guest's memory, or into recorded migrations", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(inspectMemoryCommand(), inspectStreamCommand())
	return c
}

func inspectStreamCommand() *cobra.Command {
	var asJSON, records bool
	c := &cobra.Command{
		Use:   "stream FILE [CONTINUATION...]",
		Short: "Decode a recorded migration stream of QEMU",
		Long: `Decodes a migration stream of QEMU, as it goes over the socket: forward, or the
return path; vacate finds out which. FILE may be compressed with gzip; - is
standard input. A stream that was cut and recovered is in several files: name
the first one first.

It understands what a post-copy migration needs (see package migstream). A
stream that is malformed is shown as far as it was understood, followed by the
error with the byte's offset in the uncompressed file, and the exit code is 1.

With --json, the summary is one line {"type":"stream","stream":{...}}, sizes in
bytes; with --records in addition, each element comes before it as
{"type":"record","record":{"offset":...,"item":"..."}}.`,
		Example: `  vacate inspect stream migstream/testdata/pc-bare.forward.gz
  vacate inspect stream --records - <recording | less`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, files []string) error {
			return inspectStream(files, asJSON, records)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "JSON lines on standard output")
	c.Flags().BoolVar(&records, "records", false, "list each element with its offset")
	return c
}

func inspectStream(files []string, asJSON, records bool) error {
	var parts []io.Reader
	for _, name := range files {
		if name == "-" {
			parts = append(parts, os.Stdin)
			continue
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		parts = append(parts, f)
	}
	out := bufio.NewWriter(os.Stdout)
	var record func(inspect.Record) error
	switch {
	case records && asJSON:
		record = func(r inspect.Record) error {
			return writeValue(out, "record", &r)
		}
	case records:
		record = func(r inspect.Record) error {
			_, err := fmt.Fprintf(out, "%12d  %s\n", r.Offset, clean(r.Item))
			return err
		}
	}
	s, err := inspect.Read(record, parts...)
	if asJSON {
		err = errors.Join(err, writeValue(out, "stream", &s))
	} else {
		if records {
			out.WriteByte('\n')
		}
		out.WriteString(streamText(s))
	}
	return errors.Join(err, out.Flush())
}

// streamText sums a stream up for people, in at most 80 columns as long as names are short.
func streamText(s inspect.Stream) string {
	if s.Direction == "" {
		return ""
	}
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-14s%s\n", name, fmt.Sprintf(format, args...))
	}
	counts := func(title string, list []inspect.Count) {
		for i, c := range list {
			if i > 0 {
				title = ""
			}
			row(title, "%-20s %9d", c.Name, c.Count)
		}
	}
	direction := "forward, source to destination"
	if s.Direction == "return" {
		direction = "return path, destination to source"
	}
	row("direction", "%s", direction)
	if s.Machine != "" {
		row("machine type", "%s", clean(s.Machine))
	}
	row("understood", "%d bytes", s.Bytes)
	if s.Cuts > 0 {
		row("cuts", "%d, each followed by a recovery", s.Cuts)
	}
	switch {
	case s.Ended && s.Direction == "return":
		row("end", "shut, with status %d", s.Status)
	case s.Ended:
		row("end", "with the mark of a post-copy's end")
	case s.DeviceState > 0:
		row("end", "with device state, as of a pre-copy")
	default:
		row("end", "none")
	}
	counts("messages", s.Messages)
	for i, r := range s.Requests {
		title := ""
		if i == 0 {
			title = "requests"
		}
		row(title, "%-20s %9d  %s", clean(r.Block), r.Count, units.Size(r.Bytes))
	}
	if s.Direction == "return" {
		return b.String()
	}
	counts("commands", s.Commands)
	row("RAM sections", "%d start, %d part, %d end", s.Sections.Start, s.Sections.Part,
		s.Sections.End)
	if len(s.Blocks) > 0 {
		const line = "  %-28s %9s %8s %9s %9s %9s\n"
		fmt.Fprintf(&b, "\nRAM blocks\n"+line, "name", "size", "page", "data", "zero", "discarded")
		var size, discarded uint64
		var data, zero int
		for _, k := range s.Blocks {
			fmt.Fprintf(&b, line, clean(k.Name), units.Size(k.Size), units.Size(k.PageSize),
				fmt.Sprint(k.Data), fmt.Sprint(k.Zero), units.Size(k.Discarded))
			size, discarded, data, zero = size+k.Size, discarded+k.Discarded, data+k.Data, zero+
				k.Zero
		}
		fmt.Fprintf(&b, line, "all", units.Size(size), "", fmt.Sprint(data), fmt.Sprint(zero),
			units.Size(discarded))
		b.WriteString("  (data and zero: records, of 4 KiB each)\n")
	}
	for _, p := range s.Packages {
		fmt.Fprintf(&b, "\nPackage at byte %d, %d bytes\n  %-40s %8s %8s %9s\n", p.Offset, p.Size,
			"device", "instance", "version", "bytes")
		for _, d := range p.Devices {
			fmt.Fprintf(&b, "  %-40s %8d %8d %9d\n", clean(d.Name), d.Instance, d.Version, d.Size)
		}
		if p.Error != "" {
			fmt.Fprintf(&b, "  and more that was not understood: %s\n", clean(p.Error))
		}
	}
	if s.DeviceState > 0 {
		fmt.Fprintf(&b, "\nDevice state behind RAM: %d bytes, which only QEMU can take apart\n",
			s.DeviceState)
	}
	return b.String()
}

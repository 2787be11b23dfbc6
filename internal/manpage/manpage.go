// Package manpage writes the manual pages of commands from what cobra knows of them.
//
// Cobra's own generator takes a long text for Markdown, which joins the lines of our tables.
package manpage

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// WriteTree writes the page of a command, and of each below it that is not hidden, into dir.
func WriteTree(dir string, c *cobra.Command, section int) error {
	file := filepath.Join(dir, fmt.Sprintf("%s.%d", title(c), section))
	if err := os.WriteFile(file, []byte(Page(c, section)), 0o644); err != nil { // #nosec G306 -- for all to read
		return err
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			if err := WriteTree(dir, sub, section); err != nil {
				return err
			}
		}
	}
	return nil
}

func title(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// Page is the page of one command.
func Page(c *cobra.Command, section int) string {
	c.InitDefaultHelpFlag()
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %q %d \"\" vacate\n.SH NAME\n%s \\- %s\n", strings.ToUpper(title(c)),
		section, escape(title(c)), escape(c.Short))
	fmt.Fprintf(&b, ".SH SYNOPSIS\n%s\n.SH DESCRIPTION\n", escape(c.UseLine()))
	text(&b, c.Long)
	if c.HasExample() {
		b.WriteString(".SH EXAMPLES\n")
		text(&b, c.Example)
	}
	b.WriteString(".SH OPTIONS\n")
	c.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		b.WriteString(".TP\n")
		if f.Shorthand != "" {
			fmt.Fprintf(&b, "\\fB\\-%s\\fR, ", f.Shorthand)
		}
		value, usage := pflag.UnquoteUsage(f)
		fmt.Fprintf(&b, "\\fB\\-\\-%s\\fR %s\n%s", escape(f.Name), escape(value), escape(usage))
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "[]" {
			fmt.Fprintf(&b, " (default %s)", escape(f.DefValue))
		}
		b.WriteString("\n")
	})
	var also []string
	if c.HasParent() {
		also = append(also, fmt.Sprintf("%s(%d)", escape(title(c.Parent())), section))
	}
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() && sub.Name() != "help" {
			also = append(also, fmt.Sprintf("%s(%d)", escape(title(sub)), section))
		}
	}
	if also != nil {
		fmt.Fprintf(&b, ".SH SEE ALSO\n%s\n", strings.Join(also, ",\n"))
	}
	return b.String()
}

// text writes a text of cobra's. What begins with spaces keeps its lines.
func text(b *strings.Builder, s string) {
	kept := false
	for line := range strings.Lines(strings.TrimRight(s, "\n")) {
		line = strings.TrimRight(line, "\n")
		if keep := strings.HasPrefix(line, "  ") || kept && line == ""; keep != kept {
			b.WriteString(map[bool]string{true: ".PP\n.nf\n", false: ".fi\n.PP\n"}[keep])
			kept = keep
		}
		switch {
		case line != "":
			b.WriteString(escape(line) + "\n")
		case kept:
			b.WriteString("\n")
		default:
			b.WriteString(".PP\n")
		}
	}
	if kept {
		b.WriteString(".fi\n")
	}
}

// escape has a line printed as it is.
func escape(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "`", `\(ga`, "'", `\(aq`).Replace(s)
	if strings.HasPrefix(s, ".") {
		s = `\&` + s
	}
	return s
}

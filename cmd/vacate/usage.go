package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// speakPlainly has all commands say in a sentence what is wrong with a command line, and its form.
func speakPlainly(c *cobra.Command) {
	c.SuggestionsMinimumDistance = 2
	for _, sub := range c.Commands() {
		speakPlainly(sub)
	}
	if c.HasSubCommands() {
		c.Args = knownCommand
		if !c.Runnable() {
			c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
		}
		return
	}
	check := c.Args
	if check == nil {
		return
	}
	c.Args = func(c *cobra.Command, args []string) error {
		switch {
		case check(c, args) == nil:
			return nil
		case len(args) == 0:
			return fmt.Errorf("`%s` needs more than that: %s", c.CommandPath(), usageOf(c))
		case check(c, nil) == nil && check(c, args[:1]) != nil:
			return fmt.Errorf("`%s` takes no argument, and there is %q: %s", c.CommandPath(),
				args[0], usageOf(c))
		}
		return fmt.Errorf("`%s` does not take %d arguments (%s): %s", c.CommandPath(), len(args),
			strings.Join(args, " "), usageOf(c))
	}
}

// usageOf is how a command line of a command looks.
func usageOf(c *cobra.Command) string {
	return fmt.Sprintf("usage: %s; see `%s --help`", c.UseLine(), c.CommandPath())
}

// knownCommand refuses the name of a command that there is not.
func knownCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	meant := ""
	for _, name := range c.SuggestionsFor(args[0]) {
		meant += fmt.Sprintf(" Did you mean `%s %s`?", c.CommandPath(), name)
	}
	return fmt.Errorf("unknown command %q.%s See `%s --help`", args[0], meant, c.CommandPath())
}

// badFlag is the error for a flag that a command does not have, or not so.
func badFlag(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())
	}
	names := &cobra.Command{SuggestionsMinimumDistance: 2} // cobra looks for names of commands only
	c.Flags().VisitAll(func(f *pflag.Flag) {
		names.AddCommand(&cobra.Command{Use: f.Name, Run: func(*cobra.Command, []string) {},
			Hidden: f.Hidden})
	})
	meant := ""
	for _, name := range names.SuggestionsFor(unknown.GetSpecifiedName()) {
		meant += fmt.Sprintf(" Did you mean --%s?", name)
	}
	if meant == "" {
		return fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())
	}
	return fmt.Errorf("%w.%s See `%s --help`", err, meant, c.CommandPath())
}

var missingFlags = regexp.MustCompile(`^required flag\(s\) (".*") not set$`)

// plainly is an error of cobra's in our words.
func plainly(c *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	m := missingFlags.FindStringSubmatch(err.Error())
	if m == nil {
		return err
	}
	names := strings.ReplaceAll(strings.ReplaceAll(m[1], `", "`, ` and --`), `"`, "")
	return fmt.Errorf("--%s is missing: %s", names, usageOf(c))
}

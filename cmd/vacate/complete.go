package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"vacate/internal/manpage"

	hostv1 "vacate/internal/host/api/v1"
	"vacate/internal/host/hypervisor"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
)

// completeTime is how long a shell waits for the daemon: beyond, the user would type it sooner.
const completeTime = 2 * time.Second

// A completer tells the words that may stand at a place of a command line.
type completer func(ctx context.Context, d *daemon, typed string) []string

// arguments complete those of each command, one for each place. Where one is nil, files do.
var arguments = map[string][]completer{
	"evict":  {vmsIn(hypervisor.Running)},
	"doctor": {vmsIn()},
	"start":  {vmsIn(hypervisor.None)},
	"stop":   {vmsIn(hypervisor.Running, hypervisor.Paused)},
	"show":   {vmsIn()},
	"status": {evictions(anyEviction)},
	"watch":  {evictions(func(e *hostv1.Eviction) bool { return e.EndedAt == nil })},
	"abort":  {evictions((*hostv1.Eviction).GetAbortable)},
	"decide": {evictions((*hostv1.Eviction).GetDecidable), words("resume-here", "discard")},
	"export": {evictions((*hostv1.Eviction).GetDecidable), nil},
	"report": {evictions(func(e *hostv1.Eviction) bool { return e.Report != nil })},
}

// values complete the values of flags, by the flags' names.
var values = map[string]completer{"to": peers, "host": peers, "fenced": peers, "except": vmsIn()}

// addCompletions has shells complete the commands that ask a daemon.
func addCompletions(root *cobra.Command) {
	for _, c := range root.Commands() {
		if places, ok := arguments[c.Name()]; ok {
			c.ValidArgsFunction = completed(places...)
		}
		for flag, f := range values {
			if c.Flag(flag) == nil || c.Flag("socket") == nil {
				continue
			}
			complete := completed(f)
			value := func(c *cobra.Command, _ []string,
				typed string) ([]string, cobra.ShellCompDirective) {
				return complete(c, nil, typed)
			}
			if err := c.RegisterFlagCompletionFunc(flag, value); err != nil {
				panic(err) // it has one already
			}
		}
	}
}

// completed has the daemon's answer complete arguments.
func completed(places ...completer) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string,
		typed string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= len(places) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ask := places[len(args)]
		if ask == nil {
			return nil, cobra.ShellCompDirectiveDefault
		}
		d := daemon{socket: c.Flag("socket").Value.String(), host: c.Flag("host").Value.String(),
			certs: c.Flag("operator-certs").Value.String()}
		if c.Flag("host").Value.String() == typed {
			d.host = "" // it is what is being typed
		}
		if d.open() != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		ctx, cancel := context.WithTimeout(context.Background(), completeTime)
		defer cancel()
		var fit []string
		for _, word := range ask(ctx, &d, typed) {
			if strings.HasPrefix(word, typed) && word == clean(word) {
				fit = append(fit, word)
			}
		}
		slices.Sort(fit)
		return slices.Compact(fit), cobra.ShellCompDirectiveNoFileComp
	}
}

// vmsIn completes the names of VMs in one of some states; without any, of all.
func vmsIn(states ...hypervisor.State) completer {
	return func(ctx context.Context, d *daemon, _ string) (names []string) {
		r, err := d.ListVMs(ctx, connect.NewRequest(&hostv1.ListVMsRequest{}))
		if err != nil {
			return nil
		}
		for _, vm := range r.Msg.Vms {
			if len(states) == 0 || slices.Contains(states, hypervisor.State(vm.State)) {
				names = append(names, vm.Name)
			}
		}
		return names
	}
}

// evictions completes the VMs of those evictions that fit, and their IDs once one was begun.
func evictions(fits func(*hostv1.Eviction) bool) completer {
	return func(ctx context.Context, d *daemon, typed string) (names []string) {
		r, err := d.ListEvictions(ctx, connect.NewRequest(&hostv1.ListEvictionsRequest{}))
		if err != nil {
			return nil
		}
		for _, e := range r.Msg.Evictions {
			if fits(e) {
				names = append(names, e.Vm)
				if typed != "" {
					names = append(names, e.Id)
				}
			}
		}
		return names
	}
}

func anyEviction(*hostv1.Eviction) bool { return true }

// peers completes the names of the other hosts that VMs can go to.
func peers(ctx context.Context, d *daemon, _ string) (names []string) {
	r, err := d.Status(ctx, connect.NewRequest(&hostv1.StatusRequest{}))
	if err != nil {
		return nil
	}
	for _, p := range r.Msg.Peers {
		if p.Address != "" {
			names = append(names, p.Name)
		}
	}
	return names
}

// words completes words that are always the same.
func words(list ...string) completer {
	return func(context.Context, *daemon, string) []string { return list }
}

// manCommand writes the manual pages, for those who make packages.
func manCommand() *cobra.Command {
	return &cobra.Command{Use: "man DIR", Short: "write the manual pages into a directory",
		Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return manpage.WriteTree(args[0], c.Root(), 1)
		}}
}

// Command vacate evicts a running VM from this host to another.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"

	"vacate/evict"

	"github.com/spf13/cobra"
)

// Exit codes.
const (
	exitCompleted = 0
	exitUsage     = 1
	exitRefused   = 2
	exitAborted   = 3
	exitLost      = 4
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{Use: "vacate", SilenceUsage: true, SilenceErrors: true}
	root.AddCommand(evictCommand(), receiveCommand(), labCommand())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "vacate:", err)
		os.Exit(exitCode(err))
	}
}

func exitCode(err error) int {
	switch {
	case errors.Is(err, evict.ErrRefused):
		return exitRefused
	case errors.Is(err, evict.ErrAborted):
		return exitAborted
	case errors.Is(err, evict.ErrLost):
		return exitLost
	}
	return exitUsage
}

func evictCommand() *cobra.Command {
	var s evict.Source
	var asJSON bool
	c := &cobra.Command{Use: "evict --qmp SOCKET --to HOST:PORT", Args: cobra.NoArgs}
	c.Flags().StringVar(&s.QMP, "qmp", "", "QMP socket of the VM's QEMU")
	c.Flags().StringVar(&s.To, "to", "", "address of `vacate receive`")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON lines")
	c.RunE = func(c *cobra.Command, _ []string) error {
		enc := json.NewEncoder(os.Stdout)
		if asJSON {
			s.Show = func(p evict.Progress) { enc.Encode(map[string]any{"type": "progress", "progress": p}) }
		}
		r, err := s.Evict(c.Context())
		enc.Encode(map[string]any{"type": "report", "report": r})
		return err
	}
	return c
}

func receiveCommand() *cobra.Command {
	var d evict.Destination
	var listen string
	c := &cobra.Command{Use: "receive --qmp SOCKET --listen HOST:PORT", Args: cobra.NoArgs}
	c.Flags().StringVar(&d.QMP, "qmp", "", "QMP socket of the QEMU that waits for the VM")
	c.Flags().StringVar(&listen, "listen", ":7601", "address to listen at")
	c.RunE = func(c *cobra.Command, _ []string) error {
		d.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		ln, err := net.Listen("tcp", listen)
		if err != nil {
			return err
		}
		d.Log.Info("listening", "address", ln.Addr().String())
		return d.Receive(c.Context(), ln)
	}
	return c
}

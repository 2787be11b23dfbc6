package cli

import (
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
)

// DaemonVersion is what a daemon tells others of its build.
func DaemonVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// Log is a daemon's log in a form, text or json, as its --log-format has it.
func Log(w io.Writer, format string) (*slog.Logger, error) {
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, fmt.Errorf("--log-format %q: want text or json", format)
}

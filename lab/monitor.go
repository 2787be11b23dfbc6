package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// execute runs one command on a QMP monitor (QEMU Machine Protocol, one JSON
// object a line) over a connection of its own. result may be nil.
func execute(ctx context.Context, socket, command string, args, result any) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	// The greeting comes first; commands may follow it at once.
	in := json.NewDecoder(io.LimitReader(conn, 16<<20))
	out := json.NewEncoder(conn)
	type request struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}
	var greeting struct{ QMP json.RawMessage }
	for greeting.QMP == nil { // an event may come ahead of it
		if err := in.Decode(&greeting); err != nil {
			return fmt.Errorf("qmp %s: no greeting: %w", command, errors.Join(err, ctx.Err()))
		}
	}
	for _, r := range []request{{Execute: "qmp_capabilities"}, {command, args}} {
		if err := out.Encode(r); err != nil {
			return fmt.Errorf("qmp %s: %w", command, err)
		}
		for {
			var reply struct {
				Event  string
				Return json.RawMessage
				Error  *struct{ Class, Desc string }
			}
			if err := in.Decode(&reply); err != nil {
				return fmt.Errorf("qmp %s: %w", command, errors.Join(err, ctx.Err()))
			}
			if reply.Event != "" {
				continue
			}
			if reply.Error != nil {
				return fmt.Errorf("qmp %s: %s", command, reply.Error.Desc)
			}
			if r.Execute == command && result != nil {
				if err := json.Unmarshal(reply.Return, result); err != nil {
					return fmt.Errorf("qmp %s: reply: %w", command, err)
				}
			}
			break
		}
	}
	return nil
}

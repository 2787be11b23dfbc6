package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// A message is one line from the server. Exactly one of its shapes holds:
// greeting (QMP), event (event, timestamp, optionally data), success
// (return, id) or failure (error, id). Source: docs/interop/qmp-spec.txt of
// QEMU 7.2. Other members are refused: the envelope has not grown since 2010.
type message struct {
	QMP       *greeting       `json:"QMP"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp *timestamp      `json:"timestamp"`
	Return    json.RawMessage `json:"return"`
	Error     *wireError      `json:"error"`
	ID        *uint64         `json:"id"`
}

type greeting struct {
	Version struct {
		QEMU *struct {
			Major, Minor, Micro int
		} `json:"qemu"`
		Package string `json:"package"`
	} `json:"version"`
	Capabilities []string `json:"capabilities"`
}

type wireError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

type timestamp struct {
	Seconds      int64 `json:"seconds"`
	Microseconds int64 `json:"microseconds"`
}

// parseMessage decodes one line and checks that it has one of the four shapes.
func parseMessage(line []byte) (*message, error) {
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	m := new(message)
	if err := dec.Decode(m); err != nil {
		return nil, fmt.Errorf("not a QMP message: %w: %s", err, excerpt(line))
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("not a QMP message: more than one value on a line: %s",
			excerpt(line))
	}
	shapes := 0
	for _, is := range []bool{m.QMP != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			shapes++
		}
	}
	var problem string
	switch {
	case shapes != 1:
		problem = "neither a greeting, an event nor a reply"
	case m.QMP != nil && m.QMP.Version.QEMU == nil:
		problem = "greeting without a version"
	case m.Event != "" && m.Timestamp == nil:
		problem = "event without a timestamp"
	case m.Error != nil && m.Error.Class == "":
		problem = "error without a class"
	case (m.Return != nil || m.Error != nil) && m.ID == nil:
		problem = "reply without an id"
	default:
		return m, nil
	}
	return nil, fmt.Errorf("not a QMP message: %s: %s", problem, excerpt(line))
}

// time converts QEMU's two-part time stamp; -1 in both parts means that QEMU
// could not read its clock, which gives the zero Time.
func (t timestamp) time() time.Time {
	if t.Seconds < 0 || t.Microseconds < 0 || t.Microseconds >= 1e6 {
		return time.Time{}
	}
	return time.Unix(t.Seconds, t.Microseconds*1000)
}

// excerpt quotes the start of a line for an error message.
func excerpt(line []byte) string {
	line = bytes.TrimSpace(line)
	if len(line) > 80 {
		return fmt.Sprintf("%q… (%d bytes)", line[:80], len(line))
	}
	return fmt.Sprintf("%q", line)
}

// A request is one command line to the server.
type request struct {
	Execute   string `json:"execute,omitempty"`
	ExecOOB   string `json:"exec-oob,omitempty"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

// decodeReply decodes the value of a successful reply. Members unknown to
// reply's type are skipped: each QEMU version adds some. Wrong types are errors.
func decodeReply(raw json.RawMessage, reply any) error {
	if reply == nil {
		return nil
	}
	if bytes.Equal(raw, []byte("null")) {
		return errors.New("reply is null")
	}
	return json.Unmarshal(raw, reply)
}

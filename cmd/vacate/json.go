package main

import (
	"encoding/json"
	"errors"
	"io"
	"reflect"

	"vacate/internal/evict"
	hostv1 "vacate/internal/host/api/v1"

	"google.golang.org/protobuf/proto"
)

// docs/json.md describes all of this, and docs/schema.json has its form.

// writeLine writes a line of JSON: an object with the line's type, and a value under that name.
func writeLine(w io.Writer, kind string, m proto.Message) error {
	return json.NewEncoder(w).Encode(map[string]any{"type": kind,
		kind: json.RawMessage(hostv1.JSON(m))})
}

// writeReport writes a report as a line.
func writeReport(w io.Writer, r evict.Report) error {
	m, err := hostv1.NewReport(r)
	if err != nil {
		return err
	}
	return writeLine(w, "report", m)
}

// jsonLines shows an eviction to programs: progress as JSON lines on one output, notes as
// text on another.
type jsonLines struct {
	out   io.Writer
	notes *lines
}

func (j jsonLines) progress(p evict.Progress) {
	writeLine(j.out, "progress", hostv1.NewProgress(p))
}

func (j jsonLines) note(line string) { j.notes.note(line) }

func (j jsonLines) end() {}

// errorJSON is how a command failed.
type errorJSON struct {
	Outcome  string   `json:"outcome"`   // error, refused, aborted, lost contact, goes on
	State    string   `json:"state"`     // in which it happened; empty if there is none
	Message  string   `json:"message"`   // what happened
	Advice   string   `json:"advice"`    // where the VM is, what to look at; may be empty
	Remedy   []string `json:"remedy"`    // commands to choose one of; may be empty
	ExitCode int      `json:"exit_code"` // of the command
}

var outcomes = map[int]string{exitUsage: "error", exitRefused: "refused", exitAborted: "aborted",
	exitLost: "lost contact", exitDetached: "goes on"}

// newErrorJSON says of an error what explain says.
func newErrorJSON(err error) errorJSON {
	code := exitCode(err)
	j := errorJSON{Outcome: outcomes[code], Message: clean(err.Error()), Remedy: []string{},
		ExitCode: code}
	var of *ended
	var e *evict.Error
	switch {
	case errors.As(err, &of):
		j.Message, j.Advice = clean(of.text), clean(of.advice)
		j.Remedy = append(j.Remedy, of.remedy...)
	case errors.As(err, &e):
		j.State, j.Message, j.Advice = string(e.State), clean(e.Err.Error()), clean(e.Remedy)
	}
	return j
}

// writeError writes how a command failed as a line.
func writeError(w io.Writer, err error) error {
	return json.NewEncoder(w).Encode(map[string]any{"type": "error", "error": newErrorJSON(err)})
}

// writeValue writes a value that is no message as a line. It fills v, which is a pointer, so that
// lists and objects without entries are [] and {}.
func writeValue(w io.Writer, kind string, v any) error {
	fill(reflect.ValueOf(v).Elem())
	return json.NewEncoder(w).Encode(map[string]any{"type": kind, kind: v})
}

// fill makes nil slices and maps in a value empty ones.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		if v.IsNil() {
			v.Set(reflect.MakeSlice(v.Type(), 0, 0))
		}
		for i := range v.Len() {
			fill(v.Index(i))
		}
	case reflect.Map:
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
	}
}

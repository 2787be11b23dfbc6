// Package doctor looks at both hosts of an eviction, and at the VM, before anything is touched, and
// says what would go wrong, what might, and how to mend it.
//
//	source's daemon                        destination's daemon
//	Host ─► HostFacts ┐                    Host ─► HostFacts ┐
//	VM   ─► VMFacts   ├─► Compare ◄──link──┤ (JSON, [Decode]) │
//	link ─► LinkFacts ┘      │             Twin ─► TwinFacts ┘
//	                         ▼
//	                     []Finding ─► Text
//
// Facts are gathered where they lie; [Compare] is a pure function of them. Gathering changes
// nothing: files are opened for reading only, of a QEMU only its state is asked, and no setting is
// tried out. The destination starts a QEMU for a moment that has the twin's CPUs and nothing else,
// to ask what they are. So some things cannot be known before an eviction, and no finding claims
// them. Does the twin start as described? Does a post-copy page fault work in it? Are two files
// that look alike on two hosts one? For the last there is evidence; see [FileFacts].
//
// Which files the destination looks at is its own description's word, never the peer's: a peer can
// learn nothing of other files. Facts from a peer are bounded when they are decoded, and may lie:
// then an eviction begins that the engine itself refuses. Strings in findings may hold whatever a
// peer, a file name or a QEMU says; who shows them on a terminal has to clean them.
//
// Everything here may be used concurrently.
package doctor

import (
	"fmt"
	"slices"
)

// Level is how bad a finding is.
type Level int

const (
	OK      Level = iota // looked at, and as it should be
	Note                 // good to know; no remedy needed
	Warning              // an eviction may fail, take long or hurt
	Fatal                // an eviction will be refused, fail, or damage the VM
)

var levels = [...]string{"ok", "note", "warning", "fatal"}

func (l Level) String() string {
	if l < OK || l > Fatal {
		return fmt.Sprintf("level %d", int(l))
	}
	return levels[l]
}

// MarshalText implements encoding.TextMarshaler.
func (l Level) MarshalText() ([]byte, error) {
	if l < OK || l > Fatal {
		return nil, fmt.Errorf("doctor: no level %d", int(l))
	}
	return []byte(levels[l]), nil
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *Level) UnmarshalText(b []byte) error {
	i := slices.Index(levels[:], string(b))
	if i < 0 {
		return fmt.Errorf("doctor: no level %.20q", b)
	}
	*l = Level(i)
	return nil
}

// A Finding is one answer. Every warning and fatal finding has a remedy: a command, in backquotes,
// where there is one.
type Finding struct {
	Host   string `json:"host"`  // where; "" for both, or the way between them
	Check  string `json:"check"` // "userfaultfd", "disk"…
	Level  Level  `json:"level"`
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

// Fleet is the check of what the fleet of a host keeps off it: an operator may overrule that.
const Fleet = "fleet"

// Worst returns the worst level among findings.
func Worst(findings []Finding) Level {
	worst := OK
	for _, f := range findings {
		worst = max(worst, f.Level)
	}
	return worst
}

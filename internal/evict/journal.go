package evict

import "vacate/internal/evict/journal"

// Journal is where an engine notes what must not be forgotten when it dies, of one
// eviction. Its methods return when that is durable, and may be called concurrently.
type Journal interface {
	// Note sets the eviction's mark, and why it got it.
	Note(m Mark, reason string) error
	// Keep stores bytes under a name of the engine's, in place of those stored before.
	Keep(name string, b []byte) error
	// Kept returns what was stored; an error that wraps fs.ErrNotExist if nothing was.
	Kept(name string) ([]byte, error)
}

// What engines keep, by its name.
const (
	keptFacts = "facts" // source: hostFacts; JSON
	// both: QEMU's stream from its header to the footer of the RAM section's start
	keptHead = "head"
	keptLoad = "load" // source: the package
	// source: empty; memory of the frozen VM was given back to the host
	keptGivenBack = "given-back"
	// destination: QEMU's word for the state that the VM stood in; without it the twin is to run
	keptStands = "stands"
	// destination: empty; the twin ran, so that one that is paused since is so by its operator's
	// word
	keptRan = "ran"
	// source: empty; the twin is dead for good, as the destination said, or never ran
	keptDead = "dead-there"
	// KeptHeard is kept by a destination, and empty: the source knows that the VM is whole there.
	KeptHeard = journal.Lasting + "heard"
	// KeptHuge is a HugePages, of an eviction that a destination takes or took: JSON.
	KeptHuge = journal.Lasting + "huge"
	// KeptTrace is a Trace, of an eviction that a source ended: JSON, compressed with gzip.
	KeptTrace  = journal.Lasting + "trace"
	keptMemory = "memory" // destination: JSON of guestmem.Block, where the twin's memory is
)

// StoodThere is QEMU's word for the state that a VM stood in which a destination was told of; empty
// if it ran, or that is not known.
func StoodThere(j Journal) string {
	b, err := j.Kept(keptStands)
	if err != nil {
		return ""
	}
	return string(b)
}

// DeadThere reports whether it is known, without an operator's word, that the twin never runs
// again.
func DeadThere(j Journal) bool {
	_, err := j.Kept(keptDead)
	return err == nil
}

// note is Note for an engine that may have no journal.
func note(j Journal, m Mark, reason string) error {
	if j == nil {
		return nil
	}
	return j.Note(m, reason)
}

// keep is Keep for an engine that may have no journal.
func keep(j Journal, name string, b []byte) error {
	if j == nil {
		return nil
	}
	return j.Keep(name, b)
}

package evict

import "sync/atomic"

// text is a string that one task sets and others read. It is empty at first.
type text struct{ p atomic.Pointer[string] }

func (t *text) set(s string) { t.p.Store(&s) }

func (t *text) get() string {
	if s := t.p.Load(); s != nil {
		return *s
	}
	return ""
}

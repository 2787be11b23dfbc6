package evict

import "time"

// SetAgentTime sets how long a guest's agent may take to answer, until undo is called.
func SetAgentTime(t time.Duration) (undo func()) {
	before := agentTime
	agentTime = t
	return func() { agentTime = before }
}

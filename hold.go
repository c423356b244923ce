package dmutex

import "sync"

// holds is what a mutex holds, and which Unlocks its users still owe it. The
// callers of one mutex cannot be told apart, so the oldest grant is taken to be
// unlocked first: an Unlock that comes late for a lost grant must never release
// the one that followed it.
type holds struct {
	mu sync.Mutex // guards the fields below

	current *claim // the newest grant, nil if there is none or its Unlock is under way
	tried   bool   // an Unlock of current got no answer; whether it is repeated is not known
	owed    int    // older grants, all lost, that have not been unlocked
}

// add records a new grant. Any other has been lost: the lock was free. Which one is
// newer does not depend on who comes here first.
func (h *holds) add(c *claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.current == nil || h.tried:
		h.current, h.tried = c, false
	case c.until().Before(h.current.until()):
		h.owed++
	default:
		h.current = c
		h.owed++
	}
}

// take returns the grant that the calling Unlock is to release, which nobody else
// will get; or ErrLockLost if the grant that it is for was lost, or ErrNotHeld.
func (h *holds) take() (*claim, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.owed > 0:
		h.owed--
		return nil, ErrLockLost
	case h.current == nil:
		return nil, ErrNotHeld
	}
	c := h.current
	h.current, h.tried = nil, false
	return c, nil
}

// putBack lets Unlock be called again after a release without an answer, unless
// the mutex holds something newer.
func (h *holds) putBack(c *claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current == nil {
		h.current, h.tried = c, true
	}
}

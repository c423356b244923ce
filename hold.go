package dmutex

import (
	"sync"
	"time"
)

// holds is what a mutex holds, and which Unlocks its users still owe it. The
// callers of one mutex cannot be told apart, so the oldest grant is taken to be
// unlocked first: an Unlock that comes late for a lost grant must never release
// the one that followed it.
type holds struct {
	mu sync.Mutex // guards the fields below

	current *grant // the newest grant, nil if there is none or its Unlock is under way
	owed    int    // older grants, all lost, that have not been unlocked

	// An Unlock that failed without an answer may be called again, or not. Once
	// there is a newer grant, one more Unlock is taken for the repeat until then.
	repeatUntil time.Time
}

// grant is one time that the lock was got.
type grant struct {
	*claim
	unlockTried bool // an Unlock was called that may have been for this grant
}

// add records a new grant. Any older one has been lost: the lock was free.
func (h *holds) add(c *claim) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.supersedeLocked(h.current)
	h.current = &grant{claim: c}
}

func (h *holds) supersedeLocked(old *grant) {
	switch {
	case old == nil:
	case old.unlockTried:
		h.repeatUntil = old.until()
	default:
		h.owed++
	}
}

// take returns the grant that the calling Unlock is to release, which nobody else
// will get; or ErrLockLost if the grant that it is for was lost, or ErrNotHeld.
func (h *holds) take() (*grant, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.owed > 0:
		h.owed--
		return nil, ErrLockLost
	case time.Now().Before(h.repeatUntil):
		h.repeatUntil = time.Time{}
		if h.current != nil {
			h.current.unlockTried = true
		}
		return nil, ErrLockLost
	case h.current == nil:
		return nil, ErrNotHeld
	}
	g := h.current
	h.current = nil
	return g, nil
}

// putBack undoes take after a release without an answer.
func (h *holds) putBack(g *grant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	g.unlockTried = true
	if h.current == nil {
		h.current = g
	} else {
		h.supersedeLocked(g)
	}
}

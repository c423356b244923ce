package dmutex

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// holds is what a mutex holds, and which Unlocks its users still owe it. The
// callers of one mutex cannot be told apart, so the oldest grant is taken to be
// unlocked first: an Unlock that comes late for a lost grant must never release
// the one that followed it.
type holds struct {
	mu sync.Mutex // guards the fields below

	current *hold // the newest grant, nil if there is none or its Unlock is under way
	tried   bool  // an Unlock of current got no answer; whether it is repeated is not known
	owed    int   // older grants, all lost, that have not been unlocked
}

// add records a new grant. Any other has been lost: the lock was free. Which one is
// newer does not depend on who comes here first.
func (h *holds) add(g *hold) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.current == nil || h.tried:
		h.current, h.tried = g, false
	case g.claim.until().Before(h.current.claim.until()): // as granted; renewals move the end
		h.owed++
	default:
		h.current = g
		h.owed++
	}
}

// take returns the grant that the calling Unlock is to release, which nobody else
// will get; or ErrLockLost if the grant that it is for was lost, or ErrNotHeld.
func (h *holds) take() (*hold, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.owed > 0:
		h.owed--
		return nil, ErrLockLost
	case h.current == nil:
		return nil, ErrNotHeld
	}
	g := h.current
	h.current, h.tried = nil, false
	return g, nil
}

// putBack lets Unlock be called again after a release without an answer, unless
// the mutex holds something newer.
func (h *holds) putBack(g *hold) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current == nil {
		h.current, h.tried = g, true
	}
}

// newest returns the newest grant; nil if there is none, or if an Unlock of it got no
// answer, so that it can be relied on no more.
func (h *holds) newest() *hold {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.tried {
		return nil
	}
	return h.current
}

// hold is a lock that was granted, until it is released or lost.
type hold struct {
	*claim
	bound time.Time // no renewal may let it last for longer; zero: any may

	mu    sync.Mutex    // guards the fields below
	end   time.Time     // until when it can be relied on
	fault error         // of the latest renewal; nil if that was none
	left  bool          // it is being released: no keeper may start any more
	stop  func()        // ends the keeper; nil if there is none
	lost  chan struct{} // closed by the keeper when it is lost; nil if there is none
}

// newHold makes a hold of a claim that was granted.
func newHold(c *claim, longest time.Duration) *hold {
	h := &hold{claim: c, end: c.until()}
	if longest > 0 {
		h.bound = time.Now().Add(longest)
	}
	return h
}

// until is when the hold ends on our own clock.
func (h *hold) until() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.end
}

// extend lets the hold last for its ttl from now on.
func (h *hold) extend(ctx context.Context) error {
	if !h.mayExtend() {
		if !time.Now().Before(h.until()) {
			return h.whyOver()
		}
		return ErrMaxHold
	}
	end, err := h.claim.extend(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil:
		h.fault = nil
		if end.After(h.end) {
			h.end = end
		}
	case h.fault == nil || !errors.Is(err, context.DeadlineExceeded): // a time limit says least
		h.fault = given(context.Background(), err)
	}
	return err
}

func (h *hold) mayExtend() bool {
	return h.bound.IsZero() || !time.Now().Add(h.ttl).After(h.bound)
}

// whyOver tells why the hold has come to its end.
func (h *hold) whyOver() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.fault != nil:
		return fmt.Errorf("%w: it could not be renewed before its ttl was over: %w", ErrLockLost, h.fault)
	case !h.mayExtend():
		return fmt.Errorf("%w: %w", ErrLockLost, ErrMaxHold)
	default:
		return fmt.Errorf("%w: its ttl is over", ErrLockLost)
	}
}

// keep starts the keeper, if there is none yet: the goroutine that closes lost when
// the hold can no longer be relied on, after it has told onLost why, and that sees to
// it that it can if it renews.
func (h *hold) keep(renews bool, onLost func(error)) (lost <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lost == nil {
		h.lost = make(chan struct{})
	}
	if h.stop != nil || h.left {
		return h.lost
	}
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	h.stop = func() { cancel(); <-stopped }
	go func() {
		defer close(stopped)
		if err := h.run(ctx, renews); err != nil {
			onLost(err)
			close(h.lost)
		}
	}()
	return h.lost
}

// leave ends the keeper. What it has sent and not been answered can do nothing any
// more once the ticket is released.
func (h *hold) leave() {
	h.mu.Lock()
	h.left = true
	stop := h.stop
	h.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// run returns why the hold was lost, or nil when ctx ends.
func (h *hold) run(ctx context.Context, renews bool) error {
	timer := time.NewTimer(time.Until(h.until()) - h.ttl*2/3) // the answer may have taken long
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		left := time.Until(h.until())
		switch {
		case left <= 0:
			return h.whyOver()
		case !renews || !h.mayExtend():
			timer.Reset(left)
			continue
		}
		// A connection that swallows the request leaves time for others.
		bound, cancel := context.WithTimeout(ctx, left/3)
		err := h.extend(bound)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			timer.Reset(h.ttl / 3)
		case errors.Is(err, ErrLockLost):
			return err
		default:
			timer.Reset(min(time.Until(h.until()), jitter(h.ttl/40, h.ttl/20)))
		}
	}
}

// promptCtx is a ctx that ends when a hold does. In a process that was stopped, who asks
// it first after the wake may come before the keeper; it has ended for them, too.
type promptCtx struct {
	context.Context
	hold *hold
	end  context.CancelCauseFunc
}

func (c promptCtx) Err() error {
	if !time.Now().Before(c.hold.until()) {
		c.end(c.hold.whyOver())
	}
	return c.Context.Err()
}

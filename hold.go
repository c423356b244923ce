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
	case g.until().Before(h.current.until()):
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

// newest returns the newest grant, nil if there is none.
func (h *holds) newest() *hold {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.current
}

// hold is a lock that was granted, until it is released or lost.
type hold struct {
	*claim
	bound time.Time // no renewal may let it last for longer; zero: any may

	mu   sync.Mutex    // guards the fields below
	end  time.Time     // until when it can be relied on
	stop func()        // ends the keeper; nil if there is none
	lost chan struct{} // closed by the keeper when it is lost; nil if there is none
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
		return errMaxHold
	}
	end, err := h.claim.extend(ctx)
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if end.After(h.end) {
		h.end = end
	}
	return nil
}

func (h *hold) mayExtend() bool {
	return h.bound.IsZero() || !time.Now().Add(h.ttl).After(h.bound)
}

// keep starts the keeper, if there is none yet: the goroutine that closes lost when
// the hold can no longer be relied on, after it has told onLost why, and that sees to
// it that it can if it renews.
func (h *hold) keep(renews bool, onLost func(error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stop != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	lost, stopped := make(chan struct{}), make(chan struct{})
	h.lost = lost
	h.stop = func() { cancel(); <-stopped }
	go func() {
		defer close(stopped)
		if err := h.run(ctx, renews); err != nil {
			onLost(err)
			close(lost)
		}
	}()
}

// leave ends the keeper. What it has sent and not been answered can do nothing any
// more once the ticket is released.
func (h *hold) leave() {
	h.mu.Lock()
	stop := h.stop
	h.mu.Unlock()
	if stop != nil {
		stop()
	}
}

// run returns why the hold was lost, or nil when ctx ends.
func (h *hold) run(ctx context.Context, renews bool) error {
	var fault error // of the latest renewal
	timer := time.NewTimer(h.ttl / 3)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil
		}
		left := time.Until(h.until())
		switch {
		case left <= 0 && fault != nil:
			return fmt.Errorf("%w: it could not be renewed before its ttl was over: %w", ErrLockLost, fault)
		case left <= 0 && !h.mayExtend():
			return fmt.Errorf("%w: %w", ErrLockLost, errMaxHold)
		case left <= 0:
			return errTTLOver
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
			fault = nil
			timer.Reset(h.ttl / 3)
		case errors.Is(err, ErrLockLost):
			return err
		default:
			if fault == nil || !errors.Is(err, context.DeadlineExceeded) { // that of bound says least
				fault = given(ctx, err)
			}
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
		c.end(errTTLOver)
	}
	return c.Context.Err()
}

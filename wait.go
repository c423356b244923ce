package dmutex

import (
	"context"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"
)

const (
	// longestWait is how long a waiter sleeps without a message before it looks at
	// Redis all the same: what a lost message costs at the most.
	longestWait = 5 * time.Second

	// deafWait is the same while the subscription is down or refused.
	deafWait = time.Second

	// expiryLag is how long after the end of a ttl the first in the queue looks,
	// and rankLag how much later each of the others.
	expiryLag = 2 * time.Millisecond
	rankLag   = 50 * time.Millisecond

	// pttlError is by how much more than what is left PTTL may say, as Redis counts
	// in whole milliseconds.
	pttlError = 2 * time.Millisecond

	// A holder that is not ours does not hand over, so the first in the queue looks
	// as often as redsync does.
	minPoll = 50 * time.Millisecond
	maxPoll = 250 * time.Millisecond
)

// acquire gets the lock for a new claim. It asks; if the lock is taken it gets in
// line, and asks again whenever there is a reason: a message, the end of the
// holder's ttl, or enough time gone by. It returns when ctx ends, at the first
// try also when Redis does not answer, and later when asking is of no more use.
func (m *Mutex) acquire(ctx context.Context) (*claim, error) {
	var w waiter
	defer w.leave()
	var home server // where hand-overs are told; nil until that matters
	locate := func() (err error) {
		if home == nil {
			home, err = m.node.home(ctx)
		}
		return err
	}
	getInLine := func(place string) *claim {
		w.join(home)
		c := m.claim(w.ear.inbox())
		c.inLine(place)
		w.ear.expect(c.ticket)
		return c
	}

	if !subscribers.idle() {
		if err := locate(); err != nil {
			return nil, given(ctx, err)
		}
	}
	var c *claim
	if home != nil && subscribers.live(home) {
		c = getInLine("") // a place in the queue in the first round trip
	} else {
		c = m.claim("")
	}
	late := false // there was a grant that came too late
	for first := true; ; first = false {
		sent := time.Now()
		var seen sight
		var err error
		if g := w.grant; g != nil && g.ticket == c.ticket {
			seen, err = c.accept(ctx, g)
		} else {
			seen, err = c.try(ctx)
		}
		if err == nil && seen.status == "held" {
			return c, nil
		}
		if err == nil || errors.Is(err, errTooLate) {
			if err := locate(); err != nil {
				c.abandon(ctx)
				return nil, given(ctx, err)
			}
		}
		switch {
		case errors.Is(err, errTooLate), seen.status == "ended":
			// This ticket cannot hold the lock any more; another keeps its place.
			c.abandon(ctx)
			c = getInLine(c.place())
			if err = nil; late {
				err = w.sleep(ctx, retryPause()) // the way to Redis is longer than the ttl
			}
			late = true
		case err != nil && (first || ctxErr(ctx) != nil || !transient(err)):
			c.abandon(ctx)
			return nil, given(ctx, err)
		case err != nil:
			err = w.sleep(ctx, retryPause())
		case seen.ttl < 0:
			c.abandon(ctx)
			return nil, ErrNoExpiry
		case w.ear == nil:
			if time.Since(sent) > repeatFloor {
				c.abandon(ctx) // an earlier copy of the request may still be on its way
			}
			c = getInLine("")
			if w.ear.hears() {
				continue
			}
			err = w.sleep(ctx, w.patience(seen, c.grace))
		default:
			if w.hint == c.ticket {
				w.ear.doubt() // it was told that it has the lock
			}
			if !isTicket(seen.holder) && seen.rank <= 0 {
				w.ear.listen(m.names.channel) // the original package tells its releases there
			}
			w.ear.standIn(m.line(), c)
			err = w.sleep(ctx, w.patience(seen, c.grace))
		}
		if err != nil {
			c.abandon(ctx)
			return nil, err
		}
		if w.grant != nil {
			continue
		}
		if now, err := m.node.home(ctx); err == nil {
			home = now
		}
		if w.join(home); w.ear.inbox() != c.inbox() {
			// Hand-overs are told elsewhere now; another ticket keeps the place.
			c.abandon(ctx)
			c = getInLine(c.place())
		}
	}
}

// watch waits until a hold ends: the one that made the latest TryLock fail, or
// the one that it finds. Redis says how that ended, unless it lost the news: then
// what is gone before its ttl has run out was released.
func (m *Mutex) watch(ctx context.Context) (expired bool, err error) {
	var w waiter
	defer w.leave()
	remembered := m.seen.Load()
	target := remembered
	defer func() {
		if err == nil || errors.Is(err, ErrFateUnknown) {
			target = nil
		}
		m.seen.CompareAndSwap(remembered, target)
	}()

	for first := true; ; first = false {
		holder := ""
		if target != nil {
			holder = target.holder
		}
		if w.hint != "" && w.hint == holder {
			return false, nil
		}
		sent := time.Now()
		seen, err := look(ctx, m.node, m.names, holder)
		if err != nil {
			if first || ctxErr(ctx) != nil || !transient(err) {
				return false, err
			}
			if err := w.sleep(ctx, retryPause()); err != nil {
				return false, err
			}
			continue
		}
		if target != nil && (seen.free || seen.holder != holder) {
			expired, known := target.fate(seen.fate)
			switch {
			case seen.fate == "unclaimed":
				target = nil // it never began
			case known:
				return expired, nil
			default:
				return false, ErrFateUnknown
			}
		}
		switch {
		case seen.free:
			return false, nil
		case seen.ttl < 0:
			return false, ErrNoExpiry
		}
		target = sighted(seen, sent)

		home, err := m.node.home(ctx)
		if err != nil && w.ear == nil {
			return false, given(ctx, err)
		}
		if err == nil && w.join(home) {
			w.ear.listen(m.names.channel)
			if w.ear.hears() {
				continue // a release since the look was not heard
			}
		}
		seen.rank = 0
		if err := w.sleep(ctx, w.patience(seen, maxGrace)); err != nil {
			return false, err
		}
	}
}

// sighting is a hold as it was last seen.
type sighting struct {
	holder string
	at     time.Time // before it was seen
	end    time.Time // before which it cannot have expired
}

// sighted returns what was seen by a request sent at the time given.
func sighted(seen sight, sent time.Time) *sighting {
	return &sighting{holder: seen.holder, at: sent, end: sent.Add(seen.ttl - pttlError)}
}

// fate tells how the hold, now gone, ended. If its tombstone may have expired,
// and the ttl too, that is not known.
func (s *sighting) fate(tombstone string) (expired, known bool) {
	now := time.Now()
	switch {
	case tombstone == "released", now.Before(s.end):
		return false, true
	default:
		return true, now.Sub(s.at) < tombstoneTTL-time.Second
	}
}

// waiter is one call that waits, and what it knows besides what Redis tells.
type waiter struct {
	ear     *listener // nil until it has to wait
	timer   *time.Timer
	hint    string // the message that ended the latest sleep, "" if none did
	grant   *grant // the lock, if that ended it
	witness bool   // was told of a hand-over, to see to it that it is claimed
}

// join makes it a listener on home, if it is none yet; false if it was.
func (w *waiter) join(home server) bool {
	if w.ear != nil {
		if w.ear.on(home) {
			return false
		}
		w.ear.leave()
	}
	w.ear = subscribers.join(home)
	return true
}

func (w *waiter) leave() {
	if w.ear != nil {
		w.ear.leave()
	}
	if w.timer != nil {
		w.timer.Stop()
	}
}

// sleep returns nil as soon as there is a reason to look at Redis: a message came,
// or d is over. A message that only says when to look shortens d.
func (w *waiter) sleep(ctx context.Context, d time.Duration) error {
	end := time.Now().Add(d)
	if w.timer == nil {
		w.timer = time.NewTimer(d)
	} else {
		w.timer.Reset(d)
	}
	w.hint, w.grant = "", nil
	for {
		select {
		case <-ctx.Done():
			return ctxErr(ctx)
		case <-w.timer.C:
			return nil
		case heard := <-w.ear.heard:
			w.hint, w.grant = heard.hint, heard.grant
			grace, err := strconv.ParseUint(w.hint, 10, 32)
			if err != nil {
				return nil
			}
			w.witness = true
			w.timer.Reset(min(time.Until(end), time.Duration(grace)*time.Millisecond+expiryLag))
		}
	}
}

// patience is how long a waiter that has seen this may sleep without a message. One
// that hears none and is next looks several times in the grace that it is given.
func (w *waiter) patience(seen sight, grace time.Duration) time.Duration {
	lag := expiryLag
	if seen.rank != 0 && !w.witness {
		lag = rankLag * time.Duration(max(1, seen.rank))
	}
	w.witness = false

	longest := jitter(longestWait*4/5, longestWait)
	switch {
	case !isTicket(seen.holder):
		queue := time.Duration(max(0, seen.rank))
		longest = min(longest, queue*maxPoll+jitter(minPoll, maxPoll))
	case !w.ear.hears() && seen.rank == 0:
		longest = max(minPoll, jitter(grace/4, grace/2))
	case !w.ear.hears():
		longest = jitter(deafWait/2, deafWait)
	}
	return min(seen.ttl+lag, longest)
}

// retryPause is how long a waiter waits after a fault.
func retryPause() time.Duration { return jitter(100*time.Millisecond, 500*time.Millisecond) }

func jitter(from, to time.Duration) time.Duration { return from + rand.N(to-from) }

// sleep waits for d or the end of ctx, whose error it returns.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctxErr(ctx)
	}
}

// ctxErr is ctx.Err() with its cause, but never late: a request that was given
// ctx's deadline can fail a moment before ctx itself ends.
func ctxErr(ctx context.Context) error {
	err := ctx.Err()
	if deadline, ok := ctx.Deadline(); ok && err == nil && !time.Now().Before(deadline) {
		return context.DeadlineExceeded
	}
	if cause := context.Cause(ctx); err != nil && !errors.Is(cause, err) {
		return errors.Join(err, cause)
	}
	return err
}

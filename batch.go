package dmutex

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-redis/redis/v8"
)

const (
	// maxFlights is how many requests of one client are under way before the next ones
	// wait for one of them to return, and then go together. So whoever is alone, or
	// nearly, waits for nobody; and what many goroutines ask for takes few system
	// calls, on both sides.
	maxFlights = 4

	// boarding bounds the wait for that. Their connections may be dead, and others live.
	boarding = 20 * time.Millisecond
)

// flights are the requests that are under way. A client that has none is not in it.
var flights = traffic{byClient: map[redis.UniversalClient]lane{}}

type traffic struct {
	mu       sync.Mutex // guards byClient
	byClient map[redis.UniversalClient]lane
}

// lane is the traffic of one client.
type lane struct {
	flights int          // under way; more than maxFlights only while some do not return
	waiting []*passenger // for one of them to land
}

// passenger is a request that waits for a flight.
type passenger struct {
	cmd *redis.Cmd

	// board is sent, once, either all who are to go together, for the first of them to
	// see to it; or nil, when that was done.
	board chan []*passenger
	err   error // of cmd, once that was done
}

// process is client.Process, perhaps together with others, and returns as soon as ctx
// ends.
func (t *traffic) process(ctx context.Context, client redis.UniversalClient, cmd *redis.Cmd) error {
	t.mu.Lock()
	l := t.byClient[client]
	if l.flights < maxFlights {
		l.flights++
		t.byClient[client] = l
		t.mu.Unlock()
		if ctx.Done() == nil {
			return t.fly(ctx, client, cmd, nil)
		}
		return await(ctx, func() error { return t.fly(ctx, client, cmd, nil) })
	}
	p := &passenger{cmd: cmd, board: make(chan []*passenger, 1)}
	l.waiting = append(l.waiting, p)
	t.byClient[client] = l
	t.mu.Unlock()
	return await(ctx, func() error {
		if together := t.wait(client, p); len(together) == 1 {
			return t.fly(ctx, client, cmd, nil)
		} else if together != nil {
			p.err = t.fly(ctx, client, cmd, together[1:])
		}
		if p.err != nil && (!isAnswer(p.err) || hasCode(p.err, passingInCluster)) {
			return client.Process(ctx, cmd) // go-redis does more to get a single request answered
		}
		return p.err
	})
}

// wait returns what p is told when it boards. If that takes too long, it takes all who
// wait with it.
func (t *traffic) wait(client redis.UniversalClient, p *passenger) (together []*passenger) {
	timer := time.NewTimer(boarding)
	defer timer.Stop()
	select {
	case together = <-p.board:
		return together
	case <-timer.C:
	}
	t.mu.Lock()
	l := t.byClient[client]
	i := slices.Index(l.waiting, p)
	if i < 0 {
		t.mu.Unlock()
		return <-p.board
	}
	together, l.waiting = l.waiting, nil
	l.flights++
	t.byClient[client] = l
	t.mu.Unlock()
	together[0], together[i] = p, together[0]
	return together
}

// fly sends a request and those of others.
func (t *traffic) fly(ctx context.Context, client redis.UniversalClient, cmd *redis.Cmd, others []*passenger) error {
	defer t.land(client, others)
	if len(others) == 0 {
		return client.Process(ctx, cmd)
	}
	pipe := client.Pipeline()
	_ = pipe.Process(ctx, cmd)
	for _, p := range others {
		_ = pipe.Process(ctx, p.cmd)
		p.err = errPanic
	}
	_, _ = pipe.Exec(unwatched{detached(ctx), time.Now().Add(minAnswerTime)})
	for _, p := range others {
		p.err = p.cmd.Err()
	}
	return cmd.Err()
}

var errPanic = errors.New("a hook of the client has panicked")

// land ends a flight, and lets those who wait have the next.
func (t *traffic) land(client redis.UniversalClient, others []*passenger) {
	t.mu.Lock()
	l := t.byClient[client]
	var next []*passenger
	if l.flights <= maxFlights {
		next, l.waiting = l.waiting, nil
	}
	if next == nil {
		l.flights--
	}
	if l.flights > 0 {
		t.byClient[client] = l
	} else {
		delete(t.byClient, client)
	}
	t.mu.Unlock()
	if next != nil {
		next[0].board <- next
	}
	for _, p := range others {
		p.board <- nil
	}
}

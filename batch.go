package dmutex

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/go-redis/redis/v8"
)

// maxFlights is how many requests of one client are under way before the next ones wait
// for one of them to return, and then go together. So whoever is alone, or nearly,
// waits for nobody; and what many goroutines ask for takes few system calls, on both
// sides. That one connection fails holds up a fraction of them, until its deadline.
const maxFlights = 4

// flights are the requests that are under way. A client that has none is not in it.
var flights = traffic{byClient: map[redis.UniversalClient]lane{}}

type traffic struct {
	mu       sync.Mutex // guards byClient
	byClient map[redis.UniversalClient]lane
}

// lane is the traffic of one client.
type lane struct {
	flights int          // under way, at most maxFlights
	waiting []*passenger // for one of them to land; nil if there are fewer
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
		if ctx.Done() == nil || connected(client) {
			return t.fly(ctx, client, cmd, nil)
		}
		return await(ctx, func() error { return t.fly(ctx, client, cmd, nil) })
	}
	p := &passenger{cmd: cmd, board: make(chan []*passenger, 1)}
	l.waiting = append(l.waiting, p)
	t.byClient[client] = l
	t.mu.Unlock()
	return await(ctx, func() error {
		if together := <-p.board; len(together) == 1 {
			return t.fly(ctx, client, cmd, nil)
		} else if together != nil {
			p.err = t.fly(ctx, client, cmd, together[1:])
		}
		if p.err != nil && !isAnswer(p.err) {
			return client.Process(ctx, cmd) // go-redis does more to get a single request answered
		}
		return p.err
	})
}

// connected tells whether client has a connection to spare. go-redis takes notice of the
// end of ctx while it uses that, but not always while it makes one.
func connected(client redis.UniversalClient) bool {
	c, ok := client.(interface{ PoolStats() *redis.PoolStats })
	return ok && c.PoolStats().IdleConns > 0
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
	next := l.waiting
	l.waiting = nil
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

package rig

import (
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"
)

// Bubble is a miniredis inside a testing/synctest bubble, reached through
// connections in memory: no time passes but what everybody sleeps, and whatever
// goroutine is left behind fails the test.
type Bubble struct {
	Mini *miniredis.Miniredis

	mu    sync.Mutex // guards conns
	conns []net.Conn // the server's ends
}

// NewBubble must be called inside the bubble.
func NewBubble(tb testing.TB) *Bubble {
	tb.Helper()
	m := miniredis.NewMiniRedis()
	if err := m.Start(); err != nil {
		tb.Fatal(err)
	}
	m.Server().Close() // its listener: an Accept is never durably blocked
	return &Bubble{Mini: m}
}

// Client returns a client; it has to be closed before the bubble ends.
func (b *Bubble) Client(change ...func(*redis.Options)) *redis.Client {
	opt := &redis.Options{
		PoolSize:           1000, // go-redis keeps its pool timers across bubbles
		IdleCheckFrequency: -1,
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			client, server = newQueued(client), newQueued(server)
			b.mu.Lock()
			b.conns = append(b.conns, server)
			b.mu.Unlock()
			go b.Mini.Server().ServeConn(server)
			return client, nil
		},
	}
	for _, f := range change {
		f(opt)
	}
	return redis.NewClient(opt)
}

// Advance lets time pass, for the server's keys as well.
func (b *Bubble) Advance(d time.Duration) {
	const step = 5 * time.Millisecond
	for end := time.Now().Add(d); time.Now().Before(end); {
		time.Sleep(step)
		b.Mini.FastForward(step)
	}
}

// CutAll closes all connections there are.
func (b *Bubble) CutAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range b.conns {
		_ = conn.Close()
	}
	b.conns = nil
}

// queued makes the writes of a net.Pipe end return at once, as those of a socket
// do: two peers that both write before they read would wait for each other.
type queued struct {
	net.Conn
	mu      sync.Mutex
	queue   [][]byte
	wake    chan struct{} // capacity 1
	closing chan struct{}
	once    sync.Once
}

func newQueued(conn net.Conn) *queued {
	q := &queued{Conn: conn, wake: make(chan struct{}, 1), closing: make(chan struct{})}
	go q.write()
	return q
}

func (q *queued) Write(b []byte) (int, error) {
	select {
	case <-q.closing:
		return 0, io.ErrClosedPipe
	default:
	}
	q.mu.Lock()
	q.queue = append(q.queue, append([]byte(nil), b...))
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return len(b), nil
}

func (q *queued) write() {
	for {
		q.mu.Lock()
		queue := q.queue
		q.queue = nil
		q.mu.Unlock()
		for _, b := range queue {
			if _, err := q.Conn.Write(b); err != nil {
				return
			}
		}
		if len(queue) > 0 {
			continue
		}
		select {
		case <-q.wake:
		case <-q.closing:
			return
		}
	}
}

func (q *queued) SetWriteDeadline(time.Time) error { return nil }

func (q *queued) SetDeadline(t time.Time) error { return q.SetReadDeadline(t) }

func (q *queued) Close() error {
	q.once.Do(func() { close(q.closing) })
	return q.Conn.Close()
}

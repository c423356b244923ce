package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/bsm/redislock"
	goredis "github.com/go-redis/redis/v8"
	"github.com/go-redsync/redsync/v4"
	redsyncgoredis "github.com/go-redsync/redsync/v4/redis/goredis/v8"
	goredis9 "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"

	"github.com/omniful/go_commons/dmutex"
)

// poll is the interval of all peers that poll and can be told how often.
const poll = time.Millisecond

// peer is a library under test, in one way of using it.
type peer struct {
	name   string
	about  string
	module string
	open   func(setting) (client, error)

	uncounted bool     // it does not speak Redis, so its requests are not counted
	only      []string // scenarios; nil for all
}

// setting is how a peer is to be used. It is the same for all.
type setting struct {
	Addr string
	TTL  time.Duration

	// Patience is how long a peer that can lose a wake-up waits for one before it asks
	// again; 0 is for ever.
	Patience time.Duration

	requests *atomic.Int64 // that were sent
}

// client is what a process has one of: a connection pool, or what contains it.
type client interface {
	// mutex makes what the library's documentation makes for repeated use by one
	// goroutine.
	mutex(key string) mutex
	close()
}

// mutex is one user of a lock. A lock that fails before ctx ends was given up by the
// library, and the caller is free to try again.
type mutex interface {
	lock(ctx context.Context) error
	unlock() error
}

// All but the last are in a default run.
var peers = []peer{
	{
		name: "dmutex", about: "this library",
		module: "github.com/omniful/go_commons/dmutex", open: openDmutex,
	},
	{
		name: "redsync", about: "its defaults: looks every 50 to 250 ms, 32 times",
		module: "github.com/go-redsync/redsync/v4", open: openRedsync(),
	},
	{
		name: "redsync 1 ms", about: "looks every millisecond, without end",
		module: "github.com/go-redsync/redsync/v4",
		open:   openRedsync(redsync.WithRetryDelay(poll), redsync.WithTries(math.MaxInt32)),
	},
	{
		name: "redislock", about: "looks every millisecond, without end",
		module: "github.com/bsm/redislock", open: openRedislock,
	},
	{
		name: "rueidislock", about: "is woken by client-side caching, and asks again after a second without, but for the first scenario; one key, NOLOOP",
		module: "github.com/redis/rueidis", open: openRueidislock,
	},
	{
		name: "floor", about: "SET NX PX every millisecond, and DEL if it is mine: the least that excludes",
		module: "github.com/go-redis/redis/v8", open: openFloor,
	},
	{
		name: "etcd", about: "another kind: concurrency.Mutex on one node of etcd, which does not sync to disk either",
		module: "go.etcd.io/etcd/client/v3", open: openEtcd,
		uncounted: true, only: []string{"uncontended", "processes"},
	},
	{name: "none", about: "excludes nobody; to see that this is found out", open: openNone},
}

func peerNamed(name string) (peer, error) {
	for _, p := range peers {
		if p.name == name {
			return p, nil
		}
	}
	names := make([]string, len(peers))
	for i, p := range peers {
		names[i] = strconv.Quote(p.name)
	}
	return peer{}, fmt.Errorf("no peer is named %q; there are %s", name, strings.Join(names, ", "))
}

// pool is the client that dmutex, redsync and the floor use.
type pool struct {
	*goredis.Client
	setting
}

func openPool(s setting) pool {
	return pool{goredis.NewClient(&goredis.Options{
		Addr: s.Addr,
		Dialer: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return dial(ctx, addr, s.requests)
		},
	}), s}
}

// close has go-redis say nothing of it: it logs that a subscription, which dmutex keeps
// for two seconds after the last wait, ended with the client.
func (p pool) close() {
	goredis.SetLogger(silence{})
	_ = p.Close()
}

type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

type dmutexClient struct{ pool }

type dmutexMutex struct{ *dmutex.Mutex }

func openDmutex(s setting) (client, error) { return dmutexClient{openPool(s)}, nil }

func (c dmutexClient) mutex(key string) mutex {
	return dmutexMutex{dmutex.New(key, c.TTL, c.Client)}
}

func (m dmutexMutex) lock(ctx context.Context) error { return m.Lock(ctx) }
func (m dmutexMutex) unlock() error                  { return m.Unlock(context.Background()) }

type redsyncClient struct {
	pool
	redsync *redsync.Redsync
	opts    []redsync.Option
}

type redsyncMutex struct{ *redsync.Mutex }

func openRedsync(opts ...redsync.Option) func(setting) (client, error) {
	return func(s setting) (client, error) {
		p := openPool(s)
		return redsyncClient{p, redsync.New(redsyncgoredis.NewPool(p.Client)), opts}, nil
	}
}

func (c redsyncClient) mutex(key string) mutex {
	opts := append([]redsync.Option{redsync.WithExpiry(c.TTL)}, c.opts...)
	return redsyncMutex{c.redsync.NewMutex(key, opts...)}
}

func (m redsyncMutex) lock(ctx context.Context) error { return m.LockContext(ctx) }

func (m redsyncMutex) unlock() error {
	released, err := m.UnlockContext(context.Background())
	if err == nil && !released {
		err = errNotHeld
	}
	return err
}

type redislockClient struct {
	setting
	pool   *goredis9.Client
	locker *redislock.Client
}

type redislockMutex struct {
	client *redislockClient
	key    string
	held   *redislock.Lock
}

func openRedislock(s setting) (client, error) {
	p := goredis9.NewClient(&goredis9.Options{
		Addr: s.Addr,
		Dialer: func(ctx context.Context, _, addr string) (net.Conn, error) {
			return dial(ctx, addr, s.requests)
		},
	})
	return &redislockClient{s, p, redislock.New(p)}, nil
}

func (c *redislockClient) mutex(key string) mutex { return &redislockMutex{client: c, key: key} }
func (c *redislockClient) close()                 { _ = c.pool.Close() }

func (m *redislockMutex) lock(ctx context.Context) (err error) {
	m.held, err = m.client.locker.Obtain(ctx, m.key, m.client.TTL,
		&redislock.Options{RetryStrategy: redislock.LinearBackoff(poll)})
	return err
}

func (m *redislockMutex) unlock() error { return m.held.Release(context.Background()) }

type rueidislockClient struct {
	setting
	locker rueidislock.Locker
}

type rueidislockMutex struct {
	client  *rueidislockClient
	key     string
	release context.CancelFunc
}

func openRueidislock(s setting) (client, error) {
	locker, err := rueidislock.NewLocker(rueidislock.LockerOption{
		KeyValidity:    s.TTL,
		KeyMajority:    1,
		NoLoopTracking: true,
		ClientOption: rueidis.ClientOption{
			InitAddress: []string{s.Addr},
			DialCtxFn: func(ctx context.Context, addr string, _ *net.Dialer, _ *tls.Config) (net.Conn, error) {
				return dial(ctx, addr, s.requests)
			},
		},
	})
	if err != nil {
		return nil, err
	}
	return &rueidislockClient{s, locker}, nil
}

func (c *rueidislockClient) mutex(key string) mutex { return &rueidislockMutex{client: c, key: key} }
func (c *rueidislockClient) close()                 { c.locker.Close() }

var (
	errNotHeld  = errors.New("not held")
	errNotWoken = errors.New("not woken for too long")
)

func (m *rueidislockMutex) lock(ctx context.Context) (err error) {
	if m.client.Patience == 0 {
		_, m.release, err = m.client.locker.WithContext(ctx, m.key)
		return err
	}
	// Not a deadline: that would bound the hold, too, and let it end under the holder.
	wait, cancel := context.WithCancel(ctx)
	timer := time.AfterFunc(m.client.Patience, cancel)
	_, release, err := m.client.locker.WithContext(wait, m.key)
	switch inTime := timer.Stop(); {
	case err == nil && inTime:
		m.release = func() { release(); cancel() }
		return nil
	case err == nil:
		release() // its hold has ended, or is about to
		err = errNotWoken
	case !inTime:
		err = errNotWoken
	}
	cancel()
	return err
}

func (m *rueidislockMutex) unlock() error {
	m.release()
	return nil
}

type floorClient struct{ pool }

type floorMutex struct {
	pool
	key   string
	value string
	n     int
}

var deleteIfMine = goredis.NewScript(`
	if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) end
	return 0
`)

func openFloor(s setting) (client, error) { return floorClient{openPool(s)}, nil }

func (c floorClient) mutex(key string) mutex {
	return &floorMutex{pool: c.pool, key: key, value: strconv.FormatUint(rand.Uint64(), 36) + "."}
}

func (m *floorMutex) lock(ctx context.Context) error {
	m.n++
	for {
		taken, err := m.SetNX(ctx, m.key, m.value+strconv.Itoa(m.n), m.TTL).Result()
		if err != nil || taken {
			return err
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *floorMutex) unlock() error {
	deleted, err := deleteIfMine.Run(context.Background(), m.Client, []string{m.key}, m.value+strconv.Itoa(m.n)).Int()
	if err == nil && deleted == 0 {
		err = errNotHeld
	}
	return err
}

type nothing struct{}

func openNone(setting) (client, error) { return nothing{}, nil }

func (nothing) mutex(string) mutex             { return nothing{} }
func (nothing) lock(ctx context.Context) error { return ctx.Err() }
func (nothing) unlock() error                  { return nil }
func (nothing) close()                         {}

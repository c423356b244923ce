package dmutex_test

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// batches is a hook that counts a client's round trips, and the requests in them.
type batches struct{ trips, requests atomic.Int64 }

func (b *batches) BeforeProcess(ctx context.Context, _ redis.Cmder) (context.Context, error) {
	b.trips.Add(1)
	b.requests.Add(1)
	return ctx, nil
}

func (b *batches) AfterProcess(context.Context, redis.Cmder) error { return nil }

func (b *batches) BeforeProcessPipeline(ctx context.Context, cmds []redis.Cmder) (context.Context, error) {
	b.trips.Add(1)
	b.requests.Add(int64(len(cmds)))
	return ctx, nil
}

func (b *batches) AfterProcessPipeline(context.Context, []redis.Cmder) error { return nil }

// What many goroutines ask of a client at once goes together, and each gets its own
// answer; the server need not even know the scripts.
func TestManyRequestsShareRoundTrips(t *testing.T) {
	const many = 64
	s := rig.Redis(t)
	p := rig.NewProxy(t, s.Addr)
	client := s.Client(func(o *redis.Options) { o.Addr = p.Addr })
	trips := new(batches)
	client.AddHook(trips)
	p.Delay(50 * time.Millisecond) // they all have asked before the first is answered
	ctx := timeout(t)
	for range 2 {
		require.NoError(t, s.Client().ScriptFlush(ctx).Err())
		free := make([]*dmutex.Mutex, many)
		taken := locked(t, "taken", long, s.Client())
		trips.trips.Store(0)
		trips.requests.Store(0)
		var all sync.WaitGroup
		for i := range free {
			free[i] = dmutex.New(fmt.Sprint("k", i), long, client)
			all.Go(func() {
				acquired, err := free[i].TryLock(ctx)
				assert.NoError(t, err)
				assert.True(t, acquired)
				acquired, err = dmutex.New("taken", long, client).TryLock(ctx)
				assert.NoError(t, err)
				assert.False(t, acquired)
				assert.NoError(t, free[i].Unlock(ctx))
			})
		}
		all.Wait()
		require.GreaterOrEqual(t, trips.requests.Load(), int64(3*many))
		require.Less(t, trips.trips.Load(), int64(many))
		require.NoError(t, taken.Unlock(ctx))
	}
	require.Zero(t, dmutex.UnderWay())
}

// Whoever waits for a round trip to return does not do so after the end of its ctx, and
// nothing comes of its request.
func TestWaitForARoundTripEndsWithCtx(t *testing.T) {
	s := rig.Redis(t)
	p := rig.NewProxy(t, s.Addr)
	client := s.Client(func(o *redis.Options) { o.Addr, o.ReadTimeout = p.Addr, time.Second })
	require.NoError(t, client.Ping(timeout(t)).Err())
	p.BlackHole(true)
	var all sync.WaitGroup
	for i := range 32 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			start := time.Now()
			_, err := dmutex.New(fmt.Sprint("k", i), long, client).TryLock(ctx)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.Less(t, time.Since(start), soon)
		})
	}
	all.Wait()
	p.BlackHole(false)
	p.CutAll()
	m := dmutex.New("k1", long, client)
	require.NoError(t, m.Lock(timeout(t)))
	require.NoError(t, m.Unlock(timeout(t)))
	rig.Eventually(t, "nothing is under way", func() bool { return dmutex.UnderWay() == 0 })
	requireClean(t, s.Client())
}

// Connections that swallow requests hold up those who use them, and nobody else.
func TestDeadConnectionsHoldUpNobodyElse(t *testing.T) {
	s := rig.Redis(t)
	p := rig.NewProxy(t, s.Addr)
	client := s.Client(func(o *redis.Options) { o.Addr, o.ReadTimeout = p.Addr, 2*soon })
	require.NoError(t, locked(t, "warm", long, client).Unlock(timeout(t)))
	ctx, cancel := context.WithCancel(context.Background())
	var stuck sync.WaitGroup
	for i := range 6 { // more than may be under way
		swallowed := p.LoseReply(script, rig.Swallow)
		stuck.Go(func() {
			_, err := dmutex.New(fmt.Sprint("stuck", i), long, client).TryLock(ctx)
			assert.Error(t, err)
		})
		receive(t, swallowed)
	}
	for i := range 10 {
		start := time.Now()
		m := dmutex.New(fmt.Sprint("k", i), long, client)
		require.NoError(t, m.Lock(timeout(t)))
		require.NoError(t, m.Unlock(timeout(t)))
		require.Less(t, time.Since(start), soon)
	}
	cancel()
	stuck.Wait()
	rig.Eventually(t, "nothing is under way", func() bool { return dmutex.UnderWay() == 0 })
}

// go-redis takes no notice of ctx in some dials, and makes one where a connection that it
// had is dead.
func TestCtxEndsWhileAConnectionIsMade(t *testing.T) {
	s := rig.Redis(t)
	var slow atomic.Bool
	client := s.Client(func(o *redis.Options) {
		o.Dialer = func(context.Context, string, string) (net.Conn, error) {
			if slow.Load() {
				time.Sleep(2 * soon / 5)
			}
			return net.Dial("tcp", s.Addr)
		}
	})
	require.NoError(t, client.Ping(timeout(t)).Err())
	slow.Store(true)
	require.NoError(t, s.Client().ClientKillByFilter(timeout(t), "type", "normal", "skipme", "yes").Err())
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := dmutex.New("k", long, client).TryLock(ctx)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Less(t, time.Since(start), soon/5, "less than the dial takes")
	rig.Eventually(t, "nothing is under way", func() bool { return dmutex.UnderWay() == 0 })
}

// panics is a hook that panics as often as is said.
type panics struct {
	batches
	left atomic.Int64
}

func (p *panics) BeforeProcess(ctx context.Context, _ redis.Cmder) (context.Context, error) {
	if p.left.Add(-1) >= 0 {
		panic("a bug in a hook")
	}
	return ctx, nil
}

// A hook of the client that panics does not keep its request under way.
func TestHookThatPanics(t *testing.T) {
	client := rig.Redis(t).Client()
	hook := new(panics)
	hook.left.Store(20)
	client.AddHook(hook)
	m := dmutex.New("k", long, client)
	for hook.left.Load() > 0 {
		require.Panics(t, func() { _, _ = m.TryLock(context.Background()) })
	}
	require.NoError(t, m.Lock(timeout(t)))
	require.NoError(t, m.Unlock(timeout(t)))
	require.Zero(t, dmutex.UnderWay())
}

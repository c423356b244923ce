package dmutex_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v8"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// A lock and its release that nobody waits for, beside plain redsync's and the two
// requests that both come down to.
func BenchmarkUncontended(b *testing.B) {
	s := rig.Redis(b)
	ctx := context.Background()
	b.Run("dmutex", func(b *testing.B) {
		m := dmutex.New("k", long, s.Client())
		b.ReportAllocs()
		for b.Loop() {
			require.NoError(b, m.Lock(ctx))
			require.NoError(b, m.Unlock(ctx))
		}
	})
	b.Run("dmutex made anew, with a ctx that can end", func(b *testing.B) {
		client := s.Client()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		b.ReportAllocs()
		for b.Loop() {
			m := dmutex.New("k", long, client)
			require.NoError(b, m.Lock(ctx))
			require.NoError(b, m.Unlock(ctx))
		}
	})
	b.Run("redsync", func(b *testing.B) {
		m := redsync.New(goredis.NewPool(s.Client())).NewMutex("k")
		b.ReportAllocs()
		for b.Loop() {
			require.NoError(b, m.LockContext(ctx))
			_, err := m.UnlockContext(ctx)
			require.NoError(b, err)
		}
	})
	b.Run("SET NX and DEL", func(b *testing.B) {
		client := s.Client()
		b.ReportAllocs()
		for b.Loop() {
			require.True(b, client.SetNX(ctx, "k", "v", long).Val())
			require.EqualValues(b, 1, client.Del(ctx, "k").Val())
		}
	})
}

// One turn of a lock that so many want, each on a client of its own.
func BenchmarkHandOver(b *testing.B) {
	for _, waiters := range []int{2, 8, 32, 128} {
		b.Run(fmt.Sprint(waiters), func(b *testing.B) {
			s := rig.Redis(b)
			ctx := context.Background()
			var (
				wg   sync.WaitGroup
				left = b.N // guarded by the lock
			)
			holder := locked(b, "k", long, s.Client())
			var requests []*counter
			for range waiters {
				client := s.Client()
				requests = append(requests, count(client))
				m := dmutex.New("k", long, client)
				wg.Go(func() {
					for more := true; more; {
						if m.Lock(ctx) != nil {
							return
						}
						left--
						more = left > 0
						_ = m.Unlock(ctx)
					}
				})
			}
			awaitQueue(b, s.Client(), "k", int64(waiters))
			b.ResetTimer()
			require.NoError(b, holder.Unlock(ctx))
			wg.Wait()
			b.StopTimer()
			sum := int64(0)
			for _, c := range requests {
				sum += c.n.Load()
			}
			b.ReportMetric(float64(sum)/float64(b.N), "requests/op")
		})
	}
}

// One turn of a lock that sixteen goroutines of one client want.
func BenchmarkOneProcess(b *testing.B) {
	client := rig.Redis(b).Client()
	requests := count(client)
	ctx := context.Background()
	var (
		wg   sync.WaitGroup
		left = b.N // guarded by the lock
	)
	b.ReportAllocs()
	b.ResetTimer()
	for range 16 {
		m := dmutex.New("k", long, client)
		wg.Go(func() {
			for more := true; more; {
				if m.Lock(ctx) != nil {
					return
				}
				left--
				more = left > 0
				_ = m.Unlock(ctx)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(requests.n.Load())/float64(b.N), "requests/op")
}

// Sixty-four goroutines of one client, each with a lock of its own.
func BenchmarkManyKeys(b *testing.B) {
	client := rig.Redis(b).Client()
	ctx := context.Background()
	var (
		wg   sync.WaitGroup
		left atomic.Int64
	)
	left.Store(int64(b.N))
	b.ReportAllocs()
	b.ResetTimer()
	for i := range 64 {
		m := dmutex.New(fmt.Sprint("k", i), long, client)
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				if m.Lock(ctx) != nil || m.Unlock(ctx) != nil {
					b.Error("a lock that nobody wants")
					return
				}
			}
		})
	}
	wg.Wait()
}

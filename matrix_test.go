//go:build unix

package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// A fault comes and goes while one holds the lock, one waits for it and one watches.
type fault struct {
	server []string // arguments
	begin  func(f *faulty)
	end    func(f *faulty)

	during string // what calls say while it lasts, see call
	lost   bool   // the hold does not survive it
	ends   bool   // the waits end, as the server refuses what they ask
}

// faulty is what a fault happens to.
type faulty struct {
	t      *testing.T
	server *rig.Server
	proxy  *rig.Proxy
	admin  *redis.Client // not through the proxy
	behind *redis.Client // through the proxy, like all calls that are tested
}

func (f *faulty) do(args ...any) {
	f.t.Helper()
	require.NoError(f.t, f.admin.Do(context.Background(), args...).Err(), args)
}

// config changes the configuration for as long as the fault lasts.
func config(during, name, bad, good string) fault {
	return fault{
		during: during,
		begin:  func(f *faulty) { f.do("config", "set", name, bad); f.proxy.CutAll() },
		end:    func(f *faulty) { f.do("config", "set", name, good) },
	}
}

// denies has the server deny our user something.
func denies(during string, rules ...any) fault {
	acl := func(f *faulty, rules ...any) {
		f.do(append([]any{"acl", "setuser", "behind"}, rules...)...)
	}
	return fault{
		during: during,
		begin:  func(f *faulty) { acl(f, rules...); f.proxy.CutAll() },
		end:    func(f *faulty) { acl(f, "on", "+@all", "allchannels", "allkeys") },
		ends:   during != fine,
	}
}

const fine = "taken, got, ok"

var aof = []string{"--appendonly", "yes", "--appendfsync", "always"}

var faults = map[string]fault{
	"killed, started again without its data": {
		begin:  func(f *faulty) { f.server.Kill() },
		during: "network, network, network",
		end:    func(f *faulty) { f.server.Start() },
		lost:   true,
	},
	"killed, started again with its data": {
		server: aof,
		begin:  func(f *faulty) { f.server.Kill() },
		during: "network, network, network",
		end:    func(f *faulty) { f.server.Start() },
	},
	"loading": {
		server: append([]string{"--key-load-delay", "10", "--auto-aof-rewrite-percentage", "0"}, aof...),
		begin: func(f *faulty) {
			pipe := f.admin.Pipeline()
			for i := range 40000 { // it answers after each 1024
				pipe.Set(context.Background(), fmt.Sprint("filler-", i), "", long)
			}
			_, err := pipe.Exec(context.Background())
			require.NoError(f.t, err)
			f.server.Kill()
			f.server.Start()
			require.ErrorContains(f.t, f.admin.Get(context.Background(), "k").Err(), "LOADING")
		},
		during: "LOADING, LOADING, LOADING",
		end: func(f *faulty) {
			rig.Eventually(f.t, "it has loaded", func() bool { return f.admin.Ping(context.Background()).Err() == nil })
		},
	},
	"stopped": {
		begin:  func(f *faulty) { f.server.Signal(syscall.SIGSTOP) },
		during: "ctx, ctx, ctx",
		end:    func(f *faulty) { f.server.Signal(syscall.SIGCONT) },
	},
	"black hole": {
		begin:  func(f *faulty) { f.proxy.BlackHole(true) },
		during: "ctx, ctx, ctx",
		end:    func(f *faulty) { f.proxy.BlackHole(false); f.proxy.CutAll() },
	},
	"black hole, of the commands only": {
		begin:  func(f *faulty) { f.proxy.BlackHoleOn(script) },
		during: "ctx, ctx, ctx",
		end:    func(f *faulty) { f.proxy.BlackHoleOn(""); f.proxy.CutAll() },
	},
	"no connections": {
		begin:  func(f *faulty) { f.proxy.Refuse(true); f.proxy.CutAll() },
		during: "network, network, network",
		end:    func(f *faulty) { f.proxy.Refuse(false) },
	},
	"all connections killed": {
		begin:  func(f *faulty) { f.do("client", "kill", "type", "normal"); f.do("client", "kill", "type", "pubsub") },
		during: fine,
		end:    func(f *faulty) {},
	},
	"paused": {
		begin:  func(f *faulty) { f.do("client", "pause", 8000, "all") },
		during: "ctx, ctx, ctx",
		end: func(f *faulty) {
			rig.Eventually(f.t, "it goes on", func() bool { return f.admin.Ping(context.Background()).Err() == nil })
		},
	},
	"too many clients": config("network, network, network", "maxclients", "1", "1000"),
	"out of memory":    config("taken, OOM, ok", "maxmemory", "1", "0"),
	"no replicas":      config("NOREPLICAS, NOREPLICAS, NOREPLICAS", "min-replicas-to-write", "1", "0"),
	"a replica": {
		begin:  func(f *faulty) { f.do("replicaof", "127.0.0.1", "1") },
		during: "READONLY, READONLY, READONLY",
		end:    func(f *faulty) { f.do("replicaof", "no", "one") },
	},
	"busy": {
		server: []string{"--busy-reply-threshold", "50"},
		begin: func(f *faulty) {
			patient := f.server.Client(func(o *redis.Options) { o.ReadTimeout = hang })
			go patient.Eval(context.Background(), "while true do end", nil)
			rig.Eventually(f.t, "it is busy", func() bool {
				err := f.admin.Ping(context.Background()).Err()
				return err != nil && strings.HasPrefix(err.Error(), "BUSY ")
			})
		},
		during: "BUSY, BUSY, BUSY",
		end:    func(f *faulty) { f.do("script", "kill") },
	},
	"scripts flushed": {
		begin:  func(f *faulty) { f.do("script", "flush") },
		during: fine,
		end:    func(f *faulty) {},
	},
	"data flushed": {
		begin:  func(f *faulty) { f.do("flushall") },
		during: "got, got, ok",
		end:    func(f *faulty) {},
		lost:   true,
	},
	"no rights to scripts":   denies("NOPERM, NOPERM, NOPERM", "-evalsha", "-eval"),
	"no rights to read":      denies("ERR, ERR, ERR", "-get"),
	"no rights to ttls":      denies("ERR, got, ERR", "-pttl"),
	"no rights to set":       denies("taken, ERR, ok", "-set"),
	"no rights to queues":    denies("ERR, ERR, ERR", "-zadd", "-zrem", "-zrange"),
	"no rights to the key":   denies("NOPERM, NOPERM, NOPERM", "resetkeys"),
	"no rights to publish":   denies(fine, "-publish"),
	"no rights to subscribe": denies(fine, "-subscribe"),
	"no rights to channels":  denies(fine, "resetchannels"),
	"user switched off":      denies("WRONGPASS, WRONGPASS, WRONGPASS", "off"),
}

func TestFaults(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := rig.Redis(t, append([]string{"--user", "behind", "on", ">pw", "allkeys", "allchannels", "+@all"}, fault.server...)...)
			ctx := timeout(t)
			f := &faulty{t: t, server: s, proxy: rig.NewProxy(t, s.Addr), admin: s.Client()}
			f.behind = s.Client(func(o *redis.Options) {
				o.Addr, o.Username, o.Password, o.ReadTimeout = f.proxy.Addr, "behind", "pw", 500*time.Millisecond
			})

			holder, other := locked(t, "k", long, f.behind), locked(t, "other", long, f.behind)
			next := dmutex.New("k", long, f.behind)
			gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, f.behind))
			awaitQueue(t, f.admin, "k", 1)
			awaitSubscribed(t, f.admin, "dmutex-k")

			fault.begin(f)
			for range 2 {
				require.Equal(t, fault.during, f.call(ctx))
				time.Sleep(200 * time.Millisecond)
			}
			fault.end(f)

			over := time.Now()
			rig.Eventually(t, "Unlock is answered", func() bool {
				err := holder.Unlock(ctx)
				if fault.lost {
					return errors.Is(err, dmutex.ErrLockLost)
				}
				require.NotErrorIs(t, err, dmutex.ErrLockLost)
				return err == nil
			})
			err := receive(t, gotten)
			if fault.ends {
				require.Contains(t, []string{"ok", "ERR", "NOPERM", "WRONGPASS"}, classOf(err))
			} else {
				require.NoError(t, err)
			}
			if v := receive(t, told); v.err == nil || !fault.ends {
				require.Equal(t, released(), v)
			}
			require.Less(t, time.Since(over), soon)
			if err == nil {
				require.NoError(t, next.Unlock(ctx))
			}
			f.requireNothingLeft(ctx, other)
		})
	}
}

// call tries to get a lock that is held and one that is free, asks for how long the
// former is held, and returns what came of that.
func (f *faulty) call(ctx context.Context) string {
	try := func(key string) string {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		m := dmutex.New(key, long, f.behind)
		acquired, err := m.TryLock(ctx)
		switch {
		case acquired:
			require.NoError(f.t, m.Unlock(ctx))
			return "got"
		case err == nil:
			return "taken"
		default:
			return classOf(err)
		}
	}
	held, free := try("other"), try("free")
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := dmutex.New("other", long, f.behind).LockedUntil(ctx)
	return held + ", " + free + ", " + classOf(err)
}

// classOf names what a caller can tell errors apart by.
func classOf(err error) string {
	var answer redis.Error
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, context.DeadlineExceeded):
		return "ctx"
	case errors.As(err, &answer) && !strings.Contains(err.Error(), "max number of clients"):
		code, _, _ := strings.Cut(answer.Error(), " ")
		return code
	default:
		return "network"
	}
}

func (f *faulty) requireNothingLeft(ctx context.Context, other *dmutex.Mutex) {
	f.t.Helper()
	_ = other.Unlock(ctx)
	rig.Eventually(f.t, "no lock is left", func() bool {
		return f.admin.Exists(ctx, "k", "other", "free").Val() == 0
	})
	for _, key := range f.admin.Keys(ctx, "*").Val() {
		require.NotEqual(f.t, time.Duration(-1), f.admin.PTTL(ctx, key).Val(), "%q never expires", key)
	}
	rig.Eventually(f.t, "no connection is left beside the pool", func() bool {
		return strings.Count(f.admin.Do(ctx, "client", "list").String(), "user=behind") <= int(f.behind.PoolStats().TotalConns)
	})
}

// What ends a hold needs no memory.
func TestUnlockOutOfMemory(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	client := s.Client()
	holder, next := locked(t, "k", long, client), dmutex.New("k", long, client)
	gotten, told := lock(ctx, next), watch(ctx, dmutex.New("k", long, client))
	awaitQueue(t, client, "k", 1)
	awaitSubscribed(t, client, "dmutex-k")
	require.NoError(t, client.ConfigSet(ctx, "maxmemory", "1").Err())
	require.NoError(t, holder.Unlock(ctx))
	require.Equal(t, released(), receive(t, told))
	require.NoError(t, receive(t, gotten))
	require.NoError(t, next.Unlock(ctx))
	require.ErrorIs(t, next.Unlock(ctx), dmutex.ErrNotHeld)
	require.Zero(t, client.Exists(ctx, "k").Val())
}

// A pool that others use up delays calls, but what is asked for is done at last, or
// it is said that it was not.
func TestPoolIsUsedUp(t *testing.T) {
	s := rig.Redis(t)
	ctx := timeout(t)
	admin := s.Client()
	t.Run("by a hundred waiters", func(t *testing.T) {
		client := s.Client(func(o *redis.Options) { o.PoolSize = 1 })
		holder := locked(t, "k", long, client)
		var wg sync.WaitGroup
		for range 100 {
			m := dmutex.New("k", long, client)
			wg.Go(func() {
				if assert.NoError(t, m.Lock(ctx)) {
					assert.NoError(t, m.Unlock(ctx))
				}
			})
		}
		awaitQueue(t, admin, "k", 100)
		require.NoError(t, holder.Unlock(ctx))
		wg.Wait()
	})
	t.Run("by other work", func(t *testing.T) {
		client := s.Client(func(o *redis.Options) { o.PoolSize, o.PoolTimeout = 1, 100*time.Millisecond })
		m := locked(t, "k", long, client)
		blocked := make(chan struct{})
		go func() { defer close(blocked); client.BLPop(ctx, 0, "list") }()
		rig.Eventually(t, "the pool is used up", func() bool {
			return strings.Contains(admin.Do(ctx, "client", "list").String(), "cmd=blpop")
		})
		var failed *dmutex.ErrFailedToUnlock
		require.ErrorAs(t, m.Unlock(ctx), &failed)
		require.NotErrorIs(t, failed, dmutex.ErrLockLost)
		require.NoError(t, admin.RPush(ctx, "list", "").Err())
		<-blocked
		rig.Eventually(t, "it is released in the background", func() bool { return admin.Exists(ctx, "k").Val() == 0 })
		require.NoError(t, m.Unlock(ctx))
	})
}

// A black hole that never ends: the ctx does.
func TestBlackHoleNeverEnds(t *testing.T) {
	throughProxy(t, func(t *testing.T, p *rig.Proxy, behind, beside *redis.Client) {
		holder := locked(t, "k", long, beside)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		gotten, told := lock(ctx, dmutex.New("k", long, behind)), watch(ctx, dmutex.New("k", long, behind))
		awaitQueue(t, beside, "k", 1)
		p.BlackHole(true)
		require.ErrorIs(t, receive(t, gotten), context.DeadlineExceeded)
		require.ErrorIs(t, receive(t, told).err, context.DeadlineExceeded)
		deadline, _ := ctx.Deadline()
		require.Less(t, time.Since(deadline), time.Second)
		require.NoError(t, holder.Unlock(timeout(t)))
	})
}

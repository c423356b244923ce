package dmutex_test

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// long is a ttl that never runs out in a test, and hang a bound on what must not
// hang; neither is a time that anything is expected to take.
const (
	long = time.Minute
	hang = 30 * time.Second
)

func TestMain(m *testing.M) {
	if work := os.Getenv(workerEnv); work != "" {
		worker(work)
	}
	if role := os.Getenv(chaosEnv); role != "" {
		playChaos(role)
	}
	redis.SetLogger(silent{}) // it speaks of every connection that a test cuts
	code := m.Run()
	if left := goroutinesLeft(); left != "" && code == 0 {
		fmt.Fprintf(os.Stderr, "goroutines left behind:\n\n%s\n", left)
		code = 1
	}
	os.Exit(code)
}

// goroutinesOf returns the stacks of the goroutines that are in the function given.
func goroutinesOf(function string) (found []string) {
	buf := make([]byte, 8<<20)
	for _, stack := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, function) {
			found = append(found, stack)
		}
	}
	return found
}

// goroutinesLeft returns the stacks of the library's own goroutines that are there
// after all tests, when they have had the time that they may take to end.
func goroutinesLeft() string {
	const ours = "go_commons/dmutex."
	for end := time.Now().Add(hang); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if len(goroutinesOf(ours)) == 0 {
			return ""
		}
	}
	return strings.Join(goroutinesOf(ours), "\n\n")
}

// timeout is a context that bounds a hang.
func timeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	t.Cleanup(cancel)
	return ctx
}

// inBubble runs body on a miniredis inside a synctest bubble: its time is exact,
// and a goroutine that stays behind when the client is closed fails it.
func inBubble(t *testing.T, body func(t *testing.T, b *rig.Bubble, client *redis.Client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := rig.NewBubble(t)
		defer b.Mini.Close()
		client := b.Client()
		defer func() {
			_ = client.Close()
			time.Sleep(time.Minute) // more than anything bounded may take to end
		}()
		body(t, b, client)
	})
}

// locked returns a mutex that holds key.
func locked(t testing.TB, key string, ttl time.Duration, client redis.UniversalClient) *dmutex.Mutex {
	t.Helper()
	m := dmutex.New(key, ttl, client)
	acquired, err := m.TryLock(timeout(t))
	require.NoError(t, err)
	require.True(t, acquired)
	return m
}

// verdict is what a WaitUntilUnlocked said.
type verdict struct {
	expired bool
	err     error
}

func released() verdict { return verdict{} }
func expired() verdict  { return verdict{expired: true} }

// watch starts a WaitUntilUnlocked.
func watch(ctx context.Context, m *dmutex.Mutex) <-chan verdict {
	told := make(chan verdict, 1)
	go func() {
		expired, err := m.WaitUntilUnlocked(ctx)
		told <- verdict{expired, err}
	}()
	return told
}

// lock starts a Lock.
func lock(ctx context.Context, m *dmutex.Mutex) <-chan error {
	done := make(chan error, 1)
	go func() { done <- m.Lock(ctx) }()
	return done
}

// receive returns what comes out of a channel, and fails the test if nothing does.
func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(hang):
		require.FailNow(t, "hangs")
		panic("not reached")
	}
}

// queueOf returns the name of a key's queue; the tests of names pin it.
func queueOf(key string) string {
	if strings.Contains(key, "}") {
		return key + ":dmutex:queue"
	}
	return key + "{" + key + "}:dmutex:queue"
}

// awaitQueue waits until n tickets are in the queue of key.
func awaitQueue(t testing.TB, client *redis.Client, key string, n int64) {
	t.Helper()
	rig.Eventually(t, fmt.Sprintf("%d in the queue", n), func() bool {
		return client.ZCard(context.Background(), queueOf(key)).Val() == n
	})
}

// awaitSubscribed waits until somebody is subscribed to a channel.
func awaitSubscribed(t testing.TB, client *redis.Client, channel string) {
	t.Helper()
	rig.Eventually(t, "subscription to "+channel, func() bool {
		return client.PubSubNumSub(context.Background(), channel).Val()[channel] > 0
	})
}

// requireClean checks that no key is left in Redis but for tombstones and the latest
// fencing tokens.
func requireClean(t testing.TB, client *redis.Client) {
	t.Helper()
	rig.Eventually(t, "nothing left in Redis", func() bool { return len(leftovers(client)) == 0 })
	for _, key := range client.Keys(context.Background(), "*").Val() {
		require.NotEqual(t, time.Duration(-1), client.PTTL(context.Background(), key).Val(), "%q never expires", key)
	}
}

// awaitEnded waits until a ticket for key has been ended: it can never hold the
// lock from then on.
func awaitEnded(t testing.TB, client *redis.Client, key string) {
	t.Helper()
	rig.Eventually(t, "the ticket is ended", func() bool {
		return len(client.Keys(context.Background(), key+"{*:dmutex:ended:*").Val()) > 0
	})
}

func leftovers(client *redis.Client) (left []string) {
	for _, key := range client.Keys(context.Background(), "*").Val() {
		if !strings.Contains(key, ":dmutex:ended:") && !strings.HasSuffix(key, ":dmutex:fence") {
			left = append(left, key)
		}
	}
	return left
}

// counter is a hook that counts a client's requests. It has to be put in before
// the client is used by others.
type counter struct{ n atomic.Int64 }

func count(client *redis.Client) *counter {
	c := new(counter)
	client.AddHook(c)
	return c
}

// since returns how many requests there were after a reading of n.
func (c *counter) since(n int64) int64 { return c.n.Load() - n }

func (c *counter) BeforeProcess(ctx context.Context, _ redis.Cmder) (context.Context, error) {
	c.n.Add(1)
	return ctx, nil
}

func (c *counter) AfterProcess(context.Context, redis.Cmder) error { return nil }

func (c *counter) BeforeProcessPipeline(ctx context.Context, _ []redis.Cmder) (context.Context, error) {
	return ctx, nil
}

func (c *counter) AfterProcessPipeline(context.Context, []redis.Cmder) error { return nil }

type silent struct{}

func (silent) Printf(context.Context, string, ...any) {}

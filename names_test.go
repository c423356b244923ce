package dmutex

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v8"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex/internal/rig"
)

func TestNames(t *testing.T) {
	for key, queue := range map[string]string{
		"k":      "k{k}:dmutex:queue",
		"a b":    "a b{a b}:dmutex:queue",
		"{a}b":   "{a}b:dmutex:queue",
		"a{b}":   "a{b}:dmutex:queue",
		"{{a}":   "{{a}:dmutex:queue",
		"a{":     "{a{}:dmutex:queue",
		"a}":     "a}:dmutex:queue",   // no name hashes like it
		"{}a":    "{}a:dmutex:queue",  // the same
		"}a{b":   "}a{b:dmutex:queue", // the same
		"{}{a}b": "{}{a}b:dmutex:queue",
	} {
		names := namesOf(key)
		require.Equal(t, queue, names.queue)
		require.Equal(t, strings.TrimSuffix(queue, "queue")+"ended:ticket", names.tombstone("ticket"))
		require.Equal(t, "dmutex-"+key, names.channel)
	}
}

// The server says where keys belong.
func TestNamesAreInTheSlotOfTheKey(t *testing.T) {
	client := rig.Redis(t, "--cluster-enabled", "yes").Client()
	slot := func(key string) int64 {
		n, err := client.ClusterKeySlot(context.Background(), key).Result()
		require.NoError(t, err)
		return n
	}
	const alphabet = "ab{}"
	sameSlot := 0
	for range 5000 {
		key := make([]byte, 1+rand.N(8))
		for i := range key {
			key[i] = alphabet[rand.N(len(alphabet))]
		}
		names := namesOf(string(key))
		same := slot(names.lock) == slot(names.queue) && slot(names.lock) == slot(names.fence) && slot(names.lock) == slot(names.tombstone(newTicket(newInbox(), "")))
		require.Equal(t, inOneSlot(string(key)), same, "%q", key)
		if same {
			sameSlot++
			if !strings.Contains(string(key), "{") {
				require.True(t, strings.HasPrefix(names.queue, names.lock), "an ACL pattern for %q must cover %q", key, names.queue)
			}
		}
	}
	require.Greater(t, sameSlot, 1000)
}

func TestIsTicket(t *testing.T) {
	require.True(t, isTicket(newTicket(newInbox(), "")))
	require.True(t, isTicket(deaf+newTicket(newInbox(), "")))
	require.True(t, isTicket(newTicket(newInbox(), "host 7.b\x00")))
	for _, value := range []string{"", ".", "a.", ".a", "a.x.c", "x.a", "CHAN_CLOSE", "q83vEjRWeJASNFZ4kBI0Vg=="} {
		require.False(t, isTicket(value), value)
	}
}

// redsync does not name its scripts; they are told apart by their arguments.
func TestDeleteIsToldFromTouch(t *testing.T) {
	server := miniredis.RunT(t)
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	defer client.Close()
	ctx := context.Background()
	plain := redsync.New(goredis.NewPool(client)).NewMutex("k", redsync.WithExpiry(time.Minute))

	n, err := nodeOf(client, "k")
	require.NoError(t, err)
	c := newClaim(n, namesOf("k"), time.Minute, newInbox(), signature{})

	seen, err := c.try(ctx)
	require.NoError(t, err)
	require.Equal(t, "held", seen.status)
	require.Error(t, plain.TryLockContext(ctx))

	server.SetTTL("k", time.Second)
	extended, err := c.mutex.ExtendContext(ctx)
	require.NoError(t, err)
	require.True(t, extended)
	require.Equal(t, time.Minute, server.TTL("k"))

	require.NoError(t, c.release(ctx))
	require.False(t, server.Exists("k"))
}

package dmutex_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/go-redis/redis/v8"

	"github.com/omniful/go_commons/dmutex"
)

// connect returns a client of a Redis; here of one that lives in this process.
func connect() (client *redis.Client, closeAll func()) {
	server := miniredis.NewMiniRedis()
	if err := server.Start(); err != nil {
		log.Fatal(err)
	}
	client = redis.NewClient(&redis.Options{Addr: server.Addr()})
	return client, func() { _ = client.Close(); server.Close() }
}

func ExampleMutex_Lock() {
	client, closeAll := connect()
	defer closeAll()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	mutex := dmutex.New("invoice:4711", 30*time.Second, client)
	if err := mutex.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	fmt.Println("only one of us does this")
	if err := mutex.Unlock(ctx); err != nil {
		log.Print(err)
	}
	// Output: only one of us does this
}

func ExampleMutex_TryLock() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	other := dmutex.New("nightly-report", time.Minute, client)
	if err := other.Lock(ctx); err != nil {
		log.Fatal(err)
	}

	mutex := dmutex.New("nightly-report", time.Minute, client)
	acquired, err := mutex.TryLock(ctx)
	switch {
	case err != nil:
		log.Fatal(err)
	case !acquired:
		fmt.Println("somebody is at it already")
	}
	// Output: somebody is at it already
}

func ExampleMutex_Unlock() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	mutex := dmutex.New("invoice:4711", 30*time.Second, client)
	if err := mutex.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	client.Del(ctx, "invoice:4711") // an operator's mistake

	switch err := mutex.Unlock(ctx); {
	case err == nil:
		fmt.Println("released")
	case errors.Is(err, dmutex.ErrLockLost):
		fmt.Println("lost before it was released: somebody else may have worked at the same time")
	case errors.Is(err, dmutex.ErrNotHeld):
		fmt.Println("a bug: it was not locked")
	default:
		fmt.Println("not known; it ends with its ttl:", err)
	}
	// Output: lost before it was released: somebody else may have worked at the same time
}

func ExampleMutex_WaitUntilUnlocked() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	other := dmutex.New("nightly-report", time.Minute, client)
	if err := other.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	go func() {
		time.Sleep(50 * time.Millisecond) // the report is written
		_ = other.Unlock(ctx)
	}()

	mutex := dmutex.New("nightly-report", time.Minute, client)
	acquired, err := mutex.TryLock(ctx)
	if err != nil || acquired {
		log.Fatal(acquired, err)
	}
	expired, err := mutex.WaitUntilUnlocked(ctx)
	switch {
	case err != nil:
		log.Fatal(err)
	case expired:
		fmt.Println("they died; it is on me to do it again")
	default:
		fmt.Println("they have finished; the report is there")
	}
	// Output: they have finished; the report is there
}

func ExampleMutex_LockedUntil() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	mutex := dmutex.New("invoice:4711", 30*time.Second, client)
	if err := mutex.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	left, err := mutex.LockedUntil(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("locked for", left.Round(time.Second), "at the most")
	// Output: locked for 30s at the most
}

func ExampleErrFailedToLock() {
	client, closeAll := connect()
	defer closeAll()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()

	other := dmutex.New("invoice:4711", time.Minute, client)
	if err := other.Lock(ctx); err != nil {
		log.Fatal(err)
	}

	err := dmutex.New("invoice:4711", time.Minute, client).Lock(ctx)
	var failed *dmutex.ErrFailedToLock
	if errors.As(err, &failed) {
		fmt.Println(failed.Key, errors.Is(err, context.DeadlineExceeded))
	}
	// Output: invoice:4711 true
}

func ExampleMutex_Do() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	mutex := dmutex.New("nightly-report", 5*time.Second, client)
	err := mutex.Do(ctx, func(ctx context.Context) error {
		for page := 1; page <= 3; page++ {
			if ctx.Err() != nil {
				return context.Cause(ctx) // the lock is lost, or the caller's ctx has ended
			}
			fmt.Println("page", page)
		}
		return nil
	})
	if errors.Is(err, dmutex.ErrLockLost) {
		log.Print("somebody else may have worked at the same time: ", err)
	}
	// Output:
	// page 1
	// page 2
	// page 3
}

func ExampleWithKeepAlive() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	mutex := dmutex.New("leader", 5*time.Second, client, dmutex.WithKeepAlive(), dmutex.WithMaxHold(time.Hour))
	if err := mutex.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	select {
	case <-mutex.Lost():
		fmt.Println("no longer the leader")
	case <-time.After(10 * time.Millisecond): // there is something to do
		fmt.Println("still the leader")
	}
	if err := mutex.Unlock(ctx); err != nil {
		log.Print(err)
	}
	// Output: still the leader
}

// The storage refuses a writer whose token is smaller than one that it has seen: here a
// Redis hash, below it an SQL table, whose driver tells how many rows were affected.
func ExampleWithFencing() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	guarded := redis.NewScript(`
		if tonumber(redis.call('HGET', KEYS[1], 'token') or 0) > tonumber(ARGV[1]) then
			return 'refused'
		end
		redis.call('HSET', KEYS[1], 'token', ARGV[1], 'balance', ARGV[2])
		return 'written'`)

	stale := dmutex.New("account:1", 50*time.Millisecond, client, dmutex.WithFencing())
	if err := stale.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	client.Del(ctx, "account:1") // its ttl runs out while the process is stopped

	mutex := dmutex.New("account:1", time.Minute, client, dmutex.WithFencing())
	err := mutex.Do(ctx, func(ctx context.Context) error {
		fmt.Println(guarded.Run(ctx, client, []string{"balance:1"}, dmutex.TokenFrom(ctx), 90).Val())
		return nil
	})
	if err != nil {
		log.Print(err)
	}
	fmt.Println(guarded.Run(ctx, client, []string{"balance:1"}, stale.Token(), 100).Val())

	const update = `UPDATE accounts SET balance = $1, token = $2 WHERE id = $3 AND token <= $2`
	fmt.Println(update, "-- no row affected: refused")
	// Output:
	// written
	// refused
	// UPDATE accounts SET balance = $1, token = $2 WHERE id = $3 AND token <= $2 -- no row affected: refused
}

func ExampleMutex_Inspect() {
	client, closeAll := connect()
	defer closeAll()
	ctx := context.Background()

	mutex := dmutex.New("nightly-report", time.Minute, client, dmutex.WithOwner("host-7"))
	if err := mutex.Lock(ctx); err != nil {
		log.Fatal(err)
	}
	info, err := mutex.Inspect(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Owner, "holds it, and", info.Waiting, "wait")
	// Output: host-7 holds it, and 0 wait
}

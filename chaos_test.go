//go:build unix

package dmutex_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/go-redis/redis/v8"
	"github.com/stretchr/testify/require"

	"github.com/omniful/go_commons/dmutex"
	"github.com/omniful/go_commons/dmutex/internal/rig"
)

// The environment of a chaos run: for how long each of the three lasts, and the seed
// of its faults and of what the processes do.
const (
	chaosTime = "CHAOS_TIME"
	chaosSeed = "CHAOS_SEED"
)

const (
	chaosProcesses = 4
	chaosMaxTTL    = 1500 * time.Millisecond
	chaosMaxWait   = 6 * time.Second
)

// chaosEnv makes the test binary one of the processes of a chaos run.
const chaosEnv = "DMUTEX_TEST_CHAOS"

// chaosRole is what such a process has to do, and where.
type chaosRole struct {
	Kind  string // of the addresses
	Addrs []string
	Keys  []string
	Seed  uint64
}

func (r chaosRole) client() redis.UniversalClient {
	const readTimeout = 300 * time.Millisecond
	switch r.Kind {
	case "cluster":
		return redis.NewClusterClient(&redis.ClusterOptions{ClusterSlots: rig.SlotsFrom(r.Addrs), ReadTimeout: readTimeout})
	case "sentinel":
		return redis.NewFailoverClient(&redis.FailoverOptions{MasterName: rig.MasterName, SentinelAddrs: r.Addrs, ReadTimeout: readTimeout})
	default:
		return redis.NewClient(&redis.Options{Addr: r.Addrs[0], ReadTimeout: readTimeout})
	}
}

// chaosEvent is something that happened in a process. Times are in nanoseconds, on
// one clock for all processes: the wall clock at the start of each, moved on by its
// monotonic clock.
type chaosEvent struct {
	What   string // see below
	Key    string
	Hold   string // of lock and unlock: which one
	Call   int64
	Return int64
	Until  int64  // of lock: how long it is valid
	Result string // of unlock and watch
	Late   int64  // of waits: by how much they outlasted their ctx
}

// What happened, and how it ended.
const (
	locked_  = "lock"    // with success
	failed   = "fail"    // with an error, or the lock is taken
	unlocks  = "unlocks" // and does not know yet how that ends
	unlocked = "unlock"
	watched  = "watch"

	resultDone    = "done"    // of unlock; of watch: released or free
	resultLost    = "lost"    // of unlock; of watch: ran out
	resultUnknown = "unknown" // an error
	resultTaken   = "taken"   // of fail
)

// playChaos is the main function of a process.
func playChaos(encoded string) {
	var r chaosRole
	if err := json.Unmarshal([]byte(encoded), &r); err != nil {
		panic(err)
	}
	redis.SetLogger(silent{})
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		if order, _ := bufio.NewReader(os.Stdin).ReadByte(); order != '!' {
			os.Exit(1) // the parent is gone
		}
		stop()
	}()
	start := time.Now()
	now := func() int64 { return start.UnixNano() + int64(time.Since(start)) }
	client := r.client()
	var (
		wg  sync.WaitGroup
		out sync.Mutex // guards standard output
	)
	tell := func(e chaosEvent) {
		line, _ := json.Marshal(e)
		out.Lock()
		defer out.Unlock()
		_, _ = os.Stdout.Write(append(line, '\n')) // in one piece
	}
	for i := range 4 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(r.Seed, uint64(i)))
			for n := 0; ctx.Err() == nil; n++ {
				e := chaosEvent{What: failed, Key: r.Keys[random.IntN(len(r.Keys))], Hold: fmt.Sprint(os.Getpid(), ".", i, ".", n)}
				ttl := 200*time.Millisecond + time.Duration(random.Int64N(int64(chaosMaxTTL-200*time.Millisecond)))
				m := dmutex.New(e.Key, ttl, client)
				bound, cancel := context.WithTimeout(ctx, time.Duration(random.Int64N(int64(chaosMaxWait))))
				var late time.Duration
				e.Call = now()
				e.Result = resultUnknown
				switch random.IntN(10) {
				case 0, 1:
					e.What = watched
					if expired, err := m.WaitUntilUnlocked(bound); err == nil {
						e.Result = map[bool]string{false: resultDone, true: resultLost}[expired]
					}
				case 2:
					acquired, err := m.TryLock(bound)
					if acquired {
						e.What = locked_
					} else if err == nil {
						e.Result = resultTaken
					}
				default:
					if m.Lock(bound) == nil {
						e.What = locked_
					}
				}
				if deadline, _ := bound.Deadline(); time.Now().After(deadline) {
					late = time.Since(deadline)
				}
				cancel()
				e.Return, e.Late = now(), int64(late)
				if e.What != locked_ {
					tell(e)
					time.Sleep(time.Duration(random.Int64N(int64(20 * time.Millisecond))))
					continue
				}
				e.Until, e.Result = start.UnixNano()+int64(dmutex.Until(m).Sub(start)), ""
				tell(e)

				work := time.Duration(random.Int64N(int64(20 * time.Millisecond)))
				switch random.IntN(30) {
				case 0:
					work = ttl * 6 / 5 // too long
				case 1:
					continue // died, as far as the others can see
				case 2, 3, 4:
					work *= 5
				}
				time.Sleep(work)
				e.What, e.Call, e.Return, e.Result = unlocks, now(), math.MaxInt64, ""
				tell(e) // it may be killed before it can tell how that ended
				e.What = unlocked
				switch err := m.Unlock(context.Background()); {
				case err == nil:
					e.Result = resultDone
				case errors.Is(err, dmutex.ErrLockLost):
					e.Result = resultLost
				default:
					e.Result = resultUnknown
				}
				e.Return = now()
				tell(e)
			}
		})
	}
	wg.Wait()
	_ = client.Close()
	os.Exit(0)
}

// chaos is a run.
type chaos struct {
	t      *testing.T
	role   chaosRole
	random *rand.Rand

	processes []*chaosProcess
	out       *os.File // where all processes tell what happens

	events []chaosEvent
	faults map[string]int // how many of which kind
	kills  []int64        // when a process was killed
	amiss  [][2]int64     // from when to when something was
}

type chaosProcess struct {
	*exec.Cmd
	orders io.WriteCloser
}

// A chaosFault makes something go wrong, and well again before it returns.
type chaosFault struct {
	name string
	make func(c *chaos)
}

func (c *chaos) start() *chaosProcess {
	role := c.role
	role.Seed = c.random.Uint64()
	encoded, err := json.Marshal(role)
	require.NoError(c.t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), chaosEnv+"="+string(encoded))
	cmd.Stdout, cmd.Stderr = c.out, os.Stderr
	orders, err := cmd.StdinPipe()
	require.NoError(c.t, err)
	require.NoError(c.t, cmd.Start())
	c.t.Cleanup(func() { _ = cmd.Process.Kill() })
	return &chaosProcess{cmd, orders}
}

func (c *chaos) sleep(from, to time.Duration) {
	time.Sleep(from + time.Duration(c.random.Int64N(int64(to-from))))
}

// Faults of the processes, which every run has.
var processFaults = []chaosFault{
	{"process killed", func(c *chaos) {
		i := c.random.IntN(len(c.processes))
		_ = c.processes[i].Process.Kill()
		_ = c.processes[i].Wait()
		c.kills = append(c.kills, time.Now().UnixNano())
		c.processes[i] = c.start()
	}},
	{"process stopped", func(c *chaos) {
		p := c.processes[c.random.IntN(len(c.processes))].Process
		_ = p.Signal(syscall.SIGSTOP)
		c.sleep(50*time.Millisecond, 2500*time.Millisecond)
		_ = p.Signal(syscall.SIGCONT)
	}},
}

// run lets the processes loose for a while, with faults, and notes what happens.
func (c *chaos) run(length time.Duration, faults []chaosFault) {
	news, out, err := os.Pipe()
	require.NoError(c.t, err)
	c.out = out
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(news); lines.Scan(); {
			var e chaosEvent
			if json.Unmarshal(lines.Bytes(), &e) == nil {
				c.events = append(c.events, e)
			}
		}
	}()
	for range chaosProcesses {
		c.processes = append(c.processes, c.start())
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		pause := 500 * time.Millisecond
		if c.random.IntN(4) == 0 {
			pause *= 5
		}
		c.sleep(20*time.Millisecond, pause)
		f := faults[c.random.IntN(len(faults))]
		from := time.Now().UnixNano()
		f.make(c)
		c.amiss = append(c.amiss, [2]int64{from, time.Now().UnixNano()})
		c.faults[f.name]++
	}
	for _, p := range c.processes {
		_, _ = p.orders.Write([]byte("!"))
	}
	for _, p := range c.processes {
		stuck := time.AfterFunc(hang, func() { _ = p.Process.Signal(syscall.SIGABRT) }) // with its stacks
		require.NoError(c.t, p.Wait(), "a process does not end when nothing is wrong any more")
		stuck.Stop()
	}
	_ = out.Close()
	<-read
	_ = news.Close()
}

// hold is a time in which somebody was told that it has the lock.
type hold struct {
	lock chaosEvent
	end  chaosEvent // of Unlock; zero if it was not called or did not return
}

// from and to are the bounds in which the holder may rely on it.
func (h hold) from() int64 { return h.lock.Return }

func (h hold) to() int64 {
	if h.end.What == "" {
		return h.lock.Until
	}
	return min(h.lock.Until, h.end.Call)
}

// judge checks the history, and returns what it found wrong and a line of figures.
func (c *chaos) judge() (violations []string, figures string) {
	violate := func(format string, args ...any) { violations = append(violations, fmt.Sprintf(format, args...)) }
	holds := map[string]*hold{}
	verdicts := map[string]int{}
	var watches []chaosEvent
	for _, e := range c.events {
		switch e.What {
		case locked_:
			holds[e.Hold] = &hold{lock: e}
		case unlocks, unlocked:
			holds[e.Hold].end = e
		case watched:
			watches = append(watches, e)
		}
		if e.Result != "" {
			verdicts[e.What+" "+e.Result]++
		}
		if e.Late > int64(soon) {
			violate("a wait outlasted its ctx by %v", time.Duration(e.Late))
		}
	}
	byKey := map[string][]*hold{}
	for _, h := range holds {
		byKey[h.lock.Key] = append(byKey[h.lock.Key], h)
	}
	handOvers := 0
	var history []porcupine.Operation
	for key, holds := range byKey {
		slices.SortFunc(holds, func(a, b *hold) int { return int(a.from() - b.from()) })
		for i, h := range holds {
			if i > 0 && h.lock.Call < holds[i-1].end.Call {
				handOvers++
			}
			for _, earlier := range holds[:i] {
				if h.from() < earlier.to() && h.from() < h.to() {
					violate("%s: %+v overlaps with %+v by %v", key, *h, *earlier, time.Duration(earlier.to()-h.from()))
				}
			}
			history = append(history,
				porcupine.Operation{Input: linear{key, h.lock.Hold, true}, Call: h.lock.Call, Return: h.lock.Return},
				porcupine.Operation{Input: linear{key, h.lock.Hold, false}, Call: h.endsFrom(), Return: h.endsBy()})
			if h.end.Result == resultLost && h.end.Return < h.lock.Until {
				violate("%s: %+v was lost before its time", key, *h)
			}
		}
	}
	if result := porcupine.CheckOperationsTimeout(mutexModel, history, time.Minute); result != porcupine.Ok {
		violate("linearizability: %s", result)
	}
	for _, w := range watches {
		// The hold that a wait found is the one that was there for a while from its
		// beginning on, if nothing was amiss then.
		const while = int64(30 * time.Millisecond)
		for _, h := range byKey[w.Key] {
			want := ""
			switch {
			case h.from() > w.Call || w.Call+while > h.to() || w.Result == resultUnknown || c.isAmiss(w.Call, w.Call+while):
			case h.end.Result == resultDone:
				want = resultDone
			case h.end.What == "" && !slices.ContainsFunc(c.kills, func(at int64) bool { return h.lock.Call < at && at < h.lock.Until }):
				want = resultLost // nobody released it
			}
			if want != "" && want != w.Result {
				violate("%+v, but how %+v ended is %s", w, *h, want)
			}
			if want != "" {
				verdicts["checked "+want]++
			}
		}
		for _, h := range byKey[w.Key] {
			if w.Result != resultUnknown && h.from() < w.Call && w.Return < h.to() {
				violate("%+v, while %+v went on", w, *h)
			}
		}
		if w.Result == resultLost && !c.mayHaveRunOut(w, byKey[w.Key]) {
			violate("%+v, but no hold ran out", w)
		}
	}
	return violations, fmt.Sprintf("operations %d, holds %d, handed to a waiter %d, faults %v, verdicts %v, violations %d",
		len(c.events), len(holds), handOvers, c.faults, verdicts, len(violations))
}

// mayHaveRunOut tells whether a hold that was not released can have run out while w
// waited: one that was told of, one of a process that was killed before it could tell,
// or one of a call that failed, and did not get through with the release either.
func (c *chaos) mayHaveRunOut(w chaosEvent, holds []*hold) bool {
	near := func(from, to int64) bool { return from <= w.Return && w.Call <= to+int64(chaosMaxTTL+soon) }
	return slices.ContainsFunc(holds, func(h *hold) bool {
		return h.end.Result != resultDone && h.lock.Until <= w.Return && near(h.lock.Call, h.lock.Until)
	}) || slices.ContainsFunc(c.kills, func(at int64) bool {
		return near(at, at)
	}) || slices.ContainsFunc(c.events, func(e chaosEvent) bool {
		return e.What == failed && e.Result == resultUnknown && e.Key == w.Key && near(e.Call, e.Return) &&
			c.isAmiss(e.Call, e.Return)
	})
}

// isAmiss tells whether something was amiss, or just has been, between two times.
func (c *chaos) isAmiss(from, to int64) bool {
	return slices.ContainsFunc(c.amiss, func(window [2]int64) bool {
		return window[0] <= to && from <= window[1]+int64(500*time.Millisecond)
	})
}

// endsFrom and endsBy are the bounds in which the hold ended in Redis.
func (h hold) endsFrom() int64 {
	switch {
	case h.end.Result == resultDone:
		return h.end.Call
	case h.end.Result == resultLost, h.end.What == "": // it ran out
		return h.lock.Until
	default:
		return min(h.end.Call, h.lock.Until)
	}
}

func (h hold) endsBy() int64 {
	if h.end.Result == resultDone || h.end.Result == resultLost && h.end.Return >= h.lock.Until {
		return h.end.Return
	}
	return math.MaxInt64
}

// linear is an operation of the model: a hold begins or ends.
type linear struct {
	key, hold string
	begins    bool
}

// In the model a lock is held by one hold or by none.
var mutexModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range history {
			key := op.Input.(linear).key
			byKey[key] = append(byKey[key], op)
		}
		return slices.Collect(maps.Values(byKey))
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		op := input.(linear)
		if op.begins {
			return state == "", op.hold
		}
		return state == op.hold, ""
	},
}

func chaosLength(t *testing.T) time.Duration {
	length, err := time.ParseDuration(os.Getenv(chaosTime))
	if err != nil {
		return 3 * time.Second
	}
	return length
}

func newChaos(t *testing.T, kind string, addrs ...string) *chaos {
	seed := uint64(time.Now().UnixNano())
	if _, err := fmt.Sscan(os.Getenv(chaosSeed), &seed); err == nil {
		t.Log("seed taken from the environment")
	}
	t.Logf("%s=%d", chaosSeed, seed)
	return &chaos{
		t:      t,
		role:   chaosRole{Kind: kind, Addrs: addrs, Keys: []string{"a", "b", "c"}},
		random: rand.New(rand.NewPCG(seed, 0)),
		faults: map[string]int{},
	}
}

// finish judges the run, and checks that nothing is left in Redis.
func (c *chaos) finish(of func(key string) *redis.Client) {
	violations, figures := c.judge()
	c.t.Log(figures)
	require.Empty(c.t, violations)
	require.Contains(c.t, figures, "unlock done")
	require.Contains(c.t, figures, "watch done")
	ctx := context.Background()
	for _, key := range c.role.Keys {
		rig.Eventually(c.t, "no lock is left", func() bool { return of(key).Exists(ctx, key).Val() == 0 })
		for _, left := range of(key).Keys(ctx, "*").Val() {
			require.NotEqual(c.t, time.Duration(-1), of(key).PTTL(ctx, left).Val(), "%q never expires", left)
		}
	}
}

func TestChaos(t *testing.T) {
	s := rig.Redis(t, aof...)
	p := rig.NewProxy(t, s.Addr)
	admin := s.Client()
	ctx := context.Background()
	c := newChaos(t, "single", p.Addr)
	c.run(chaosLength(t), append([]chaosFault{
		{"connections cut", func(*chaos) { p.CutAll() }},
		{"reply lost", func(*chaos) { p.LoseReply(script, rig.Cut) }},
		{"reply swallowed", func(*chaos) { p.LoseReply(script, rig.Swallow) }},
		{"request late", func(*chaos) { p.Late(script, 700*time.Millisecond) }},
		{"slow network", func(c *chaos) {
			p.Delay(time.Duration(c.random.Int64N(int64(50 * time.Millisecond))))
			c.sleep(10*time.Millisecond, time.Second)
			p.Delay(0)
		}},
		{"black hole", func(c *chaos) {
			p.BlackHole(true)
			c.sleep(10*time.Millisecond, 2*time.Second)
			p.BlackHole(false)
		}},
		{"no connections", func(c *chaos) {
			p.Refuse(true)
			p.CutAll()
			c.sleep(10*time.Millisecond, time.Second)
			p.Refuse(false)
		}},
		{"subscriptions killed", func(*chaos) { admin.Do(ctx, "client", "kill", "type", "pubsub") }},
		{"scripts flushed", func(*chaos) { admin.ScriptFlush(ctx) }},
		{"server stopped", func(c *chaos) {
			s.Signal(syscall.SIGSTOP)
			c.sleep(10*time.Millisecond, 2*time.Second)
			s.Signal(syscall.SIGCONT)
		}},
		{"server killed", func(*chaos) { s.Kill(); s.Start() }},
	}, processFaults...))
	c.finish(func(string) *redis.Client { return admin })
}

func TestChaosInCluster(t *testing.T) {
	cluster := rig.NewCluster(t)
	var addrs []string
	for _, s := range cluster.Servers {
		addrs = append(addrs, s.Addr)
	}
	c := newChaos(t, "cluster", addrs...)
	master := func(c *chaos) *rig.Server {
		master, _ := cluster.Master(c.role.Keys[c.random.IntN(len(c.role.Keys))])
		return master
	}
	c.run(chaosLength(t), append([]chaosFault{
		{"failed over by agreement", func(c *chaos) {
			_, replica := cluster.Master(c.role.Keys[c.random.IntN(len(c.role.Keys))])
			cluster.FailOver(replica)
			cluster.AwaitReplicas()
		}},
		{"slot moved", func(c *chaos) {
			cluster.Migrate(c.role.Keys[c.random.IntN(len(c.role.Keys))], func() { c.sleep(0, 100*time.Millisecond) })
		}},
		{"connections killed", func(c *chaos) { cluster.On(master(c)).Do(context.Background(), "client", "kill", "type", "normal") }},
		{"subscriptions killed", func(c *chaos) { cluster.On(master(c)).Do(context.Background(), "client", "kill", "type", "pubsub") }},
		{"master stopped", func(c *chaos) { // for less than the others need to notice
			s := master(c)
			s.Signal(syscall.SIGSTOP)
			c.sleep(10*time.Millisecond, 400*time.Millisecond)
			s.Signal(syscall.SIGCONT)
		}},
	}, processFaults...))
	c.finish(func(key string) *redis.Client {
		master, _ := cluster.Master(key)
		return cluster.On(master)
	})
}

func TestChaosWithSentinel(t *testing.T) {
	sentinel := rig.NewSentinel(t, time.Minute) // no fail-over: it could lose a lock
	master := sentinel.Master()
	c := newChaos(t, "sentinel", sentinel.Addrs()...)
	c.run(chaosLength(t), append([]chaosFault{
		{"connections killed", func(*chaos) { master.Client().Do(context.Background(), "client", "kill", "type", "normal") }},
		{"subscriptions killed", func(*chaos) { master.Client().Do(context.Background(), "client", "kill", "type", "pubsub") }},
		{"replica killed", func(c *chaos) {
			s := sentinel.Servers[1+c.random.IntN(2)]
			s.Kill()
			c.sleep(0, 2*time.Second)
			s.Start()
			s.Follow(master)
		}},
		{"sentinel stopped", func(c *chaos) {
			s := sentinel.Sentinels[c.random.IntN(3)]
			s.Signal(syscall.SIGSTOP)
			c.sleep(10*time.Millisecond, 2*time.Second)
			s.Signal(syscall.SIGCONT)
		}},
	}, processFaults...))
	require.Zero(t, sentinel.FailOvers())
	admin := master.Client()
	c.finish(func(string) *redis.Client { return admin })
}

package dmutex

import (
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-redis/redis/v8"
	"github.com/go-redsync/redsync/v4"
	redsyncredis "github.com/go-redsync/redsync/v4/redis"
	"github.com/go-redsync/redsync/v4/redis/goredis/v8"
)

const (
	// maxGrace is how long whoever was handed the lock has to claim it: what one
	// stopped process costs the others, and what a slow network may take.
	maxGrace = time.Second

	// queueTTL outlives the longest pause between two looks of a waiter several
	// times, so only a queue of the dead expires.
	queueTTL = 30 * time.Second

	// tombstoneTTL outlives the retries of a go-redis client with its default
	// settings (four times 3 s and the pauses between). handover.lua has it, too.
	tombstoneTTL = 15 * time.Second

	// fenceTTL is for how long the latest fencing token is kept after it was given.
	// After that the clock alone sees to it that tokens rise.
	fenceTTL = 24 * time.Hour

	// An answer is waited for as long as the ttl, but within these bounds. It may
	// be of use only if it comes within the ttl, but that is decided when it is here.
	minAnswerTime = 5 * time.Second
	maxAnswerTime = time.Hour

	// cleanUpTime bounds a release, whatever the caller's ctx. One that nobody waits
	// for is repeated after firstPause, and then ever more slowly.
	cleanUpTime = 10 * time.Second
	firstPause  = 200 * time.Millisecond

	// A request that took longer than this may have been sent twice: go-redis repeats
	// it after a read timeout, which nobody sets lower.
	repeatFloor = 100 * time.Millisecond

	// rerouteTime is for how long after its start a request is repeated that a
	// cluster could not serve because a master failed or a slot moved; reroutePause
	// is how soon, and about as long as the client takes to read the new map.
	rerouteTime  = 2 * time.Second
	reroutePause = 50 * time.Millisecond

	// faultTime is for how long after its start an Unlock that met a fault is tried
	// again, and faultPause how soon.
	faultTime  = time.Second
	faultPause = 10 * time.Millisecond
)

var (
	//go:embed lua/handover.lua
	handoverLua string
	//go:embed lua/acquire.lua
	acquireLua string
	//go:embed lua/release.lua
	releaseLua string
	//go:embed lua/extend.lua
	extendLua string
	//go:embed lua/inspect.lua
	inspectLua string
	//go:embed lua/look.lua
	lookLua string

	acquireScript = redis.NewScript(handoverLua + acquireLua)
	releaseScript = redis.NewScript(handoverLua + releaseLua)
	extendScript  = redis.NewScript(extendLua)
	inspectScript = redis.NewScript(inspectLua)
	lookScript    = redis.NewScript(lookLua)
)

var (
	errForgotten = errors.New("it was released or lost; Redis has forgotten which")
	errTooLate   = errors.New("the ttl was over before the answer came")
	errNotUsable = errors.New("client is nil or was not made by its constructor")
	errRing      = errors.New("client is a *redis.Ring, which can grant one lock twice")
	errManySlots = errors.New("key has a closing brace but no hash tag, so Redis Cluster cannot keep its queue in its slot")
)

// names are the keys and the channel of one lock. All keys begin with the lock's,
// so that an ACL pattern for it covers them, and hash to its slot where that can
// be had (see hashBase).
type names struct {
	lock    string
	queue   string
	ended   string // begins the name of each tombstone
	fence   string
	channel string
}

func namesOf(key string) names {
	base := hashBase(key)
	return names{
		lock:    key,
		queue:   base + ":dmutex:queue",
		ended:   base + ":dmutex:ended:",
		fence:   base + ":dmutex:fence",
		channel: "dmutex-" + key,
	}
}

// hashBase returns a beginning for key names that hash to the same slot as key.
// A key with a hash tag brings it along; one without braces is repeated as a tag;
// one with only opening braces can be a tag but not stand before it. For a key
// that contains a closing brace but no tag there is no such name: its other keys
// lie in other slots.
func hashBase(key string) string {
	switch {
	case strings.Contains(key, "}"):
		return key
	case strings.Contains(key, "{"):
		return "{" + key + "}"
	default:
		return key + "{" + key + "}"
	}
}

// inOneSlot tells whether all names of a lock hash to the slot of its key.
func inOneSlot(key string) bool {
	_, tail, opened := strings.Cut(key, "{")
	return !strings.Contains(key, "}") || opened && strings.IndexByte(tail, '}') > 0
}

func (n names) tombstone(ticket string) string { return n.ended + ticket }

// deaf begins the tickets of a process that may not subscribe; see handover.lua.
const deaf = "-"

func inboxChannel(inbox string) string { return "dmutex-inbox:" + inbox }

// newTicket returns a ticket whose hand-over is told to inbox, and which says whose it
// is.
func newTicket(inbox, owner string) string {
	ticket := inbox + "." + randomHex(16)
	if owner != "" {
		ticket += "." + url.QueryEscape(owner)
	}
	return ticket
}

func newInbox() string { return randomHex(8) }

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// isTicket tells our holders, who hand over, from plain redsync's and the
// original package's, whose values are base64.
func isTicket(value string) bool {
	inbox, random, _ := splitTicket(value)
	return isHex(strings.TrimPrefix(inbox, deaf)) && isHex(random)
}

func splitTicket(ticket string) (inbox, random, owner string) {
	inbox, rest, _ := strings.Cut(ticket, ".")
	random, owner, _ = strings.Cut(rest, ".")
	return inbox, random, owner
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

// node is the little that a lock asks of a Redis client.
type node interface {
	// run runs a script on the master that owns the lock's key.
	run(ctx context.Context, script *redis.Script, keys []string, args ...any) (any, error)
	// home returns that master, as far as the client knows.
	home(ctx context.Context) (server, error)
	// pool is for redsync.
	pool() redsyncredis.Pool
}

// server is a node on which messages are published.
type server interface {
	// subscribe returns a subscription, without channels yet.
	subscribe(ctx context.Context) *redis.PubSub
	// shared is equal for all copies of one client, and comparable.
	shared() any
}

// single is a server that a go-redis v8 client always talks to.
type single struct{ client redis.UniversalClient }

var (
	_ node   = single{}
	_ server = single{}
	_ node   = cluster{}
)

// nodeOf checks that client can be used for key, without a request.
func nodeOf(client redis.UniversalClient, key string) (n node, err error) {
	if client == nil {
		return nil, errNotUsable
	}
	defer func() {
		if recover() != nil { // a nil pointer, at the top or embedded
			n, err = nil, errNotUsable
		}
	}()
	client.Context()
	switch c := client.(type) { // by their methods, which types that embed them have too
	case interface{ Options() *redis.RingOptions }:
		return nil, errRing
	case clusterClient:
		if c.Options(); !inOneSlot(key) {
			return nil, errManySlots
		}
		return cluster{c, key}, nil
	case interface{ Options() *redis.Options }:
		c.Options()
	}
	if !reflect.ValueOf(client).Comparable() {
		return nil, fmt.Errorf("client of type %T is not comparable: pass a pointer", client)
	}
	return single{client}, nil
}

func (s single) run(ctx context.Context, script *redis.Script, keys []string, args ...any) (any, error) {
	return await(ctx, func() (any, error) { return script.Run(ctx, s.client, keys, args...).Result() })
}

func (s single) home(context.Context) (server, error) { return s, nil }

func (s single) pool() redsyncredis.Pool { return goredis.NewPool(s.client) }

func (s single) subscribe(ctx context.Context) *redis.PubSub { return s.client.Subscribe(ctx) }

func (s single) shared() any {
	if client, ok := s.client.(interface{ Options() *redis.Options }); ok {
		return client.Options() // WithContext copies the client, not the options
	}
	return s.client
}

// cluster is the master of key in a Redis Cluster, whichever that is at the time.
// Everything goes through that master's own client: the cluster client's routing
// asks for a table of commands that it cannot read of Redis 7, each time anew, and
// would have replicas answer.
type cluster struct {
	client clusterClient
	key    string
}

type clusterClient interface {
	redis.UniversalClient
	Options() *redis.ClusterOptions
	MasterForKey(ctx context.Context, key string) (*redis.Client, error)
	ReloadState(ctx context.Context)
}

func (c cluster) master(ctx context.Context) (single, error) {
	master, err := await(ctx, func() (*redis.Client, error) { return c.client.MasterForKey(ctx, c.key) })
	return single{master}, err
}

func (c cluster) home(ctx context.Context) (server, error) { return c.master(ctx) }

func (c cluster) pool() redsyncredis.Pool { return goredis.NewPool(c.client) }

// run asks again for a while if the master is another one by now, does not answer,
// or cannot answer yet.
func (c cluster) run(ctx context.Context, script *redis.Script, keys []string, args ...any) (any, error) {
	for start := time.Now(); ; {
		master, err := c.master(ctx)
		if err == nil {
			var reply any
			if reply, err = master.run(ctx, script, keys, args...); err == nil {
				return reply, nil
			}
		}
		if ctx.Err() != nil || !misrouted(err) || time.Since(start) > rerouteTime {
			return nil, err
		}
		c.client.ReloadState(ctx)
		if sleep(ctx, jitter(reroutePause, 2*reroutePause)) != nil {
			return nil, err
		}
	}
}

// await returns what f does, but as soon as ctx ends. go-redis does not always: some
// dials and locks on its way take no notice of ctx.
func await[T any](ctx context.Context, f func() (T, error)) (T, error) {
	if ctx.Done() == nil {
		return f()
	}
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// sight is what a request saw of the lock.
type sight struct {
	status string        // of acquire: "held", "taken" or "ended"
	holder string        // value of the lock, if taken
	free   bool          // nobody holds the lock
	ttl    time.Duration // remaining, if taken; negative: no expiry
	rank   int           // in the queue, 0 is next; -1: not in it
	fate   string        // of the ticket asked about: "released", "ended", "unclaimed" or unknown
	token  int64         // of acquire, if it is held: the fencing token; 0 if none was asked for
}

// look sees who holds the lock and, if ticket is one, how that ended.
func look(ctx context.Context, n node, names names, ticket string) (sight, error) {
	if !isTicket(ticket) {
		ticket = "" // has no tombstone
	}
	reply, err := n.run(ctx, lookScript, []string{names.lock, names.queue, names.tombstone(ticket)}, ticket)
	if err != nil {
		return sight{}, given(ctx, err)
	}
	fields, _ := reply.([]any)
	if len(fields) != 3 {
		return sight{}, fmt.Errorf("unexpected reply %v", reply)
	}
	var seen sight
	seen.holder, _ = fields[0].(string)
	ttl, _ := fields[1].(int64)
	seen.free = ttl == -2
	seen.ttl = time.Duration(ttl) * time.Millisecond
	seen.fate, _ = fields[2].(string)
	return seen, nil
}

// Info is what [Mutex.Inspect] has seen of a lock.
type Info struct {
	Held    bool          // somebody holds it, or it is being handed over
	TTL     time.Duration // remaining, 0 if it is free; negative if it never expires
	Waiting int           // how many waiters stand in line

	// Of the holder, if there is one.

	Owner    string    // its label, see [WithOwner]; "" if it has none
	Holder   string    // names the hold; not in full, so that nobody can release it
	Since    time.Time // when it got the lock, by the server's clock as far as that was not set back; zero if it has no label or token
	HandedTo bool      // it was handed the lock, and has not answered yet
	Foreign  bool      // it speaks another protocol, like plain redsync, and hands nothing over
}

// inspect sees all that there is to know of a lock.
func inspect(ctx context.Context, n node, names names) (Info, error) {
	reply, err := n.run(ctx, inspectScript, []string{names.lock, names.queue, names.fence})
	if err != nil {
		return Info{}, given(ctx, err)
	}
	fields, _ := reply.([]any)
	if len(fields) != 5 {
		return Info{}, fmt.Errorf("unexpected reply %v", reply)
	}
	ticket, _ := fields[0].(string)
	ttl, _ := fields[1].(int64)
	waiting, _ := fields[2].(int64)
	info := Info{Held: ttl != -2, Waiting: int(waiting)}
	if !info.Held {
		return info, nil
	}
	info.TTL = time.Duration(ttl) * time.Millisecond
	info.HandedTo = fields[3] == int64(1)
	if info.Foreign = !isTicket(ticket); info.Foreign {
		return info, nil
	}
	inbox, random, owner := splitTicket(ticket)
	info.Holder = inbox + "." + random[:min(8, len(random)/2)]
	info.Owner, _ = url.QueryUnescape(owner)
	latest, _ := fields[4].(string)
	if token, holder, _ := strings.Cut(latest, " "); holder == ticket {
		micros, _ := strconv.ParseInt(token, 10, 64)
		info.Since = time.UnixMicro(micros)
	}
	return info, nil
}

// claim is one ticket on its way to the lock, through redsync. Not for use by two
// goroutines at once, like the redsync.Mutex in it, but for abandon and extend.
type claim struct {
	ticket string
	ttl    time.Duration
	mutex  *redsync.Mutex
	port   *port

	releasing time.Time              // when release was called first
	ended     atomic.Pointer[string] // what abandon was told of the ticket
}

func newClaim(n node, names names, ttl time.Duration, inbox string, signed signature) *claim {
	p := &port{
		Pool:    n.pool(),
		node:    n,
		names:   names,
		ticket:  newTicket(inbox, signed.owner),
		grace:   min(ttl, maxGrace),
		fencing: signed.fencing || signed.owner != "", // whose token tells since when
	}
	value := redsync.WithGenValueFunc(func() (string, error) { return p.ticket, nil })
	return &claim{ticket: p.ticket, ttl: ttl, port: p, mutex: p.mutex(ttl, value)}
}

// signature is what a claim says of itself besides its ticket.
type signature struct {
	fencing bool   // it asks for a fencing token
	owner   string // whose it is, for people; "" if that is not said
}

// inLine makes the following tries ask for a place in the queue; since is the one
// of an earlier ticket, if it had one. The ticket's inbox must be listened to.
func (c *claim) inLine(since string) {
	if since == "" {
		since = "0"
	}
	c.port.since = since
}

// inbox is where a hand-over to the ticket is told.
func (c *claim) inbox() string {
	inbox, _, _ := splitTicket(c.ticket)
	return inbox
}

// grace is for how long the lock is kept for the ticket when it is handed over.
func (c *claim) grace() time.Duration { return c.port.grace }

// place is where the ticket stands in the queue, to be taken over by another.
func (c *claim) place() string { return c.port.since }

// try asks for the lock once. The error is errTooLate if it was granted but is no
// longer valid; after any error the ticket's fate is unknown: end it.
func (c *claim) try(ctx context.Context) (sight, error) {
	c.port.seen = sight{}
	err := c.mutex.TryLockContext(ctx)
	seen := c.port.seen
	switch {
	case err == nil, seen.status == "taken", seen.status == "ended":
		return seen, nil
	case seen.status == "held":
		return seen, errTooLate
	default:
		return seen, given(ctx, err)
	}
}

// token is the fencing token that the claim was granted with, 0 if none was asked for.
func (c *claim) token() int64 { return c.port.seen.token }

// until is when the hold that was granted ends on our own clock, if it is not
// extended.
func (c *claim) until() time.Time { return c.mutex.Until() }

// extend lets the hold last for the ttl from now on, and returns when it ends then.
// The error matches ErrLockLost if it was lost before.
func (c *claim) extend(ctx context.Context) (until time.Time, err error) {
	// A mutex of its own: redsync's are not safe for concurrent use.
	m := c.port.mutex(c.ttl, redsync.WithValue(c.ticket))
	_, err = m.ExtendContext(ctx)
	var taken *redsync.ErrTaken
	switch {
	case err == nil:
		return m.Until(), nil
	case errors.As(err, &taken), hasCode(err, []string{"WRONGTYPE "}):
		return time.Time{}, fmt.Errorf("%w: %w", ErrLockLost, err)
	case errors.Is(err, redsync.ErrExtendFailed):
		return time.Time{}, errTooLate
	default:
		return time.Time{}, given(ctx, err)
	}
}

// release gives the lock back. The error matches ErrLockLost if it was lost
// before. It takes no notice of the end of ctx, and is bounded by cleanUpTime. A
// fault that passes is not told: after a restart all of a client's pooled
// connections may be dead, and go-redis tries no more than four.
func (c *claim) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	defer cancel()
	if c.releasing.IsZero() {
		c.releasing = time.Now()
	}
	if ended := c.ended.Load(); ended != nil && *ended == "released" {
		return nil
	}
	for start := time.Now(); ; {
		err := c.releaseOnce(ctx)
		if errors.Is(err, ErrLockLost) && time.Since(c.releasing) > tombstoneTTL-time.Second {
			return errForgotten // an earlier request may have released it
		}
		if err == nil || !transient(err) || time.Since(start) > faultTime {
			return err
		}
		if sleep(ctx, faultPause) != nil {
			return err
		}
	}
}

func (c *claim) releaseOnce(ctx context.Context) error {
	c.port.ending = true
	released, err := c.mutex.UnlockContext(ctx)
	var taken *redsync.ErrTaken
	switch {
	case released:
		return nil
	case errors.Is(err, redsync.ErrLockAlreadyExpired), errors.As(err, &taken),
		hasCode(err, []string{"WRONGTYPE "}): // the key has become something else
		return fmt.Errorf("%w: %w", ErrLockLost, err)
	default:
		return given(context.Background(), err)
	}
}

// abandon ends a ticket whose fate is unknown or that is no longer wanted: if it
// holds the lock, the next one gets it; if it waits, it does no longer; if its
// request is still under way, it will come too late. It returns at once; the
// requests go on until one is answered, for cleanUpTime at most, whatever ctx.
func (c *claim) abandon(ctx context.Context) {
	port := c.port
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUpTime)
	go func() {
		defer cancel()
		for pause := firstPause; ; pause *= 2 {
			status, err := port.release(ctx)
			if err == nil {
				c.ended.Store(&status)
			}
			if err == nil || errors.Is(err, redis.ErrClosed) || sleep(ctx, jitter(pause/2, pause)) != nil {
				return
			}
		}
	}()
}

// port is the pool that one claim's redsync.Mutex works on, and the way past its
// bool results: redsync's own adapter, but for the two requests that differ.
type port struct {
	redsyncredis.Pool
	node   node
	names  names
	ticket string
	grace  time.Duration

	fencing bool // a token is asked for

	since  string // place in the queue to ask for, see acquire.lua
	seen   sight  // by the latest acquire; zero if it was not answered
	ending bool   // redsync's delete is meant, see portConn.Eval
}

// mutex returns a redsync.Mutex that works on p.
func (p *port) mutex(ttl time.Duration, value redsync.Option) *redsync.Mutex {
	return redsync.New(p).NewMutex(p.names.lock,
		redsync.WithExpiry(ttl),
		redsync.WithTimeoutFactor(float64(min(max(ttl, minAnswerTime), maxAnswerTime))/float64(ttl)),
		value,
	)
}

func (p *port) Get(ctx context.Context) (redsyncredis.Conn, error) {
	conn, err := p.Pool.Get(ctx)
	return &portConn{conn, ctx, p}, err
}

type portConn struct {
	redsyncredis.Conn
	ctx  context.Context // of the one request that redsync makes on it
	port *port
}

var _ redsyncredis.Conn = (*portConn)(nil)

// SetNX is redsync's acquire.
func (c *portConn) SetNX(_, _ string, ttl time.Duration) (bool, error) {
	return c.port.acquire(c.ctx, ttl)
}

// Eval is redsync's delete or, with a third argument, its touch. It also deletes
// after every try that failed: that must not end a ticket which waits, so only
// the delete of a release is let through.
func (c *portConn) Eval(_ *redsyncredis.Script, keysAndArgs ...any) (any, error) {
	if isDelete := len(keysAndArgs) == 2; !isDelete {
		return c.port.node.run(c.ctx, extendScript, []string{c.port.names.lock}, keysAndArgs[1:]...)
	}
	if !c.port.ending {
		return int64(0), nil
	}
	status, err := c.port.release(c.ctx)
	switch {
	case err != nil:
		return nil, err
	case status == "released":
		return int64(1), nil
	case status == "gone":
		return int64(-1), nil
	default:
		return int64(0), nil
	}
}

func (p *port) keys() []string {
	return []string{p.names.lock, p.names.queue, p.names.tombstone(p.ticket)}
}

func (p *port) acquire(ctx context.Context, ttl time.Duration) (bool, error) {
	keys := p.keys()
	if p.fencing {
		keys = append(keys, p.names.fence)
	}
	reply, err := p.node.run(ctx, acquireScript, keys, p.ticket, ttl.Milliseconds(),
		p.grace.Milliseconds(), p.since, queueTTL.Milliseconds(), fenceTTL.Milliseconds())
	if err != nil {
		return false, err
	}
	fields, _ := reply.([]any)
	if len(fields) == 0 {
		return false, fmt.Errorf("unexpected reply %v", reply)
	}
	seen := sight{rank: -1}
	seen.status, _ = fields[0].(string)
	if seen.status == "held" && len(fields) == 2 {
		token, _ := fields[1].(string)
		seen.token, _ = strconv.ParseInt(token, 10, 64) // 0 if there is none
	}
	if seen.status == "taken" && len(fields) == 5 {
		seen.holder, _ = fields[1].(string)
		ttl, _ := fields[2].(int64)
		seen.ttl = time.Duration(ttl) * time.Millisecond
		rank, _ := fields[3].(int64)
		seen.rank = int(rank)
		p.since, _ = fields[4].(string)
	}
	p.seen = seen
	return seen.status == "held", nil
}

func (p *port) release(ctx context.Context) (status string, err error) {
	reply, err := p.node.run(ctx, releaseScript, p.keys(),
		p.ticket, p.names.channel, p.grace.Milliseconds(), tombstoneTTL.Milliseconds())
	if err != nil {
		return "", err
	}
	status, _ = reply.(string)
	return status, nil
}

// given returns the error of a request as the caller should see it: the end of
// its own ctx if that is what it was, and never the end of one that it did not
// give, like redsync's.
func given(ctx context.Context, err error) error {
	if ended := ctxErr(ctx); ended != nil {
		return ended
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &noAnswerError{err}
	}
	return err
}

// noAnswerError is a time limit of redsync's, go-redis's or our own that ended a
// request. It can be taken for its cause but does not match
// context.DeadlineExceeded, which would tell the caller that its ctx ended.
type noAnswerError struct{ cause error }

func (e *noAnswerError) Error() string      { return "no answer from Redis in time: " + e.cause.Error() }
func (e *noAnswerError) As(target any) bool { return errors.As(e.cause, target) }
func (e *noAnswerError) Timeout() bool      { return true }

// transient tells an error that may pass while a waiter waits from one that ends
// the wait: the client is closed, or the server refuses.
func transient(err error) bool {
	return !errors.Is(err, redis.ErrClosed) && !errors.Is(err, ErrLockLost) && !refused(err)
}

// misrouted tells an error that another master, or the same one in a moment, may
// not give.
func misrouted(err error) bool {
	if !isAnswer(err) {
		return !errors.Is(err, redis.ErrClosed)
	}
	return hasCode(err, passingInCluster)
}

// refused tells an answer of the server that asking again will not change.
func refused(err error) bool {
	return isAnswer(err) && !hasCode(err, passingInCluster) && !hasCode(err, passing)
}

// isAnswer tells an error that the server gave from one of the network or of the
// client.
func isAnswer(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer)
}

var (
	passingInCluster = []string{"MOVED ", "ASK ", "READONLY ", "CLUSTERDOWN ", "TRYAGAIN ", "LOADING ", "MASTERDOWN "}
	passing          = []string{"BUSY ", "OOM ", "MISCONF ", "NOREPLICAS ", "UNBLOCKED ", "max number of clients"}
)

// hasCode tells whether one of the codes is in err; older servers put words before
// the code of an error that a script met.
func hasCode(err error, codes []string) bool {
	return slices.ContainsFunc(codes, func(code string) bool { return strings.Contains(err.Error(), code) })
}

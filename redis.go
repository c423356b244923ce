package dmutex

import (
	"cmp"
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
	// settings (four times 3 s and the pauses between).
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

	acquireScript = newScript(acquireLua)
	releaseScript = newScript(releaseLua)
	extendScript  = newScript(extendLua)
	inspectScript = newScript(inspectLua)
	lookScript    = newScript(lookLua)
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

// appendTicket appends a new ticket to b. Its hand-over is told to inbox, or to nobody
// if that is ""; and it says whose it is.
func appendTicket(b []byte, inbox, owner string) []byte {
	var random [inboxSize + 16]byte
	_, _ = rand.Read(random[:]) // never fails
	if inbox != "" {
		b = append(b, inbox...)
	} else {
		b = hex.AppendEncode(b, random[:inboxSize])
	}
	b = append(b, '.')
	b = hex.AppendEncode(b, random[inboxSize:])
	if owner != "" {
		b = append(b, '.')
		b = append(b, url.QueryEscape(owner)...)
	}
	return b
}

func newInbox() string {
	var random [inboxSize]byte
	_, _ = rand.Read(random[:])
	return hex.EncodeToString(random[:])
}

const inboxSize = 8 // bytes

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

// script is a Lua script, and what go-redis's own type does not offer: a request for it
// that is made in one piece. It holds both values as go-redis takes them.
type script struct{ source, hash any }

// newScript returns a script, with handover.lua where it names that, and with the times
// that all of them know in front: as strings, which is what redis.call needs, and makes
// of a number at some cost.
func newScript(source string) script {
	times := fmt.Sprintf("local tombstone_ttl, queue_ttl, fence_ttl = '%d', '%d', '%d'\n",
		tombstoneTTL.Milliseconds(), queueTTL.Milliseconds(), fenceTTL.Milliseconds())
	source = times + strings.Replace(source, "--> handover.lua\n", handoverLua, 1)
	return script{source, redis.NewScript(source).Hash()}
}

// request returns the script's request with so many keys, which come first.
func (s script) request(keys int, keysAndArgs ...any) []any {
	request := make([]any, 0, 3+len(keysAndArgs))
	return append(append(request, "evalsha", s.hash, keys), keysAndArgs...)
}

// node is the little that a lock asks of a Redis client.
type node interface {
	// run sends the request of a script to the master that owns the lock's key.
	run(ctx context.Context, script script, request []any) (any, error)
	// home returns that master, as far as the client knows.
	home(ctx context.Context) (server, error)
	// adapter is redsync's own.
	adapter() redsyncredis.Pool
	// shared is equal for all copies of one client, and comparable.
	shared() any
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

func (s single) run(ctx context.Context, script script, request []any) (any, error) {
	cmd := redis.NewCmd(ctx, request...)
	err := flights.process(ctx, s.client, cmd)
	if err != nil && isAnswer(err) && hasCode(err, []string{"NOSCRIPT "}) {
		request = slices.Clone(request) // go-redis and its hooks may look at the first
		request[0], request[1] = "eval", script.source
		cmd = redis.NewCmd(ctx, request...)
		err = flights.process(ctx, s.client, cmd)
	}
	if err != nil {
		return nil, err // the request may still be under way
	}
	return cmd.Val(), nil
}

func (s single) home(context.Context) (server, error) { return s, nil }

func (s single) adapter() redsyncredis.Pool { return goredis.NewPool(s.client) }

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
	var master *redis.Client
	err := await(ctx, func() (err error) {
		master, err = c.client.MasterForKey(ctx, c.key)
		return err
	})
	if err != nil {
		return single{}, err // it may still be under way
	}
	return single{master}, nil
}

func (c cluster) home(ctx context.Context) (server, error) { return c.master(ctx) }

func (c cluster) adapter() redsyncredis.Pool { return goredis.NewPool(c.client) }

func (c cluster) shared() any { return c.client.Options() }

// run asks again for a while if the master is another one by now, does not answer,
// or cannot answer yet.
func (c cluster) run(ctx context.Context, script script, request []any) (any, error) {
	if deadline, ok := ctx.Deadline(); ok && ctx.Done() == nil {
		// To find the master can take long, and no connection's deadline bounds that.
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	for start := time.Now(); ; {
		master, err := c.master(ctx)
		if err == nil {
			var reply any
			if reply, err = master.run(ctx, script, request); err == nil {
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
func await(ctx context.Context, f func() error) error {
	if ctx.Done() == nil {
		return f()
	}
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
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
	token  int64         // of acquire, if it is held: its fencing token; 0 if none was asked for
}

// look sees who holds the lock and, if ticket is one, how that ended.
func look(ctx context.Context, n node, names names, ticket string) (sight, error) {
	if !isTicket(ticket) {
		ticket = "" // has no tombstone
	}
	reply, err := n.run(ctx, lookScript, lookScript.request(3, names.lock, names.queue, names.tombstone(ticket), ticket))
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
	reply, err := n.run(ctx, inspectScript, inspectScript.request(3, names.lock, names.queue, names.fence))
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

// claimant is what all claims of one mutex have in common: which lock they are for, and
// what is made once for all of them. It does not change after New.
type claimant struct {
	node      node
	names     names
	ttl       time.Duration
	grace     time.Duration // for which the lock is kept for whoever is handed it
	signature signature

	adapter redsyncredis.Conn // redsync's own
	options []redsync.Option
	fixed   struct{ lock, queue, fence, ttl, grace any } // arguments, as go-redis takes them
}

// signature is what a claim says of itself besides its ticket.
type signature struct {
	fencing bool   // it asks for a fencing token
	owner   string // whose it is, for people; "" if that is not said
}

// minted tells whether a hold comes with a token, which also tells since when it is.
func (s signature) minted() bool { return s.fencing || s.owner != "" }

func newClaimant(n node, names names, ttl time.Duration) claimant {
	adapter, _ := n.adapter().Get(context.Background()) // never fails
	ct := claimant{
		node:    n,
		names:   names,
		ttl:     ttl,
		grace:   min(ttl, maxGrace),
		adapter: adapter,
		options: []redsync.Option{
			redsync.WithExpiry(ttl),
			redsync.WithGenValueFunc(noValue),
		},
	}
	ct.fixed.lock, ct.fixed.queue, ct.fixed.fence = names.lock, names.queue, names.fence
	ct.fixed.ttl, ct.fixed.grace = ttl.Milliseconds(), ct.grace.Milliseconds()
	return ct
}

// answerTime is for how long the answer to a request for the lock is waited for.
func answerTime(ttl time.Duration) time.Duration { return min(max(ttl, minAnswerTime), maxAnswerTime) }

// noValue is redsync's value for a lock, as the ticket has been sent.
func noValue() (string, error) { return "", nil }

// claim is one ticket on its way to the lock. Not for use by two goroutines at once, but
// for abandon and extend.
type claim struct {
	*claimant
	ticket string
	own    struct{ ticket, tombstone any } // arguments, as go-redis takes them

	port  port           // tells redsync what Redis has answered to try and release
	mutex *redsync.Mutex // works on port

	since string    // place in the queue to ask for, see acquire.lua
	seen  sight     // by the latest try; zero if it was not answered
	end   time.Time // of the hold on our own clock, if it is not extended; zero if there is none

	releasing time.Time             // when release was called first
	ended     atomic.Pointer[int64] // what abandon was told of the ticket
}

// claim returns a claim with a new ticket, whose hand-over is told to inbox; "" is one
// that nobody hears.
func (ct *claimant) claim(inbox string) *claim {
	name := make([]byte, 0, 256)
	name = appendTicket(append(name, ct.names.ended...), inbox, ct.signature.owner)
	tombstone := string(name)
	c := &claim{claimant: ct, ticket: tombstone[len(ct.names.ended):]}
	c.own.ticket, c.own.tombstone = c.ticket, tombstone
	c.port = port{Conn: ct.adapter, claim: c}
	c.mutex = ct.mutex(&c.port)
	return c
}

// inLine makes the following tries ask for a place in the queue; since is the one
// of an earlier ticket, if it had one. The ticket's inbox must be listened to.
func (c *claim) inLine(since string) { c.since = cmp.Or(since, "0") }

// inbox is where a hand-over to the ticket is told.
func (c *claim) inbox() string {
	inbox, _, _ := splitTicket(c.ticket)
	return inbox
}

// place is where the ticket stands in the queue, to be taken over by another.
func (c *claim) place() string { return c.since }

// try asks for the lock once. The error is errTooLate if it was granted but is no
// longer valid; after any error the ticket's fate is unknown: end it.
func (c *claim) try(ctx context.Context) (sight, error) {
	bounded, cancel := bound(ctx, answerTime(c.ttl))
	defer cancel()
	sent := time.Now()
	var err error
	c.seen, err = c.runAcquire(bounded)
	if err == nil && c.seen.status != "held" {
		return c.seen, nil
	}
	return c.seen, given(ctx, c.judge(sent, err))
}

// accept is try for a claim that was given the lock by a release in this process.
func (c *claim) accept(ctx context.Context, g *grant) (sight, error) {
	c.seen = sight{status: "held", token: g.token}
	if err := ctxErr(ctx); err != nil {
		return c.seen, err
	}
	return c.seen, c.judge(g.sent, nil)
}

// judge has redsync judge the answer to a request for the lock: that it was granted, or
// an error. redsync counts the hold's validity from when it is told; here it counts from
// when the request was sent.
func (c *claim) judge(sent time.Time, err error) error {
	c.port.held, c.port.err = err == nil, err
	failed := c.mutex.TryLockContext(answered)
	if err != nil {
		return failed
	}
	now := time.Now()
	end := c.mutex.Until().Add(-now.Sub(sent))
	if failed != nil || !now.Before(end) {
		return errTooLate
	}
	c.end = end
	return nil
}

// token is the fencing token that the claim was granted with, 0 if none was asked for.
func (c *claim) token() int64 { return c.seen.token }

// until is when the hold that was granted ends on our own clock, if it is not
// extended.
func (c *claim) until() time.Time { return c.end }

// extend lets the hold last for the ttl from now on, and returns when it ends then.
// The error matches ErrLockLost if it was lost before.
func (c *claim) extend(ctx context.Context) (until time.Time, err error) {
	// A mutex of its own: redsync's are not safe for concurrent use.
	m := c.claimant.mutex(&port{Conn: c.adapter, claim: c})
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

// heir is a waiter of this process that gets the lock from a release if it is the first
// in the queue, for its whole ttl: the reply tells of it, so no message has to.
type heir struct {
	ticket string
	ttl    time.Duration
	minted bool // it comes with a token

	// What is known after the release.
	grant   *grant // nil if it was not given the lock
	unknown bool   // whether it was: the answer was lost
}

// grant is a lock that was given away by a release.
type grant struct {
	ticket string
	sent   time.Time // before the release was
	token  int64     // 0 if none was asked for
}

// releaseTo gives the lock back, to the heir if there is one and it is next. The error
// matches ErrLockLost if the lock was lost before. It takes no notice of the end of ctx,
// and is bounded by cleanUpTime. A fault that passes is not told: after a restart all of
// a client's pooled connections may be dead, and go-redis tries no more than four.
func (c *claim) releaseTo(ctx context.Context, to *heir) error {
	if c.releasing.IsZero() {
		c.releasing = time.Now()
	}
	if ended := c.ended.Load(); ended != nil && *ended >= fateReleased {
		return nil
	}
	ctx, cancel := bound(detached(ctx), cleanUpTime)
	defer cancel()
	for start := time.Now(); ; {
		err := c.releaseOnce(ctx, to)
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

func (c *claim) releaseOnce(ctx context.Context, to *heir) error {
	c.port.fate, c.port.err = c.runRelease(ctx, to)
	_, err := c.mutex.UnlockContext(answered)
	var taken *redsync.ErrTaken
	switch {
	case err == nil:
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
	ctx, cancel := context.WithTimeout(detached(ctx), cleanUpTime)
	go func() {
		defer cancel()
		for pause := firstPause; ; pause *= 2 {
			fate, err := c.runRelease(ctx, nil)
			if err == nil {
				c.ended.Store(&fate)
			}
			if err == nil || errors.Is(err, redis.ErrClosed) || sleep(ctx, jitter(pause/2, pause)) != nil {
				return
			}
		}
	}()
}

// request is that of a script on the keys of the claim, and on that of tokens if one is
// to be minted.
func (c *claim) request(s script, minted bool, args ...any) []any {
	request := append(make([]any, 0, 16), "evalsha", s.hash, 3, c.fixed.lock, c.fixed.queue, c.own.tombstone)
	if minted {
		request = append(request, c.fixed.fence)
		request[2] = 4
	}
	return append(request, args...)
}

// runAcquire runs the acquire script.
func (c *claim) runAcquire(ctx context.Context) (sight, error) {
	request := c.request(acquireScript, c.signature.minted(), c.own.ticket, c.fixed.ttl, c.fixed.grace)
	if c.since != "" {
		request = append(request, c.since)
	}
	reply, err := c.node.run(ctx, acquireScript, request)
	if err != nil {
		return sight{}, err
	}
	seen := sight{rank: -1}
	switch fields, _ := reply.([]any); {
	case reply == int64(1):
		seen.status = "held"
	case reply == int64(0):
		seen.status = "ended"
	case len(fields) == 1:
		seen.status, seen.token = "held", tokenIn(fields[0])
	case len(fields) == 4:
		seen.status = "taken"
		seen.holder, _ = fields[0].(string)
		ttl, _ := fields[1].(int64)
		seen.ttl = time.Duration(ttl) * time.Millisecond
		rank, _ := fields[2].(int64)
		seen.rank = int(rank)
		c.since, _ = fields[3].(string)
	default:
		return sight{}, fmt.Errorf("unexpected reply %v", reply)
	}
	return seen, nil
}

// The fate of a ticket, in the numbers of redsync's own scripts.
const (
	fateGone     int64 = -1 // it did not hold the lock, and nobody does
	fateTaken    int64 = 0  // it did not hold the lock, and somebody does
	fateReleased int64 = 1  // it held the lock
)

// runRelease runs the release script, and notes in to what became of the heir.
func (c *claim) runRelease(ctx context.Context, to *heir) (fate int64, err error) {
	request := c.request(releaseScript, to != nil && to.minted, c.own.ticket, c.fixed.grace)
	if to != nil {
		untold := ""
		if to.ttl < longestWait {
			untold = "untold"
		}
		request = append(request, to.ticket, to.ttl.Milliseconds(), untold)
	} else {
		to = &heir{}
	}
	to.unknown = true // until that is answered
	sent := time.Now()
	reply, err := c.node.run(ctx, releaseScript, request)
	if err != nil {
		return 0, err
	}
	fate, _ = reply.(int64)
	fields, _ := reply.([]any)
	switch {
	case len(fields) == 1:
		to.grant = &grant{to.ticket, sent, tokenIn(fields[0])}
	case fate == 3:
		to.grant = &grant{ticket: to.ticket, sent: sent}
	case fate == 2:
		return fateReleased, nil // by an earlier copy of the request; what that did is not known
	default:
		to.unknown = false
		return fate, nil
	}
	to.unknown = false
	return fateReleased, nil
}

// tokenIn is the fencing token in a reply, 0 if there is none.
func tokenIn(reply any) int64 {
	text, _ := reply.(string)
	token, _ := strconv.ParseInt(text, 10, 64)
	return token
}

// port is the connection that redsync is given for a claim: its own adapter, but for what
// differs. To take the lock and to release it, the request has been made before, and
// redsync is told the answer and judges it. It would make it on a goroutine that it
// starts, whose stack has to grow for that each time: a fifth of the client's work.
type port struct {
	redsyncredis.Conn
	claim *claim
	ctx   context.Context // of redsync's request

	held bool  // the answer to a try
	fate int64 // the answer to a release
	err  error // what came instead of either
}

// pool is a port as the pool that it comes from.
type pool port

var (
	_ redsyncredis.Conn = (*port)(nil)
	_ redsyncredis.Pool = (*pool)(nil)
)

// answered is the ctx of what takes no time. It has a deadline for redsync to need no
// timer.
var answered context.Context = unwatched{context.Background(), time.Time{}}

// mutex returns a redsync.Mutex that works on p.
func (ct *claimant) mutex(p *port) *redsync.Mutex {
	return redsync.New((*pool)(p)).NewMutex(ct.names.lock, ct.options...)
}

func (p *pool) Get(ctx context.Context) (redsyncredis.Conn, error) {
	p.ctx = ctx
	return (*port)(p), nil
}

// SetNX is redsync's acquire.
func (p *port) SetNX(string, string, time.Duration) (bool, error) { return p.held, p.err }

// Eval is redsync's delete, also after each try that failed, or, with a third argument,
// its touch.
func (p *port) Eval(_ *redsyncredis.Script, keysAndArgs ...any) (any, error) {
	if isDelete := len(keysAndArgs) == 2; isDelete {
		return p.fate, p.err
	}
	c := p.claim
	return c.node.run(p.ctx, extendScript, extendScript.request(1, c.fixed.lock, c.own.ticket, c.fixed.ttl))
}

// detached returns ctx without its end.
func detached(ctx context.Context) context.Context {
	if ctx.Done() == nil {
		return ctx
	}
	return context.WithoutCancel(ctx)
}

// bound returns ctx with a time limit. If ctx has no end of its own only a connection's
// deadline sees to it: to watch a Done takes a goroutine or two for each request. In a
// cluster that is done all the same, see cluster.run.
func bound(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	if ctx.Done() != nil {
		return context.WithTimeout(ctx, limit)
	}
	return unwatched{ctx, time.Now().Add(limit)}, func() {}
}

// unwatched is a ctx that has a deadline but does not end with it. Nor does one that is
// derived from it with a later deadline.
type unwatched struct {
	context.Context
	deadline time.Time
}

func (u unwatched) Deadline() (time.Time, bool) { return u.deadline, true }

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

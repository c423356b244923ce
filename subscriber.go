package dmutex

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-redis/redis/v8"
)

const (
	// linger is how long a subscriber outlives its last listener, so that a busy
	// client does not open a connection for each wait.
	linger = 2 * time.Second

	// tickEvery is how often a subscriber looks after itself, and probeEvery how
	// often it makes the server answer.
	tickEvery  = time.Second
	probeEvery = 3 * time.Second

	// silence is how long a connection is believed without a sign of life.
	silence = 7 * time.Second

	// subscribeTime bounds the wait for the first subscription of a connection.
	subscribeTime = 3 * time.Second

	// refusedPause follows a refusal, which takes an operator to change, and
	// brokenPause any other failure.
	refusedPause = 10 * time.Second
	brokenPause  = 300 * time.Millisecond

	// doubtAfter is how old a connection must be before it is given up because what
	// came over it proved untrue. That may have come late, too.
	doubtAfter = 5 * time.Second

	// probeChannel is never subscribed; an UNSUBSCRIBE of it is answered all the
	// same, while go-redis's own health check takes no answer for a good sign.
	probeChannel = "dmutex-probe"
)

var (
	errSilent   = errors.New("dmutex: the subscription gives no sign of life")
	errDoubtful = errors.New("dmutex: the subscription is on another server than the locks")
)

// subscribers has one subscriber for each client that somebody waits on, and
// nothing else. It is the only state of the package, but for warned and flights.
var subscribers = registry{byClient: map[any]*subscriber{}, lines: map[lineID][]*listener{}}

type registry struct {
	mu       sync.Mutex // guards the fields below and what each subscriber says it guards
	byClient map[any]*subscriber
	lines    map[lineID][]*listener // who waits for one lock, first come first; no line is empty
}

// lineID names a lock: its key, and what is shared by the copies of a client.
type lineID struct {
	client any
	key    string
}

// warned is done when it was said that waiting goes by polling.
var warned sync.Once

// subscriber is the one pub/sub connection of a client, or of a cluster client to one
// of its masters, shared by all who wait on it. Its goroutine, run, owns the connection and ends by itself when nobody has
// listened for a while or the client is closed.
//
// What it delivers are hints to look at Redis again: a message, or "" when the
// server has confirmed a subscription. It does that after each reconnect too, and
// messages may have been missed before it.
type subscriber struct {
	server  server
	inbox   string        // id of the channel on which hand-overs are told
	changed chan struct{} // capacity 1: there is something new for tend

	// The rest is guarded by subscribers.mu.

	listeners int                               // who joined and did not leave
	idleSince time.Time                         // when the last one left
	tickets   map[string]*listener              // who waits for a hand-over to which ticket
	channels  map[string]map[*listener]struct{} // who listens to which channel; no set is empty

	deaf bool // the server refuses the inbox

	// The state of the connection.
	confirmed map[string]bool // channels that the server has confirmed
	inboxOnly bool            // it has refused another channel, so none is tried any more
	since     time.Time       // when the inbox was confirmed first
	lastSign  time.Time       // of life
	doubtful  bool            // what came over it proved untrue
}

// listener is one who waits. Its methods may be called by one goroutine at a time.
type listener struct {
	heard chan news // capacity 1; the latest
	sub   *subscriber

	ticket  string // "" if it waits for none
	channel string // "" if it listens to none
	line    lineID // zero if it stands in none
	place   int64  // in the queue, which decides that in the line
	claim   *claim // that of ticket, if it stands in a line
}

// news is what a listener is told.
type news struct {
	hint  string // a message, "" if it is only to look
	grant *grant // the lock, if it was given that
}

// join adds a listener on a server, which hears nothing yet.
func (r *registry) join(home server) *listener {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byClient[home.shared()]
	if s == nil {
		s = &subscriber{
			server:   home,
			inbox:    newInbox(),
			changed:  make(chan struct{}, 1),
			tickets:  map[string]*listener{},
			channels: map[string]map[*listener]struct{}{},
		}
		r.byClient[home.shared()] = s
		go s.run()
	}
	s.listeners++
	return &listener{heard: make(chan news, 1), sub: s}
}

// idle tells whether nobody has waited for a while, on any server.
func (r *registry) idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.byClient) == 0
}

// live tells whether hand-overs on a server are heard, so that a ticket for its
// subscriber's inbox may take a place in a queue at once.
func (r *registry) live(home server) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byClient[home.shared()]
	return s != nil && s.confirmed[inboxChannel(s.inbox)]
}

// expect waits for the hand-over to ticket, and to no earlier one any more.
func (l *listener) expect(ticket string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	delete(l.sub.tickets, l.ticket)
	l.leaveLineLocked()
	select {
	case <-l.heard: // it may be for the earlier one
	default:
	}
	l.ticket = ticket
	l.sub.tickets[ticket] = l
}

// standIn puts the listener, which waits for the hand-over to c, in a line at the place
// that c has in the queue.
func (l *listener) standIn(line lineID, c *claim) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	place, err := strconv.ParseInt(c.place(), 10, 64)
	if err != nil || l.claim == c {
		return
	}
	l.line, l.place, l.claim = line, place, c
	others := subscribers.lines[line]
	i, _ := slices.BinarySearchFunc(others, l, func(a, b *listener) int {
		return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.ticket, b.ticket)) // as Redis sorts
	})
	subscribers.lines[line] = slices.Insert(others, i, l)
}

// leaveLineLocked takes the listener out of its line, if it stands in one.
func (l *listener) leaveLineLocked() {
	if l.claim == nil {
		return
	}
	others := subscribers.lines[l.line]
	if i := slices.Index(others, l); len(others) == 1 {
		delete(subscribers.lines, l.line)
	} else {
		subscribers.lines[l.line] = slices.Delete(others, i, i+1)
	}
	l.claim = nil
}

// heir returns the first in a line, and what a release needs to know of it; nil if
// nobody stands there.
func (r *registry) heir(line lineID) (*listener, *heir) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lines) == 0 || len(r.lines[line]) == 0 {
		return nil, nil
	}
	l := r.lines[line][0]
	return l, &heir{ticket: l.ticket, ttl: l.claim.ttl, minted: l.claim.signature.minted()}
}

// inherit tells the listener what a release made of it, if there is anything to tell.
func (l *listener) inherit(h *heir) {
	if h.grant != nil || h.unknown {
		l.tell(h.ticket, news{grant: h.grant})
	}
}

// tell delivers news, if the listener still waits for the hand-over to ticket.
func (l *listener) tell(ticket string, n news) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if l.sub.tickets[ticket] == l {
		l.tellLocked(n)
	}
}

// on tells whether the listener is on a server.
func (l *listener) on(home server) bool { return l.sub.server.shared() == home.shared() }

// inbox is where the listener's tickets are to be told of, as of now.
func (l *listener) inbox() string {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if l.sub.deaf {
		return deaf + l.sub.inbox
	}
	return l.sub.inbox
}

// doubt says that a hand-over was told which there was not. That comes late, or from
// a server on which the locks are no longer, like a master that became a replica.
func (l *listener) doubt() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s := l.sub
	if s.confirmed != nil && time.Since(s.since) > doubtAfter {
		s.doubtful = true
		s.noteChange()
	}
}

// listen hears the messages on channel as well.
func (l *listener) listen(channel string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if l.channel == channel {
		return
	}
	l.channel = channel
	if l.sub.channels[channel] == nil {
		l.sub.channels[channel] = map[*listener]struct{}{}
		l.sub.noteChange()
	}
	l.sub.channels[channel][l] = struct{}{}
}

// hears tells whether the server has confirmed what the listener waits for: what
// is published from now on arrives, unless the connection is lost.
func (l *listener) hears() bool {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s := l.sub
	return (l.ticket == "" || s.confirmed[inboxChannel(s.inbox)]) &&
		(l.channel == "" || s.confirmed[l.channel])
}

// leave ends listening.
func (l *listener) leave() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s := l.sub
	delete(s.tickets, l.ticket)
	l.leaveLineLocked()
	if set := s.channels[l.channel]; set != nil {
		delete(set, l)
		if len(set) == 0 {
			delete(s.channels, l.channel)
			s.noteChange()
		}
	}
	if s.listeners--; s.listeners == 0 {
		s.idleSince = time.Now()
	}
}

// tellLocked delivers news in place of some that were not taken yet: the listener looks
// at Redis, and finds out what they said. Nobody else sends, so there is room.
func (l *listener) tellLocked(n news) {
	select {
	case <-l.heard:
	default:
	}
	l.heard <- n
}

func (s *subscriber) noteChange() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// run keeps a connection for as long as somebody listens.
func (s *subscriber) run() {
	for {
		err := s.serve()
		if err == nil {
			return
		}
		if errors.Is(err, redis.ErrClosed) {
			s.abandon()
			return
		}
		pause := brokenPause
		if refused(err) {
			pause = refusedPause
			s.goDeaf()
			warn(err)
		}
		if s.rest(pause) {
			return
		}
	}
}

// serve opens a connection and looks after it until it is of no more use; it
// returns nil once the subscriber is retired.
func (s *subscriber) serve() error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	defer s.disconnected()
	pubsub := s.server.subscribe(ctx)
	defer func() { _ = pubsub.Close() }()

	// Nobody else may use pubsub before the first message was received: go-redis
	// writes a field then that it reads when a call fails.
	inbox := inboxChannel(s.inbox)
	if err := subscribeFirst(ctx, pubsub, inbox); err != nil {
		return err
	}
	s.confirm(inbox)

	received := make(chan struct{})
	go func() {
		defer close(received)
		cancel(s.receive(ctx, pubsub))
	}()
	err := s.tend(ctx, pubsub)
	cancel(nil)
	_ = pubsub.Close()
	<-received
	return err
}

func subscribeFirst(ctx context.Context, pubsub *redis.PubSub, channel string) error {
	ctx, cancel := context.WithTimeout(ctx, subscribeTime)
	defer cancel()
	if err := pubsub.Subscribe(ctx, channel); err != nil {
		return err
	}
	_, err := pubsub.ReceiveTimeout(ctx, subscribeTime)
	return err
}

// tend subscribes what is listened to, for as long as the connection lives and
// somebody listens. Nobody else writes on it.
func (s *subscriber) tend(ctx context.Context, pubsub *redis.PubSub) error {
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	has := map[string]bool{inboxChannel(s.inbox): true}
	probed := time.Now()
	for {
		// An error here is one that receive meets as well.
		missing, surplus := s.compare(has)
		for _, channel := range missing { // one by one: a refusal is for all of a command
			has[channel] = true
			_ = pubsub.Subscribe(ctx, channel)
		}
		for _, channel := range surplus {
			delete(has, channel)
			_ = pubsub.Unsubscribe(ctx, channel)
		}
		if time.Since(probed) >= probeEvery {
			probed = time.Now()
			_ = pubsub.Unsubscribe(ctx, probeChannel)
		}

		select {
		case <-s.changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			if s.retire() {
				return nil
			}
		}
		if err := s.fault(); err != nil {
			return err
		}
	}
}

// receive delivers what arrives. go-redis reconnects and subscribes again by
// itself when a connection is lost.
func (s *subscriber) receive(ctx context.Context, pubsub *redis.PubSub) error {
	lost := 0
	for {
		message, err := pubsub.Receive(ctx)
		switch {
		case err == nil:
			lost = 0
			s.deliver(message)
		case errors.Is(err, redis.ErrClosed):
			return err
		case refused(err):
			if !s.restrict() {
				return err
			}
			warn(err)
		case isAnswer(err): // it may pass, but it has lost us the channels
			return err
		default:
			s.disconnected()
			if lost++; lost > 1 && sleep(ctx, brokenPause) != nil {
				return err
			}
		}
	}
}

func (s *subscriber) deliver(message any) {
	subscribers.mu.Lock()
	s.lastSign = time.Now()
	subscribers.mu.Unlock()
	switch message := message.(type) {
	case *redis.Subscription:
		if message.Kind == "subscribe" {
			s.confirm(message.Channel)
		}
	case *redis.Message:
		s.dispatch(message.Channel, message.Payload)
	}
}

// dispatch delivers a message: in the inbox, to the one that waits for the ticket
// which it begins with, or to all who wait if it begins with none; on any other
// channel, to all who listen there.
func (s *subscriber) dispatch(channel, payload string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if channel == inboxChannel(s.inbox) {
		ticket, hint, _ := strings.Cut(payload, " ")
		if l := s.tickets[ticket]; l != nil {
			if hint == "" || len(l.heard) == 0 { // one that only tells a time is worth least
				l.tellLocked(news{hint: cmp.Or(hint, ticket)})
			}
		} else if !isTicket(ticket) {
			s.tellTicketsLocked()
		}
	}
	for l := range s.channels[channel] {
		l.tellLocked(news{hint: payload})
	}
}

// confirm notes that channel is subscribed, and has all who listen to it look.
func (s *subscriber) confirm(channel string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s.lastSign = time.Now()
	if s.confirmed == nil {
		s.confirmed = map[string]bool{}
		s.since = s.lastSign
	}
	s.confirmed[channel] = true
	if channel == inboxChannel(s.inbox) {
		s.deaf = false
		s.tellTicketsLocked()
	}
	for l := range s.channels[channel] {
		l.tellLocked(news{})
	}
}

func (s *subscriber) tellTicketsLocked() {
	for _, l := range s.tickets {
		l.tellLocked(news{})
	}
}

// disconnected forgets what the lost connection had.
func (s *subscriber) disconnected() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s.confirmed, s.inboxOnly, s.doubtful = nil, false, false
}

// goDeaf notes that the inbox is refused, and lets those look who wait to be told.
func (s *subscriber) goDeaf() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s.deaf = true
	s.tellTicketsLocked()
}

// restrict notes that a channel was refused; false if it was the inbox, alone or
// together with the others after a reconnect.
func (s *subscriber) restrict() bool {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if !s.confirmed[inboxChannel(s.inbox)] {
		return false
	}
	s.inboxOnly = true
	s.noteChange()
	return true
}

// compare returns the channels that are listened to but not subscribed yet, and
// those that are subscribed for nothing.
func (s *subscriber) compare(has map[string]bool) (missing, surplus []string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	for channel := range s.channels {
		if !has[channel] && !s.inboxOnly {
			missing = append(missing, channel)
		}
	}
	for channel := range has {
		if channel != inboxChannel(s.inbox) && (s.channels[channel] == nil || s.inboxOnly) {
			surplus = append(surplus, channel)
			delete(s.confirmed, channel)
		}
	}
	return missing, surplus
}

// fault tells why the connection is of no more use, if it is not.
func (s *subscriber) fault() error {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	switch {
	case s.doubtful:
		return errDoubtful
	case time.Since(s.lastSign) > silence:
		return errSilent
	}
	return nil
}

// rest waits before the next connection; true if the subscriber was retired.
func (s *subscriber) rest(pause time.Duration) (retired bool) {
	tick := time.NewTicker(min(pause, tickEvery))
	defer tick.Stop()
	for end := time.Now().Add(pause); time.Now().Before(end); {
		<-tick.C
		if s.retire() {
			return true
		}
	}
	return false
}

// retire takes the subscriber out of the registry if nobody has listened for a
// while; whoever joins after that gets a new one.
func (s *subscriber) retire() bool {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if s.listeners > 0 || time.Since(s.idleSince) < linger {
		return false
	}
	delete(subscribers.byClient, s.server.shared())
	return true
}

// abandon takes the subscriber of a closed client out of the registry, and has
// all who listen look, to find the client closed.
func (s *subscriber) abandon() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	delete(subscribers.byClient, s.server.shared())
	s.tellTicketsLocked()
	for _, set := range s.channels {
		for l := range set {
			l.tellLocked(news{})
		}
	}
}

func warn(err error) {
	warned.Do(func() {
		slog.Warn("dmutex: Redis refuses SUBSCRIBE, so waiting goes by polling", "error", err)
	})
}

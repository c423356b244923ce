package dmutex

import (
	"context"
	"errors"
	"log/slog"
	"slices"
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

	// probeChannel is never subscribed; an UNSUBSCRIBE of it is answered all the
	// same, while go-redis's own health check takes no answer for a good sign.
	probeChannel = "dmutex-probe"
)

var errSilent = errors.New("dmutex: the subscription gives no sign of life")

// subscribers has one subscriber for each client that somebody waits on, and
// nothing else. It is the only state of the package.
var subscribers = registry{byClient: map[any]*subscriber{}}

type registry struct {
	mu       sync.Mutex // guards byClient and what each subscriber says it guards
	byClient map[any]*subscriber
}

// subscriber is the one pub/sub connection of a client, shared by all who wait on
// it. Its goroutine, run, owns the connection and ends by itself when nobody has
// listened for a while or the client is closed.
//
// What it delivers are hints to look at Redis again: a message, or "" when the
// server has confirmed a subscription. It does that after each reconnect too, and
// messages may have been missed before it.
type subscriber struct {
	node    node
	inbox   string        // id of the channel on which hand-overs are told
	changed chan struct{} // capacity 1: the channels to subscribe are others now

	warnOnce sync.Once

	// The rest is guarded by subscribers.mu.

	listeners int                               // who joined and did not leave
	idleSince time.Time                         // when the last one left
	tickets   map[string]*listener              // who waits for a hand-over to which ticket
	channels  map[string]map[*listener]struct{} // who listens to which channel; no set is empty

	confirmed map[string]bool // channels that the server has confirmed on this connection
	asked     []string        // channels asked for on this connection and not answered yet, oldest first
	refused   map[string]bool // channels that this connection may not subscribe
	lastSign  time.Time       // of life, on this connection
}

// listener is one who waits. Its methods may be called by one goroutine at a time.
type listener struct {
	heard chan string // capacity 1; the latest hint
	sub   *subscriber

	ticket  string // "" if it waits for none
	channel string // "" if it listens to none
}

// join adds a listener on n's client, which hears nothing yet.
func (r *registry) join(n node) *listener {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byClient[n.shared()]
	if s == nil {
		s = &subscriber{
			node:     n,
			inbox:    newInbox(),
			changed:  make(chan struct{}, 1),
			tickets:  map[string]*listener{},
			channels: map[string]map[*listener]struct{}{},
		}
		r.byClient[n.shared()] = s
		go s.run()
	}
	s.listeners++
	return &listener{heard: make(chan string, 1), sub: s}
}

// live tells whether hand-overs to n's client are heard, so that a ticket for its
// inbox may take a place in a queue at once.
func (r *registry) live(n node) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.byClient[n.shared()]
	return s != nil && s.confirmed[inboxChannel(s.inbox)]
}

// expect waits for the hand-over to ticket, and to no earlier one any more.
func (l *listener) expect(ticket string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	delete(l.sub.tickets, l.ticket)
	l.ticket = ticket
	l.sub.tickets[ticket] = l
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

// tellLocked delivers a hint in place of one that was not taken yet. Nobody else
// sends, so there is room.
func (l *listener) tellLocked(hint string) {
	select {
	case <-l.heard:
	default:
	}
	l.heard <- hint
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
			s.warn(err)
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
	pubsub := s.node.subscribe(ctx)
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
			if s.silentFor() > silence {
				return errSilent
			}
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
			s.warn(err)
			if !s.refuse() {
				return err
			}
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
// which it begins with; on any other channel, to all who listen there.
func (s *subscriber) dispatch(channel, payload string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if channel == inboxChannel(s.inbox) {
		ticket, hint, _ := strings.Cut(payload, " ")
		if l := s.tickets[ticket]; l != nil {
			l.tellLocked(hint)
		}
	}
	for l := range s.channels[channel] {
		l.tellLocked(payload)
	}
}

// confirm notes that channel is subscribed, and has all who listen to it look.
func (s *subscriber) confirm(channel string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s.lastSign = time.Now()
	s.asked = slices.DeleteFunc(s.asked, func(c string) bool { return c == channel })
	if s.confirmed == nil {
		s.confirmed = map[string]bool{}
	}
	s.confirmed[channel] = true
	if channel == inboxChannel(s.inbox) {
		for _, l := range s.tickets {
			l.tellLocked("")
		}
	}
	for l := range s.channels[channel] {
		l.tellLocked("")
	}
}

// disconnected forgets what the lost connection had.
func (s *subscriber) disconnected() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	s.confirmed, s.asked, s.refused = nil, nil, nil
}

// warn says once that waiting goes by polling.
func (s *subscriber) warn(err error) {
	s.warnOnce.Do(func() {
		slog.Warn("dmutex: Redis refuses SUBSCRIBE, so waiting goes by polling", "error", err)
	})
}

// refuse notes that the server refused the oldest channel asked for; false if
// none was, so that it must have been all of them, after a reconnect.
func (s *subscriber) refuse() bool {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	if len(s.asked) == 0 {
		return false
	}
	if s.refused == nil {
		s.refused = map[string]bool{}
	}
	s.refused[s.asked[0]] = true
	s.asked = s.asked[1:]
	s.noteChange()
	return true
}

// compare returns the channels that are listened to but not subscribed yet, which
// it notes as asked for, and those that are subscribed for nothing.
func (s *subscriber) compare(has map[string]bool) (missing, surplus []string) {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	for channel := range s.channels {
		if !has[channel] && !s.refused[channel] {
			missing = append(missing, channel)
		}
	}
	for channel := range has {
		if channel != inboxChannel(s.inbox) && (s.channels[channel] == nil || s.refused[channel]) {
			surplus = append(surplus, channel)
			delete(s.confirmed, channel)
		}
	}
	s.asked = append(s.asked, missing...)
	return missing, surplus
}

func (s *subscriber) silentFor() time.Duration {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	return time.Since(s.lastSign)
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
	delete(subscribers.byClient, s.node.shared())
	return true
}

// abandon takes the subscriber of a closed client out of the registry, and has
// all who listen look, to find the client closed.
func (s *subscriber) abandon() {
	subscribers.mu.Lock()
	defer subscribers.mu.Unlock()
	delete(subscribers.byClient, s.node.shared())
	for _, l := range s.tickets {
		l.tellLocked("")
	}
	for _, set := range s.channels {
		for l := range set {
			l.tellLocked("")
		}
	}
}

package rig

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"time"
)

// Proxy is a network between clients and a server that can be made to misbehave.
type Proxy struct {
	Addr string

	tb       testing.TB
	listener net.Listener
	running  sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	target  string
	delay   time.Duration
	holed   bool   // nothing passes, and nobody is told
	holedOn string // the same on connections on which a request had this in it
	refuses bool   // new connections are closed at once
	losing  []*loss
	lateTo  string // part of the request that is to be late
	late    time.Duration
	links   map[*link]struct{}
	closed  bool
}

// loss is a reply to be lost.
type loss struct {
	to   string // part of the request
	how  Loss
	done chan struct{} // closed when the request has been passed on
}

// Loss is a way to lose a reply.
type Loss int

const (
	Cut     Loss = iota // the connection is closed when the reply comes
	Swallow             // the connection stays, the reply never arrives
)

type link struct {
	client, server net.Conn

	lose  *Loss // what happens to the next reply; guarded by Proxy.mu
	holed bool  // guarded by Proxy.mu
}

// NewProxy starts a proxy to target on a loopback port; it ends with the test.
func NewProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{Addr: l.Addr().String(), tb: tb, target: target, listener: l, links: map[*link]struct{}{}}
	p.running.Go(p.accept)
	tb.Cleanup(func() {
		p.mu.Lock()
		p.closed = true
		p.mu.Unlock()
		_ = l.Close()
		p.CutAll()
		p.running.Wait()
	})
	return p
}

// Delay makes whatever passes take this long in each direction.
func (p *Proxy) Delay(d time.Duration) { p.set(func() { p.delay = d }) }

// BlackHole stops whatever passes, without telling anybody, until it is ended.
// What was sent meanwhile is gone.
func (p *Proxy) BlackHole(on bool) { p.set(func() { p.holed = on }) }

// BlackHoleOn does the same to each connection on which a request contains to, now
// or before long, but only to what the server sends.
func (p *Proxy) BlackHoleOn(to string) { p.set(func() { p.holedOn = to }) }

// Refuse closes new connections at once.
func (p *Proxy) Refuse(on bool) { p.set(func() { p.refuses = on }) }

// LoseReply loses the reply to the next request that contains to. The channel is
// closed when that request has been passed on to the server.
func (p *Proxy) LoseReply(to string, how Loss) <-chan struct{} {
	l := &loss{to, how, make(chan struct{})}
	p.set(func() { p.losing = append(p.losing, l) })
	return l.done
}

// Late makes the next request that contains to arrive d later than it would, even
// if the connection that it came on is closed meanwhile.
func (p *Proxy) Late(to string, d time.Duration) { p.set(func() { p.lateTo, p.late = to, d }) }

// Retarget makes new connections go to another server; the others stay.
func (p *Proxy) Retarget(addr string) { p.set(func() { p.target = addr }) }

// CutAll closes all connections.
func (p *Proxy) CutAll() {
	p.set(func() {
		for l := range p.links {
			_ = l.client.Close()
			_ = l.server.Close()
		}
	})
}

// BlackHoles tells on how many connections BlackHoleOn has worked.
func (p *Proxy) BlackHoles() (n int) {
	p.set(func() {
		for l := range p.links {
			if l.holed {
				n++
			}
		}
	})
	return n
}

func (p *Proxy) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		var target string
		p.set(func() { target = p.target })
		server, err := net.Dial("tcp", target)
		p.mu.Lock()
		if err != nil || p.refuses || p.closed {
			p.mu.Unlock()
			_ = client.Close()
			if err == nil {
				_ = server.Close()
			}
			continue
		}
		l := &link{client: client, server: server}
		p.links[l] = struct{}{}
		p.mu.Unlock()
		p.running.Go(func() { p.pass(l, client, server, p.request) })
		p.running.Go(func() { p.pass(l, server, client, p.reply) })
	}
}

// pass copies from one side to the other for as long as what allows it.
func (p *Proxy) pass(l *link, from, to net.Conn, what func(*link, []byte) (pass, cut bool)) {
	defer p.set(func() {
		_ = from.Close()
		_ = to.Close()
		delete(p.links, l)
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		time.Sleep(p.delayOf(buf[:n]))
		pass, cut := what(l, buf[:n])
		if cut {
			return
		}
		if pass {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

func (p *Proxy) delayOf(data []byte) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lateTo != "" && bytes.Contains(data, []byte(p.lateTo)) {
		p.lateTo = ""
		return p.delay + p.late
	}
	return p.delay
}

func (p *Proxy) request(l *link, data []byte) (pass, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.holed {
		return false, false
	}
	if p.holedOn != "" && bytes.Contains(data, []byte(p.holedOn)) {
		l.holed = true
	}
	for i, loss := range p.losing {
		if bytes.Contains(data, []byte(loss.to)) {
			p.losing = append(p.losing[:i:i], p.losing[i+1:]...)
			l.lose = &loss.how
			close(loss.done)
			break
		}
	}
	return true, false
}

func (p *Proxy) reply(l *link, _ []byte) (pass, cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if how := l.lose; how != nil {
		return false, *how == Cut
	}
	return !p.holed && !l.holed, false
}

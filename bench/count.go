package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// dial connects to a server and counts each request that is sent there.
func dial(ctx context.Context, addr string, requests *atomic.Int64) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 5 * time.Minute}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &countedConn{Conn: conn, requests: requests}, nil
}

// countedConn counts the requests that a client writes to it.
type countedConn struct {
	net.Conn
	requests *atomic.Int64
	stream   stream
}

func (c *countedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if begun := c.stream.read(b[:n]); begun > 0 {
		c.requests.Add(begun)
	}
	return n, err
}

// SyscallConn is what go-redis looks at to see whether a connection is still alive.
func (c *countedConn) SyscallConn() (syscall.RawConn, error) {
	if conn, ok := c.Conn.(syscall.Conn); ok {
		return conn.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// stream follows the requests of one connection, however they are cut into writes: a
// request is "*2\r\n", followed by as many strings, each "$3\r\nGET\r\n". A line that
// begins otherwise, between two requests, is one too.
type stream struct {
	strings int // of the request that are still to come
	skip    int // bytes of a string and its line end that are still to come
	line    bool
	kind    byte // first byte of the line, '$' or '*', or anything else
	number  int  // that is on the line
}

// read takes the next bytes, and returns how many requests have begun in them.
func (s *stream) read(b []byte) (begun int64) {
	for len(b) > 0 {
		switch {
		case s.skip > 0:
			n := min(s.skip, len(b))
			s.skip -= n
			b = b[n:]
		case !s.line:
			if s.strings == 0 {
				begun++
			}
			s.line, s.kind, s.number = true, b[0], 0
			if s.kind != '\n' {
				b = b[1:]
			}
		default:
			end := bytes.IndexByte(b, '\n')
			digits := b
			if end >= 0 {
				digits = b[:end]
			}
			for _, c := range digits {
				if c >= '0' && c <= '9' {
					s.number = 10*s.number + int(c-'0')
				}
			}
			if end < 0 {
				return begun
			}
			b = b[end+1:]
			s.line = false
			switch s.kind {
			case '*':
				s.strings = s.number
			case '$':
				s.strings--
				s.skip = s.number + len("\r\n")
			}
		}
	}
	return begun
}

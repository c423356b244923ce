package main

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	goredis "github.com/go-redis/redis/v8"
	"golang.org/x/sys/unix"
)

// patience is how long a process may take to start or to end.
const patience = 20 * time.Second

// server is a redis-server of our own.
type server struct {
	addr    string
	monitor *goredis.Client
	cmd     *exec.Cmd
	dir     string
}

// startServer starts a redis-server on a free loopback port that keeps nothing, by way of
// start.
func startServer(ctx context.Context, start starter) (_ *server, err error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "dmutex-bench-")
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(addr)
	s := &server{
		addr: addr,
		dir:  dir,
		cmd: exec.Command("redis-server",
			"--port", port, "--bind", host, "--save", "", "--appendonly", "no",
			"--dir", dir, "--logfile", filepath.Join(dir, "log")),
	}
	if err := start(s.cmd); err != nil {
		_ = os.RemoveAll(dir)
		return nil, fmt.Errorf("starting redis-server: %w", err)
	}
	s.monitor = goredis.NewClient(&goredis.Options{Addr: s.addr, MaxRetries: -1})
	for end := time.Now().Add(patience); s.monitor.Ping(ctx).Err() != nil; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) || ctx.Err() != nil {
			s.stop()
			return nil, errors.New("redis-server does not answer")
		}
	}
	return s, nil
}

func (s *server) stop() {
	_ = s.monitor.Close()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	_ = os.RemoveAll(s.dir)
}

// freeAddr is a loopback address that nobody listens on.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// cpuOf is the processor time that a process has used.
func cpuOf(pid int) time.Duration {
	const scheduled = 2 // not the ticks of user or system time, but what it got exactly
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &t); err != nil {
		panic(err)
	}
	return time.Duration(t.Nano())
}

// starter starts a process: anywhere, which is (*exec.Cmd).Start, or onOneCore.
type starter func(*exec.Cmd) error

// child is a process of this program that does a task.
type child struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *gob.Decoder
}

// pageFile is the descriptor of the shared page in a child: the first after the usual three.
const pageFile = 3

// startChild starts a process for a task, by way of start. ctx kills it.
func startChild(ctx context.Context, t task, page *os.File, start starter) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), taskVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	if page != nil {
		cmd.ExtraFiles = []*os.File{page}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := start(cmd); err != nil {
		return nil, fmt.Errorf("starting a process: %w", err)
	}
	return &child{cmd: cmd, stdin: stdin, out: gob.NewDecoder(stdout)}, nil
}

var errSilent = errors.New("a process did not answer")

// answer is what the child tells next: nothing but that it is ready, or what it found. It
// is killed if that takes for longer than d and what a busy machine may need.
func (c *child) answer(d time.Duration) (figures, error) {
	late := time.AfterFunc(d+patience, func() { _ = c.cmd.Process.Kill() })
	f := figures{}
	err := c.out.Decode(&f)
	switch inTime := late.Stop(); {
	case err != nil && !inTime:
		return nil, errSilent
	case err != nil:
		return nil, fmt.Errorf("a process ended early: %w", err)
	}
	return f, nil
}

// begin has the child do its work once.
func (c *child) begin() error {
	_, err := io.WriteString(c.stdin, "go\n")
	return err
}

// end lets the child end, or kills it if it does not.
func (c *child) end() error {
	_ = c.stdin.Close()
	late := time.AfterFunc(patience, func() { _ = c.cmd.Process.Kill() })
	defer late.Stop()
	err := c.cmd.Wait()
	if c.cmd.ProcessState.ExitCode() == overlapStatus {
		return errOverlap
	}
	return err
}

// onOneCore starts a process that may use but one core, the last that this one may use.
func onOneCore(cmd *exec.Cmd) (err error) {
	runtime.LockOSThread() // the affinity is the thread's, and what it starts inherits it
	defer runtime.UnlockOSThread()
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for core := len(all) * 64; one.Count() == 0; core-- {
		if all.IsSet(core) {
			one.Set(core)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &all)) }()
	return cmd.Start()
}

package main

import (
	"context"
	"net/url"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// etcdServer is a process of this program that is an etcd of one node.
type etcdServer struct {
	*child
	addr string
	dir  string
}

// startEtcd starts one, by way of start.
func startEtcd(ctx context.Context, start starter) (_ *etcdServer, err error) {
	e := &etcdServer{}
	if e.addr, err = freeAddr(); err != nil {
		return nil, err
	}
	if e.dir, err = os.MkdirTemp("", "dmutex-bench-"); err != nil {
		return nil, err
	}
	t := task{Scenario: "etcd", Peer: "etcd", Dir: e.dir, Setting: setting{Addr: e.addr}}
	if e.child, err = startChild(ctx, t, nil, start); err == nil {
		if _, err = e.answer(0); err == nil {
			return e, nil
		}
	}
	e.stop()
	return nil, err
}

func (e *etcdServer) stop() {
	if e.child != nil {
		_ = e.end()
	}
	_ = os.RemoveAll(e.dir)
}

// serveEtcd is what it does. It keeps its data as badly as the redis-server: that is not
// what is compared.
func (w *worker) serveEtcd() error {
	peerAddr, err := freeAddr()
	if err != nil {
		return err
	}
	clients, members := url.URL{Scheme: "http", Host: w.Setting.Addr}, url.URL{Scheme: "http", Host: peerAddr}
	c := embed.NewConfig()
	c.Dir, c.UnsafeNoFsync, c.LogLevel = w.Dir, true, "fatal"
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{clients}, []url.URL{clients}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{members}, []url.URL{members}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	server, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	defer server.Close()
	<-server.Server.ReadyNotify()
	return w.onGo(func() (figures, error) { return figures{}, nil })
}

type etcdClient struct {
	client  *clientv3.Client
	session *concurrency.Session
}

type etcdMutex struct{ *concurrency.Mutex }

func openEtcd(s setting) (client, error) {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.Addr}, Logger: zap.NewNop()})
	if err != nil {
		return nil, err
	}
	session, err := concurrency.NewSession(c, concurrency.WithTTL(int(s.TTL/time.Second)))
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return etcdClient{c, session}, nil
}

// mutex excludes the mutexes of other sessions only, so there may be one of a client.
func (c etcdClient) mutex(key string) mutex {
	return etcdMutex{concurrency.NewMutex(c.session, "/"+key)}
}

func (c etcdClient) close() {
	_ = c.session.Close()
	_ = c.client.Close()
}

func (m etcdMutex) lock(ctx context.Context) error { return m.Lock(ctx) }
func (m etcdMutex) unlock() error                  { return m.Unlock(context.Background()) }

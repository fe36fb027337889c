package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// The keys of the S3 server of a run.
const (
	farKey    = "bench"
	farSecret = "bench-secret"
)

// far is an S3 server behind a proxy that delays each answer, as a network does, and
// counts.
type far struct {
	address string // of the proxy
	dir     string // of the server's buckets
	delay   atomic.Int64
	down    atomic.Bool  // requests are cut off without an answer
	reads   atomic.Int64 // GET and HEAD
	writes  atomic.Int64
	bytes   atomic.Int64 // of the answers' bodies
	server  *exec.Cmd
	proxy   *http.Server
	done    sync.WaitGroup
}

// traffic is what a run moved.
type traffic struct{ reads, writes, bytes int64 }

func (t traffic) String() string {
	return fmt.Sprintf("%d reads, %d writes, %s", t.reads, t.writes, megabytes(t.bytes))
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (b *bench) startFar() (*far, error) {
	if b.cfg.gateway == "" {
		return nil, errors.New("name the S3 server with -s3")
	}
	dir, err := os.MkdirTemp(b.cfg.dir, "far-*")
	if err != nil {
		return nil, err
	}
	behind, err := freePort()
	if err != nil {
		return nil, err
	}
	f := &far{dir: filepath.Join(dir, "buckets")}
	if err := os.Mkdir(f.dir, 0o700); err != nil {
		return nil, err
	}
	f.server = exec.Command(b.cfg.gateway, "--access", farKey, "--secret", farSecret, "--port", behind, "--quiet", "posix", f.dir)
	f.server.Stderr = os.Stderr
	if err := f.server.Start(); err != nil {
		return nil, err
	}
	for {
		if c, err := net.Dial("tcp", behind); err == nil {
			_ = c.Close()
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, f.stop())
	}
	f.address = l.Addr().String()
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: behind})
			r.Out.Host = r.In.Host
		},
		Transport:     &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		FlushInterval: -1,
		ModifyResponse: func(r *http.Response) error {
			r.Body = &countedBody{r.Body, &f.bytes}
			return nil
		},
	}
	f.proxy = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			f.reads.Add(1)
		} else {
			f.writes.Add(1)
		}
		time.Sleep(time.Duration(f.delay.Load()))
		if f.down.Load() {
			panic(http.ErrAbortHandler)
		}
		pass.ServeHTTP(w, r)
	})}
	f.done.Go(func() { _ = f.proxy.Serve(l) })
	return f, nil
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

// count runs something and returns what it moved.
func (f *far) count(do func() error) (traffic, error) {
	reads, writes, bytes := f.reads.Load(), f.writes.Load(), f.bytes.Load()
	err := do()
	return traffic{f.reads.Load() - reads, f.writes.Load() - writes, f.bytes.Load() - bytes}, err
}

func (f *far) stop() error {
	var err error
	if f.proxy != nil {
		err = f.proxy.Close()
	}
	f.done.Wait()
	_ = f.server.Process.Kill()
	_ = f.server.Wait()
	return errors.Join(err, os.RemoveAll(filepath.Dir(f.dir)))
}

package csidriver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The agent is how the controller reaches the process of a node: a unix socket in the
// state directory with /alive, /freeze?path= and /thaw?path=. A lost node does not
// answer, and its volumes are unavailable.

// freezeLimit thaws what the controller left frozen: it may die while a node is frozen.
const freezeLimit = 30 * time.Second

type frozenPaths struct {
	mu     sync.Mutex
	timers map[string]*time.Timer
}

func (d *Driver) agentSocket(node string) string {
	return filepath.Join(d.cfg.State, "nodes", node+".sock")
}

func (d *Driver) serveAgent() (stop func(), err error) {
	l, err := listenUnix(d.agentSocket(d.cfg.Node))
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
	mux.HandleFunc("/alive", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/freeze", func(w http.ResponseWriter, r *http.Request) {
		answer(w, d.freezeHere(r.Context(), r.FormValue("path")))
	})
	mux.HandleFunc("/thaw", func(w http.ResponseWriter, r *http.Request) {
		answer(w, d.thawHere(r.FormValue("path")))
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			d.cfg.Log.Error("the node's agent stopped", "err", err)
		}
	}()
	return func() {
		_ = s.Close()
		<-done
		d.frozen.mu.Lock()
		paths := make([]string, 0, len(d.frozen.timers))
		for p := range d.frozen.timers {
			paths = append(paths, p)
		}
		d.frozen.mu.Unlock()
		for _, p := range paths {
			_ = d.thawHere(p)
		}
	}, nil
}

func (d *Driver) freezeHere(ctx context.Context, path string) error {
	d.frozen.mu.Lock()
	defer d.frozen.mu.Unlock()
	if _, ok := d.frozen.timers[path]; ok {
		return fmt.Errorf("%s is frozen already", path)
	}
	if _, err := run(ctx, "fsfreeze", "-f", path); err != nil {
		return err
	}
	if d.frozen.timers == nil {
		d.frozen.timers = map[string]*time.Timer{}
	}
	d.frozen.timers[path] = time.AfterFunc(freezeLimit, func() {
		if err := d.thawHere(path); err != nil {
			d.cfg.Log.Error("thaw after the time limit", "path", path, "err", err)
		}
	})
	return nil
}

func (d *Driver) thawHere(path string) error {
	d.frozen.mu.Lock()
	defer d.frozen.mu.Unlock()
	t, ok := d.frozen.timers[path]
	if !ok {
		return nil
	}
	t.Stop()
	delete(d.frozen.timers, path)
	// The caller may have died; a file system must not stay frozen.
	_, err := run(context.Background(), "fsfreeze", "-u", path)
	return err
}

func (d *Driver) askAgent(ctx context.Context, node, what, path string) error {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var nd net.Dialer
			return nd.DialContext(ctx, "unix", d.agentSocket(node))
		}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent/"+what+"?path="+url.QueryEscape(path), nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return status.Errorf(codes.Unavailable, "node %s does not answer: %v", node, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return status.Errorf(codes.Internal, "%s on node %s: %s", what, node, b)
	}
	return nil
}

func (d *Driver) agentAlive(ctx context.Context, node string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return d.askAgent(ctx, node, "alive", "")
}

// freeze stops writes to a staged volume. A Block volume has no file system to freeze;
// its node must still answer.
func (d *Driver) freeze(ctx context.Context, node, path string, filesystem bool) (thaw func(), err error) {
	if !filesystem {
		return func() {}, d.agentAlive(ctx, node)
	}
	if err := d.askAgent(ctx, node, "freeze", path); err != nil {
		return nil, err
	}
	return func() {
		if err := d.askAgent(context.WithoutCancel(ctx), node, "thaw", path); err != nil {
			d.cfg.Log.Error("thaw", "node", node, "path", path, "err", err)
		}
	}, nil
}

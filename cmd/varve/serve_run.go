package main

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/internal/serve"
	"github.com/varve-io/varve/nbdserver"
)

// listeners opens the listeners. A supervisor's sockets take precedence over flags.
func (f *serveFlags) listeners() ([]net.Listener, error) {
	if f.stdio {
		return nil, nil
	}
	ls, err := nbdserver.Activated()
	if err != nil || len(ls) > 0 {
		f.activated = true
		return ls, err
	}
	addresses := f.listen
	if len(addresses) == 0 {
		path, err := defaultSocket()
		if err != nil {
			return nil, err
		}
		addresses = []string{"unix:" + path}
	}
	for _, address := range addresses {
		l, err := nbdserver.Listen(address)
		if err == nil && f.tls.Certificate == "" && !f.insecure && !nbdserver.IsLocal(l.Addr()) {
			err = errors.Join(usagef("listen on %s: %w", l.Addr(), nbdserver.ErrNeedsTLS), l.Close())
		}
		if err != nil {
			closeAll(ls)
			return nil, err
		}
		ls = append(ls, l)
	}
	return ls, nil
}

func closeAll(ls []net.Listener) {
	for _, l := range ls {
		_ = l.Close()
	}
}

// serving is a running server.
type serving struct {
	*app
	flags     serveFlags
	catalog   *serve.Catalog
	cache     *image.Cache
	copies    *hydrate.Cache // nil without --hydrate
	listeners []net.Listener
	parent    int           // process that started this one
	opening   time.Duration // time to open the repository
	opened    time.Time     // when it was opened
}

func (s *serving) run(ctx context.Context, cfg nbdserver.Config) error {
	metrics, err := s.startMetrics(&cfg)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if s.flags.once {
		cfg.LastLeft = stop
	}
	srv, err := nbdserver.New(cfg)
	if err != nil {
		metrics.close()
		return usagef("%w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.catalog.Follow(ctx, s.flags.refresh) })
	g.Go(func() error { return metrics.serve() })
	for _, l := range s.listeners {
		g.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, nbdserver.ErrServerClosed) {
				return err
			}
			return nil
		})
	}
	if s.flags.stdio {
		g.Go(func() error {
			defer stop()
			return s.serveStdio(srv)
		})
	}
	if s.flags.parent {
		g.Go(func() error {
			if awaitParent(ctx, s.parent) == nil {
				s.log.Info("the process that started this server has ended; the server ends too", "process", s.parent)
				stop()
			}
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		metrics.close()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.flags.grace)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil {
			s.log.Warn("disconnected clients that did not end in time", "timeout", s.flags.grace)
		}
		srv.Close()
		return nil
	})
	if !s.flags.stdio {
		// Standard output belongs to the client that passed the socket, or is a journal.
		if !s.flags.activated {
			if err := s.announce(metrics); err != nil {
				stop()
				return errors.Join(err, g.Wait())
			}
		}
		s.log.Info("ready", "exports", s.catalog.Len(), "opening", s.opening, "after_opening", time.Since(s.opened))
	}
	err = g.Wait()
	if s.flags.writable && s.flags.overlays.Keep {
		if bytes, n := s.catalog.OverlayBytes(); n > 0 {
			s.log.Info("overlays are kept", "directory", s.flags.overlays.Dir, "overlays", n, "bytes", bytes)
		}
	}
	return err
}

func (s *serving) serveStdio(srv *nbdserver.Server) error {
	in, ok1 := s.stdin.(*os.File)
	out, ok2 := s.stdout.(*os.File)
	if !ok1 || !ok2 {
		return usagef("--stdio needs a socket or pipes as standard input and output")
	}
	c, err := nbdserver.Stdio(in, out)
	if err != nil {
		return err
	}
	// inetd and systemd pass connections of other machines, too.
	err = srv.ServeConn(c, nbdserver.IsLocalConn(c))
	if errors.Is(err, nbdserver.ErrNeedsTLS) {
		return usagef("serve %s on standard input: %w", c.RemoteAddr(), err)
	}
	return err
}

// loopbackIfBare adds the loopback address to a port without one.
func loopbackIfBare(address string) string {
	if !strings.Contains(address, ":") {
		address = ":" + address
	}
	if strings.HasPrefix(address, ":") {
		address = "127.0.0.1" + address
	}
	return address
}

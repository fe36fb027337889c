package nbddisk_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// one is a catalogue of one export, under any name.
type one struct{ export nbdserver.Export }

func (o one) List(context.Context, nbdserver.Client, func(nbdserver.Listing) bool) error { return nil }

func (o one) Open(_ context.Context, name string, _ nbdserver.Client) (*nbdserver.Opened, error) {
	return &nbdserver.Opened{Export: o.export, Name: name}, nil
}

// cutter is a listener that can end the connections it took.
type cutter struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
	taken int
	lost  bool // no more connections
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.taken++
		if c.conns = append(c.conns, conn); c.lost {
			_ = conn.Close()
		}
	}
	return conn, err
}

// cut ends all connections; with for good no further one lasts.
func (c *cutter) cut(forGood bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.conns, c.lost = nil, forGood
}

func (c *cutter) connections() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken
}

// serve serves an export on a socket until the test ends.
func serve(t *testing.T, export nbdserver.Export) (*nbdclient.URI, *cutter) {
	t.Helper()
	return serveCatalog(t, one{export})
}

func serveCatalog(t *testing.T, catalog nbdserver.Catalog) (*nbdclient.URI, *cutter) {
	t.Helper()
	srv, err := nbdserver.New(nbdserver.Config{Catalog: catalog})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	cut := &cutter{Listener: l}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(cut) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; !errors.Is(err, nbdserver.ErrServerClosed) {
			t.Errorf("Serve returned %v", err)
		}
	})
	return &nbdclient.URI{Network: "unix", Address: socket, Export: "disk"}, cut
}

func open(t *testing.T, uri *nbdclient.URI, opt nbddisk.Options) *nbddisk.Disk {
	t.Helper()
	d, err := nbddisk.Open(t.Context(), uri, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

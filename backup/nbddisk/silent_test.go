package nbddisk_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

// TestSilentAtFirst: a server that accepts a connection and says nothing ends an opening, and so does the caller.
func TestSilentAtFirst(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "nbd")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() // connections wait in its queue
	uri := &nbdclient.URI{Network: "unix", Address: socket, Export: "disk"}
	if _, err := nbddisk.Open(t.Context(), uri, nbddisk.Options{Patience: 10 * time.Millisecond}); !errors.Is(err, nbddisk.ErrSilent) {
		t.Errorf("opened: %v", err)
	}
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(10*time.Millisecond, func() { cancel(stopped) })
	if _, err := nbddisk.Open(ctx, uri, nbddisk.Options{}); !errors.Is(err, stopped) {
		t.Errorf("opened: %v", err)
	}
}

// TestSilentLater: a read that is not answered is sent again on another connection, and reading ends where no answer comes.
func TestSilentLater(t *testing.T) {
	t.Parallel()
	want := content(striped)
	disk := nbdtest.NewDisk(want)
	uri, _ := serve(t, disk.ReadOnly())
	hang := make(chan struct{})
	defer close(hang) // before the server ends, which waits for its requests
	var reads, silent atomic.Int64
	silent.Store(1)
	disk.Fail = func(int64, int64) error {
		if reads.Add(1) > 3 && silent.Add(-1) >= 0 {
			<-hang
		}
		return nil
	}
	d := openSoon(t, uri, nbddisk.Options{Retry: 5 * time.Minute})
	if !bytes.Equal(cbttest.ReadData(t, d, 65_000), want) {
		t.Error("the disk reads otherwise")
	}
	if silent.Load() >= 0 {
		t.Error("no read was left without an answer")
	}
	silent.Store(1 << 30)
	d = openSoon(t, uri, nbddisk.Options{})
	if _, err := d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, nbddisk.ErrSilent) {
		t.Errorf("read: %v", err)
	}
}

// openSoon opens a disk with little patience: no less than this machine takes at the moment to connect to a server that answers.
func openSoon(t *testing.T, uri *nbdclient.URI, opt nbddisk.Options) *nbddisk.Disk {
	t.Helper()
	for opt.Patience = 250 * time.Millisecond; ; opt.Patience *= 2 {
		d, err := nbddisk.Open(t.Context(), uri, opt)
		if errors.Is(err, nbddisk.ErrSilent) && opt.Patience < time.Minute {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = d.Close() })
		return d
	}
}

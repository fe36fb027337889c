package nbddisk_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/cbt/cbttest"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
)

const diskSize = 4 << 20

// content is a disk whose blocks hold what value says; 0 for zeroes.
func content(value func(block int64) byte) []byte {
	b := make([]byte, diskSize)
	for i := range b {
		if v := value(int64(i) / nbdtest.BlockSize); v != 0 {
			b[i] = v + byte(i%7)
		}
	}
	return b
}

func striped(block int64) byte { return byte(block / 16 % 3 * 50) }

func newDisk(t *testing.T, value func(int64) byte) (*nbdtest.Disk, *nbdclient.URI) {
	t.Helper()
	d := nbdtest.NewDisk(content(value))
	uri, _ := serve(t, d.Writable())
	return d, uri
}

// TestReconnect reads from a server that cuts all connections at every tenth access.
func TestReconnect(t *testing.T) {
	t.Parallel()
	want := content(striped)
	disk := nbdtest.NewDisk(want)
	uri, cut := serve(t, disk.ReadOnly())
	var n atomic.Int64
	disk.Fail = func(int64, int64) error {
		if n.Add(1)%10 == 0 {
			cut.cut(false)
		}
		return nil
	}
	d := open(t, uri, nbddisk.Options{Retry: time.Minute})
	if d.Connections() != nbddisk.DefaultConnections {
		t.Errorf("%d connections", d.Connections())
	}
	if !bytes.Equal(cbttest.ReadData(t, d, 65_000), want) {
		t.Error("the disk reads otherwise")
	}
	if cut.connections() <= nbddisk.DefaultConnections {
		t.Errorf("%d connections were made: none was cut", cut.connections())
	}
}

// TestReconnectElsewhere meets another disk where it connects again, and a server that is gone.
func TestReconnectElsewhere(t *testing.T) {
	t.Parallel()
	var other atomic.Bool
	small, large := nbdtest.NewDisk(content(striped)), nbdtest.NewEmptyDisk(2*diskSize)
	uri, cut := serve(t, choosing{small.ReadOnly(), large.ReadOnly(), &other})
	d := open(t, uri, nbddisk.Options{Retry: time.Minute})
	other.Store(true)
	cut.cut(false)
	if _, err := d.ReadAt(make([]byte, 4096), 0); !errors.Is(err, nbddisk.ErrOtherDisk) {
		t.Errorf("another disk: %v", err)
	}
	d = open(t, uri, nbddisk.Options{})
	cut.cut(true)
	if _, err := d.ReadAt(make([]byte, 4096), 0); err == nil || errors.Is(err, nbddisk.ErrOtherDisk) {
		t.Errorf("no server: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := nbddisk.Open(ctx, uri, nbddisk.Options{}); err == nil {
		t.Error("opened after the end")
	}
}

// choosing is one of two disks, for connections that are made from now on.
type choosing struct {
	nbdserver.Export
	other nbdserver.Export
	now   *atomic.Bool
}

func (c choosing) Size() int64 {
	if c.now.Load() {
		return c.other.Size()
	}
	return c.Export.Size()
}

func TestServerError(t *testing.T) {
	t.Parallel()
	disk := nbdtest.NewDisk(content(striped))
	uri, cut := serve(t, disk.ReadOnly())
	d := open(t, uri, nbddisk.Options{Retry: time.Minute})
	disk.Fail = func(int64, int64) error { return errors.New("bad sector") }
	before := cut.connections()
	if _, err := d.ReadAt(make([]byte, 4096), 0); err == nil {
		t.Error("read a bad sector")
	}
	if cut.connections() != before {
		t.Error("connected again because of a bad sector")
	}
	if _, err := d.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("read at a negative offset")
	}
	if n, err := d.ReadAt(make([]byte, 1), diskSize); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("read at the end: %d, %v", n, err)
	}
}

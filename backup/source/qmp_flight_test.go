package source_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// TestQMPWritesInFlight backs up disks that have a thread of their own, while many writes to each
// are in flight. The increment has the bytes of the moment. QEMU 7.2 aborts where a node is put
// above such a disk, or a client leaves it: each round has a daemon of its own, whose disks get
// their threads late, and which is killed with its clients.
func TestQMPWritesInFlight(t *testing.T) {
	t.Parallel()
	for range 10 {
		if writesInFlight(t); t.Failed() {
			return
		}
	}
}

func writesInFlight(t *testing.T) {
	d := startDaemon(t)
	socket := filepath.Join(d.dir, "n")
	type m = map[string]any
	d.do(t, "nbd-server-start", m{"addr": m{"type": "unix", "data": m{"path": socket}}})
	const size = 16 << 20
	var guests []*deepWriter
	for _, name := range []string{"vda", "vdb"} {
		path := filepath.Join(d.dir, name+".img")
		tool(t, "truncate", "-s", "16M", path)
		d.do(t, "object-add", m{"qom-type": "iothread", "id": "thread-" + name})
		// Writes wait here, and go on at once where QEMU waits for them.
		d.do(t, "object-add", m{"qom-type": "throttle-group", "id": "slow-" + name, "limits": m{"iops-total": 1000}})
		d.do(t, "blockdev-add", m{"driver": "raw", "node-name": name, "file": m{
			"driver": "throttle", "throttle-group": "slow-" + name, "file": m{"driver": "file", "filename": path},
		}})
		d.do(t, "block-export-add", m{"type": "nbd", "id": "guest-" + name, "node-name": name, "name": name, "writable": true})
		guests = append(guests, &deepWriter{t: t, socket: socket, disk: name, size: size})
	}
	uri := d.uri() + "?nbd=" + url.QueryEscape("nbd+unix:///?socket="+socket)
	before, err := machine{}.backup(t.Context(), uri, machine{}.options(t.TempDir()), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	opt := before.options(t.TempDir())
	opt.Step = func(step string) {
		for _, g := range guests {
			switch step {
			case "server":
				d.do(t, "block-export-add", m{
					"type": "nbd", "id": "thread-" + g.disk, "node-name": g.disk, "name": "thread-" + g.disk, "iothread": "thread-" + g.disk, "fixed-iothread": true,
				})
				g.start()
			case "open":
				g.stop()
			}
		}
	}
	s, err := source.Open(t.Context(), uri, opt)
	if err != nil {
		t.Fatal(err)
	}
	for _, disk := range s.Disks() {
		one, err := takeDisk(t.Context(), disk, before[disk.Name])
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		if _, err := disk.Bytes.ReadAt(want, 0); err != nil {
			t.Fatal(err)
		}
		if one.by != "bitmap" {
			t.Errorf("%s is by %s: %v", disk.Name, one.by, one.why)
		}
		if !bytes.Equal(one.bytes, want) {
			t.Errorf("the increment of %s lacks what was written", disk.Name)
		}
	}
	_ = d.cmd.Process.Kill()
	for _, g := range guests {
		_ = g.close()
	}
	_ = s.Close() // the machine is gone
}

// deepWriter keeps writes to a disk in flight, each to the next place of 64 KiB, for which a bitmap
// has a bit.
type deepWriter struct {
	t            *testing.T
	socket, disk string
	size, n      int64
	over         atomic.Bool
	all          sync.WaitGroup
	close        func() error
}

// start returns once some writes have ended and others are in flight.
func (w *deepWriter) start() {
	c, err := nbdclient.Dial(w.t.Context(), &nbdclient.URI{Network: "unix", Address: w.socket}, nil)
	if err != nil {
		w.t.Error(err)
		return
	}
	_, conn, err := c.HandOver(w.disk)
	if err != nil {
		w.t.Error(err)
		return
	}
	w.close = conn.Close
	const depth = 64
	flying, some := make(chan struct{}, depth), make(chan struct{})
	w.all.Go(func() {
		var answers sync.WaitGroup
		answers.Go(func() { w.answers(conn, flying, some) })
		w.write(conn, flying)
		close(flying)
		answers.Wait()
	})
	<-some
}

func (w *deepWriter) stop() {
	w.over.Store(true)
	w.all.Wait()
}

func (w *deepWriter) write(conn net.Conn, flying chan<- struct{}) {
	const length = 512
	data := make([]byte, 28+length)
	for !w.over.Load() {
		w.n++
		head := binary.BigEndian.AppendUint32(data[:0], 0x25609513)
		head = binary.BigEndian.AppendUint32(head, 1) // no flags, a write
		head = binary.BigEndian.AppendUint64(head, uint64(w.n))
		head = binary.BigEndian.AppendUint64(head, uint64(w.n<<16%w.size))
		head = binary.BigEndian.AppendUint32(head, length)
		binary.BigEndian.PutUint64(data[len(head):], uint64(w.n))
		flying <- struct{}{}
		if _, err := conn.Write(data); err != nil {
			w.t.Errorf("a guest's write: %v", err)
			return
		}
	}
}

func (w *deepWriter) answers(conn net.Conn, flying <-chan struct{}, some chan<- struct{}) {
	enough := sync.OnceFunc(func() { close(some) })
	defer enough()
	n := 0
	for range flying {
		var reply [16]byte
		if _, err := io.ReadFull(conn, reply[:]); err != nil || binary.BigEndian.Uint32(reply[4:]) != 0 {
			w.t.Errorf("a guest's write: %v, %x", err, reply)
			w.over.Store(true)
			break
		}
		if n++; n == 80 {
			enough()
		}
	}
	for range flying {
	}
}

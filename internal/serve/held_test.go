package serve

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// answered are metrics that tell of each answered request.
type answered chan proto.Errno

func (a answered) Connected(string) nbdserver.ExportMetrics { return a }

func (a answered) Request(_ proto.Command, _ int64, _ time.Duration, errno proto.Errno) { a <- errno }

func (a answered) Disconnected() {}

// A client that reads a few bytes of many blocks, and takes no replies, holds no more memory than
// the server takes for its requests, although the cache has dropped the blocks.
func TestShortReadsHoldNoBlocks(t *testing.T) {
	const block, size, reads = 1 << 20, 64 << 20, 200
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	r := repotest.New(t).Open(t)
	p, _, err := backup.Run(t.Context(), r, backup.Options{
		Volume: points.Volume{Namespace: "shop", Name: "db", Cluster: "c"}, Disk: memory(data), BlockSize: block,
	})
	if err != nil {
		t.Fatal(err)
	}
	cache := image.NewCache(4 << 20)
	defer cache.Close()
	c, err := Open(t.Context(), r, cache, Options{Cluster: "c", Linger: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	replies := make(answered, reads)
	_, socket := nbdtest.Serve(t, nbdserver.Config{Catalog: c, Metrics: replies, TotalMemory: 64 << 20, StallTimeout: time.Hour})
	client := nbdtest.Target{Dial: nbdtest.DialUnix(socket)}.DialOptions(t, nbdtest.Fixed)
	client.Go(p.Name())
	before := heap()
	place := func(i uint64) uint64 { return i*block%size + i*4096%block }
	for i := range uint64(reads) {
		client.Request(proto.CmdRead, 0, i, place(i), 4096)
	}
	for range reads {
		select {
		case errno := <-replies:
			if errno != 0 {
				t.Fatal(errno)
			}
		case <-time.After(nbdtest.Timeout):
			t.Fatal("not all requests are answered")
		}
	}
	// A worker has its block for a moment after it has counted the request.
	grown := heap() - before
	for end := time.Now().Add(nbdtest.Timeout); grown > 32<<20 && time.Now().Before(end); grown = heap() - before {
		time.Sleep(10 * time.Millisecond)
	}
	if grown > 32<<20 {
		t.Errorf("%d MiB are held for %d reads of 4 KiB", grown>>20, reads)
	}
	for range reads { // in any order
		reply := client.Read(proto.SimpleReplySize + 4096)
		at := place(binary.BigEndian.Uint64(reply[8:]))
		if !bytes.Equal(reply[proto.SimpleReplySize:], data[at:at+4096]) {
			t.Fatalf("other bytes at %d", at)
		}
	}
}

// heap returns the bytes in use.
func heap() int64 {
	runtime.GC()
	runtime.GC() // the first leaves what pools have
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A short copy does not take the memory of a long one.
func TestCopiesHaveTheirSize(t *testing.T) {
	newCopy(32 << 20).Release()
	for _, n := range []int{1, 4096, 4097, 128 << 10, 32 << 20} {
		c := newCopy(n)
		if len(c.b) != n || cap(c.b) >= 2*max(n, 4096) {
			t.Errorf("a copy of %d bytes has %d, and takes %d", n, len(c.b), cap(c.b))
		}
		c.Release()
	}
}

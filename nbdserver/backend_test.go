package nbdserver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"

	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

var _ backend.Backend = (*nbdserver.Backend)(nil)

// go-nbd's own server serves an export. It knows simple replies only, and
// greets without NO_ZEROES.
func TestGoNBDServesExport(t *testing.T) {
	d := nbdtest.NewDisk(nbdtest.Image())
	b := nbdserver.NewBackend(context.Background(), d.Writable())
	client, server := socketPair(t)
	served := make(chan error, 1)
	go func() {
		served <- gonbd.Handle(server, []*gonbd.Export{{Name: "disk", Backend: b}}, nil)
	}()
	if _, err := io.ReadFull(client, make([]byte, 18)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write(append([]byte{0, 0, 0, 1}, option(proto.OptGo, append(lenString("disk"), 0, 0))...)); err != nil {
		t.Fatal(err)
	}
	for { // answers to GO
		h := make([]byte, proto.OptionReplyHeaderSize)
		if _, err := io.ReadFull(client, h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, client, int64(binary.BigEndian.Uint32(h[16:]))); err != nil {
			t.Fatal(err)
		}
		if proto.Reply(binary.BigEndian.Uint32(h[12:])) == proto.RepAck {
			break
		}
	}
	want := nbdtest.Image()
	ask := func(req []byte, n int) []byte {
		t.Helper()
		if _, err := client.Write(req); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 16+n)
		if _, err := io.ReadFull(client, got); err != nil {
			t.Fatal(err)
		}
		return got[16:]
	}
	if got := ask(nbdtest.Request(proto.CmdRead, 0, 1, 4096, 65536), 65536); !bytes.Equal(got, want[4096:4096+65536]) {
		t.Error("go-nbd served other bytes")
	}
	ask(append(nbdtest.Request(proto.CmdWrite, 0, 2, 4096, 5), "hello"...), 0)
	if got := ask(nbdtest.Request(proto.CmdRead, 0, 3, 4096, 5), 5); string(got) != "hello" {
		t.Errorf("go-nbd served %q", got)
	}
	_ = client.Close()
	<-served
}

func TestBackend(t *testing.T) {
	ro := nbdserver.NewBackend(context.Background(), nbdtest.NewDisk(nbdtest.Image()).ReadOnly())
	if _, err := ro.WriteAt([]byte("x"), 0); !errors.Is(err, proto.EPERM) {
		t.Errorf("write to a read-only export: %v", err)
	}
	if err := ro.Sync(); err != nil {
		t.Error(err)
	}
	if n, err := ro.ReadAt(make([]byte, 10), nbdtest.ImageSize-4); n != 4 || err != io.EOF {
		t.Errorf("read across the end: %d, %v", n, err)
	}
	rw := nbdtest.NewEmptyDisk(4096)
	b := nbdserver.NewBackend(context.Background(), rw.Writable())
	if _, err := b.WriteAt(make([]byte, 10), 4090); err == nil {
		t.Error("write across the end succeeded")
	}
	if err := b.Sync(); err != nil || rw.Flushes.Load() != 1 {
		t.Errorf("sync: %v, %d flushes", err, rw.Flushes.Load())
	}
}

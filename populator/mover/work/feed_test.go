package work

import (
	"bytes"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/stream"
)

// read asks for every frame of a mover that is about to wait, as the controller does, and gives what came.
func (p *pod) read() (text []byte, ended chan error) {
	p.t.Helper()
	asks, ask := io.Pipe()
	from, to := io.Pipe()
	ended = make(chan error, 1)
	go func() {
		err := stream.Relay(p.t.Context(), p.Socket, asks, to)
		_, _ = to.CloseWithError(io.EOF), asks.Close()
		ended <- err
	}()
	go func() {
		for {
			if _, err := ask.Write([]byte("bn")); err != nil {
				return
			}
		}
	}()
	hello := make([]byte, len("varve stream 1\n"))
	if _, err := io.ReadFull(from, hello); err != nil {
		p.t.Error(err)
	}
	text, err := io.ReadAll(stream.NewReader(from))
	if err != nil {
		p.t.Error(err)
	}
	return text, ended
}

// What a mover stored as a stream it gives back, and nothing else.
func TestFeed(t *testing.T) {
	p := newPod(t)
	p.Socket = filepath.Join(t.TempDir(), "socket")
	rows := []byte(strings.Repeat("another row\n", 500_000))
	relayed := p.send(rows, true)
	made := p.run(p.dumpTask("run", nil))
	<-relayed
	task := func(id string) mover.Task {
		return mover.Task{Version: mover.ProtocolVersion, Action: mover.ActionFeed, Store: p.settings, Feed: &mover.FeedTask{PointID: id}}
	}
	done := make(chan mover.Result, 1)
	go func() { done <- Run(t.Context(), p.Environment, task(made.Point.ID)) }()
	text, ended := p.read()
	if r := <-done; !r.OK || r.Point == nil || r.Point.SizeBytes != int64(len(rows)) || !bytes.Equal(text, rows) {
		t.Errorf("%d of %d bytes came, %+v", len(text), len(rows), r)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	disk := p.run(p.task("snap-1"))
	for id, reason := range map[string]string{strings.Repeat("0", 32): v1alpha1.ReasonNoRecoveryPoint, disk.Point.ID: v1alpha1.ReasonInvalidSpec} {
		if r := Run(t.Context(), p.Environment, task(id)); r.OK || r.Again || r.Reason != reason {
			t.Errorf("point %s: %+v", id, r)
		}
	}
}

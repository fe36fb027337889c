package work

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/store"
	"github.com/varve-io/varve/populator/stream"
)

// send sends bytes to a mover that is about to wait, as the controller does, and the end of the stream if
// wanted.
func (p *pod) send(data []byte, end bool) (relayed chan error) {
	p.t.Helper()
	in, to := io.Pipe()
	relayed = make(chan error, 1)
	go func() { relayed <- stream.Relay(p.t.Context(), p.Socket, in, io.Discard) }()
	go func() {
		w := stream.NewWriter(to)
		_, err := w.Write(data)
		if err == nil && end {
			err = w.End()
		}
		_ = to.CloseWithError(err)
	}()
	return relayed
}

func (p *pod) dumpTask(run string, g *blocktree.Group) mover.Task {
	return mover.Task{Version: mover.ProtocolVersion, Action: mover.ActionDump, Store: p.settings, Dump: &mover.DumpTask{
		Volume: points.Volume{Namespace: "shop", Name: "data.sql", Cluster: "e2e"}, Time: time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC),
		Claim: blocktree.Claim{UID: "claim", NamespaceUID: "namespace"}, Group: g, Run: run,
		Consistency:  &blocktree.Consistency{Level: blocktree.ApplicationConsistent, Method: "dump"},
		NamespaceUID: "namespace", Retention: &backup.Policy{Latest: 2},
	}}
}

// stored returns the streams of the dump's volume in the repository.
func (p *pod) stored() (all []string) {
	p.t.Helper()
	c, err := store.ReadCredentials(p.StoreDir)
	if err != nil {
		p.t.Fatal(err)
	}
	o, err := p.settings.Open(p.t.Context(), store.OpenOptions{Credentials: c, Dir: p.t.TempDir(), VolumeDir: p.VolumeDir})
	if err != nil {
		p.t.Fatal(err)
	}
	defer o.Close(p.t.Context())
	cat, err := points.List(p.t.Context(), o.Repository, points.ListOptions{})
	if err != nil {
		p.t.Fatal(err)
	}
	for _, pt := range cat.Points() {
		var out bytes.Buffer
		if _, err := backup.RestoreTo(p.t.Context(), o.Repository, pt, &out, backup.RestoreOptions{}); err != nil {
			p.t.Fatal(err)
		}
		all = append(all, out.String())
	}
	return all
}

// A stream with its end becomes a point; one without does not, and older ones stay. The
// retention is that of the volume.
func TestDump(t *testing.T) {
	p := newPod(t)
	p.Socket = filepath.Join(t.TempDir(), "socket")
	rows := strings.Repeat("a row\n", 500_000)
	for i, data := range []string{"first", rows, "third"} {
		if i == 1 { // before the second, one that is cut
			relayed := p.send([]byte(rows), false)
			if r := Run(t.Context(), p.Environment, p.dumpTask("run 1", nil)); r.OK || !r.Again || !strings.Contains(r.Message, "the stream was cut") {
				t.Errorf("a stream without its end: %+v", r)
			}
			if err := <-relayed; err != nil {
				t.Error(err)
			}
			if got := p.stored(); len(got) != 1 || got[0] != "first" {
				t.Errorf("after a stream that was cut there are %d points", len(got))
			}
		}
		relayed := p.send([]byte(data), true)
		task := p.dumpTask(fmt.Sprint("run ", i), nil)
		task.Dump.Time = task.Dump.Time.Add(time.Duration(i) * time.Hour)
		r := p.run(task)
		if err := <-relayed; err != nil {
			t.Error(err)
		}
		if r.Point == nil || r.Point.SizeBytes != int64(len(data)) || r.PointCount != int64(min(i+1, 2)) || !r.Point.Time.Time.Equal(task.Dump.Time) {
			t.Errorf("stream %d: %+v", i, r)
		}
	}
	if got := p.stored(); len(got) != 2 || got[0] != rows || got[1] != "third" {
		t.Errorf("%d points are left", len(got))
	}
	// A volume of disks accepts no streams, and no retry helps.
	p.run(p.task("snap-1"))
	task := p.dumpTask("run 3", nil)
	task.Dump.Volume.Name = "data"
	relayed := p.send([]byte("dump"), true)
	if r := Run(t.Context(), p.Environment, task); r.OK || r.Again || r.Reason != "HookFailed" {
		t.Errorf("a stream in a volume of disks: %+v", r)
	}
	<-relayed
}

// An attempt whose result was lost has still made the point of its run: the next one takes that, and waits
// for no stream. So a dump of one run is one point, alone or in a group.
func TestDumpIsMadeOnce(t *testing.T) {
	p := newPod(t)
	p.Socket = filepath.Join(t.TempDir(), "socket")
	g, err := points.NewGroup("shop/app", []points.Volume{{Namespace: "shop", Name: "data", Cluster: "e2e"}, {Namespace: "shop", Name: "data.sql", Cluster: "e2e"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	tasks := []mover.Task{p.dumpTask("alone", nil), p.dumpTask("first of a group", g)}
	var made []string
	for i, task := range tasks {
		relayed := p.send([]byte(fmt.Sprint("dump ", i)), true)
		first := p.run(task)
		if err := <-relayed; err != nil {
			t.Error(err)
		}
		made = append(made, first.Point.ID)
	}
	p.Socket = filepath.Join(t.TempDir(), "nowhere", "socket") // nothing can listen here
	for i, task := range tasks {
		task.Dump.Time = task.Dump.Time.Add(time.Hour)
		if again := p.run(task); again.Point.ID != made[i] || again.PointCount != 2 {
			t.Errorf("another attempt of %q made %+v, and there are %d points", task.Dump.Run, again.Point, again.PointCount)
		}
	}
	if got := p.stored(); len(got) != 2 || got[0] != "dump 0" || got[1] != "dump 1" {
		t.Errorf("there are points of %q", got)
	}
}

package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

var dumpVolume = points.Volume{Namespace: "shop", Name: "db-dump", Cluster: "test"}

func mustStream(t *testing.T, r *repository.Repository, data []byte) (*points.Point, *blocktree.Record) {
	t.Helper()
	p, rec, err := RunStream(t.Context(), r, StreamOptions{Volume: dumpVolume, Reader: bytes.NewReader(data)})
	if err != nil {
		t.Fatal(err)
	}
	return p, rec
}

// streamed reads a point back as restore to standard output does.
func streamed(t *testing.T, r *repository.Repository, p *points.Point) []byte {
	t.Helper()
	var out bytes.Buffer
	if _, err := RestoreTo(t.Context(), r, p, &out, RestoreOptions{}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestStreams: streams of any length read back unchanged, from tags and from records, and are
// verified, pruned and forgotten like other points.
func TestStreams(t *testing.T) {
	r, _ := newRepo(t)
	rng := rand.New(rand.NewPCG(1, 1))
	want := map[string][]byte{}
	for i, n := range []int{1, 511, 128 << 10, 1 << 20, 1<<20 + 1, 9<<20 + 77} {
		data := randomBytes(rng, n)
		if i == 3 {
			clear(data) // Kopia's splitter cuts zeroes at its maximum
		}
		p, rec := mustStream(t, r, data)
		want[p.ID] = data
		if !p.Stream || p.Size != int64(n) || p.Generation != int64(i+1) || rec.BlockSize != 0 || rec.Disk != nil || !rec.IsStream() {
			t.Fatalf("point %+v", p)
		}
		listed := mustList(t, r).ByID(p.ID)
		if listed == nil || !listed.Stream || listed.Size != int64(n) {
			t.Fatalf("listed %+v", listed)
		}
		stored, err := points.LoadRecord(t.Context(), r, p)
		if err != nil || !stored.IsStream() || stored.Size != int64(n) {
			t.Fatalf("record %+v, %v", stored, err)
		}
	}
	for id, data := range want {
		if got := streamed(t, r, mustList(t, r).ByID(id)); !bytes.Equal(got, data) {
			t.Errorf("a stream of %d bytes came back as another one, of %d", len(data), len(got))
		}
	}
	if rep, err := Verify(t.Context(), r, VerifyOptions{Read: 1}); err != nil || len(rep.Points) != len(want) || rep.Read == 0 {
		t.Errorf("verify: %+v, %v", rep, err)
	}
	plan, err := Prune(t.Context(), r, PruneOptions{Policy: Policy{Latest: 2}, Cluster: "test"})
	if err != nil || len(plan.Removed()) != 4 {
		t.Errorf("prune: %+v, %v", plan, err)
	}
	maintainNow(t, r)
	left := mustList(t, r).Of(dumpVolume)
	if len(left) != 2 {
		t.Fatalf("%d streams are left", len(left))
	}
	for _, p := range left {
		if !bytes.Equal(streamed(t, r, p), want[p.ID]) {
			t.Errorf("%s is another one after maintenance", p.Name())
		}
	}
}

// TestStreamsShareContent: content that moved within a stream is not stored again.
func TestStreamsShareContent(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(2, 2)), 12<<20)
	mustStream(t, r, data)
	moved := append([]byte("a line more at the beginning\n"), data...)
	copy(moved[6<<20:], "and a row that changed")
	_, rec := mustStream(t, r, moved)
	if rec.Stats.Read != int64(len(moved)) || rec.Stats.Uploaded > 2<<20 {
		t.Errorf("of %d bytes %d were uploaded", rec.Stats.Read, rec.Stats.Uploaded)
	}
}

// failingReader returns some bytes and then an error.
type failingReader struct {
	io.Reader
	err error
}

func (r failingReader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		err = r.err
	}
	return n, err
}

// TestStreamsThatFail leave no point.
func TestStreamsThatFail(t *testing.T) {
	r, _ := newRepo(t)
	broken := errors.New("the producer died")
	read := func(n int) io.Reader { return bytes.NewReader(make([]byte, n)) }
	for _, tc := range []struct {
		name string
		opt  StreamOptions
		want error
	}{
		{"a producer that died", StreamOptions{Reader: failingReader{read(3 << 20), broken}}, broken},
		{"a connection that was cut", StreamOptions{Reader: failingReader{read(3<<20 + 7), io.ErrUnexpectedEOF}}, io.ErrUnexpectedEOF},
		{"an end that is wrapped", StreamOptions{Reader: failingReader{read(3<<20 + 7), fmt.Errorf("exec: %w", io.EOF)}}, io.EOF},
		{"nothing", StreamOptions{Reader: read(0)}, ErrEmptyStream},
		{"too short", StreamOptions{Reader: read(999_999), Expect: 1_000_000}, ErrStreamLength},
		{"too long", StreamOptions{Reader: read(1_000_001), Expect: 1_000_000}, ErrStreamLength},
		{"a check that fails", StreamOptions{Reader: read(5), Check: func(context.Context) error { return broken }}, broken},
	} {
		tc.opt.Volume = dumpVolume
		if p, _, err := RunStream(t.Context(), r, tc.opt); !errors.Is(err, tc.want) || p != nil {
			t.Errorf("%s: %v, %v", tc.name, p, err)
		}
	}
	if n := len(mustList(t, r).Points()); n != 0 {
		t.Fatalf("%d points", n)
	}
	p, rec, err := RunStream(t.Context(), r, StreamOptions{Volume: dumpVolume, Reader: read(1_000_000), Expect: 1_000_000})
	if err != nil || rec.Size != 1_000_000 {
		t.Fatal(p, err)
	}
	// A volume holds disks or streams, not both.
	if _, _, err := Run(t.Context(), r, Options{Volume: dumpVolume, Disk: &memDisk{data: make([]byte, 5)}}); !errors.Is(err, ErrOtherDisk) {
		t.Errorf("a disk in a volume of streams: %v", err)
	}
	if _, _, err := Run(t.Context(), r, Options{Volume: testVolume, Disk: &memDisk{data: make([]byte, 5)}, Parent: p.ID, Branch: true}); !errors.Is(err, points.ErrStream) {
		t.Errorf("a disk on top of a stream: %v", err)
	}
	mustBackup(t, r, Options{Volume: testVolume, Disk: &memDisk{data: []byte("a disk")}})
	if _, _, err := RunStream(t.Context(), r, StreamOptions{Volume: testVolume, Reader: read(5)}); !errors.Is(err, ErrOtherDisk) {
		t.Errorf("a stream in a volume of disks: %v", err)
	}
	// Operations on disks refuse a stream.
	cache := image.NewCache(1 << 20)
	defer cache.Close()
	held := disks.New(r, cache, disks.Options{Purpose: "test"})
	defer held.Close(t.Context())
	if _, err := held.Hold(t.Context(), p); !errors.Is(err, points.ErrStream) {
		t.Errorf("a stream opened as a disk: %v", err)
	}
}

// TestStreamCheckpoints: the next run finds a dead one and does not upload again what came
// before its last checkpoint, and a collection during the run deletes nothing of it.
func TestStreamCheckpoints(t *testing.T) {
	r, conf := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(3, 3)), 12<<20)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	kept := 0
	_, _, err := RunStream(ctx, r, StreamOptions{
		Volume: dumpVolume, Reader: bytes.NewReader(data), CheckpointEvery: time.Nanosecond,
		step: func(s string) {
			if s != "checkpoint" {
				return
			}
			if kept++; kept == 4 {
				maintainNow(t, openRepo(t, conf))
			}
			if kept == 9 {
				cancel(errCrash)
			}
		},
	})
	if !errors.Is(err, errCrash) || kept != 9 {
		t.Fatalf("%v after %d checkpoints", err, kept)
	}
	if n := len(mustList(t, r).Points()); n != 0 {
		t.Fatalf("%d points", n)
	}
	p, rec := mustStream(t, r, data)
	if rec.Stats.Uploaded > 6<<20 {
		t.Errorf("%d bytes were uploaded again", rec.Stats.Uploaded)
	}
	if !bytes.Equal(streamed(t, r, p), data) {
		t.Error("the stream is another one")
	}
}

// TestStreamLosesData: contents that are collected before the point is recorded fail the run.
func TestStreamLosesData(t *testing.T) {
	r, _ := newRepo(t)
	data := randomBytes(rand.New(rand.NewPCG(4, 4)), 3<<20)
	p, _ := mustStream(t, r, data)
	_, _, err := RunStream(t.Context(), r, StreamOptions{Volume: dumpVolume, Reader: bytes.NewReader(data), step: func(s string) {
		if s != "flushed" {
			return
		}
		objects, err := func() ([]repository.ObjectID, error) {
			rec, err := points.LoadRecord(t.Context(), r, p)
			if err != nil {
				return nil, err
			}
			root, err := rec.OpenRoot()
			if err != nil {
				return nil, err
			}
			w, err := r.NewWriter(t.Context(), "test")
			if err != nil {
				return nil, err
			}
			defer w.Close()
			return w.ContentsOf(t.Context(), root.Object)
		}()
		if err != nil || len(objects) < 5 {
			t.Errorf("contents %v, %v", objects, err)
			return
		}
		changeRepo(t, r, func(w *repository.Writer) error { return w.ForgetContent(t.Context(), objects[2]) })
	}})
	if !errors.Is(err, ErrLostData) {
		t.Errorf("a content was lost: %v", err)
	}
	if n := len(mustList(t, r).Points()); n != 1 {
		t.Errorf("%d points", n)
	}
}

// TestStreamInAGroup: a dump and the disks of a group stay together.
func TestStreamInAGroup(t *testing.T) {
	r, _ := newRepo(t)
	g, err := points.NewGroup("shop/app", []points.Volume{vmDisk("a"), dumpVolume}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	mustBackup(t, r, Options{Volume: vmDisk("a"), Disk: &memDisk{data: make([]byte, 5)}, Group: g})
	if _, _, err := RunStream(t.Context(), r, StreamOptions{Volume: vmDisk("b"), Reader: strings.NewReader("dump"), Group: g}); err == nil {
		t.Error("a volume that is no member was taken")
	}
	if findGroup(t, r, g.ID).Complete() {
		t.Error("the group is complete without its dump")
	}
	c := &blocktree.Consistency{Level: blocktree.ApplicationConsistent, Method: "dump"}
	if _, _, err := RunStream(t.Context(), r, StreamOptions{Volume: dumpVolume, Reader: strings.NewReader("dump"), Group: g, Consistency: c}); err != nil {
		t.Fatal(err)
	}
	if got := findGroup(t, r, g.ID); !got.Complete() || fmt.Sprint(got.Wanted) != "[shop/db-dump shop/vm-a]" {
		t.Errorf("group %+v", got)
	}
}

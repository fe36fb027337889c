package backup

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"log/slog"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
)

// emptyDisk is a disk of zeroes of any size, which counts what is read of it.
type emptyDisk struct {
	size int64
	read *atomic.Int64
}

func (d emptyDisk) Size() int64                                 { return d.size }
func (d emptyDisk) CheckSize() error                            { return nil }
func (d emptyDisk) DataRange(int64) (start, end int64, _ error) { return 0, 0, io.EOF }

func (d emptyDisk) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	d.read.Add(int64(len(p)))
	return len(p), nil
}

// nothingChanged is a source that lists no change.
type nothingChanged struct{}

func (nothingChanged) Changes(_ context.Context, req cbt.Request, _ func(cbt.Extent) error) (cbt.Report, error) {
	return cbt.Report{Source: "test", BaseChangeID: req.Base.ChangeID, TargetChangeID: "t", Size: req.Size, Exact: true}, nil
}

// TestSpotCheckIsBounded: what a check reads is bounded in bytes and time, small disks are
// read in a larger part, and the record says what was reached.
func TestSpotCheckIsBounded(t *testing.T) {
	r, _ := newRepo(t)
	for _, c := range []struct {
		name  string
		size  int64
		share float64
		bytes int64
		time  time.Duration
		limit string
		least int64 // bytes read
		most  int64
	}{
		{name: "tiny", size: 2 << 20, share: 0.001, least: 2 << 20, most: 2 << 20},
		{name: "small", size: 256 << 20, share: 0.001, least: 32 << 20, most: 34 << 20},
		{name: "not-so-small", size: 2 << 30, share: 0.001, least: 64 << 20, most: 68 << 20},
		{name: "share", size: 256 << 30, share: 0.001, bytes: -1, least: 256 << 20, most: 3*256<<20 + 4<<20},
		{name: "large", size: 10 << 40, share: 0.001, bytes: 96 << 20, limit: "bytes", least: 32 << 20, most: 96<<20 + 4<<20},
		{name: "one-block", size: 10 << 40, share: 1, bytes: 1, limit: "bytes", least: 1 << 20, most: 6 << 20},
		{name: "no-time", size: 1 << 40, share: 0.001, time: 1, limit: "time", most: 64 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			var read atomic.Int64
			opt := Options{Volume: points.Volume{Namespace: "shop", Name: c.name, Cluster: "c"}, Disk: emptyDisk{c.size, &read}}
			mustBackup(t, r, opt)
			opt.Source, opt.VerifyUnchanged, opt.SpotCheckBytes = nothingChanged{}, c.share, c.bytes
			opt.SpotCheckTime = cmp.Or(c.time, -1) // a loaded machine may need more than the default
			_, rec := mustBackup(t, r, opt)
			check := rec.SpotCheck
			if check == nil || check.Limit != c.limit {
				t.Fatalf("spot check %+v, want one limited by %q", check, c.limit)
			}
			// Signatures are read of the disk as well, to know which one it is.
			const signatures = 8 << 20
			if got := read.Load(); got < check.Bytes || got > check.Bytes+signatures || check.Bytes < c.least || check.Bytes > c.most {
				t.Errorf("read %d bytes and says %d, want %d to %d", got, check.Bytes, c.least, c.most)
			}
			blockSize := rec.BlockSize
			if check.Candidates != c.size/blockSize || check.Stripes < 1 || check.Blocks != check.Bytes/blockSize {
				t.Errorf("spot check %+v", check)
			}
			// At most all that was read was drawn at random, at least a third.
			highest, lowest := detection(check.Candidates, check.Blocks), detection(check.Candidates, check.Blocks/3-3)
			if check.Probability > highest+1e-9 || check.Probability < lowest-1e-9 || math.IsNaN(check.Probability) {
				t.Errorf("probability %v after %d blocks, want %v to %v", check.Probability, check.Blocks, lowest, highest)
			}
		})
	}
}

// TestSpotCheckDecodesAnIndexOnce: an index describes 512 blocks, and a check reads many of them at random.
func TestSpotCheckDecodesAnIndexOnce(t *testing.T) {
	var log bytes.Buffer
	_, conf := newRepo(t)
	r := openWith(t, repository.OpenOptions{ConfigFile: conf, Password: "secret", Log: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	const segments = 3
	d := &memDisk{data: make([]byte, segments*blocktree.SegmentSize)}
	for i := 0; i < len(d.data); i += 64 << 10 { // no holes
		binary.LittleEndian.PutUint64(d.data[i:], uint64(i)+1)
	}
	opt := Options{Volume: points.Volume{Namespace: "shop", Name: "db", Cluster: "c"}, Disk: d}
	mustBackup(t, r, opt)
	opt.Source, opt.VerifyUnchanged, opt.SpotCheckTime = nothingChanged{}, 1, -1
	if _, rec := mustBackup(t, r, opt); rec.SpotCheck.Blocks < 100*segments {
		t.Errorf("only %d blocks were checked", rec.SpotCheck.Blocks)
	}
	var passed struct {
		Msg     string
		Indexes int64
	}
	for line := range bytes.Lines(log.Bytes()) {
		if bytes.Contains(line, []byte("spot check passed")) {
			if err := json.Unmarshal(line, &passed); err != nil {
				t.Fatal(err)
			}
		}
	}
	if passed.Indexes < segments || passed.Indexes > segments+1 { // one of the root's
		t.Errorf("%d indexes of %d segments were decoded", passed.Indexes, segments)
	}
}

package backup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/readfull"
)

// Errors about streams.
var (
	// ErrStreamLength means that a stream is not as long as expected.
	ErrStreamLength = errors.New("the stream does not have the expected length")
	// ErrEmptyStream means that a stream ended before its first byte.
	ErrEmptyStream = errors.New("the stream is empty")
)

// StreamOptions say how to back up a stream.
type StreamOptions struct {
	// Volume must hold streams only: a volume with points of a disk is refused.
	Volume points.Volume
	// Reader provides the bytes, up to io.EOF. No point is recorded after another error, such as
	// io.ErrUnexpectedEOF or one that wraps io.EOF: only the reader knows whether a producer
	// that ended was complete.
	Reader io.Reader
	// Expect is the length in bytes; 0 if unknown.
	Expect int64
	// Check, Consistency, Group, Time, ToolVersion, CheckpointEvery and Progress are as in
	// Options. Time is the moment whose state the stream holds; zero is the start of the run.
	Check       func(context.Context) error
	Consistency *blocktree.Consistency
	// Claim whose application wrote the stream; nil for none.
	Claim *blocktree.Claim
	Group *blocktree.Group
	// Run names the run in the record; empty for none.
	Run             string
	Time            time.Time
	ToolVersion     string
	CheckpointEvery time.Duration
	Progress        func(Progress)

	step func(string)
}

// streamBuffer is how much of a stream is read at once, in bytes.
const streamBuffer = 1 << 20

// Streams of at least these many bytes are cut into larger contents. If the length is
// unknown, that of the previous stream decides: contents cut in another way are not found
// again.
const (
	mediumStream = 64 << 30
	largeStream  = 1 << 40
)

// splitterFor returns the splitter for a stream of about n bytes.
func splitterFor(n int64) string {
	switch {
	case n >= largeStream:
		return repository.SplitLarge
	case n >= mediumStream:
		return repository.SplitMedium
	}
	return repository.SplitSmall
}

// RunStream makes a recovery point of a stream of bytes, such as a dump or an archive: a
// Kopia snapshot with a plain file. What earlier streams of any volume hold is not stored
// again. An empty stream, or one whose length is not Expect, is refused. A run that fails
// leaves no point and changes none. The error is ErrOtherDisk if the volume has points of a
// disk.
func RunStream(ctx context.Context, repo *repository.Repository, opt StreamOptions) (*points.Point, *blocktree.Record, error) {
	o := Options{
		Volume: opt.Volume, Check: opt.Check, Consistency: opt.Consistency, Group: opt.Group, Claim: opt.Claim, Time: opt.Time, ToolVersion: opt.ToolVersion,
		CheckpointEvery: opt.CheckpointEvery, Progress: opt.Progress, step: opt.step,
	}
	if err := o.check(); err != nil {
		return nil, nil, err
	}
	if err := repo.CheckRights(ctx); err != nil {
		return nil, nil, err
	}
	if err := recoverDead(ctx, repo); err != nil {
		return nil, nil, err
	}
	w, err := repo.NewWriter(ctx, "varve backup "+opt.Volume.String())
	if err != nil {
		return nil, nil, err
	}
	s := &streamRun{run: &run{opt: o, repo: repo, w: w, lastCheckpoint: checkpointed{at: time.Now()}}, stream: opt}
	p, err := s.do(ctx)
	if cerr := w.Close(); err == nil && cerr != nil {
		repo.Log().WarnContext(ctx, "close write session", "error", cerr)
	}
	if err != nil {
		return nil, nil, adviseRoom(err)
	}
	return p, s.rec, nil
}

// streamRun is one backup of a stream in progress.
type streamRun struct {
	*run

	stream StreamOptions
	out    *repository.StreamWriter
	cut    string // the splitter
}

func (s *streamRun) do(ctx context.Context) (*points.Point, error) {
	if err := s.prepareStream(ctx); err != nil {
		return nil, err
	}
	s.opt.step("prepared")
	s.out = s.w.NewStream(s.cut)
	defer func() { _ = s.out.Close() }() // Result has the errors
	n, err := s.copy(ctx)
	if err != nil {
		s.salvageStream(ctx, err)
		return nil, fmt.Errorf("%s: %w; no point was made", s.opt.Volume, err)
	}
	s.opt.step("stored")
	root := blocktree.Root{Size: n}
	if root.Object, err = s.out.Result(); err != nil {
		return nil, err
	}
	if err := s.writeIncomplete(ctx, &root); err != nil {
		return nil, fmt.Errorf("flush: %w", err)
	}
	s.opt.step("flushed")
	if root, err = s.prove(ctx, root); err != nil {
		return nil, err
	}
	s.opt.step("proved")
	return s.record(ctx, root)
}

func (s *streamRun) prepareStream(ctx context.Context) error {
	if err := s.repo.Refresh(ctx); err != nil {
		return err
	}
	v := s.opt.Volume
	cat, err := points.List(ctx, s.repo, points.ListOptions{Volume: &v})
	if err != nil {
		return err
	}
	now := s.repo.Now().UTC()
	at := now
	if !s.opt.Time.IsZero() {
		at = s.opt.Time.UTC()
	}
	s.rec = &blocktree.Record{
		ID: points.NewID(), Generation: 1, Kind: blocktree.KindFull, Content: blocktree.ContentStream,
		Namespace: v.Namespace, Name: v.Name, Cluster: v.Cluster, Start: now, Time: pointTime(at, cat.Of(v)),
		Source: "stream", ToolVersion: s.opt.ToolVersion, Consistency: s.opt.Consistency, Group: s.opt.Group, Claim: s.opt.Claim, Run: s.stream.Run,
		NotCrashConsistent: s.opt.NotCrashConsistent,
	}
	s.cut = splitterFor(s.stream.Expect)
	if latest := cat.Latest(v); latest != nil {
		if !latest.Stream {
			return fmt.Errorf("%w: %s: the volume holds disks, such as %s; no point was made; give the stream a volume of its own", ErrOtherDisk, v, latest.Name())
		}
		s.rec.Generation = latest.Generation + 1
		s.cut = splitterFor(max(s.stream.Expect, latest.Size))
	}
	return nil
}

// copy stores the stream and returns its length.
func (s *streamRun) copy(ctx context.Context) (n int64, err error) {
	limit := int64(blocktree.MaxSize)
	if s.stream.Expect > 0 {
		limit = s.stream.Expect
	}
	buf := make([]byte, streamBuffer)
	for {
		if err := ctx.Err(); err != nil {
			return n, context.Cause(ctx)
		}
		k, rerr := readfull.Read(s.stream.Reader, buf)
		n += int64(k)
		if n > limit {
			if s.stream.Expect > 0 {
				return n, fmt.Errorf("%w: more than the %s that were expected", ErrStreamLength, bytesize.Exact(limit))
			}
			return n, fmt.Errorf("%w: the stream has more", ErrTooLarge)
		}
		if _, err := s.out.Write(buf[:k]); err != nil {
			return n, err
		}
		s.counters.read.Store(n)
		s.opt.Progress(Progress{Phase: "backup", Done: n, Total: s.stream.Expect})
		switch {
		case rerr == io.EOF: //nolint:errorlint // one that wraps it is a failure
			return n, s.ended(n)
		case ctx.Err() != nil: // this may be why the producer failed
			return n, context.Cause(ctx)
		case rerr != nil:
			return n, fmt.Errorf("read the stream at %d: %w", n, rerr)
		}
		if s.lastCheckpoint.due(time.Since(s.lastCheckpoint.at), s.opt.CheckpointEvery, 0, s.w.Uploaded()) {
			if err := s.keep(ctx); err != nil {
				return n, err
			}
		}
	}
}

// ended checks the length of a stream at its end.
func (s *streamRun) ended(n int64) error {
	switch {
	case n == 0:
		return fmt.Errorf("%w: its producer wrote nothing", ErrEmptyStream)
	case s.stream.Expect > 0 && n != s.stream.Expect:
		return fmt.Errorf("%w: %s of %s came", ErrStreamLength, bytesize.Exact(n), bytesize.Exact(s.stream.Expect))
	}
	return nil
}

// keep makes a checkpoint: what was stored so far is protected, and the next run finds it.
func (s *streamRun) keep(ctx context.Context) error {
	began := time.Now()
	oid, n, err := s.out.Checkpoint()
	if err == nil && n > 0 {
		err = s.writeIncomplete(ctx, &blocktree.Root{Object: oid, Size: n})
	}
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	now := time.Now()
	s.lastCheckpoint = checkpointed{at: now, took: now.Sub(began), uploaded: s.w.Uploaded()}
	s.counters.checkpoints++
	s.opt.step("checkpoint")
	return nil
}

// salvageStream keeps what was stored of a failed stream, if it is worth it, so that the next
// run does not upload it again.
func (s *streamRun) salvageStream(ctx context.Context, cause error) {
	if s.w.Uploaded()-s.lastCheckpoint.uploaded < checkpointBytes/2 || errors.Is(cause, repository.ErrStorageFull) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := s.keep(ctx); err != nil {
		s.repo.Log().WarnContext(ctx, "could not save what was stored before the backup stopped", "cause", cause, "error", err)
	}
}

// lostOfStream counts the contents of a stream that are missing.
func (r *run) lostOfStream(ctx context.Context, root blocktree.Root) (lost int64, err error) {
	objects, err := r.w.ContentsOf(ctx, root.Object)
	if errors.Is(err, repository.ErrContentMissing) {
		return 1, nil
	}
	if err != nil {
		return 0, err
	}
	p := &prover{run: r, ctx: ctx, packs: map[string]int64{}}
	for _, oid := range objects {
		ok, err := p.present(oid)
		if err != nil {
			return 0, err
		}
		if !ok {
			lost++
		}
	}
	return lost, r.w.Flush(ctx) // of forgotten contents
}

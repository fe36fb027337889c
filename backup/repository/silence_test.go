package repository

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kopia/kopia/repo/blob"
)

// slow is a slow storage that is silent for a while.
type slow struct {
	blob.Storage
	pieces int           // of a blob
	pause  time.Duration // before each
	err    error         // instead of the last
}

func (s *slow) GetBlob(ctx context.Context, _ blob.ID, _, _ int64, out blob.OutputBuffer) error {
	for range s.pieces {
		if err := wait(ctx, s.pause); err != nil {
			return err
		}
		if _, err := out.Write([]byte("piece")); err != nil {
			return err
		}
	}
	if s.err != nil {
		return errors.Join(wait(ctx, s.pause), s.err)
	}
	return nil
}

func (s *slow) ListBlobs(ctx context.Context, _ blob.ID, do func(blob.Metadata) error) error {
	for range s.pieces {
		if err := errors.Join(wait(ctx, s.pause), do(blob.Metadata{})); err != nil {
			return err
		}
	}
	return nil
}

func (s *slow) GetMetadata(ctx context.Context, _ blob.ID) (blob.Metadata, error) {
	return blob.Metadata{}, errors.Join(wait(ctx, s.pause), s.err)
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Work may take hours while something arrives; silence is bounded, and this process's own
// work between two calls is not silence.
func TestSilence(t *testing.T) {
	const limit = 45 * time.Second
	get := func(ctx context.Context, st blob.Storage) error {
		var b blobBuffer
		return st.GetBlob(ctx, "x", 0, -1, &b)
	}
	list := func(ctx context.Context, st blob.Storage) error {
		return st.ListBlobs(ctx, "", func(blob.Metadata) error { return nil })
	}
	ask := func(ctx context.Context, st blob.Storage) error {
		_, err := st.GetMetadata(ctx, "x")
		return err
	}
	down := errors.New("connection refused")
	for _, row := range []struct {
		name string
		st   slow
		do   func(context.Context, blob.Storage) error
		dead bool
	}{
		{"a blob in pieces", slow{pieces: 100, pause: 40 * time.Second}, get, false},
		{"a blob that does not come", slow{pieces: 1, pause: 46 * time.Second}, get, true},
		{"a blob that stops coming", slow{pieces: 3, pause: 40 * time.Second, err: down}, func(ctx context.Context, st blob.Storage) error {
			return errors.Join(get(ctx, st), ask(ctx, st))
		}, true},
		{"a list in pieces", slow{pieces: 100, pause: 40 * time.Second}, list, false},
		{"a list that does not begin", slow{pieces: 1, pause: 46 * time.Second}, list, true},
		{"many answers", slow{pause: 40 * time.Second}, func(ctx context.Context, st blob.Storage) (err error) {
			for range 100 {
				err = errors.Join(err, ask(ctx, st))
			}
			return err
		}, false},
		{"that something is missing is an answer", slow{pause: 40 * time.Second, err: blob.ErrBlobNotFound}, func(ctx context.Context, st blob.Storage) error {
			for range 100 {
				if err := ask(ctx, st); !errors.Is(err, blob.ErrBlobNotFound) {
					return err
				}
			}
			return nil
		}, false},
		{"failures are none", slow{pause: 20 * time.Second, err: down}, func(ctx context.Context, st blob.Storage) error {
			for ctx.Err() == nil {
				_ = ask(ctx, st)
			}
			return context.Cause(ctx)
		}, true},
		{"work of our own", slow{pause: 40 * time.Second}, func(ctx context.Context, st blob.Storage) error {
			return errors.Join(ask(ctx, st), wait(ctx, time.Hour), ask(ctx, st))
		}, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, settled, release := boundSilence(t.Context(), limit)
				defer release()
				err := row.do(ctx, &watched{Storage: &row.st})
				settled()
				if dead := errors.Is(context.Cause(ctx), errNoAnswer); dead != row.dead || (err != nil) != row.dead {
					t.Errorf("given up: %v (%v), want %v", dead, err, row.dead)
				}
				if silenceOf(ctx).asked != 0 {
					t.Error("calls are thought to be under way")
				}
			})
		})
	}
}

// Nested bounds: both hear an answer.
func TestSilenceWithinAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		outer, _, releaseOuter := boundSilence(t.Context(), time.Minute)
		defer releaseOuter()
		st := &watched{Storage: &slow{pause: 40 * time.Second}}
		for range 10 {
			inner, settled, release := boundSilence(outer, 45*time.Second)
			if _, err := st.GetMetadata(inner, "x"); err != nil {
				t.Error(err)
			}
			settled()
			release()
		}
		if context.Cause(outer) != nil {
			t.Error(context.Cause(outer))
		}
	})
}

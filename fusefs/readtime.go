package fusefs

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/varve-io/varve/backup/image"
)

// readTimeout is the cause of a context that ended by Options.ReadTimeout.
type readTimeout struct{ limit time.Duration }

func (e *readTimeout) Error() string {
	return fmt.Sprintf("the data did not arrive within %v, the limit of this mount (--read-timeout)", e.limit)
}

// inTime calls do with a context that Options.ReadTimeout ends. An error after that time is
// reported as the timeout, whatever failed first.
func (f *FS) inTime(ctx context.Context, do func(context.Context) error) error {
	limit := f.opt.ReadTimeout
	if limit <= 0 {
		return do(ctx)
	}
	late := &readTimeout{limit}
	timed, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	err := do(timed)
	if err != nil && timed.Err() != nil && ctx.Err() == nil {
		return late
	}
	return err
}

// attempt is one caller's attempt to open something of the point, for which others wait.
type attempt struct {
	done chan struct{}
	err  error // once done is closed
}

// opening calls do, which opens something of the point; calls for one point run one at a
// time. If storage does not answer, many callers wait no longer than one: those that waited
// for an attempt that timed out return its error.
func (p *point) opening(ctx context.Context, do func(context.Context) error) error {
	for {
		p.mu.Lock()
		other, mine := p.attempt, &attempt{done: make(chan struct{})}
		if other == nil {
			p.attempt = mine
		}
		p.mu.Unlock()
		if other == nil {
			defer func() {
				p.mu.Lock()
				p.attempt = nil
				p.mu.Unlock()
				close(mine.done)
			}()
			mine.err = do(ctx)
			return mine.err
		}
		select {
		case <-other.done:
		case <-ctx.Done():
			return ctx.Err() //nolint:wrapcheck // interrupted
		}
		if late := (*readTimeout)(nil); errors.As(other.err, &late) {
			return other.err
		}
	}
}

// timedImage is an image for diskfs that bounds each read by Options.ReadTimeout.
type timedImage struct {
	fs  *FS
	img *image.Image
}

func (t timedImage) ReadAt(b []byte, off int64) (n int, err error) {
	err = t.fs.inTime(context.Background(), func(ctx context.Context) error {
		n, err = t.img.ReadContext(ctx, b, off)
		return err //nolint:wrapcheck // io.EOF must stay itself
	})
	return n, err
}

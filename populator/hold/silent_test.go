package hold

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"
)

// silent is a program that prints nothing; ends says whether it ends with its input.
type silent struct{ ends bool }

func (s silent) Exec(ctx context.Context, _ Target, _ []string, stdin io.Reader, _ io.Writer) error {
	_, err := io.Copy(io.Discard, stdin)
	if !s.ends {
		<-ctx.Done()
	}
	return err
}

// An application whose freeze failed may still be frozen if its program gives no answer to the thaw and does not
// end; one whose program has ended silently is not.
func TestSilentThaw(t *testing.T) {
	t.Parallel()
	for _, ends := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			defer end()
			p := Part{Program: Program{Limit: time.Second}}
			h := &Hold{cut: make(chan struct{}), parts: []PartState{{Part: p}}}
			m := start(ctx, silent{ends}, Target{}, p.Program, defaultSilence, defaultBeat)
			if h.freeze(ctx, []*member{m}) {
				t.Fatal("it is frozen without an answer")
			}
			h.letGo(0, m, nil)
			_, parts := h.State()
			if err := parts[0].Err; !errors.Is(err, ErrFreeze) || errors.Is(err, ErrStuck) == ends || parts[0].Thawed {
				t.Errorf("ends %v: thawed %v, %v", ends, parts[0].Thawed, err)
			}
		})
	}
}

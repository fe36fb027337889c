package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/populator/hold"
)

// pieces gives text piece by piece, and at the end err, io.EOF if that is nil.
func pieces(text []byte, size int, err error) func(context.Context) ([]byte, error) {
	return func(context.Context) ([]byte, error) {
		if len(text) == 0 {
			if err == nil {
				return nil, io.EOF
			}
			return nil, err
		}
		n := min(size, len(text))
		piece := text[:n]
		text = text[n:]
		return piece, nil
	}
}

func random(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(p)
	return p
}

// A command reads what it is fed byte by byte, and has succeeded only if it read all of it.
func TestConsume(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		text := random(3*maxPiece + 12345)
		for _, tc := range []struct {
			name, command string
			says          string // empty if it succeeds
			code          int
		}{
			{name: "whole", command: `cat >"$DIR/$0.whole"; echo done`},
			{name: "piped", command: `cat | (cat; true) >"$DIR/$0.piped"`},
			// BusyBox's head reads more than it gives.
			{name: "slow", command: `dd bs=1000 count=1 >"$DIR/$0.slow"; sleep 3; cat >>"$DIR/$0.slow"`},
			{name: "after", command: `cat >"$DIR/$0.after"; sleep 2`},
			{name: "fails at once", command: `echo 'no database' >&2; exit 3`, says: "with status 3 after 0 of", code: 3},
			{name: "fails at the end", command: `cat >/dev/null; printf 'half a line' >&2; exit 1`, says: "with status 1 after 3.0 MiB", code: 1},
			{name: "ends early", command: `head -c 5 >/dev/null`, says: "has not read all"},
			{name: "ends early after a piece", command: `dd bs=1048576 count=1 >/dev/null; sleep 1`, says: "has not read all"},
			{name: "closes its input", command: `exec <&-; sleep 1`, says: "has not read all"},
			{name: "no command", command: `/nonexistent/psql`, says: "with status 127", code: 127},
		} {
			t.Run(tc.name, func(t *testing.T) {
				t.Parallel()
				l := *l
				l.t = t
				var took atomic.Int64
				command := strings.ReplaceAll(tc.command, "$0.", "")
				end, err := fast.consume(t.Context(), &l, hold.Target{}, command, time.Minute, int64(len(text)), &took, pieces(text, maxPiece, nil))
				if end.ExitCode != tc.code {
					t.Errorf("%+v", end)
				}
				if tc.says != "" {
					if !errors.Is(err, ErrCommand) || !strings.Contains(strings.ReplaceAll(err.Error(), "3158073 of", "3.0 MiB of"), tc.says) {
						t.Error(err)
					}
					return
				}
				if err != nil || end.Bytes != int64(len(text)) || took.Load() != end.Bytes {
					t.Errorf("%+v, %v", end, err)
				}
				if got, err := os.ReadFile(filepath.Join(l.dir, tc.name)); err != nil || !bytes.Equal(got, text) {
					t.Errorf("%d of %d bytes came, or others: %v", len(got), len(text), err)
				}
			})
		}
	})
}

// committers are commands that commit at the end of their input, or at what they take for it.
var committers = map[string]string{
	"plain":  `cat >"$DIR/NAME.data" && : >"$DIR/NAME.committed"`,
	"exec":   `exec tail -c 1 >"$DIR/NAME.committed"`,
	"piped":  `cat | (cat >"$DIR/NAME.data" && : >"$DIR/NAME.committed")`,
	"nested": `sh -c 'cat; :' | sh -c 'cat; :' | (sh -c 'cat >/dev/null && : >"$DIR/NAME.committed"'; :); :`,
	"again":  `while :; do cat >/dev/null || :; done`,
	"then":   `cat >/dev/null; : >"$DIR/NAME.committed"`,
	"deaf":   `trap "" TERM HUP INT; cat >/dev/null && : >"$DIR/NAME.committed"`,
}

// A command whose input was cut, wherever and however, sees no end of it: it is killed, and all that it started.
func TestConsumeCut(t *testing.T) {
	t.Parallel()
	text := random(2*maxPiece + 777)
	type fault struct {
		name  string
		times times
		limit time.Duration
		// begin makes it happen.
		begin func(l *local, ctx context.Context, stop context.CancelCauseFunc, n int) func(context.Context) ([]byte, error)
		want  error
		says  string
	}
	broken := errors.New("the repository is gone")
	quick := fast
	quick.silence = 2 * time.Second
	whole := pieces
	faults := []fault{
		{"source", fast, time.Minute, func(_ *local, _ context.Context, _ context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			return whole(text[:n], 100_000, broken)
		}, ErrCut, "the repository is gone"},
		{"short", fast, time.Minute, func(_ *local, _ context.Context, _ context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			return whole(text[:n], 100_000, nil)
		}, ErrCut, "the recovery point has"},
		{"cancel", fast, time.Minute, func(_ *local, _ context.Context, stop context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			give := whole(text[:n], 100_000, broken)
			return func(ctx context.Context) ([]byte, error) {
				p, err := give(ctx)
				if err != nil {
					stop(errDropped)
					<-ctx.Done()
					return nil, context.Cause(ctx)
				}
				return p, nil
			}
		}, ErrCut, "the run has ended"},
		{"transport", fast, time.Minute, func(l *local, _ context.Context, _ context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			l.cutIn = n + 8000 // behind the program, which is longer
			return whole(text, maxPiece, nil)
		}, ErrCut, "the controller was gone"},
		{"silence", quick, time.Minute, func(l *local, _ context.Context, _ context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			l.cutIn, l.silent = n+8000, true
			return whole(text, maxPiece, nil)
		}, ErrCut, "nothing was heard"},
		{"limit", fast, 2 * time.Second, func(_ *local, _ context.Context, _ context.CancelCauseFunc, n int) func(context.Context) ([]byte, error) {
			give := whole(text[:n], 100_000, broken)
			return func(ctx context.Context) ([]byte, error) {
				p, err := give(ctx)
				if err != nil {
					<-ctx.Done()
				}
				return p, err
			}
		}, ErrCommand, "time limit"},
	}
	inEach(t, func(t *testing.T, l *local) {
		rng := rand.New(rand.NewPCG(1, 2))
		for name, command := range committers {
			for _, f := range faults {
				at := []int{0, 1 + rng.IntN(70_000), 1 + rng.IntN(maxPiece), maxPiece, maxPiece + rng.IntN(maxPiece)}
				if name != "plain" || f.name == "silence" || f.name == "limit" { // which take their time
					at = at[rng.IntN(len(at)):][:1]
				}
				for _, n := range at {
					t.Run(name+" "+f.name, func(t *testing.T) {
						t.Parallel()
						l := *l
						l.t, l.dir = t, t.TempDir()
						ctx, stop := context.WithCancelCause(t.Context())
						defer stop(nil)
						give := f.begin(&l, ctx, stop, n)
						var took atomic.Int64
						end, err := f.times.consume(ctx, &l, hold.Target{}, strings.ReplaceAll(command, "NAME", "x"), f.limit, int64(len(text)), &took, give)
						if !errors.Is(err, f.want) || !strings.Contains(err.Error(), f.says) {
							t.Errorf("after %d: %+v, %v", n, end, err)
						}
						if fi, err := os.Stat(filepath.Join(l.dir, "x.committed")); err == nil && (name != "exec" || fi.Size() > 0) {
							t.Errorf("after %d bytes it committed", n)
						}
						l.none()
					})
				}
			}
		}
	})
}

// none waits until no process of the test is left.
func (l *local) none() {
	l.t.Helper()
	l.until("its processes to be gone", func() bool { return len(l.left()) == 0 })
}

// left are the processes of the test: those with its directory, which is in their environment too.
func (l *local) left() (pids []int) {
	l.t.Helper()
	dir, err := os.Stat(l.dir)
	if err != nil {
		l.t.Fatal(err)
	}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil {
			continue
		}
		// A process that is about to run another program has no environment for a moment.
		at, err := os.Stat(filepath.Join(p, "cwd"))
		text, _ := os.ReadFile(filepath.Join(p, "environ"))
		if err == nil && os.SameFile(at, dir) || bytes.Contains(text, []byte("DIR="+l.dir+"\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// feeding begins a feed of a mover that serves with write.
func beginFeed(t *testing.T, command string, total int64, write func(context.Context, io.Writer) error) (s *Streams, changed chan struct{}, served chan error, l *local) {
	t.Helper()
	l = &local{t: t, shell: shells(t)["dash"], dir: t.TempDir(), path: "/usr/bin:/bin"}
	b := both{l, filepath.Join(l.dir, "socket")}
	s, changed, served = &Streams{Exec: b}, make(chan struct{}), make(chan error, 1)
	f := Feed{App: hold.Target{Pod: "app"}, Command: command, Limit: time.Minute, Bytes: total, Mover: hold.Target{Pod: "mover"}}
	if err := s.BeginFeed(Key{"run", "feed"}, f, func() { close(changed) }); err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := Accept(t.Context(), b.socket, time.Minute)
		if err == nil {
			err = errors.Join(Serve(t.Context(), c, write), c.Close())
		}
		served <- err
	}()
	return s, changed, served, l
}

// What a mover has gets to a command by two execs, whole; what a mover does not finish does not.
func TestFeed(t *testing.T) {
	t.Parallel()
	text := random(10*maxPiece + 99)
	for name, tc := range map[string]struct {
		send  []byte
		err   error
		total int
		want  error
		begun bool
	}{
		"whole":         {send: text, begun: true},
		"one byte":      {send: text[:1], begun: true},
		"whole pieces":  {send: text[:6*maxPiece], begun: true},
		"fails":         {send: text[:5*maxPiece+1], err: errors.New("a pack is lost"), want: ErrMover, begun: true},
		"fails at once": {err: errors.New("a pack is lost"), want: ErrMover},
		"empty":         {want: ErrMover},
		"short":         {send: text[:7], total: 8, want: ErrCut, begun: true},
		"long":          {send: text[:maxPiece+9], total: 8, want: ErrCut, begun: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			total := int64(len(tc.send))
			if tc.total > 0 {
				total = int64(tc.total)
			}
			s, changed, served, l := beginFeed(t, `cat >"$DIR/got" && : >"$DIR/committed"`, total, func(_ context.Context, w io.Writer) error {
				if _, err := w.Write(tc.send); err != nil {
					return err
				}
				return tc.err
			})
			<-changed
			st := s.Get(Key{"run", "feed"}).State()
			if !st.Ended || !errors.Is(st.Err, tc.want) || (tc.want == nil) != (st.Err == nil) || st.Begun != tc.begun {
				t.Errorf("%+v", st)
			}
			<-served
			got, _ := os.ReadFile(filepath.Join(l.dir, "got"))
			_, err := os.Stat(filepath.Join(l.dir, "committed"))
			if tc.want == nil && (!bytes.Equal(got, tc.send) || err != nil || st.Bytes != total) {
				t.Errorf("%d of %d bytes came, %v, %+v", len(got), len(tc.send), err, st)
			}
			if tc.want != nil && err == nil {
				t.Error("it committed")
			}
			l.none()
		})
	}
}

// A run that is deleted, and a process that ends, kill the command, and the mover ends.
func TestFeedIsDropped(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(s *Streams){
		"dropped": func(s *Streams) { s.Drop("run") },
		"closed": func(s *Streams) {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			_ = s.Start(ctx)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, changed, served, l := beginFeed(t, `: >"$DIR/begun"; cat >/dev/null && : >"$DIR/committed"`, 8*maxPiece, func(ctx context.Context, w io.Writer) error {
				if _, err := w.Write(make([]byte, 3*maxPiece)); err != nil {
					return err
				}
				<-ctx.Done()
				return ctx.Err()
			})
			l.until("the command to begin", func() bool { _, err := os.Stat(filepath.Join(l.dir, "begun")); return err == nil })
			end(s)
			<-changed
			if err := <-served; !errors.Is(err, ErrCut) {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(l.dir, "committed")); err == nil {
				t.Error("it committed")
			}
			l.none()
		})
	}
}

// kill kills all processes of the test at once, as the end of their pod does: each is stopped first, so that
// none sees another's end.
func (l *local) kill() {
	l.t.Helper()
	for range 2 { // what one has begun before it was stopped
		for _, pid := range l.left() {
			_ = syscall.Kill(pid, syscall.SIGSTOP)
		}
	}
	l.until("its processes to be killed", func() bool {
		left := l.left()
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(left) == 0
	})
}

// A pod that goes away takes the command and the program with it: the exec ends, the mover ends, and it is said
// whether the command had all of its input.
func TestFeedIntoAPodThatGoes(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		command string
		all     bool // the mover sends all of it
		want    error
	}{
		"while it reads":         {command: `: >"$DIR/begun"; cat >/dev/null && : >"$DIR/committed"`, want: ErrCut},
		"while it reads no more": {command: `: >"$DIR/begun"; sleep 600 && : >"$DIR/committed"`, all: true, want: ErrCut},
		"with all of its input":  {command: `cat >/dev/null; : >"$DIR/begun"; sleep 600 && : >"$DIR/committed"`, all: true, want: ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, changed, served, l := beginFeed(t, tc.command, 8*maxPiece, func(ctx context.Context, w io.Writer) error {
				n := 3
				if tc.all {
					n = 8
				}
				if _, err := w.Write(make([]byte, n*maxPiece)); err != nil || tc.all {
					return err
				}
				<-ctx.Done()
				return ctx.Err()
			})
			l.until("the command to begin", func() bool { _, err := os.Stat(filepath.Join(l.dir, "begun")); return err == nil })
			l.kill()
			<-changed
			if st := s.Get(Key{"run", "feed"}).State(); !st.Ended || !st.Begun || !errors.Is(st.Err, tc.want) || st.End.ExitCode != -1 {
				t.Errorf("%+v", st)
			}
			if err := <-served; !tc.all && !errors.Is(err, ErrCut) {
				t.Errorf("the mover: %v", err)
			}
			if _, err := os.Stat(filepath.Join(l.dir, "committed")); err == nil {
				t.Error("it committed")
			}
			l.none()
		})
	}
}

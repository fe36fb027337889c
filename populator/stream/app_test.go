package stream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/populator/hold"
)

// fast is for tests.
var fast = times{silence: time.Minute, beat: 100 * time.Millisecond, pace: time.Second, grace: 500 * time.Millisecond}

// The output of a successful command arrives byte by byte.
func TestProduce(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		for _, tc := range []struct{ command, want string }{
			{"printf hello", "hello"},
			{`printf '%s\n' "it's" '$HOME' '\' "a
b"; echo to standard error >&2`, "it's\n$HOME\n\\\na\nb\n"},
			{`x=1; (sleep 0.1; echo $x) | cat`, "1\n"},
			{"cat; echo no input", "no input\n"},
		} {
			var out bytes.Buffer
			end, err := fast.produce(t.Context(), l, hold.Target{}, tc.command, time.Minute, &out)
			if err != nil || out.String() != tc.want || end != (End{0, int64(len(tc.want))}) {
				t.Errorf("%q gave %q, %+v, %v", tc.command, out.String(), end, err)
			}
		}
		var out bytes.Buffer
		end, err := fast.produce(t.Context(), l, hold.Target{}, `head -c 5000001 /dev/urandom | tee "$DIR/copy"`, time.Minute, &out)
		want, rerr := os.ReadFile(filepath.Join(l.dir, "copy"))
		if err != nil || rerr != nil || end.Bytes != 5000001 || !bytes.Equal(out.Bytes(), want) {
			t.Errorf("of 5,000,001 bytes came %d, %+v, %v", out.Len(), end, errors.Join(err, rerr))
		}
	})
}

// Incomplete output, and output of a failed command, is an error that says so.
func TestProduceFails(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		for _, tc := range []struct {
			name, command string
			limit         time.Duration
			short         int
			path          string
			want          error
			says          string
			code          int
		}{
			{name: "a status", command: "echo half; echo 'no such table' >&2; exit 3", want: ErrCommand, says: "status 3; it printed: no such table", code: 3},
			{name: "half a line", command: "echo half; printf 'no such table' >&2; exit 3", want: ErrCommand, says: "status 3; it printed: no such table", code: 3},
			{name: "no command", command: "/nonexistent/pg_dump", want: ErrCommand, says: "status 127", code: 127},
			{name: "killed", command: "echo half; kill -9 $$", want: ErrCommand, says: "status 137", code: 137},
			{name: "a syntax error", command: "if", want: ErrCommand, says: "status 2", code: 2},
			{name: "nothing", command: "true", want: ErrCommand, says: "printed nothing"},
			{name: "too long", command: "echo half; sleep 60", limit: time.Second, want: ErrCommand, says: "time limit", code: 143},
			{name: "cut without a word", command: "echo 0123456789", short: 4, want: ErrCut, says: "printed 11 bytes, and 7 came"},
			{name: "without tee", command: "echo whole", path: "sleep wc sh", want: ErrCommand, says: "no tee command", code: -1},
		} {
			if tc.path != "" && strings.Contains(l.shell[0], "busybox") {
				continue // its shell finds its own commands without a path
			}
			t.Run(tc.name, func(t *testing.T) {
				t.Parallel()
				l := *l
				l.t, l.short = t, tc.short
				if tc.path != "" {
					path := t.TempDir()
					for name := range strings.FieldsSeq(tc.path) {
						if err := os.Symlink("/bin/"+name, filepath.Join(path, name)); err != nil {
							t.Fatal(err)
						}
					}
					l.path = path
				}
				limit := tc.limit
				if limit == 0 {
					limit = time.Minute
				}
				var out bytes.Buffer
				end, err := fast.produce(t.Context(), &l, hold.Target{}, tc.command, limit, &out)
				if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) || end.ExitCode != tc.code {
					t.Errorf("%+v, %v", end, err)
				}
			})
		}
	})
}

// A command whose client has ended is ended, even if it prints nothing or ignores signals.
func TestProduceIsLeft(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		for name, command := range map[string]string{
			"busy": `echo $$ >"$DIR/busy"; while :; do echo row; done`,
			"idle": `echo $$ >"$DIR/idle"; exec sleep 600`,
			"deaf": `trap "" TERM; echo $$ >"$DIR/deaf"; while :; do sleep 1; done`,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				l := *l
				l.t = t
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				var out bytes.Buffer
				done := make(chan error, 1)
				go func() {
					_, err := fast.produce(ctx, &l, hold.Target{}, command, time.Hour, &out)
					done <- err
				}()
				l.until("the command to begin", func() bool {
					select {
					case err := <-done:
						t.Fatalf("ended before it was left: %v", err)
					default:
					}
					return l.pid(name) > 0
				})
				cancel()
				if err := <-done; !errors.Is(err, ErrCut) {
					t.Error(err)
				}
				l.gone(name)
			})
		}
	})
}

// A command whose time is over before its process is known is ended too.
func TestProduceEndsWhatBeginsLate(t *testing.T) {
	t.Parallel()
	inEach(t, func(t *testing.T, l *local) {
		slow := t.TempDir()
		if err := os.WriteFile(filepath.Join(slow, "sh"), []byte("#!/bin/sh\nsleep 3\nexec /bin/sh \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		l.path = slow + ":" + l.path
		var out bytes.Buffer
		end, err := fast.produce(t.Context(), l, hold.Target{}, "exec sleep 60", time.Second, &out)
		if !errors.Is(err, ErrCommand) || !strings.Contains(err.Error(), "time limit") || end.ExitCode != 143 {
			t.Errorf("%+v, %v", end, err)
		}
		l.none()
	})
}

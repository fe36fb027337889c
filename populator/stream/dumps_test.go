package stream

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/populator/hold"
)

// both execs in an application's pod, which is this machine, and in a mover's, whose socket is there.
type both struct {
	*local
	socket string
}

func (b both) Stream(ctx context.Context, t hold.Target, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if t.Pod == "mover" {
		return Relay(ctx, b.socket, stdin, stdout)
	}
	return b.local.Stream(ctx, t, command, stdin, stdout, stderr)
}

// took is what a mover has read.
type took struct {
	text string
	err  error
}

// passing begins a stream to a mover that reads with take.
func passing(t *testing.T, command string, take func(c net.Conn) took) (s *Streams, key Key, changed chan struct{}, got chan took, l *local) {
	t.Helper()
	for _, shell := range shells(t) {
		l = &local{t: t, shell: shell, dir: t.TempDir(), path: "/usr/bin:/bin"}
	}
	b := both{l, filepath.Join(l.dir, "socket")}
	s, key, changed, got = &Streams{Exec: b}, Key{"run", "dump"}, make(chan struct{}), make(chan took, 1)
	d := Dump{App: hold.Target{Pod: "app"}, Command: command, Limit: time.Minute, Mover: hold.Target{Pod: "mover"}}
	if err := s.Begin(key, d, func() { close(changed) }); err != nil {
		t.Fatal(err)
	}
	if s.Begin(key, d, nil) == nil {
		t.Error("it began twice")
	}
	go func() {
		c, err := Accept(t.Context(), b.socket, time.Minute)
		if err != nil {
			got <- took{err: err}
			return
		}
		defer c.Close()
		got <- take(c)
	}()
	return s, key, changed, got, l
}

func all(c net.Conn) took {
	text, err := io.ReadAll(NewReader(c))
	return took{string(text), err}
}

// A mover gets the end of a stream only if the command has succeeded.
func TestStreams(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		command, text string
		want          error
	}{
		{"printf 'whole\n'", "whole\n", nil},
		{"printf 'half\n'; exit 1", "half\n", ErrCommand},
	} {
		s, key, changed, got, _ := passing(t, tc.command, all)
		<-changed
		st := s.Get(key).State()
		if !st.Ended || !errors.Is(st.Err, tc.want) || st.Bytes != int64(len(tc.text)) {
			t.Errorf("%q: %+v", tc.command, st)
		}
		m := <-got
		if m.text != tc.text || tc.want == nil != (m.err == nil) || m.err != nil && !errors.Is(m.err, ErrCut) {
			t.Errorf("%q: the mover read %+v", tc.command, m)
		}
		s.Drop("run")
		if s.Get(key) != nil {
			t.Error("it was dropped and is there")
		}
	}
}

// A mover that stops reading ends the command.
func TestMoverLeaves(t *testing.T) {
	t.Parallel()
	s, key, changed, got, l := passing(t, `echo $$ >"$DIR/pid"; while :; do echo row; done`, func(c net.Conn) took {
		_, err := io.ReadFull(NewReader(c), make([]byte, 100))
		return took{err: err}
	})
	if m := <-got; m.err != nil {
		t.Fatal(m.err)
	}
	<-changed
	if st := s.Get(key).State(); !errors.Is(st.Err, ErrMover) || st.Bytes < 100 {
		t.Errorf("%+v", st)
	}
	l.gone("pid")
}

// A stream that is dropped, or whose process ends, is cut: the mover gets no end.
func TestStreamsAreDropped(t *testing.T) {
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
			read := make(chan struct{})
			s, _, changed, got, l := passing(t, `echo $$ >"$DIR/pid"; echo half; sleep 600; echo whole`, func(c net.Conn) took {
				r := NewReader(c)
				if _, err := io.ReadFull(r, make([]byte, 5)); err != nil {
					return took{err: err}
				}
				close(read)
				text, err := io.ReadAll(r)
				return took{string(text), err}
			})
			<-read
			end(s)
			<-changed
			if m := <-got; m.text != "" || !errors.Is(m.err, ErrCut) {
				t.Errorf("the mover read %+v", m)
			}
			l.gone("pid")
			if name == "closed" {
				if err := s.Begin(Key{"other", "dump"}, Dump{}, nil); err == nil || !strings.Contains(err.Error(), "being stopped") {
					t.Error(err)
				}
			}
		})
	}
}

package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/varve-io/varve/populator/hold"
)

// Dump is one command whose output a mover stores.
type Dump struct {
	// Object of the run, for Gone.
	Object types.NamespacedName
	// App is where Command runs, by the container's sh, for at most Limit.
	App     hold.Target
	Command string
	Limit   time.Duration
	// Mover waits for the stream (Accept).
	Mover hold.Target
}

// Key names a stream: an attempt of a run's dump.
type Key struct {
	Run  types.UID
	Name string
}

// State of a stream.
type State struct {
	// Bytes that came so far, or that the command took.
	Bytes int64
	// Begun says that the command of a feed may have been started.
	Begun bool
	// Ended says that nothing of it runs in this process any more.
	Ended bool
	// End is how the command ended, and Err why the stream is useless, if it Ended. Without Err the
	// mover has all of it, and reports its own result.
	End End
	Err error
}

// Stream is a running or ended stream.
type Stream struct {
	of    types.NamespacedName // the run's object; empty for a feed
	end   context.CancelCauseFunc
	bytes atomic.Int64
	begun atomic.Bool

	mu    sync.Mutex
	state State
}

// State of the stream.
func (s *Stream) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.state
	if !st.Ended {
		st.Bytes = s.bytes.Load()
	}
	st.Begun = s.begun.Load()
	return st
}

// Streams are those of this process; none outlives it. They are safe for concurrent use.
type Streams struct {
	Exec Exec

	mu      sync.Mutex
	all     map[Key]*Stream
	closed  bool
	running sync.WaitGroup
}

var (
	errClosed  = errors.New("the controller is being stopped")
	errDropped = errors.New("the run has ended")
)

// Begin starts to forward a command's output to its mover; changed is called when it has ended.
func (s *Streams) Begin(k Key, d Dump, changed func()) error {
	return s.begin(k, d.Object, changed, func(ctx context.Context, one *Stream) (End, error) { return one.pass(ctx, s.Exec, d) })
}

func (s *Streams) begin(k Key, of types.NamespacedName, changed func(), do func(context.Context, *Stream) (End, error)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	if s.all[k] != nil {
		return fmt.Errorf("run %s has a stream %s already", k.Run, k.Name)
	}
	ctx, end := context.WithCancelCause(context.Background())
	one := &Stream{of: of, end: end}
	if s.all == nil {
		s.all = map[Key]*Stream{}
	}
	s.all[k] = one
	s.running.Go(func() {
		defer changed()
		defer end(nil)
		how, err := do(ctx, one)
		if err != nil && ctx.Err() != nil && !errors.Is(err, ErrCut) && !errors.Is(err, ErrUnknown) {
			err = fmt.Errorf("%w: %w", ErrCut, context.Cause(ctx))
		}
		one.mu.Lock()
		one.state = State{Bytes: how.Bytes, Ended: true, End: how, Err: err}
		one.mu.Unlock()
	})
	return nil
}

// Get returns a stream of this process; nil if it has none of that name.
func (s *Streams) Get(k Key) *Stream {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[k]
}

// Drop ends the streams of a run at once. It does not wait.
func (s *Streams) Drop(run types.UID) {
	s.drop(func(k Key, _ *Stream) bool { return k.Run == run })
}

// Gone is Drop for the dumps of the runs of a name, except the one that has the name now, if any: an
// object may be deleted just before Begin.
func (s *Streams) Gone(name types.NamespacedName, now types.UID) {
	s.drop(func(k Key, one *Stream) bool { return one.of == name && k.Run != now })
}

func (s *Streams) drop(is func(k Key, one *Stream) bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, one := range s.all {
		if is(k, one) {
			one.end(errDropped)
			delete(s.all, k)
		}
	}
}

// Start implements controller-runtime's manager.Runnable: it returns once the process is to end and no
// stream is left.
func (s *Streams) Start(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	s.closed = true
	for _, one := range s.all {
		one.end(errClosed)
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// ErrMover means that the mover read no stream, or not all of it; its result says why.
var ErrMover = errors.New("the mover did not take the stream")

// streamBeat is how often the mover is told that the controller is alive.
const streamBeat = 10 * time.Second

// pass connects the two execs. The one in the mover's pod comes first, so that the command does
// not begin before there is a reader.
func (s *Stream) pass(ctx context.Context, e Exec, d Dump) (End, error) {
	none := End{ExitCode: -1}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	frames, to := io.Pipe()
	greeting := &greeted{yes: make(chan struct{})}
	relayed := make(chan struct{})
	var left error // how the relay ended
	go func() {
		defer close(relayed)
		left = e.Stream(ctx, d.Mover, Relayed, frames, greeting, io.Discard)
		if left == nil {
			left = errors.New("it closed the stream")
		}
		left = fmt.Errorf("%w: %w", ErrMover, left)
		_ = frames.CloseWithError(left) // later writes fail
	}()
	defer func() {
		stop()
		_ = to.Close()
		<-relayed
	}()
	select {
	case <-greeting.yes:
	case <-relayed:
		return none, left
	case <-ctx.Done():
		return none, ctx.Err()
	}
	w := NewWriter(to)
	go func() {
		tick := time.NewTicker(streamBeat)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if w.Beat() != nil {
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	out := &passed{w: w, bytes: &s.bytes, stop: stop}
	end, err := usual.produce(ctx, e, d.App, d.Command, d.Limit, out)
	switch {
	case out.failed() != nil: // the command only saw that there is no reader
		return end, out.failed()
	case err != nil:
		return end, err
	}
	if err := w.End(); err != nil {
		return end, err
	}
	// The mover closes the stream once it has read the end.
	select {
	case <-relayed:
		return end, nil
	case <-ctx.Done():
		return end, ctx.Err()
	}
}

// passed receives the command's output: the first error ends all.
type passed struct {
	w     *Writer
	bytes *atomic.Int64
	stop  func()

	mu  sync.Mutex
	err error
}

func (p *passed) failed() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

func (p *passed) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.bytes.Store(p.w.Bytes())
	if err != nil {
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
		p.stop()
	}
	return n, err
}

// greeted waits for the mover's hello.
type greeted struct {
	got  []byte
	once sync.Once
	yes  chan struct{}
}

func (g *greeted) Write(p []byte) (int, error) {
	if len(g.got) < len(hello) {
		g.got = append(g.got, p[:min(len(p), len(hello)-len(g.got))]...)
		if bytes.Equal(g.got, []byte(hello)) {
			g.once.Do(func() { close(g.yes) })
		}
	}
	return len(p), nil
}

package stream

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/populator/hold"
)

// Exec runs a command in a container with its streams until it ends or the stream breaks.
type Exec interface {
	Stream(ctx context.Context, t hold.Target, command []string, stdin io.Reader, stdout, stderr io.Writer) error
}

// ErrCommand means that the command itself failed: a retry would fail too.
var ErrCommand = errors.New("the command failed")

// End is how a command ended, as the program in its pod reported.
type End struct {
	// ExitCode of the command; -1 if unknown.
	ExitCode int
	// Bytes that came.
	Bytes int64
}

// Bounds of the kept part of a command's standard error, in bytes.
const (
	maxSaid  = 2 << 10
	maxShown = 400
)

// trailer receives a program's standard error: its last line, and the end of the command's output.
type trailer struct {
	nonce string

	mu     sync.Mutex
	said   []byte
	ended  []string      // the words of the last line
	last   chan struct{} // closed when that came
	failed string
}

// line handles a printed line.
func (t *trailer) line(line []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rest, mine := bytes.CutPrefix(line, []byte(t.nonce+" "))
	if !mine {
		t.said = append(append(t.said, line...), '\n')
		t.said = t.said[max(len(t.said)-maxSaid, 0):]
		return
	}
	word, arg, _ := strings.Cut(string(rest), " ")
	switch word {
	case "ended":
		if t.ended == nil {
			t.ended = strings.Fields(arg)
			close(t.last)
		}
	case "failed":
		t.failed = arg
	}
}

// endings say for users why the program ended the command.
var endings = map[string]string{
	"gone":    "the controller was gone",
	"limit":   "its time limit passed",
	"silence": "nothing was heard from the controller",
	"garbled": "what came was not what the controller sent",
	"left":    "the controller gave it up",
}

// printedWords are the end of what a command printed, for a message; empty for none.
func printedWords(text []byte) string {
	said := plain.Line(strings.Join(strings.Fields(string(text)), " "))
	if said == "" {
		return ""
	}
	if len(said) > maxShown {
		said = "..." + strings.ToValidUTF8(said[len(said)-maxShown:], "")
	}
	return "; it printed: " + said
}

// judge checks that came bytes are all that the command printed, and that it succeeded. err is how
// the exec ended.
func (t *trailer) judge(came int64, err error) (End, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	end := End{ExitCode: -1, Bytes: came}
	printed := printedWords(t.said)
	switch {
	case errors.Is(err, hold.ErrForbidden):
		return end, err
	case t.failed != "":
		return end, fmt.Errorf("%w: %s", ErrCommand, t.failed)
	case len(t.ended) != 4:
		if err == nil {
			err = errors.New("the exec ended without the program's last line")
		}
		return end, fmt.Errorf("%w after %s: %w%s", ErrCut, bytesize.Exact(came), err, printed)
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return -1
		}
		return n
	}
	code, passed, counted, why := number(t.ended[0]), number(t.ended[1]), number(t.ended[2]), t.ended[3]
	end.ExitCode = int(code)
	switch {
	case why == "limit":
		return end, fmt.Errorf("%w: %s%s", ErrCommand, endings[why], printed)
	case why != "none":
		return end, fmt.Errorf("%w after %s: %s", ErrCut, bytesize.Exact(came), endings[why])
	case code != 0:
		return end, fmt.Errorf("%w with status %s%s", ErrCommand, t.ended[0], printed)
	case passed != 0 || counted != came:
		return end, fmt.Errorf("%w: the command printed %s bytes, and %d came%s", ErrCut, t.ended[2], came, printed)
	case came == 0:
		return end, fmt.Errorf("%w: it printed nothing%s", ErrCommand, printed)
	}
	return end, nil
}

// counter counts written bytes. An exec may still write after its end.
type counter struct {
	w io.Writer
	n atomic.Int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// produce runs a command in an application's pod and writes what it prints to out. nil means
// that this is all of it, and that the command succeeded. The error is ErrCommand if the command
// failed, hold.ErrForbidden without the right to exec, and ErrCut for all else.
func (t times) produce(ctx context.Context, e Exec, pod hold.Target, command string, limit time.Duration, out io.Writer) (End, error) {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	stdin, to := io.Pipe()
	said := &trailer{nonce: hex.EncodeToString(id[:]), last: make(chan struct{})}
	count := &counter{w: out}
	ended := make(chan struct{})
	var talk sync.WaitGroup
	talk.Go(func() {
		if _, err := io.WriteString(to, t.text(dumpBody, said.nonce, command, limit)); err != nil {
			return
		}
		tick := time.NewTicker(t.beat)
		defer tick.Stop()
		for {
			select {
			case <-ended:
				return
			case <-tick.C:
				if _, err := io.WriteString(to, "beat\n"); err != nil {
					return
				}
			}
		}
	})
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	talk.Go(func() {
		select {
		case <-ended:
			return
		case <-said.last:
		}
		// The exec ends once all its streams are closed. Processes that the command left may hold
		// them.
		left := time.NewTimer(t.grace)
		defer left.Stop()
		select {
		case <-ended:
		case <-left.C:
			stop()
		}
	})
	err := e.Stream(ctx, pod, Bootstrap, stdin, count, hold.NewLines(said.line))
	close(ended)
	_ = stdin.CloseWithError(io.ErrClosedPipe)
	talk.Wait()
	return said.judge(count.n.Load(), err)
}

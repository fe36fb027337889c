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
	"github.com/varve-io/varve/populator/hold"
)

// maxPiece bounds what is on the way to a command at once, in bytes: the next piece is sent when it has taken
// the one before.
const maxPiece = maxFrame

// ErrUnknown says that it is not known how a command ended that had the end of its input.
var ErrUnknown = errors.New("it is not known whether the command completed")

// teller takes what the program prints to its standard output (feed.sh), and the end of what the command prints.
type teller struct {
	nonce string
	took  chan struct{} // one for each piece that was taken
	last  chan struct{} // closed when the last line came
	bytes *atomic.Int64 // that the command took

	mu     sync.Mutex
	said   []byte
	ended  []string // the words of the last line
	failed string
}

// line takes a line of the program.
func (t *teller) line(line []byte) {
	rest, mine := bytes.CutPrefix(line, []byte(t.nonce+" "))
	if !mine {
		return
	}
	word, arg, _ := strings.Cut(string(rest), " ")
	t.mu.Lock()
	defer t.mu.Unlock()
	switch word {
	case "took":
		if n, err := strconv.ParseInt(arg, 10, 64); err == nil {
			t.bytes.Store(n)
			select {
			case t.took <- struct{}{}:
			default:
			}
		}
	case "ended":
		if t.ended == nil {
			t.ended = strings.Fields(arg)
			close(t.last)
		}
	case "failed":
		t.failed = arg
	}
}

// Write takes what the command prints.
func (t *teller) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.said = append(t.said, p[max(len(p)-maxSaid, 0):]...)
	t.said = t.said[max(len(t.said)-maxSaid, 0):]
	return len(p), nil
}

// judge says whether a command took all of a stream and succeeded. sent says that it was given the end of its input,
// broken why it was not, and err how the exec ended.
func (t *teller) judge(total int64, sent bool, broken, err error) (End, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	end := End{ExitCode: -1, Bytes: t.bytes.Load()}
	printed := printedWords(t.said)
	of := fmt.Sprintf("%d of %s", end.Bytes, bytesize.Exact(total))
	switch {
	case errors.Is(err, hold.ErrForbidden):
		return end, err
	case t.failed != "":
		return end, fmt.Errorf("%w: %s", ErrCommand, t.failed)
	case len(t.ended) != 4:
		if err == nil {
			err = errors.New("the exec ended without the program's last line")
		}
		if sent {
			return end, fmt.Errorf("%w: it had all of its input, and then the exec was lost: %w%s", ErrUnknown, err, printed)
		}
		if broken != nil {
			err = broken
		}
		return end, fmt.Errorf("%w after %s: %w%s", ErrCut, of, err, printed)
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return -1
		}
		return n
	}
	code, fed, unread, why := number(t.ended[0]), number(t.ended[1]), number(t.ended[2]), t.ended[3]
	end.ExitCode = int(code)
	switch {
	case why == "limit":
		return end, fmt.Errorf("%w: %s after %s%s", ErrCommand, endings[why], of, printed)
	case why != "none":
		if broken == nil {
			broken = errors.New(endings[why])
		}
		return end, fmt.Errorf("%w after %s, and the command was killed: %w", ErrCut, of, broken)
	case code != 0:
		return end, fmt.Errorf("%w with status %s after %s%s", ErrCommand, t.ended[0], of, printed)
	case !sent || fed != total || unread != 0:
		return end, fmt.Errorf("%w: it ended with status 0 and has not read all of its input; it was given %s%s", ErrCommand, of, printed)
	}
	return end, nil
}

// fed is a command that is fed.
type fed struct {
	times
	nonce string
	tell  *teller
	to    *io.PipeWriter
	ended chan struct{} // the exec has ended
	mu    sync.Mutex    // of writes
}

// errEnded says that the command did not wait for the end of its input.
var errEnded = errors.New("the command has ended")

func (f *fed) write(p []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.to.Write(p)
	return err
}

// feed sends the pieces that next gives, to its io.EOF; sent says that the end was sent.
func (f *fed) feed(ctx context.Context, total int64, next func(context.Context) ([]byte, error)) (sent bool, err error) {
	sum := int64(0)
	for {
		piece, err := next(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return false, err
		}
		sum += int64(len(piece))
		if err := f.write(append(fmt.Appendf(nil, "d %d\n", len(piece)), piece...)); err != nil {
			return false, errEnded
		}
		select {
		case <-f.tell.took:
		case <-f.tell.last:
			return false, errEnded
		case <-f.ended:
			return false, errEnded
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
	if sum != total {
		return false, fmt.Errorf("%w: it has %s, and the recovery point has %s", ErrCut, bytesize.Exact(sum), bytesize.Exact(total))
	}
	// From here on it may have the end, whatever the write says.
	if err := f.write(fmt.Appendf(nil, "e %d %s\n", sum, f.nonce)); err != nil {
		return true, errEnded
	}
	return true, nil
}

// consume runs a command in an application's pod with a stream of total bytes as its standard input, which next gives
// piece by piece. nil says that the command has read all of it, and succeeded. Whatever else happens, the command sees no end
// of its input: it is killed. The error is ErrCommand where it is the command's own, hold.ErrForbidden
// without the right to exec, ErrUnknown where the command had all and what became of it was not heard, and ErrCut for all else.
func (t times) consume(ctx context.Context, e Exec, pod hold.Target, command string, limit time.Duration, total int64, took *atomic.Int64, next func(context.Context) ([]byte, error)) (End, error) {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	stdin, to := io.Pipe()
	f := &fed{times: t, nonce: hex.EncodeToString(id[:]), to: to, ended: make(chan struct{})}
	f.tell = &teller{nonce: f.nonce, took: make(chan struct{}, 1), last: make(chan struct{}), bytes: took}
	// The exec outlives ctx by the time that the program needs to kill the command, and to say so.
	execution, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	feeding, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	var talk sync.WaitGroup
	begun, given := make(chan struct{}), make(chan struct{}) // the program was sent; the command is given up
	var sent bool
	var broken error
	talk.Go(func() {
		err := f.write([]byte(t.text(feedBody, f.nonce, command, limit)))
		close(begun)
		if err != nil {
			return
		}
		if sent, broken = f.feed(feeding, total, next); sent && broken == nil { // the command works on the rest
			select {
			case <-f.tell.last:
			case <-f.ended:
			case <-ctx.Done():
				broken = context.Cause(ctx)
			}
		}
		if broken != nil && !errors.Is(broken, errEnded) {
			close(given)
			_ = f.write([]byte("x\n"))
		}
	})
	talk.Go(func() {
		select {
		case <-f.tell.last:
		case <-ctx.Done():
		case <-given:
		case <-f.ended:
			return
		}
		// The exec ends once all of its streams are closed. What the command has left behind may hold them.
		left := time.NewTimer(t.grace)
		defer left.Stop()
		select {
		case <-f.ended:
		case <-left.C:
			stop()
		}
	})
	talk.Go(func() {
		<-begun
		tick := time.NewTicker(t.beat)
		defer tick.Stop()
		for {
			select {
			case <-f.ended:
				return
			case <-tick.C:
				if f.write([]byte("b\n")) != nil {
					return
				}
			}
		}
	})
	err := e.Stream(execution, pod, Bootstrap, stdin, hold.NewLines(f.tell.line), f.tell)
	close(f.ended)
	leave(errEnded)
	_ = stdin.CloseWithError(io.ErrClosedPipe)
	talk.Wait()
	if errors.Is(broken, errEnded) {
		broken = nil
	}
	return f.tell.judge(total, sent, broken, err)
}

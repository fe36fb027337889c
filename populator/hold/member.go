package hold

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/varve-io/varve/internal/bytesize"
)

// Exec runs a command in a container with its streams until it ends or the stream breaks.
type Exec interface {
	Exec(ctx context.Context, t Target, command []string, stdin io.Reader, stdout io.Writer) error
}

// Target is a container of a pod.
type Target struct{ Namespace, Pod, UID, Container string }

func (t Target) String() string { return t.Namespace + "/" + t.Pod }

// Errors of a hold.
var (
	// ErrFreeze means that the application could not be frozen.
	ErrFreeze = errors.New("the application was not frozen")
	// ErrLost means that the hold ended too early, or that this is not known.
	ErrLost = errors.New("the hold was lost")
	// ErrForbidden means that this process may not exec in the pod.
	ErrForbidden = errors.New("exec is forbidden")
	// ErrStuck means that the application may still be frozen.
	ErrStuck = errors.New("the application may still be frozen")
)

// Bounds of the kept output of a command.
const (
	maxLine  = 16 << 10
	maxSaid  = 2 << 10
	maxNotes = 4 << 10
)

// member is one application being held. Its methods are safe for concurrent use.
type member struct {
	nonce string
	stdin *io.PipeWriter
	write sync.Mutex // of stdin

	mu       sync.Mutex
	said     []byte // the end of what the commands printed
	notes    map[string]string
	size     int // of notes, with their names
	failed   string
	status   string // of a freeze command that failed
	began    bool
	stuck    bool
	thawed   bool
	thawing  string // why
	frozenAt time.Time
	held     map[string]bool // challenges that were answered
	lost     bool

	ready   chan struct{} // closed when it holds
	changed chan struct{} // has one element when a line arrived
	ended   chan struct{} // closed when the exec has ended
	err     error         // of the exec; read once ended
}

// start begins to freeze. The exec ends with ctx at the latest.
func start(ctx context.Context, e Exec, t Target, p Program, silence, beat time.Duration) *member {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	r, w := io.Pipe()
	m := &member{
		nonce: hex.EncodeToString(id[:]), stdin: w, notes: map[string]string{}, held: map[string]bool{},
		ready: make(chan struct{}), changed: make(chan struct{}, 1), ended: make(chan struct{}),
	}
	out := &lines{take: m.line}
	go func() {
		defer close(m.ended)
		m.err = e.Exec(ctx, t, Bootstrap, r, out)
		_ = r.CloseWithError(io.ErrClosedPipe)
	}()
	go func() {
		if m.send(p.text(m.nonce, silence)) != nil {
			return
		}
		tick := time.NewTicker(beat)
		defer tick.Stop()
		for {
			select {
			case <-m.ended:
				return
			case <-tick.C:
				if m.send("beat\n") != nil {
					return
				}
			}
		}
	}()
	return m
}

// send writes to the program. It may block for as long as the exec lasts.
func (m *member) send(text string) error {
	m.write.Lock()
	defer m.write.Unlock()
	_, err := io.WriteString(m.stdin, text)
	return err
}

// line handles a printed line.
func (m *member) line(line []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	defer func() {
		select {
		case m.changed <- struct{}{}:
		default:
		}
	}()
	rest, mine := bytes.CutPrefix(line, []byte(m.nonce+" "))
	if !mine {
		m.said = append(append(m.said, line...), '\n')
		m.said = m.said[max(len(m.said)-maxSaid, 0):]
		return
	}
	word, arg, _ := strings.Cut(string(rest), " ")
	switch word {
	case sayFreezing:
		m.began = true
	case sayReady:
		if m.frozenAt.IsZero() {
			m.frozenAt = time.Now()
			close(m.ready)
		}
	case sayHeld:
		if len(m.held) < 64 {
			m.held[arg] = true
		}
	case sayFailed:
		m.failed = arg
		if status, is := strings.CutPrefix(arg, saysStatus); is {
			m.status = status
		}
	case sayLost:
		m.lost = true
	case sayThawing:
		m.thawing = arg
	case sayThawed:
		m.thawed = true
	case sayStuck:
		m.stuck = true
	case sayEnded:
		m.thawed = true // its locks ended with it
		if arg != "0" {
			m.failed = "the session ended with status " + arg
		}
	case sayNote:
		name, text, _ := strings.Cut(arg, " ")
		raw, err := base64.StdEncoding.DecodeString(text)
		switch size := m.size + len(name) + len(raw); {
		case err != nil:
			m.failed = "a note was not in base64"
		case size > maxNotes:
			m.failed = fmt.Sprintf("its notes have more than %s", bytesize.Format(maxNotes))
		default:
			m.notes[name], m.size = string(raw), size
		}
	}
}

// wait waits until is reports true of the received lines. It fails if the exec ends before that.
func (m *member) wait(ctx context.Context, is func() bool) error {
	now := func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return is()
	}
	for {
		if now() {
			return nil
		}
		select {
		case <-m.changed:
		case <-m.ended:
			if now() {
				return nil
			}
			return m.why()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// why returns why the exec ended, in one line.
func (m *member) why() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	parts := []string{}
	if m.failed != "" {
		parts = append(parts, m.failed)
	}
	if m.lost {
		parts = append(parts, "the check failed")
	}
	if why := thawReasons[m.thawing]; why != "" {
		parts = append(parts, why)
	}
	select {
	case <-m.ended:
		if m.err != nil && (len(parts) == 0 || m.thawing == "") {
			parts = append(parts, m.err.Error())
		}
	default:
	}
	if said := strings.Join(strings.Fields(string(m.said)), " "); said != "" {
		parts = append(parts, "it printed: "+clip(said, 400))
	}
	if len(parts) == 0 {
		parts = []string{"the command ended"}
	}

	said := errors.New(strings.Join(parts, "; "))
	select {
	case <-m.ended:
		if errors.Is(m.err, ErrForbidden) {
			return fmt.Errorf("%w: %w", ErrForbidden, said)
		}
	default:
	}
	return said
}

// thawReasons say for users why a program thawed by itself.
var thawReasons = map[string]string{
	"limit":   "the time limit of the hold passed",
	"silence": "nothing was heard from the controller",
	"eof":     "the stream ended",
	"orphan":  "its process in the pod was killed",
	"left":    "its processes in the pod were killed",
	"session": "the session ended",
}

// endedWhy returns why the program ended by itself; nil if it has not.
func (m *member) endedWhy() error {
	select {
	case <-m.ended:
		return m.why()
	default:
		return nil
	}
}

func (m *member) isStuck() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stuck
}

func (m *member) isThawed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.thawed
}

// left returns the program that thaws what p may have left frozen. It is nil if p began nothing, has
// thawed, or could not thaw, and if its locks end with a session.
func (m *member) left(p Program) *Program {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.began || m.thawed || m.stuck || p.Session != "" {
		return nil
	}
	p.again, p.status = true, m.status
	return &p
}

func (m *member) noted() map[string]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.notes)
}

// frozen waits until the application is held.
func (m *member) frozen(ctx context.Context) error {
	err := m.wait(ctx, func() bool { return !m.frozenAt.IsZero() || m.failed != "" || m.thawing != "" })
	m.mu.Lock()
	ok := err == nil && !m.frozenAt.IsZero() && m.failed == "" && m.thawing == ""
	m.mu.Unlock()
	if ok {
		return nil
	}
	if err == nil {
		err = m.why()
	}
	return fmt.Errorf("%w: %w", ErrFreeze, err)
}

// prove asks the program whether it has held until now. nil means that it has: the answer is to
// a new challenge.
func (m *member) prove(ctx context.Context) error {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails
	challenge := hex.EncodeToString(id[:])
	go m.send("prove " + challenge + "\n") //nolint:errcheck // a broken stream gives no answer
	err := m.wait(ctx, func() bool { return m.held[challenge] || m.lost || m.thawing != "" })
	m.mu.Lock()
	ok := err == nil && m.held[challenge] && !m.lost
	m.mu.Unlock()
	if ok {
		return nil
	}
	if err == nil {
		err = m.why()
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}

// release thaws the application and waits for that. It fails if the thaw is not known, or if the
// program's work at the end failed.
func (m *member) release(ctx context.Context) error {
	go func() {
		_ = m.send("thaw\n")
		m.write.Lock()
		defer m.write.Unlock()
		_ = m.stdin.Close()
	}()
	err := m.wait(ctx, func() bool { return m.thawed || m.stuck })
	m.mu.Lock()
	stuck, failed, thawed := m.stuck, m.failed, m.thawed
	m.mu.Unlock()
	switch {
	case thawed && failed == "":
		return nil
	case thawed:
		return m.why()
	case stuck:
		err = m.why()
	}
	return fmt.Errorf("%w: %w", ErrStuck, err)
}

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}

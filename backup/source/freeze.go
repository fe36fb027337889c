package source

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/internal/plain"
)

// ErrFreeze means that a guest's file systems were not frozen for the moment of a backup.
var ErrFreeze = errors.New("the guest's file systems could not be frozen")

// freezeLimit is how long a guest is held at most, from when the agent is asked. A freeze that
// lasts has the guest's programs hang.
const freezeLimit = 15 * time.Second

// freezer freezes the file systems of a guest.
type freezer interface {
	freeze(ctx context.Context) error
	thaw(ctx context.Context) error
	// thawed reports whether they are known not to be frozen.
	thawed(ctx context.Context) bool
	close() error
}

// openFreezer opens "unix:" and the socket of a guest agent, or a libvirt domain.
func openFreezer(ctx context.Context, target string) (freezer, error) {
	socket, ok := strings.CutPrefix(target, "unix:")
	if !ok {
		return openLibvirtFreezer(ctx, target)
	}
	c, err := qmp.DialAgent(ctx, socket)
	if err != nil {
		return nil, err
	}
	return agent{c}, nil
}

// agent is the guest agent itself.
type agent struct{ conn *qmp.Conn }

func (a agent) freeze(ctx context.Context) error {
	return a.conn.Do(ctx, "guest-fsfreeze-freeze", nil, nil)
}

func (a agent) thaw(ctx context.Context) error {
	return a.conn.Do(ctx, "guest-fsfreeze-thaw", nil, nil)
}

func (a agent) thawed(ctx context.Context) bool {
	var status string
	err := a.conn.Do(ctx, "guest-fsfreeze-status", nil, &status)
	return err == nil && status == "thawed"
}

func (a agent) close() error { return a.conn.Close() }

// Words of the process that freezes and thaws.
const (
	wordFrozen = "frozen"
	wordThawed = "thawed"
	wordLate   = "late"
	wordFailed = "failed: "
)

// GuardFreeze freezes a guest, says so on out, and thaws it when in ends, or after a limit. It
// runs in a process of its own, which ignores signals: however the backup ends, its end of in
// is closed, and the guest goes on. With onlyThaw it thaws a guest that an earlier backup left
// frozen.
func GuardFreeze(ctx context.Context, target string, onlyThaw bool, in io.Reader, out io.Writer) error {
	say := func(word string) error {
		_, err := fmt.Fprintln(out, word)
		return err
	}
	f, err := openFreezer(ctx, target)
	if err != nil {
		return say(wordFailed + plain.Clip(err.Error(), 500))
	}
	defer func() { _ = f.close() }()
	if !f.thawed(ctx) { // by an earlier backup, perhaps
		if err := f.thaw(ctx); err != nil {
			return say(wordFailed + plain.Clip(err.Error(), 500))
		}
	}
	if onlyThaw {
		return say(wordThawed)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, in)
	}()
	limit := time.After(freezeLimit)
	if err := freezeWithin(ctx, f, limit); err != nil {
		// It may have frozen some of them, or do so yet.
		return say(wordFailed + plain.Clip(errors.Join(err, thawSurely(ctx, target, f)).Error(), 500))
	}
	_ = say(wordFrozen) // whoever does not hear it has ended
	word := wordThawed
	select {
	case <-ended:
	case <-limit:
		word = wordLate
	}
	if err := thawSurely(ctx, target, f); err != nil {
		word = wordFailed + plain.Clip(err.Error(), 500)
	}
	return say(word)
}

// freezeWithin freezes a guest. One that does not answer in time is not waited for: its connection
// ends.
func freezeWithin(ctx context.Context, f freezer, limit <-chan time.Time) error {
	done := make(chan error, 1)
	go func() { done <- f.freeze(ctx) }()
	select {
	case err := <-done:
		return err
	case <-limit:
		_ = f.close()
		<-done
		return fmt.Errorf("the guest did not answer within %s", freezeLimit)
	}
}

// How long a thaw is tried: where the agent refuses it, or is gone, and where it, or libvirt, does not
// answer.
const (
	thawRefused = 25 * time.Second
	thawSilent  = 5 * time.Minute
)

// thawSurely tries for as long as it may help. A command whose answer did not come ends the
// connection, and the agent may obey it yet: a freeze that takes longer than its answer may is thawed
// over another connection.
func thawSurely(ctx context.Context, target string, f freezer) (err error) {
	begun, limit := time.Now(), thawRefused
	for wait := 100 * time.Millisecond; time.Since(begun) < limit; wait = min(2*wait, 10*time.Second) {
		if err = f.thaw(ctx); err == nil {
			return nil
		}
		if f.thawed(ctx) {
			return nil
		}
		time.Sleep(wait)
		var refused *qmp.Error
		if errors.As(err, &refused) || libvirt.Refused(err) {
			continue
		}
		again, openErr := openFreezer(ctx, target)
		if openErr == nil {
			defer again.close()
			f = again
		} else if errors.Is(openErr, qmp.ErrNoAgent) || errors.Is(openErr, libvirt.ErrNoAnswer) {
			limit = thawSilent
		}
	}
	return fmt.Errorf("the guest may still be frozen; thaw it with guest-fsfreeze-thaw, or 'virsh domfsthaw': %w", err)
}

// freeze is a guest that is held by another process.
type freeze struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	self   []string
	target string
	begun  time.Time
	lasted time.Duration
	silent bool // the process did not say in time what became of it, and goes on
}

func startGuard(self []string, args ...string) (*freeze, error) {
	if len(self) == 0 {
		return nil, fmt.Errorf("%w: no process to thaw it", ErrFreeze)
	}
	f := &freeze{cmd: exec.Command(self[0], append(append([]string{}, self[1:]...), args...)...)}
	// A session of its own: what ends this process does not end that one. It gets what ssh needs,
	// and none of our secrets.
	for _, name := range []string{"PATH", "HOME", "USER", "SSH_AUTH_SOCK", "TMPDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			f.cmd.Env = append(f.cmd.Env, name+"="+v)
		}
	}
	f.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var err error
	if f.in, err = f.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f.out = bufio.NewReader(out)
	if err := f.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFreeze, err)
	}
	return f, nil
}

// startFreeze freezes a guest. The caller thaws it.
func startFreeze(self []string, target string) (*freeze, error) {
	f, err := startGuard(self, target)
	if err != nil {
		return nil, err
	}
	f.self, f.target, f.begun = self, target, time.Now()
	if word := f.word(); word != wordFrozen {
		f.end()
		err := fmt.Errorf("%w: %s; no point was made", ErrFreeze, strings.TrimPrefix(word, wordFailed))
		if !strings.HasPrefix(word, wordFailed) { // it was killed
			err = errors.Join(err, thawLeft(self, target))
		}
		return nil, err
	}
	return f, nil
}

// thaw lets the guest go on, and fails if it did before, or may not have.
func (f *freeze) thaw() error {
	err := f.in.Close()
	word := f.word()
	f.lasted = time.Since(f.begun)
	f.end()
	switch {
	case err != nil:
		return err
	case word == wordLate:
		return fmt.Errorf("%w for the moment of the backup: it took longer than %s; no point was made", ErrFreeze, freezeLimit)
	case f.silent:
		return fmt.Errorf("thaw the guest: %s", strings.TrimPrefix(word, wordFailed))
	case word != wordThawed: // the process was killed, perhaps
		return errors.Join(fmt.Errorf("thaw the guest: %s", strings.TrimPrefix(word, wordFailed)), thawLeft(f.self, f.target))
	}
	return nil
}

// listening is how long the process may take to say something: it is not waited for while it tries
// to thaw a guest that does not answer.
const listening = freezeLimit + time.Minute

// word is the next thing that the process says.
func (f *freeze) word() string {
	said := make(chan string, 1)
	go func() {
		line, err := f.out.ReadString('\n')
		if err != nil {
			line = "the process that was to thaw the guest ended"
		}
		said <- strings.TrimSpace(line)
	}()
	select {
	case word := <-said:
		return word
	case <-time.After(listening):
		f.silent = true
		return wordFailed + fmt.Sprintf("the guest did not answer within %s and may be frozen; a process goes on trying to thaw it for %s", listening, thawSilent)
	}
}

func (f *freeze) end() {
	_ = f.in.Close()
	if !f.silent {
		_ = f.cmd.Wait() // what counts was said
	}
}

// thawLeft thaws a guest that an earlier backup left frozen.
func thawLeft(self []string, target string) error {
	f, err := startGuard(self, "--thaw", target)
	if err != nil {
		return err
	}
	defer f.end()
	if word := f.word(); word != wordThawed {
		return fmt.Errorf("%w: %s; no point was made", ErrFreeze, strings.TrimPrefix(word, wordFailed))
	}
	return nil
}

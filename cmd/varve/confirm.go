package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/varve-io/varve/internal/plain"
)

// errDeclined means that the user did not confirm.
var errDeclined = errors.New("not confirmed; nothing was changed")

// terminal returns standard input if it is a terminal, so that the user can be asked.
func (a *app) terminal() (*os.File, bool) {
	in, ok := a.stdin.(*os.File)
	return in, ok && term.IsTerminal(int(in.Fd()))
}

// confirm asks a question that "yes" or "y" agrees to. The error is errDeclined
// for any other answer.
func (a *app) confirm(ctx context.Context, in *os.File, question string) error {
	fmt.Fprintf(a.stderr, "%s [y/N] ", plain.Text(question))
	if err := waitReadable(ctx, in); err != nil {
		fmt.Fprintln(a.stderr)
		return err
	}
	// In line mode a terminal returns one line per read.
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && line == "" {
		fmt.Fprintln(a.stderr)
		return errDeclined
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// pollMilliseconds is how soon Ctrl-C ends a question.
const pollMilliseconds = 100

// waitReadable waits for input: a read would delay Ctrl-C until a line is typed.
func waitReadable(ctx context.Context, in *os.File) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		fds := []unix.PollFd{{Fd: int32(in.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, pollMilliseconds)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for an answer: %w", err)
		case n > 0:
			return nil
		}
	}
}

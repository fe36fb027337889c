package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// await polls until the result is nil.
func await(t *testing.T, what string, ask func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// One test only: the supervisor reaps every child of its process, those of other
// tests too.
func TestSupervisor(t *testing.T) {
	dir := t.TempDir()
	c := Client{Socket: filepath.Join(dir, "s")}
	go func() { _ = Serve(c.Socket, slog.New(slog.DiscardHandler)) }() // lives as long as the process
	await(t, "the socket", func() error { _, err := c.Status(t.Context()); return err })
	status := func(name string) Status {
		t.Helper()
		s, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s[name]
	}
	log := filepath.Join(dir, "log")
	start := func(name string, restart bool, script string) error {
		return c.Start(t.Context(), Process{Name: name, Argv: []string{"sh", "-c", script}, Env: []string{"WORD=sediment"}, Log: log, Restart: restart})
	}

	if err := start("once", false, "echo a layer of $WORD; exit 3"); err != nil {
		t.Fatal(err)
	}
	await(t, "once to end", func() error {
		if s := status("once"); s.PID != 0 || s.Exits != 1 || s.Last != "exit status 3" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if b, err := os.ReadFile(log); err != nil || string(b) != "a layer of sediment\n" {
		t.Errorf("the log has %q, %v", b, err)
	}

	if err := start("long", true, "exec sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if err := start("long", true, "true"); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("started twice: %v", err)
	}
	first := status("long").PID
	if err := c.Signal(t.Context(), "long", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "a restart", func() error {
		if s := status("long"); s.PID == 0 || s.PID == first || s.Exits != 1 || s.Last != "killed" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	second := status("long").PID
	if err := c.Stop(t.Context(), "long", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := status("long"); s.PID != 0 || s.Last != "terminated" {
		t.Errorf("stopped: %+v", s)
	}
	if err := syscall.Kill(second, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the stopped process is still there: %v", err)
	}

	// An orphan becomes the supervisor's child only where it is PID 1; here it is
	// enough that nothing unknown can be signalled or stopped.
	if err := c.Signal(t.Context(), "nobody", syscall.SIGTERM); err == nil {
		t.Error("a signal reached nobody")
	}
	if err := c.Stop(t.Context(), "nobody", syscall.SIGTERM); err == nil {
		t.Error("nobody was stopped")
	}
	if err := c.Start(t.Context(), Process{Name: "missing", Argv: []string{"no-such-command"}, Log: log}); err == nil {
		t.Error("a missing command was started")
	}
}

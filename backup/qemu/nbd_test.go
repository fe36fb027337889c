package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// TestMain is also the process that TestServerKilled kills.
func TestMain(m *testing.M) {
	path := os.Getenv("VARVE_TEST_IMAGE")
	if path == "" {
		os.Exit(m.Run())
	}
	if err := serveUntilKilled(path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serveUntilKilled(path string) error {
	srv, err := StartNBD(Serve{Path: path, Format: QCOW2, Write: true})
	if err != nil {
		return err
	}
	if err := srv.Hide(); err != nil {
		return err
	}
	if _, err := os.Stdout.WriteString("serving\n"); err != nil {
		return err
	}
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n') // never comes
	return errors.New("it was not killed")
}

// TestServerClosedAtOnce: a server that is to end while it starts ends, at whatever moment that is.
func TestServerClosedAtOnce(t *testing.T) {
	t.Parallel()
	path := create(t, filepath.Join(t.TempDir(), "disk.qcow2"), "-f", "qcow2")
	for i := range 40 {
		srv, err := StartNBD(Serve{Path: path, Format: QCOW2, Write: true})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(i) * time.Millisecond)
		_ = srv.Close() // the shell that starts it may be what the signal ends
		if n := servers(path); n > 0 {
			t.Fatalf("closed after %d ms: %d processes are left", i, n)
		}
	}
}

// TestServerKilled kills the process that started a qemu-nbd: the qemu-nbd ends too, and lets
// go of the image and its lock.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	path := create(t, filepath.Join(t.TempDir(), "disk.qcow2"), "-f", "qcow2")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "VARVE_TEST_IMAGE="+path)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(out); ; {
		if !lines.Scan() {
			t.Fatalf("the child served nothing: %v", cmd.Wait())
		}
		if strings.TrimSpace(lines.Text()) == "serving" {
			break
		}
	}
	if _, err := ReadInfo(t.Context(), path, QCOW2); !errors.Is(err, ErrLocked) {
		// qemu-nbd may not have come to open it yet; it does, or the next loop fails.
		t.Logf("the image is not locked yet: %v", err)
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for begun := time.Now(); servers(path) > 0; time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > patienceOfTests {
			t.Fatal("the qemu-nbd outlives who started it")
		}
	}
	// A process has no command line before its last thread has ended, and the lock with that.
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		out, err := exec.Command("qemu-io", "-f", "qcow2", "-c", "write 0 4k", path).CombinedOutput()
		if err == nil {
			break
		}
		if time.Since(begun) > patienceOfTests {
			t.Fatalf("the image cannot be written to: %v: %s", err, out)
		}
	}
}

// patienceOfTests is for what a machine with other work does at last.
const patienceOfTests = 5 * time.Minute

// servers is how many processes have been started on the image.
func servers(path string) (n int) {
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if line, err := os.ReadFile(p); err == nil && strings.Contains(string(line), path) {
			n++
		}
	}
	return n
}

// TestServerExclusive: nobody writes to a raw file while a server of it wants that, and none is served that is written to.
func TestServerExclusive(t *testing.T) {
	t.Parallel()
	diskfstest.NeedTool(t, "qemu-nbd")
	diskfstest.NeedTool(t, "qemu-io")
	path := filepath.Join(t.TempDir(), "a,b.raw")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	write := func() error { return exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", path).Run() }
	if err := write(); err != nil {
		t.Fatal(err)
	}
	srv, err := StartNBD(Serve{Path: path, Format: Raw, Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := nbdclient.Dial(t.Context(), srv.URI(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := write(); err == nil {
		t.Error("another process wrote to it")
	}
	if err := errors.Join(conn.Close(), srv.Close()); err != nil {
		t.Error(err)
	}
	if srv.Running() {
		t.Error("it runs after its end")
	}
	if err := write(); err != nil {
		t.Errorf("the lock is left: %v", err)
	}
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/internal/progress"
	"github.com/varve-io/varve/nbdserver/nbdclient"
)

// server is a "varve serve" under test.
type server struct {
	view   serveView
	socket string
	stop   func() result // ends it, once
}

// startServer runs "varve serve" on a separate socket until the test ends, and returns once
// it is ready.
func startServer(t *testing.T, env testEnv, args ...string) *server {
	t.Helper()
	s := &server{socket: filepath.Join(t.TempDir(), "s")}
	ctx, cancel := context.WithCancel(t.Context())
	stdout, w := io.Pipe()
	var stderr bytes.Buffer
	a := &app{
		stdin: strings.NewReader(""), stdout: w, stderr: &stderr,
		lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
		log:       slog.New(slog.DiscardHandler),
		progress:  progress.New(progress.Options{}),
	}
	ended := make(chan int, 1)
	go func() {
		defer w.Close()
		ended <- a.run(ctx, append([]string{"serve", "-o", "json", "--listen", "unix:" + s.socket}, args...))
	}()
	s.stop = sync.OnceValue(func() result {
		cancel()
		_, _ = io.Copy(io.Discard, stdout)
		return result{code: <-ended, stderr: stderr.String()}
	})
	t.Cleanup(func() { s.stop() })
	if err := json.NewDecoder(stdout).Decode(&s.view); err != nil {
		t.Fatalf("varve serve %v: %v\n%s", args, err, s.stop().stderr)
	}
	return s
}

func (s *server) uri(export string) string {
	return (&nbdclient.URI{Network: "unix", Address: s.socket, Export: export}).String()
}

func (s *server) enter(t *testing.T, export string, contexts ...string) *nbdclient.Export {
	t.Helper()
	e, err := enterExport(t.Context(), s.uri(export), contexts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	return e
}

func (s *server) read(t *testing.T, export string) []byte {
	t.Helper()
	e := s.enter(t, export)
	p := make([]byte, e.Size)
	if _, err := e.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func contents(t *testing.T, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestServeReadsPoints(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	old := contents(t, disk)
	changeByte(t, disk, 300_000)
	second := backupJSON(t, env, disk, "--volume", "shop/db")
	backupJSON(t, env, disk, "--volume", "shop/web")
	s := startServer(t, env, "--metrics", "0")
	if s.view.Exports != 3 || len(s.view.Listeners) != 1 || !strings.Contains(s.view.Listeners[0].URI, "nbd+unix:///shop/") {
		t.Errorf("announced %+v", s.view)
	}
	for name, want := range map[string][]byte{
		first.Name: old, first.ID: old, "shop/db@latest~1": old, second.Name: contents(t, disk), "shop/web@latest": contents(t, disk),
	} {
		if !bytes.Equal(s.read(t, name), want) {
			t.Errorf("%s differs", name)
		}
	}
	if _, err := enterExport(t.Context(), s.uri("")); err == nil {
		t.Error("the empty name means one of three")
	}
	depth := runVarve(t, env, "nbd", "map", "-o", "json", "--context", "qemu:allocation-depth", s.uri("shop/db@latest"))
	dirty := runVarve(t, env, "nbd", "map", "-o", "json", "--context", "qemu:dirty-bitmap:"+first.Name, s.uri("shop/db@latest"))
	for what, r := range map[string]result{"depth": depth, "dirty": dirty} {
		var runs []nbdExtent
		if err := json.Unmarshal([]byte(r.stdout), &runs); err != nil {
			t.Fatalf("%s: %v %+v", what, err, r)
		}
		changed := []nbdExtent{}
		for _, x := range runs {
			if x.Flags == 1 {
				changed = append(changed, x)
			}
		}
		if len(changed) != 1 || changed[0].Offset != 262144 || changed[0].Length != 65536 {
			t.Errorf("%s: %+v", what, runs)
		}
	}
	resp, err := http.Get(s.view.Metrics)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || !strings.Contains(string(text), "varve_nbd_exports 3") ||
		!strings.Contains(string(text), fmt.Sprintf(`varve_nbd_requests_total{command="read",export=%q}`, first.Name)) {
		t.Errorf("metrics: %v\n%s", err, text)
	}
	if r := s.stop(); r.code != exitOK {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	if _, err := os.Stat(s.socket); err == nil {
		t.Error("the socket is left")
	}
}

// New points appear and deleted ones are refused, while an alias keeps its binding.
func TestServeFollowsTheRepository(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db")
	s := startServer(t, env, "--refresh", "20ms", "shop/db")
	old := contents(t, disk)
	alias := s.enter(t, "shop/db@latest")
	changeByte(t, disk, 300_000)
	second := backupJSON(t, env, disk, "--volume", "shop/db")
	backupJSON(t, env, disk, "--volume", "shop/web")
	waitUntil(t, "the server has noticed", func() bool {
		e, err := enterExport(t.Context(), s.uri(second.Name))
		if err == nil {
			_ = e.Close()
		}
		return err == nil
	})
	// A second connection of the client that holds the alias.
	if again := s.enter(t, "shop/db@latest"); again.Name != first.Name || alias.Name != first.Name {
		t.Errorf("@latest led to %s and then to %s", alias.Name, again.Name)
	}
	if !bytes.Equal(s.read(t, "shop/db@latest"), old) {
		t.Error("the alias reads another disk")
	}
	if _, err := enterExport(t.Context(), s.uri("shop/web@latest")); err == nil {
		t.Error("a volume that was not selected is served")
	}
	// The lease protects what is open. It is taken in the background.
	looked := s.lookNowAndThen(t, second.Name)
	waitUntil(t, "both have their leases", func() bool { return isLeased(t, env, first.ID) && isLeased(t, env, second.ID) })
	if r := runVarve(t, env, "forget", first.Name); r.code == exitOK {
		t.Errorf("forgot a point that is being read: %+v", r)
	}
	if r := runVarve(t, env, "forget", second.Name); r.code == exitOK {
		t.Errorf("forgot a point that was read a moment ago: %+v", r)
	}
	looked()
	third := backupJSON(t, env, disk, "--volume", "shop/db")
	waitUntil(t, "the server has noticed", func() bool { return strings.Contains(runVarve(t, env, "nbd", "list", s.uri("")).stdout, third.Name) })
	mustRun(t, env, "forget", third.Name)
	waitUntil(t, "the server has noticed", func() bool {
		e, err := enterExport(t.Context(), s.uri(third.Name))
		if err == nil {
			_ = e.Close()
		}
		return err != nil
	})
}

func isLeased(t *testing.T, env testEnv, id string) bool {
	t.Helper()
	ctx := t.Context()
	r := openRepo(t, env)
	defer r.Close(ctx)
	held, err := points.Leases(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return len(held[id]) > 0
}

// lookNowAndThen opens an export and leaves it, each second until stop: a lease that lasts for a minute after that lasts
// as long as a command, however long that takes on a busy machine.
func (s *server) lookNowAndThen(t *testing.T, export string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() {
		for ctx.Err() == nil {
			if e, err := enterExport(ctx, s.uri(export)); err == nil {
				_ = e.Close()
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	})
	return func() { cancel(); all.Wait() }
}

// The limits of the flags hold.
func TestServeLimits(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	s := startServer(t, env, "--max-connections", "2", "--max-memory", "32M", "--max-connection-memory", "32M", "--idle-timeout", "20ms")
	u, err := nbdclient.ParseURI(s.uri("shop/db@latest"))
	if err != nil {
		t.Fatal(err)
	}
	// A client without requests is disconnected.
	c, err := nbdclient.Dial(t.Context(), u, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, conn, err := c.HandOver(u.Export)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("an idle client got %d bytes, %v", n, err)
	}
	_ = conn.Close()
	// Clients in negotiation count, too; the third one is refused.
	var clients []*nbdclient.Client
	waitUntil(t, "there is room for two", func() bool {
		for len(clients) < 2 {
			c, err := nbdclient.Dial(t.Context(), u, nil)
			if err != nil {
				return false // the idle one is still counted
			}
			clients = append(clients, c)
		}
		return true
	})
	if c, err := nbdclient.Dial(t.Context(), u, nil); err == nil {
		_ = c.Close()
		t.Error("a third client was let in")
	}
	for _, c := range clients {
		_ = c.Close()
	}
	// The largest request fits into the least memory.
	waitUntil(t, "there is room again", func() bool {
		e, err := enterExport(t.Context(), u.String())
		if err != nil {
			return false
		}
		defer e.Close()
		p := make([]byte, 1<<20)
		_, err = e.ReadAt(t.Context(), p, 0)
		return err == nil && bytes.Equal(p, contents(t, disk))
	})
}

func TestServeRefusals(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	for _, c := range []struct {
		name string
		args []string
		want string
		code int
	}{
		{"beyond this machine", []string{"--listen", "0.0.0.0:0"}, "--insecure", exitUsage},
		{"keep without a place", []string{"--writable", "--keep"}, "--overlay-dir", exitUsage},
		{"overlays of read-only exports", []string{"--overlay-dir", env["HOME"]}, "--writable", exitUsage},
		{"names without certificates", []string{"--allow", "db=shop/*"}, "--tls-client-ca", exitUsage},
		{"no rule", []string{"--allow", "db"}, "CLIENT=EXPORT", exitUsage},
		{"half of TLS", []string{"--tls-key", "k"}, "--tls-cert", exitUsage},
		{"the other half of TLS", []string{"--tls-cert", "c"}, "--tls-key", exitUsage},
		{"no such point", []string{"shop/db@2001-01-01"}, "no such recovery point", exitFailure},
		{"no such metrics address", []string{"--metrics", "nowhere.invalid:1"}, "metrics", exitFailure},
		{"too little memory", []string{"--max-memory", "1M"}, "32 MiB", exitUsage},
		{"too little memory for a client", []string{"--max-connection-memory", "1M"}, "32 MiB", exitUsage},
		{"copies without hydration", []string{"--hydrate-limit", "1G"}, "--hydrate", exitUsage},
		{"stdio of a test", []string{"--stdio"}, "--stdio", exitUsage},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := append([]string{"serve"}, c.args...)
			if c.name != "stdio of a test" && c.name != "beyond this machine" {
				args = append(args, "--listen", "unix:"+filepath.Join(t.TempDir(), "s"))
			}
			r := runVarve(t, env, args...)
			if r.code == exitOK || !strings.Contains(r.stderr, c.want) || c.code == exitUsage && r.code != exitUsage {
				t.Errorf("exit code %d, want %d\n%s", r.code, c.code, r.stderr)
			}
		})
	}
}

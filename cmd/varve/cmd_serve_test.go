package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/internal/progress"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/nbdtest"
	"github.com/varve-io/varve/nbdserver/proto"
)

// server is a "varve serve" under test.
type server struct {
	view   serveView
	socket string
	stop   func() result // ends it, once
}

// startServer runs "varve serve" on a socket of its own until the test ends,
// and returns once it says that it is ready.
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

// New points appear and deleted ones refuse, while an alias stays where it was
// bound.
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
	// The lease keeps what is open.
	if r := runVarve(t, env, "forget", first.Name); r.code == exitOK {
		t.Errorf("forgot a point that is being read: %+v", r)
	}
	if r := runVarve(t, env, "forget", second.Name); r.code == exitOK {
		t.Errorf("forgot a point that was read a moment ago: %+v", r)
	}
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

func TestServeWritableAndCommit(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	overlays := filepath.Join(env["HOME"], "overlays")
	args := []string{"--writable", "--overlay-dir", overlays, "--keep", "--overlay-limit", "128K"}
	s := startServer(t, env, args...)
	want := contents(t, disk)
	e := s.enter(t, "shop/db@latest")
	write := func(e *nbdclient.Export, off int64, text string) {
		t.Helper()
		copy(want[off:], text)
		if err := e.WriteAt(t.Context(), []byte(text), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	write(e, 100_000, "written over it")
	if !bytes.Equal(s.read(t, first.Name), want) {
		t.Error("another connection does not see the write")
	}
	if err := e.WriteAt(t.Context(), make([]byte, 256<<10), 0, 0); err == nil || !strings.Contains(err.Error(), proto.ENOSPC.Error()) {
		t.Errorf("a write beyond the limit: %v", err)
	}
	commit := func(args ...string) backupResult {
		t.Helper()
		var res backupResult
		if err := json.Unmarshal([]byte(mustRun(t, env, append([]string{"commit", "-o", "json"}, args...)...).stdout), &res); err != nil {
			t.Fatal(err)
		}
		return res
	}
	running := commit(s.uri(first.Name))
	if running.Kind != "incremental" || running.Parent != first.ID || running.Stats.Changed != 64<<10 || !running.NotCrashConsistent || running.Source != "overlay" {
		t.Errorf("commit of a running overlay: %+v", running)
	}
	if r := commit(s.uri(first.Name), "--quiesced", "--volume", "test/copy"); !strings.HasPrefix(r.Name, "test/copy@") || r.Parent != first.ID || r.NotCrashConsistent {
		t.Errorf("commit to another volume: %+v", r)
	}
	// Another cluster's chain gets no point unless it is named.
	other := maps.Clone(env)
	other["VARVE_CLUSTER"] = "beta"
	if r := runVarve(t, other, "commit", s.uri(first.Name)); r.code != exitRefused || !strings.Contains(r.stderr, "--volume ") {
		t.Errorf("commit to another cluster's volume: %+v", r)
	}
	if r := runVarve(t, other, "commit", s.uri(first.Name), "--volume", "shop/db"); r.code != exitOK {
		t.Errorf("commit to a volume of this cluster: %+v", r)
	}
	if r := runVarve(t, env, "commit", filepath.Join(overlays, first.ID)); r.code == exitOK || !strings.Contains(r.stderr, "NBD URI") {
		t.Errorf("commit of an overlay in use: %+v", r)
	}
	_ = e.Close()
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}

	s = startServer(t, env, append(args, first.Name)...)
	write(s.enter(t, ""), 500_000, "and after a restart")
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	// Neither who forgets --keep nor a cache of local copies takes it away.
	for _, args := range [][]string{
		{"--writable", "--overlay-dir", overlays},
		{"--hydrate", "--hydrate-dir", overlays},
		{"--writable", "--overlay-dir", overlays, "--keep", "--hydrate", "--hydrate-dir", overlays},
	} {
		args = append(args, "--listen", "unix:"+filepath.Join(t.TempDir(), "s"))
		if r := runVarve(t, env, append([]string{"serve"}, args...)...); r.code != exitRefused && r.code != exitUsage || !strings.Contains(r.stderr, overlays) {
			t.Errorf("%v: %+v", args, r)
		}
	}
	kept := commit(filepath.Join(overlays, first.ID), "--volume", "test/kept")
	if kept.NotCrashConsistent || kept.Stats.Changed != 128<<10 {
		t.Errorf("commit of a kept overlay: %+v", kept)
	}
	for _, name := range []string{kept.Name, first.Name} {
		target := filepath.Join(env["HOME"], "restored")
		mustRun(t, env, "restore", name, target)
		if got := contents(t, target); bytes.Equal(got, want) != (name == kept.Name) {
			t.Errorf("%s is not what it should be", name)
		}
		_ = os.Remove(target)
	}
}

// What was hydrated is kept, told by the metrics, and read after a restart;
// copies of points that were deleted go.
func TestServeHydrate(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	copies := filepath.Join(env["HOME"], "copies")
	metrics := func(s *server) string {
		t.Helper()
		resp, err := http.Get(s.view.Metrics)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	args := []string{"--hydrate", "--hydrate-dir", copies, "--hydrate-limit", "64M", "--metrics", "0"}
	s := startServer(t, env, args...)
	if !bytes.Equal(s.read(t, "shop/db@latest"), contents(t, disk)) {
		t.Error("the disk differs")
	}
	waitUntil(t, "the disk is here", func() bool { return strings.Contains(metrics(s), "\nvarve_hydrate_disks_complete 1\n") })
	if text := metrics(s); !strings.Contains(text, "\nvarve_hydrate_filled_bytes_total 1.048576e+06\n") || !strings.Contains(text, "\nvarve_hydrate_limit_bytes 6.7108864e+07\n") {
		t.Errorf("metrics:\n%s", text)
	}
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	s = startServer(t, env, args...)
	if !bytes.Equal(s.read(t, "shop/db@latest"), contents(t, disk)) {
		t.Error("the disk differs after a restart")
	}
	if text := metrics(s); !strings.Contains(text, "\nvarve_hydrate_filled_bytes_total 0\n") || strings.Contains(text, "\nvarve_hydrate_read_bytes_total 0\n") {
		t.Errorf("after a restart:\n%s", text)
	}
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	changeByte(t, disk, 1000)
	backupJSON(t, env, disk, "--volume", "shop/db")
	mustRun(t, env, "forget", first.Name)
	startServer(t, env, args...).stop()
	if _, err := os.Stat(filepath.Join(copies, first.ID)); !os.IsNotExist(err) {
		t.Errorf("the copy of a deleted point: %v", err)
	}
}

// What a killed server left in the clear goes with the next, and what a server makes
// goes with it.
func TestServeScratch(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	// A server that is killed neither removes its directories nor stays to hold them.
	f := serveFlags{writable: true, hydrate: true}
	killed, err := f.scratch()
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range []*overlay.Scratch{killed.overlays, killed.copies} {
		dir := filepath.Join(parent, fmt.Sprintf("kept%d", i))
		if err := errors.Join(os.Rename(s.Dir, dir), s.Close(), os.Rename(dir, s.Dir), os.Mkdir(filepath.Join(s.Dir, "id"), 0o700),
			os.WriteFile(filepath.Join(s.Dir, "id", "data"), []byte("secret"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	names := func() (dirs []string) {
		entries, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			dirs = append(dirs, filepath.Join(parent, e.Name()))
		}
		return dirs
	}
	s := startServer(t, env, "--writable", "--hydrate")
	for _, dir := range names() {
		if dir == killed.overlays.Dir || dir == killed.copies.Dir {
			t.Errorf("%s of a killed server is there still", dir)
		}
	}
	if n := len(names()); n != 2 {
		t.Errorf("%d directories of a server: %v", n, names())
	}
	e := s.enter(t, "shop/db@latest")
	if err := e.WriteAt(t.Context(), []byte("x"), 0, 0); err != nil {
		t.Fatal(err)
	}
	_ = e.Close()
	// Whatever lies there goes.
	for _, dir := range names() {
		if err := os.Mkdir(filepath.Join(dir, "half"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if r := s.stop(); r.code != exitOK || len(names()) != 0 {
		t.Errorf("exit code %d, left %v\n%s", r.code, names(), r.stderr)
	}
}

// A directory that a user named is nobody's scratch, whatever its name: neither while its
// server runs nor afterwards.
func TestServeLeavesNamedDirectories(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	overlays, copies := filepath.Join(parent, "varve-overlay-mydb"), filepath.Join(parent, "varve-overlay-copies")
	args := []string{"--writable", "--keep", "--overlay-dir", overlays, "--hydrate", "--hydrate-dir", copies}
	first := startServer(t, env, args...)
	e := first.enter(t, "shop/db@latest")
	if err := e.WriteAt(t.Context(), []byte("mine"), 0, 0); err != nil {
		t.Fatal(err)
	}
	_ = e.Close()
	old := time.Now().Add(-time.Hour)
	for _, dir := range []string{overlays, copies} {
		if err := os.Chtimes(dir, old, old); err != nil {
			t.Fatal(err)
		}
	}
	other := func() {
		if r := startServer(t, env, "--writable", "--hydrate").stop(); r.code != exitOK {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
	}
	other()
	if got := first.read(t, "shop/db@latest"); string(got[:4]) != "mine" {
		t.Errorf("the running server reads %q", got[:4])
	}
	if r := first.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	other()
	if _, err := os.Stat(copies); err != nil {
		t.Error(err)
	}
	if got := startServer(t, env, args...).read(t, "shop/db@latest"); string(got[:4]) != "mine" {
		t.Errorf("afterwards the disk reads %q", got[:4])
	}
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
	// Those that negotiate count, too; the third one is turned away.
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

func TestServeRules(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	backupJSON(t, env, disk, "--volume", "hr/pay")
	s := startServer(t, env, "--allow", "*=shop/*")
	if out := mustRun(t, env, "nbd", "list", s.uri("")).stdout; !strings.Contains(out, "shop/db@") || strings.Contains(out, "hr/pay") {
		t.Errorf("listed:\n%s", out)
	}
	hidden := runVarve(t, env, "nbd", "info", s.uri("hr/pay@latest"))
	unknown := runVarve(t, env, "nbd", "info", s.uri("hr/no@latest"))
	if hidden.code == exitOK || strings.ReplaceAll(hidden.stderr, "pay", "no") != unknown.stderr {
		t.Errorf("a hidden export answers\n%sand an unknown one\n%s", hidden.stderr, unknown.stderr)
	}
}

// moving is a catalogue whose alias "latest" leads to the last export.
type moving struct {
	*nbdserver.Static
	latest string
}

func (m *moving) Resolve(ctx context.Context, name string, c nbdserver.Client) (string, error) {
	if name == "latest" {
		name = m.latest
	}
	return m.Static.Resolve(ctx, name, c)
}

// A client without rights leaves alone what others have an alias bound to.
func TestServeRulesAndAliases(t *testing.T) {
	rule, err := nbdserver.ParseAccessRule("alice=*")
	if err != nil {
		t.Fatal(err)
	}
	disk := nbdtest.NewEmptyDisk(4096).ReadOnly()
	m := &moving{Static: nbdserver.NewStatic(nbdserver.Opened{Name: "a", Export: disk}, nbdserver.Opened{Name: "b", Export: disk}), latest: "a"}
	view := clientView(m, []nbdserver.AccessRule{rule})
	alice := nbdserver.Client{Names: []string{"alice"}}
	for _, want := range []string{"a", "a"} {
		o, err := view.Open(t.Context(), "latest", alice)
		if err != nil || o.Name != want {
			t.Fatalf("latest is %+v, not %s: %v", o, want, err)
		}
		o.Close()
		m.latest = "b"
		if _, err := view.Open(t.Context(), "latest", nbdserver.Client{Names: []string{"mallory"}}); !errors.Is(err, nbdserver.ErrUnknownExport) {
			t.Fatal(err)
		}
	}
}

func TestNBDCommands(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db")
	s := startServer(t, env)
	var info nbdInfo
	if err := json.Unmarshal([]byte(mustRun(t, env, "nbd", "info", "-o", "json", s.uri("")).stdout), &info); err != nil {
		t.Fatal(err)
	}
	if info.Name != first.Name || info.Size != 1<<20 || info.Headers != "extended" || info.Can[0] != "read-only" || len(info.Contexts) != 2 {
		t.Errorf("info %+v", info)
	}
	if out := mustRun(t, env, "nbd", "info", s.uri("")).stdout; !strings.Contains(out, "multi-conn") {
		t.Errorf("info:\n%s", out)
	}
	if out := mustRun(t, env, "nbd", "map", s.uri("")).stdout; !strings.Contains(out, "data") {
		t.Errorf("map:\n%s", out)
	}
	want := contents(t, disk)
	if out := mustRun(t, env, "nbd", "read", s.uri(""), "--offset", "5000", "--length", "70000").stdout; out != string(want[5000:75000]) {
		t.Errorf("read %d bytes that differ", len(out))
	}
	if out := mustRun(t, env, "nbd", "read", s.uri(""), "--hex", "--offset", "1M", "--length", "0").stdout; out != "" {
		t.Errorf("dumped %q", out)
	}
	if out := mustRun(t, env, "nbd", "read", s.uri(""), "--hex", "--offset", "5K", "--length", "2").stdout; out != "00000000  05 05                                             |..|\n" {
		t.Errorf("dumped %q", out)
	}
	file := filepath.Join(env["HOME"], "copy")
	mustRun(t, env, "nbd", "read", s.uri(""), file)
	if !bytes.Equal(contents(t, file), want) {
		t.Error("the copy differs")
	}
	// A file is replaced only when that is said; the export is not even asked for before.
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := runVarve(t, env, "nbd", "read", "nbd+unix:///?socket=/nowhere", file); r.code != exitRefused || !strings.Contains(r.stderr, "--overwrite") {
		t.Errorf("onto a file: %+v", r)
	}
	if got := contents(t, file); string(got) != "precious" {
		t.Errorf("the file holds %d bytes", len(got))
	}
	mustRun(t, env, "nbd", "read", s.uri(""), file, "--overwrite")
	mustRun(t, env, "nbd", "read", s.uri(""), "/dev/null")
	if !bytes.Equal(contents(t, file), want) {
		t.Error("the copy over a file differs")
	}
	if out := mustRun(t, env, "nbd", "read", s.uri(""), "-", "--length", "5").stdout; out != string(want[:5]) {
		t.Errorf("standard output: %q", out)
	}
	for _, args := range [][]string{
		{"info", "http://x/"},
		{"read", s.uri(""), "--offset", "1M", "--length", "1"},
		{"map", s.uri(""), "--context", "no:such"},
		{"info", s.uri("nothing")},
	} {
		if r := runVarve(t, env, append([]string{"nbd"}, args...)...); r.code == exitOK || r.stderr == "" {
			t.Errorf("nbd %v: %+v", args, r)
		}
	}
	if r := runVarve(t, env, "commit", s.uri("")); r.code == exitOK || !strings.Contains(r.stderr, "--writable") {
		t.Errorf("commit of a read-only export: %+v", r)
	}
}

// libnbd's brackets pass a socket, and what runs in them must not serve anything else.
func TestServeExamples(t *testing.T) {
	for line := range strings.Lines(newServeCommand(&app{}).Example) {
		_, inner, ok := strings.Cut(line, "[ varve serve ")
		if inner, _, closed := strings.Cut(inner, " ]"); ok && (!closed || strings.Contains(inner, "--stdio") || strings.Contains(inner, "--listen")) {
			t.Errorf("socket activation with %q", inner)
		}
	}
}

// The default socket lies in a directory of this user only, whoever was there first.
func TestPrivateDirectory(t *testing.T) {
	in := t.TempDir()
	for name, make := range map[string]func(dir string) error{
		"file":    func(dir string) error { return os.WriteFile(dir, nil, 0o600) },
		"open":    func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o777)) },
		"group":   func(dir string) error { return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o750)) },
		"symlink": func(dir string) error { return os.Symlink(in, dir) },
		"somebody's": func(dir string) error {
			if os.Geteuid() != 0 {
				return os.Symlink(in, dir)
			}
			return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534))
		},
	} {
		dir := filepath.Join(in, name)
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if err := privateDirectory(dir); !errors.Is(err, errNotPrivate) || exitCode(err) != exitRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
	own := filepath.Join(in, "own")
	for range 2 {
		if err := privateDirectory(own); err != nil {
			t.Error(err)
		}
	}
}

func TestShellWord(t *testing.T) {
	for in, want := range map[string]string{"a/b@c": "a/b@c", "": "''", "a?b": "'a?b'", "it's": `'it'\''s'`} {
		if got := shellWord(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestExampleName(t *testing.T) {
	if got := exampleName(nil, nil); !strings.Contains(got, "@latest") {
		t.Errorf("of nothing: %s", got)
	}
	if got := exampleName([]string{"shop/db@T"}, []*backup.Point{{}}); got != "shop/db@T" {
		t.Errorf("of one: %s", got)
	}
}

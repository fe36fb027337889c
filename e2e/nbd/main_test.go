package nbd

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/varve-io/varve/nbdserver/nbdclient"
)

var varveBin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "varve-nbd-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if varveBin = cmp.Or(os.Getenv("VARVE_QUICK"), os.Getenv("VARVE")); varveBin == "" {
		varveBin = filepath.Join(dir, "varve")
		build := exec.Command("go", "build", "-o", varveBin, "./cmd/varve")
		build.Dir = filepath.Join("..", "..")
		build.Env = append(os.Environ(), "CGO_ENABLED=0") // it also runs in a guest without libraries
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build varve: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

// site is a repository with a chain of points of one volume, shop/db.
type site struct {
	t      *testing.T
	dir    string
	points []point // oldest first
}

// point is a recovery point and its expected content.
type point struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	want string // file
}

const diskSize = 48 << 20

// newSite makes a chain of three points: data, holes, and a few changes each.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir()}
	s.varve("repo", "create", "filesystem", "--path", s.path("repo"))
	rng := rand.New(rand.NewPCG(3, 4))
	data := make([]byte, diskSize)
	for i := 0; i < diskSize; i += 8 << 20 { // 5 MiB of data, 3 MiB of hole
		for j := i; j < i+5<<20; j++ {
			data[j] = byte(rng.Uint32() >> (j >> 20 & 3)) // some of it compresses
		}
	}
	for n := range 3 {
		if n > 0 {
			for range 6 {
				off := rng.IntN(diskSize - 9000)
				copy(data[off:], bytes.Repeat([]byte{byte(n)}, 9000))
			}
		}
		s.backup(data)
	}
	return s
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

// backup adds a point with that content.
func (s *site) backup(data []byte) point {
	s.t.Helper()
	file := s.path(fmt.Sprintf("disk-%d.img", len(s.points)))
	if err := os.WriteFile(file, data, 0o600); err != nil {
		s.t.Fatal(err)
	}
	p := s.backupFile(file)
	s.points = append(s.points, p)
	return p
}

func (s *site) backupFile(file string) point { s.t.Helper(); return s.backupAs("shop/db", file) }

func (s *site) backupAs(volume, file string) point {
	s.t.Helper()
	p := point{want: file}
	if err := json.Unmarshal([]byte(s.varve("backup", file, "--volume", volume, "-o", "json")), &p); err != nil {
		s.t.Fatal(err)
	}
	return p
}

func (s *site) latest() point { return s.points[len(s.points)-1] }

func (s *site) environment() []string {
	// Debian's Python modules belong to Debian's Python.
	return []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin:/usr/sbin:/sbin", "VARVE_PASSWORD=correct horse",
		"VARVE_CONFIG=" + s.path("config"), "LC_ALL=C"}
}

func (s *site) command(name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(s.t.Context(), name, args...)
	cmd.Env, cmd.Dir = s.environment(), s.dir
	return cmd
}

func (s *site) varve(args ...string) string { s.t.Helper(); return s.run(varveBin, args...) }

// run runs a program and returns its standard output.
func (s *site) run(name string, args ...string) string {
	s.t.Helper()
	out, stderr, err := s.try(name, args...)
	if err != nil {
		s.t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr)
	}
	return out
}

func (s *site) try(name string, args ...string) (stdout, stderr string, err error) {
	s.t.Helper()
	if name != varveBin {
		if _, err := exec.LookPath(name); err != nil {
			s.t.Skipf("%s is not installed: \"make setup\" installs it", name)
		}
	}
	var out, errs bytes.Buffer
	cmd := s.command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// server is a running "varve serve".
type server struct {
	*site
	cmd       *exec.Cmd
	socket    string
	addresses []string
	log       *lockedBuffer
}

// lockedBuffer is a program's output, readable while it runs.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// serve starts a server and returns once it is ready. The test's end stops it and checks
// that it ends well.
func (s *site) serve(args ...string) *server {
	s.t.Helper()
	srv := &server{site: s, socket: filepath.Join(s.t.TempDir(), "s"), log: &lockedBuffer{}}
	// Not bound to the test's context: it is told to end, and its end is tested.
	srv.cmd = exec.Command(varveBin, append([]string{"serve", "-o", "json", "--listen", "unix:" + srv.socket}, args...)...)
	srv.cmd.Env, srv.cmd.Dir, srv.cmd.Stderr = s.environment(), s.dir, srv.log
	stdout, err := srv.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := srv.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(srv.stop)
	var view struct {
		Listeners []struct{ Address string }
	}
	if err := json.NewDecoder(stdout).Decode(&view); err != nil {
		s.t.Fatalf("varve serve %v: %v\n%s", args, err, srv.log)
	}
	for _, l := range view.Listeners {
		srv.addresses = append(srv.addresses, l.Address)
	}
	return srv
}

// stop ends the server, and fails the test if it does not end well.
func (srv *server) stop() {
	srv.t.Helper()
	if srv.cmd.ProcessState != nil {
		return
	}
	_ = srv.cmd.Process.Signal(syscall.SIGTERM)
	if err := srv.cmd.Wait(); err != nil {
		srv.t.Errorf("varve serve ended with %v\n%s", err, srv.log)
	}
}

// kill ends the server without any warning.
func (srv *server) kill() {
	srv.t.Helper()
	if err := srv.cmd.Process.Kill(); err != nil {
		srv.t.Fatal(err)
	}
	_ = srv.cmd.Wait()
}

func (srv *server) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + srv.socket
}

// stay connects to an export as a client that stays, until leave or the test's end.
func (srv *server) stay(export string) (leave func()) {
	srv.t.Helper()
	u, err := nbdclient.ParseURI(srv.uri(export))
	if err != nil {
		srv.t.Fatal(err)
	}
	c, err := nbdclient.Dial(srv.t.Context(), u, nil)
	if err != nil {
		srv.t.Fatal(err)
	}
	if _, err := c.Negotiate(nbdclient.Structured); err != nil {
		srv.t.Fatal(err)
	}
	e, err := c.Go(u.Export)
	if err != nil {
		srv.t.Fatal(err)
	}
	leave = sync.OnceFunc(func() { _ = e.Close() })
	srv.t.Cleanup(leave)
	return leave
}

// same fails the test unless two files have the same bytes.
func (s *site) same(got, want string) {
	s.t.Helper()
	s.run("cmp", got, want)
}

func (s *site) has(out string, want ...string) {
	s.t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			s.t.Errorf("output lacks %q:\n%s", w, out)
		}
	}
}

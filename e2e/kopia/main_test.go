package kopia

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var varveBin, kopiaBin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	kopiaBin = os.Getenv("VARVE_TEST_KOPIA")
	if kopiaBin == "" {
		fmt.Fprintln(os.Stderr, "VARVE_TEST_KOPIA must name a kopia binary: run these tests with \"make test\"")
		return 1
	}
	dir, err := os.MkdirTemp("", "varve-kopia-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if varveBin = os.Getenv("VARVE"); varveBin == "" {
		varveBin = filepath.Join(dir, "varve")
		build := exec.Command("go", "build", "-o", varveBin, "./cmd/varve")
		build.Dir = filepath.Join("..", "..")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build varve: %v\n%s", err, out)
			return 1
		}
	}
	return m.Run()
}

const password = "correct horse battery staple"

// site is a repository with a Varve and a Kopia client connected to it.
type site struct {
	t    *testing.T
	dir  string // of this test
	repo string // of the repository
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir := t.TempDir()
	return &site{t: t, dir: dir, repo: filepath.Join(dir, "repo")}
}

func (s *site) command(bin string, args ...string) *exec.Cmd {
	cmd := exec.Command(bin, args...)
	cmd.Env = []string{
		"HOME=" + s.dir, "PATH=" + os.Getenv("PATH"), "VARVE_PASSWORD=" + password,
		"KOPIA_PASSWORD=" + password, "KOPIA_CHECK_FOR_UPDATES=false",
	}
	return cmd
}

func (s *site) output(cmd *exec.Cmd) []byte {
	s.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		s.t.Fatalf("%v: %v\n%s%s", cmd.Args, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes()
}

func (s *site) varve(args ...string) []byte {
	s.t.Helper()
	return s.output(s.command(varveBin, args...))
}

// kopiaConfig is the configuration file of the Kopia client.
func (s *site) kopiaConfig() string { return filepath.Join(s.dir, "kopia.config") }

func (s *site) kopia(args ...string) []byte {
	s.t.Helper()
	return s.output(s.command(kopiaBin, append([]string{"--config-file=" + s.kopiaConfig()}, args...)...))
}

// connectKopia connects stock Kopia under the name that owns maintenance, since
// only the owner may maintain a repository.
func (s *site) connectKopia() {
	s.t.Helper()
	s.kopia("repository", "connect", "filesystem", "--path="+s.repo,
		"--override-username=varve", "--override-hostname=repository")
}

// point is the output of "varve backup -o json".
type point struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	Kind string `json:"kind"`
}

func (s *site) backup(disk, volume string, args ...string) point {
	s.t.Helper()
	var p point
	out := s.varve(append([]string{"backup", disk, "--volume", volume, "-o", "json", "--no-progress"}, args...)...)
	if err := json.Unmarshal(out, &p); err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	return p
}

// restored restores a point with Varve and returns its bytes.
func (s *site) restored(name string) []byte {
	s.t.Helper()
	target := filepath.Join(s.dir, "restored.img")
	defer os.Remove(target)
	s.varve("restore", name, target, "--no-progress")
	p, err := os.ReadFile(target)
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// disk is an image file that a test changes between backups.
type disk struct {
	t    *testing.T
	path string
	data []byte
	rng  *rand.Rand
}

func newDisk(t *testing.T, dir string, size int) *disk {
	t.Helper()
	d := &disk{t: t, path: filepath.Join(dir, "disk.img"), data: make([]byte, size), rng: rand.New(rand.NewPCG(1, uint64(size)))}
	for range 20 {
		d.scribble(200_000)
	}
	d.save()
	return d
}

func (d *disk) scribble(n int) {
	n = min(n, len(d.data))
	off := d.rng.IntN(len(d.data) - n + 1)
	for i := range n {
		d.data[off+i] = byte(d.rng.Uint32())
	}
}

func (d *disk) save() {
	d.t.Helper()
	if err := os.WriteFile(d.path, d.data, 0o600); err != nil {
		d.t.Fatal(err)
	}
}

func (s *site) equal(what string, got, want []byte) {
	s.t.Helper()
	if !bytes.Equal(got, want) {
		s.t.Errorf("%s: %d bytes that differ from the %d wanted", what, len(got), len(want))
	}
}

package faults

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var varveBin string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "varve-faults-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if varveBin = cmp.Or(os.Getenv("VARVE_QUICK"), os.Getenv("VARVE")); varveBin == "" {
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

// site is a repository, and an image file whose states are backed up to it.
type site struct {
	t         *testing.T
	dir, repo string
	disk      string
	data      []byte // of the disk
	rng       *rand.Rand
	want      map[string][]byte // what each point holds, by ID
}

const volume = "shop/db"

// newSite makes a repository in a directory, and a disk of random bytes.
func newSite(t *testing.T, repo string, size int) *site {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dir := t.TempDir()
	if repo == "" {
		repo = filepath.Join(dir, "repo")
	}
	s := &site{
		t: t, dir: dir, repo: repo, disk: filepath.Join(dir, "disk.img"), want: map[string][]byte{},
		rng: rand.New(rand.NewPCG(seed, 0)), data: make([]byte, size),
	}
	s.varve("repo", "create", "filesystem", "--path", repo)
	s.scribble(0, size)
	return s
}

// scribble writes random bytes to a range of the disk.
func (s *site) scribble(off, n int) {
	s.t.Helper()
	s.data = bytes.Clone(s.data)
	for i := off; i < off+n; i += 8 {
		v := s.rng.Uint64()
		for j := i; j < min(i+8, off+n); j++ {
			s.data[j] = byte(v)
			v >>= 8
		}
	}
	if err := os.WriteFile(s.disk, s.data, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) command(args ...string) *exec.Cmd {
	cmd := exec.Command(varveBin, append(args, "--no-progress")...)
	cmd.Env = []string{"HOME=" + s.dir, "PATH=" + os.Getenv("PATH"), "VARVE_PASSWORD=secret"}
	return cmd
}

// result is how a run of varve ended.
type result struct {
	stdout, stderr string
	code           int // -1 when it was killed
}

func (s *site) run(args ...string) result {
	s.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := s.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// varve runs a command that must work.
func (s *site) varve(args ...string) string {
	s.t.Helper()
	r := s.run(args...)
	if r.code != 0 {
		s.t.Fatalf("varve %v: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// made is the output of "varve backup -o json".
type made struct {
	Name               string `json:"name"`
	ID                 string `json:"id"`
	Kind               string `json:"kind"`
	NotCrashConsistent bool   `json:"notCrashConsistent"`
	ReadErrors         []struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
	} `json:"readErrors"`
}

// backup makes a point, which must work.
func (s *site) backup(args ...string) made {
	s.t.Helper()
	return s.made(s.varve(append([]string{"backup", s.disk, "--volume", volume, "-o", "json"}, args...)...))
}

func (s *site) made(stdout string) made {
	s.t.Helper()
	var p made
	if err := json.Unmarshal([]byte(stdout), &p); err != nil {
		s.t.Fatalf("%v\n%s", err, stdout)
	}
	s.want[p.ID] = s.data
	return p
}

// ids lists the existing points.
func (s *site) ids() []string {
	s.t.Helper()
	var list []struct {
		ID string `json:"id"`
	}
	out := s.varve("list", "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		s.t.Fatalf("%v\n%s", err, out)
	}
	var ids []string
	for _, p := range list {
		ids = append(ids, p.ID)
	}
	return ids
}

// check restores every point and compares it byte by byte. The known ones must exist; one
// more may be from a backup that was killed at its end.
func (s *site) check() {
	s.t.Helper()
	ids := s.ids()
	for _, id := range ids {
		want, known := s.want[id]
		if !known {
			want, s.want[id] = s.data, s.data
		}
		cmd := s.command("restore", id, "-")
		got, err := cmd.Output()
		if err != nil || !bytes.Equal(got, want) {
			s.t.Errorf("point %s: restored %d bytes of %d, different: %v", id, len(got), len(want), err)
		}
	}
	if len(ids) != len(s.want) {
		s.t.Errorf("%d points, want %d", len(ids), len(s.want))
	}
}

// size returns the size of the repository's blobs, in bytes. The file that Kopia was
// writing when it was killed is no blob yet (kopia repo/blob/filesystem), and stays.
func (s *site) size() int64 {
	s.t.Helper()
	var n int64
	err := filepath.WalkDir(s.repo, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.Contains(d.Name(), ".tmp.") {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

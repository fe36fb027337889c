package main

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/progress"
)

// Nobody deletes a recovery point while its files are being copied out.
func TestContentIsHeld(t *testing.T) {
	env := newFilesEnv(t)
	for _, args := range [][]string{
		{"cat", "shop/db@latest:/data"},
		{"cp", "--tar", "shop/db@latest:/"},
	} {
		r, w := io.Pipe()
		a := &app{
			stdin: strings.NewReader(""), stdout: w, stderr: io.Discard,
			lookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok },
			log:       slog.New(slog.DiscardHandler), progress: progress.New(progress.Options{}),
		}
		ended := make(chan int)
		go func() {
			code := a.run(t.Context(), args)
			_ = w.Close() // never fails
			ended <- code
		}()
		if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		if r := runVarve(t, env, "forget", "shop/db@latest"); r.code != exitRefused || !strings.Contains(r.stderr, args[0]+" (process") {
			t.Errorf("forget while %q reads: %+v", args, r)
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Error(err)
		}
		if code := <-ended; code != exitOK {
			t.Errorf("%q: exit code %d", args, code)
		}
	}
	mustRun(t, env, "forget", "shop/db@latest")
}

// A look that takes long gets a lease, and gives it back; a quick one has none.
func TestHoldLate(t *testing.T) {
	repo := repotest.New(t).Open(t)
	p, _, err := backup.Run(t.Context(), repo, backup.Options{
		Volume: backup.Volume{Cluster: "test", Namespace: "shop", Name: "db"}, Disk: zeroes(t, 1<<20),
	})
	if err != nil {
		t.Fatal(err)
	}
	leases := func() int {
		held, err := backup.Leases(t.Context(), repo)
		if err != nil {
			t.Fatal(err)
		}
		return len(held[p.ID])
	}
	for _, quick := range []bool{true, false} {
		late := make(chan time.Time, 1)
		h := newHolder(repo, "ls", holdLate, slog.New(slog.DiscardHandler))
		h.late = func() <-chan time.Time { return late }
		if err := errors.Join(h.hold(t.Context(), p), h.hold(t.Context(), p)); err != nil {
			t.Fatal(err)
		}
		if n := leases(); n != 0 {
			t.Errorf("%d leases at the start", n)
		}
		if !quick {
			late <- time.Time{}
			waitUntil(t, "the lease is there", func() bool { return leases() == 1 })
		}
		h.release(t.Context())
		if n := leases(); n != 0 {
			t.Errorf("quick %v: %d leases stay", quick, n)
		}
	}
	if _, err := backup.Forget(t.Context(), repo, backup.ForgetOptions{Names: []string{p.ID}, Cluster: "test"}); err != nil {
		t.Fatal(err)
	}
	h := newHolder(repo, "cp", holdAtOnce, slog.New(slog.DiscardHandler))
	defer h.release(t.Context())
	if err := h.hold(t.Context(), p); !errors.Is(err, backup.ErrNoSuchPoint) {
		t.Errorf("a deleted point is held: %v", err)
	}
}

// zeroes opens an image of nothing.
func zeroes(t *testing.T, size int64) backup.Disk {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, size)); err != nil {
		t.Fatal(err)
	}
	d, err := disk.Open(name, disk.Options{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// A quick listing writes nothing to the repository, and one that cannot be written is read.
func TestReadingWithoutWriting(t *testing.T) {
	env := newFilesEnv(t)
	dir := filepath.Join(env["HOME"], "repo")
	before := filesBelow(t, dir)
	for _, args := range [][]string{{"ls", "-R", "shop/db@latest"}, {"find", "shop/db@latest"}, {"tree", "shop/db@latest"}, {"stat", "shop/db@latest:/data"}} {
		mustRun(t, env, args...)
	}
	mustRun(t, env, "repo", "disconnect")
	mustRun(t, env, "repo", "connect", "filesystem", "--path", dir, "--read-only")
	if r := mustRun(t, env, "cat", "shop/db@latest:/etc/app.conf"); r.stdout != "port=1\n" || strings.Contains(r.stderr, "pruned") {
		t.Errorf("cat by a read-only connection: %+v", r)
	}
	if after := filesBelow(t, dir); !slices.Equal(before, after) {
		t.Errorf("the repository had %q, and now %q", before, after)
	}
}

func filesBelow(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		list = append(list, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// Storage that refuses to be written is read, and a warning says what that means.
func TestReadingWithoutPermissionToWrite(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "setpriv")
	env := newFilesEnv(t)
	program := buildVarve(t)
	repo := filepath.Join(env["HOME"], "repo")
	diskfstest.Run(t, "chown", "-R", "65534:65534", env["HOME"])
	diskfstest.Run(t, "chown", "-R", "0:0", repo)
	diskfstest.Run(t, "chmod", "-R", "a+rX,go-w", repo)
	for _, d := range []string{env["HOME"], filepath.Dir(program)} { // another user gets there
		diskfstest.Run(t, "chmod", "0755", d, filepath.Dir(d))
	}
	cmd := exec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", program, "cat", "shop/db@latest:/etc/app.conf")
	cmd.Env = append(os.Environ(), env.list()...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || stdout.String() != "port=1\n" || strings.Count(stderr.String(), "could be pruned") != 1 {
		t.Errorf("%v, %q\n%s", err, &stdout, &stderr)
	}
}

package main

import (
	"bytes"
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

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/progress"
)

// A recovery point cannot be deleted while its files are being copied out.
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

// A quick listing writes nothing to the repository, and works on one that cannot be written.
func TestReadingWithoutWriting(t *testing.T) {
	env := newFilesEnv(t)
	dir := filepath.Join(env["HOME"], "repo")
	var before []string
	for _, args := range [][]string{{"ls", "-R", "shop/db@latest"}, {"find", "shop/db@latest"}, {"tree", "shop/db@latest"}, {"stat", "shop/db@latest:/data"}} {
		// A point that is read for five seconds gets its lease, even if the machine is only busy: then the look was not quick.
		for quick := false; !quick; {
			before = filesBelow(t, dir)
			began := time.Now()
			mustRun(t, env, args...)
			quick = time.Since(began) < 5*time.Second
			if after := filesBelow(t, dir); quick && !slices.Equal(before, after) {
				t.Errorf("before %q the repository had %q, and now %q", args, before, after)
			}
		}
	}
	before = filesBelow(t, dir)
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

// Storage that refuses writes is read, and a warning says what that means.
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
		diskfstest.Run(t, "chmod", "a+rx", d, filepath.Dir(d))
	}
	cmd := exec.CommandContext(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", program, "cat", "shop/db@latest:/etc/app.conf")
	cmd.Env = append(os.Environ(), env.list()...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || stdout.String() != "port=1\n" || strings.Count(stderr.String(), "prune can delete") != 1 {
		t.Errorf("%v, %q\n%s", err, &stdout, &stderr)
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

func TestVersionsOfAFile(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	again := func() { mustRun(t, env, "backup", image, "--volume", "shop/db") }
	again() // nothing changed

	// Another file is written: its blocks share stored ones with /data.
	diskfstest.Run(t, "debugfs", "-w", "-R", "write "+filepath.Join(env["HOME"], "src/etc/other")+" /more", image)
	again()

	// A byte of /data changes, and its metadata does not.
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	changeByte(t, image, int64(bytes.Index(b, bytes.Repeat([]byte("d"), 50_000)))+20_000)
	again()

	diskfstest.Run(t, "debugfs", "-w", "-R", "rm /data", image)
	again()

	var list []fileVersion
	out := mustRun(t, env, "ls", "--versions", "shop/db:/data", "-o", "json").stdout
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(list) != 3 || list[0].Points != 3 || list[1].Points != 1 || list[2].Points != 1 ||
		list[0].File == nil || list[0].File.Size != 100_000 || list[1].File == nil || list[2].File != nil {
		t.Errorf("the versions are\n%s", out)
	}
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"ls", "--versions", "shop/db"}, exitUsage},
		{[]string{"ls", "--versions", "shop/nothing:/data"}, exitNotFound},
		{[]string{"ls", "--versions", "shop/db:/nothing"}, exitFailure},
	} {
		if r := runVarve(t, env, c.args...); r.code != c.code {
			t.Errorf("%v: exit code %d, want %d\n%s", c.args, r.code, c.code, r.stderr)
		}
	}
}

// The states of a large file are distinguished without reading it.
func TestVersionsReadLittle(t *testing.T) {
	diskfstest.NeedTool(t, "mke2fs")
	diskfstest.NeedTool(t, "debugfs")
	env := newTestEnv(t)
	src, image := t.TempDir(), filepath.Join(env["HOME"], "disk.img")
	const size = 48 << 20
	large := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(large)
	other := filepath.Join(src, "other")
	if err := errors.Join(os.WriteFile(filepath.Join(src, "large"), large, 0o644), os.WriteFile(other, []byte("x"), 0o644)); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", src, image, "96M")
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	for i := range 4 {
		mustRun(t, env, "backup", image, "--volume", "shop/db")
		diskfstest.Run(t, "debugfs", "-w", "-R", fmt.Sprintf("write %s /new%d", other, i), image)
	}
	read := func(args ...string) int64 {
		t.Helper()
		before := bytesRead(t)
		mustRun(t, env, args...)
		return bytesRead(t) - before
	}
	if n := read("cat", "shop/db@latest:/large"); n < size {
		t.Fatalf("reading the file reads %d bytes: the test measures nothing", n)
	}
	for _, args := range [][]string{{"ls", "--versions", "shop/db:/large"}, {"diff", "--files", "shop/db@latest~1", "shop/db@latest"}} {
		if n := read(args...); n > size/8 {
			t.Errorf("%v reads %d bytes of a repository with a file of %d", args, n, size)
		}
	}
}

// bytesRead returns what this process has read so far, see proc_pid_io(5).
func bytesRead(t *testing.T) (n int64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err == nil {
		_, err = fmt.Sscanf(string(b), "rchar: %d", &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// newDamagedEnv is a user with two points of a file system. In both the attributes of /f are
// damaged; /g and /dir/new are only in the second, in which an entry of /dir is damaged.
func newDamagedEnv(t *testing.T) testEnv {
	t.Helper()
	for _, tool := range []string{"mke2fs", "debugfs"} {
		diskfstest.NeedTool(t, tool)
	}
	env := newTestEnv(t)
	src, image := filepath.Join(env["HOME"], "src"), filepath.Join(env["HOME"], "disk.img")
	for _, name := range []string{"dir/bad-name", "dir/same", "f"} {
		path := filepath.Join(src, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(filepath.Dir(name)), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-b", "1024", "-I", "128", "-O", "^metadata_csum", "-d", src, image, "16M")
	diskfstest.Run(t, "debugfs", "-w", "-R", "ea_set f user.lost value", image)
	_, acl, _ := strings.Cut(diskfstest.Run(t, "debugfs", "-R", "stat f", image), "File ACL: ")
	block, err := strconv.Atoi(strings.Fields(acl)[0])
	if err != nil || block == 0 {
		t.Fatalf("attribute block %d, %v", block, err)
	}
	patch := func(change func(b []byte)) {
		b, err := os.ReadFile(image)
		if err == nil {
			change(b)
			err = os.WriteFile(image, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	patch(func(b []byte) { clear(b[block<<10 : (block+1)<<10]) })
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	diskfstest.Run(t, "debugfs", "-w", "-R", "write "+filepath.Join(src, "f")+" g", image)
	diskfstest.Run(t, "debugfs", "-w", "-R", "write "+filepath.Join(src, "f")+" dir/new", image)
	patch(func(b []byte) { b[bytes.Index(b, []byte("bad-name"))+3] = '/' })
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	return env
}

// Damage hides nothing else: an archive and a list of changes have all the rest, and name
// what is damaged at the end.
func TestDamageHidesItselfOnly(t *testing.T) {
	env := newDamagedEnv(t)
	r := runVarve(t, env, "cp", "--tar", "shop/db@latest:/")
	var names []string
	for in := tar.NewReader(strings.NewReader(r.stdout)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); r.code != exitFailure || got != "./ dir/ dir/new dir/same f g lost+found/" ||
		!strings.Contains(r.stderr, "file=/f") || !strings.Contains(r.stderr, "in the archive") {
		t.Errorf("exit code %d, the archive holds %q\n%s", r.code, got, r.stderr)
	}

	r = runVarve(t, env, "diff", "--files", "shop/db@latest~1", "shop/db@latest")
	want := "? /dir/bad-name  (could not be compared)\n+ /dir/new\n? /f  (could not be compared)\n+ /g\n2 added, 0 removed, 0 changed, 2 could not be compared\n"
	if r.code != exitFailure || r.stdout != want || !strings.Contains(r.stderr, ":/f") || !strings.Contains(r.stderr, ":/dir") {
		t.Errorf("exit code %d\n%swant\n%s%s", r.code, r.stdout, want, r.stderr)
	}

	target := filepath.Join(t.TempDir(), "copy")
	r = runVarve(t, env, "cp", "shop/db@latest:/f", target)
	if b, err := os.ReadFile(target); err != nil || string(b) != "." || r.code != exitFailure ||
		strings.Contains(r.stderr, "is not in") || !strings.Contains(r.stderr, "f is in "+target) {
		t.Errorf("exit code %d, the copy holds %q, %v\n%s", r.code, b, err, r.stderr)
	}

	for path, what := range map[string]string{"/f": "attributes", "/dir": "some entries"} {
		r = runVarve(t, env, "stat", "shop/db@latest:"+path)
		if r.code != exitFailure || !strings.Contains(r.stdout, "Damage: "+what) || !strings.Contains(r.stdout, "Links:") {
			t.Errorf("stat %s: exit code %d\n%s", path, r.code, r.stdout)
		}
	}
	r = runVarve(t, env, "stat", "-o", "json", "shop/db@latest:/f", "shop/db@latest:/g")
	var list []statInfo
	if err := json.Unmarshal([]byte(r.stdout), &list); err != nil || len(list) != 2 || len(list[0].Damage) != 1 || list[1].Damage != nil {
		t.Errorf("%v\n%s", err, r.stdout)
	}

	for _, args := range [][]string{{"ls", "shop/db@latest:/dir"}, {"find", "shop/db@latest:/"}, {"tree", "shop/db@latest:/"}, {"cat", "shop/db@latest:/dir/*"}} {
		r := runVarve(t, env, args...)
		if r.code != exitFailure || !strings.Contains(r.stdout, map[bool]string{true: ".dir", false: "same"}[args[0] == "cat"]) ||
			!strings.Contains(r.stderr, "could not be read in full") {
			t.Errorf("%s: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	if r := runVarve(t, env, "cat", "shop/db@latest:/dir/bad-name"); r.code != exitFailure || strings.Contains(r.stderr, "not exist") {
		t.Errorf("what a damaged entry may have been: exit code %d\n%s", r.code, r.stderr)
	}
}

// A file that is damaged in one point has its states in the others.
func TestVersionsGoOn(t *testing.T) {
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	diskfstest.NeedTool(t, "debugfs")
	diskfstest.Run(t, "debugfs", "-w", "-R", "sif /etc/other mode 0", image)
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	r := runVarve(t, env, "ls", "--versions", "shop/db:/etc/other")
	if r.code != exitFailure || !strings.Contains(r.stdout, "(cannot be read)") || !strings.Contains(r.stdout, "-rw-r-----") {
		t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

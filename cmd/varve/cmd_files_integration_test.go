package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/fusefs/files"
)

// newFilesEnv is a user with a backup of a file system that holds /etc/app.conf,
// /etc/other and /data.
func newFilesEnv(t *testing.T) testEnv {
	t.Helper()
	diskfstest.NeedTool(t, "mke2fs")
	env := newTestEnv(t)
	src := filepath.Join(env["HOME"], "src")
	if err := os.MkdirAll(filepath.Join(src, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"etc/app.conf": "port=1\n", "etc/other": "x", "data": strings.Repeat("d", 100_000)} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(env["HOME"], "disk.img")
	diskfstest.Run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-d", src, image, "16M")
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	return env
}

func TestFileCommands(t *testing.T) {
	env := newFilesEnv(t)
	const p = "shop/db@latest:"
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		args []string
		code int
		want string // in standard output, or in the error
	}{
		{"find by name", []string{"find", p + "/", "--name", "*.conf"}, exitOK, "/etc/app.conf\n"},
		{"find by type and size", []string{"find", "shop/db@latest", "--type", "f", "--size", "+50K"}, exitOK, "/data\n"},
		{"find nothing newer", []string{"find", p + "/", "--newer", "2999-01-01"}, exitOK, ""},
		{"find by a wrong type", []string{"find", p + "/", "--type", "x"}, exitUsage, "--type"},
		{"ls a pattern", []string{"ls", p + "/etc/*"}, exitOK, "/etc/app.conf\n"},
		{"ls several", []string{"ls", p + "/etc", p + "/data"}, exitOK, ":/etc:\n"},
		{"ls recursively", []string{"ls", "-R", p + "/"}, exitOK, ":/etc:\n"},
		{"ls recursively as JSON", []string{"ls", "-R", p + "/", "-o", "json"}, exitOK, `"path": "/etc/app.conf"`},
		{"ls nothing", []string{"ls", p + "/no*"}, exitFailure, "does not exist"},
		{"cat a pattern", []string{"cat", p + "/etc/*"}, exitOK, "port=1\nx"},
		{"cat a directory", []string{"cat", p + "/etc"}, exitFailure, "a directory"},
		{"find in a pattern", []string{"find", p + "/e*", "--name", "other"}, exitOK, "/etc/other\n"},
		{"tree", []string{"tree", "shop/db@latest"}, exitOK, "├── data\n├── etc\n│   ├── app.conf\n│   └── other\n"},
		{"tree to a depth", []string{"tree", "shop/db@latest", "-L", "1"}, exitOK, "├── etc\n└── lost+found\n"},
		{"tree to a depth as JSON", []string{"tree", "shop/db@latest", "-L", "1", "-o", "json"}, exitOK, `"name": "etc",`},
		{"stat", []string{"stat", p + "/etc/app.conf"}, exitOK, "Size: 7 B"},
		{"stat of nothing", []string{"stat", p + "/nothing"}, exitFailure, ":/nothing: file does not exist"},
		{"a path without its slash", []string{"ls", p + "etc"}, exitUsage, "shop/db@latest:/etc"},
		{"versions at one point", []string{"ls", "--versions", p + "/etc"}, exitUsage, "shop/db:/etc"},
		{"ls -l", []string{"ls", "-l", p + "/etc"}, exitOK, "-rw-r-----"},
		{"cp a pattern", []string{"cp", p + "/etc/*", dir}, exitOK, "copied 2 files"},
		{"cp over a file", []string{"cp", p + "/etc/other", dir}, exitRefused, "--force"},
		{"cp over a file by force", []string{"cp", "-f", p + "/etc/other", dir}, exitOK, "copied 1 file and 0 directories"},
		{"cp a directory", []string{"cp", p + "/etc", dir}, exitFailure, "--recursive"},
		{"cp a tree", []string{"cp", "-r", p + "/", filepath.Join(dir, "all")}, exitOK, "copied 3 files and 3 directories"},
		{"cp several to a file", []string{"cp", p + "/etc/*", filepath.Join(dir, "new")}, exitUsage, "need a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := runVarve(t, env, c.args...)
			if out := r.stdout + r.stderr; r.code != c.code || !strings.Contains(out, c.want) {
				t.Errorf("exit code %d, want %d; want %q in\n%s", r.code, c.code, c.want, out)
			}
		})
	}
	if b, err := os.ReadFile(filepath.Join(dir, "all/etc/app.conf")); err != nil || string(b) != "port=1\n" {
		t.Errorf("the copy holds %q, %v", b, err)
	}
	r := tar.NewReader(strings.NewReader(mustRun(t, env, "cp", "--tar", p+"/etc").stdout))
	var names []string
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != "etc/ etc/app.conf etc/other" {
		t.Errorf("the archive holds %q", got)
	}
	var list []statInfo
	if err := json.Unmarshal([]byte(mustRun(t, env, "stat", "-o", "json", p+"/data").stdout), &list); err != nil || len(list) != 1 || list[0].Size != 100_000 {
		t.Errorf("stat as JSON: %+v, %v", list, err)
	}
}

// One damaged file does not hide the others in a listing, and a name in an error does not
// affect the terminal.
func TestListingsGoOn(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	const hostile = "\x1b]0;harm\a"
	diskfstest.Run(t, "debugfs", "-w", "-R", "write "+filepath.Join(env["HOME"], "src/etc/other")+" /etc/"+hostile, image)
	// Without its type an inode is damaged.
	for _, name := range []string{"/etc/other", "/etc/" + hostile} {
		diskfstest.Run(t, "debugfs", "-w", "-R", "sif "+name+" mode 0", image)
	}
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"ls", []string{"ls", "shop/db@latest:/etc"}, []string{"app.conf\n", "??????????  ?      ?    ?    ?     ?                     other\n"}},
		{"ls -R", []string{"ls", "-R", "shop/db@latest:/"}, []string{"app.conf\n", "other\n", "data\n"}},
		{"ls as JSON", []string{"ls", "-o", "json", "shop/db@latest:/etc"}, []string{`"name": "app.conf"`, `"error": "`}},
		{"tree", []string{"tree", "shop/db@latest:/"}, []string{"app.conf\n", "other (cannot be read)\n", "data\n"}},
		{"tree as JSON", []string{"tree", "-o", "json", "shop/db@latest:/"}, []string{`"name": "app.conf"`, `"error": "`}},
		{"find", []string{"find", "shop/db@latest:/etc"}, []string{"/etc/app.conf\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := runVarve(t, env, c.args...)
			if r.code == exitOK || !strings.Contains(r.stderr, "could not be read") || !strings.Contains(r.stderr, "/etc/other") {
				t.Errorf("exit code %d\n%s", r.code, r.stderr)
			}
			for _, want := range c.want {
				if !strings.Contains(r.stdout, want) {
					t.Errorf("%q is missing:\n%s", want, r.stdout)
				}
			}
			if out := r.stdout + r.stderr; strings.ContainsAny(out, "\x1b\a") {
				t.Errorf("control characters: %q", out)
			}
		})
	}
	r := runVarve(t, env, "stat", "shop/db@latest:/etc/"+hostile)
	if r.code == exitOK || !strings.Contains(r.stderr, "harm") || strings.ContainsAny(r.stderr, "\x1b\a") {
		t.Errorf("exit code %d, %q", r.code, r.stderr)
	}
}

func TestModeString(t *testing.T) {
	for mode, want := range map[uint32]string{
		0o100644: "-rw-r--r--", 0o040755: "drwxr-xr-x", 0o120777: "lrwxrwxrwx", 0o020666: "crw-rw-rw-", 0o060660: "brw-rw----",
		0o010600: "prw-------", 0o140700: "srwx------", 0o104755: "-rwsr-xr-x", 0o104644: "-rwSr--r--", 0o102755: "-rwxr-sr-x",
		0o102644: "-rw-r-Sr--", 0o041777: "drwxrwxrwt", 0o041770: "drwxrwx--T", 0o107000: "---S--S--T",
	} {
		if got := files.ModeString(mode); got != want {
			t.Errorf("files.ModeString(%o) = %s, want %s", mode, got, want)
		}
	}
}

// What cannot be read is skipped by a copy, named, and reflected in the exit code.
func TestCpNamesWhatItLeavesOut(t *testing.T) {
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image := filepath.Join(env["HOME"], "disk.img")
	diskfstest.Run(t, "tune2fs", "-O", "encrypt", image)
	diskfstest.Run(t, "debugfs", "-w", "-R", "sif /etc/other flags 0x80800", image)
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	dir := t.TempDir()
	r := runVarve(t, env, "cp", "-r", "shop/db@latest:/", filepath.Join(dir, "all"))
	if r.code != exitFailure || !strings.Contains(r.stderr, "etc/other could not be read and is not in "+dir) ||
		!strings.Contains(r.stderr, "encrypt") || !strings.Contains(r.stdout, "copied 2 files") {
		t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "all/etc/app.conf")); err != nil || string(b) != "port=1\n" {
		t.Errorf("a file beside holds %q, %v", b, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "all/etc/other")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
	r = runVarve(t, env, "cp", "-o", "json", "shop/db@latest:/etc/*", dir)
	var res cpResult
	if err := json.Unmarshal([]byte(r.stdout), &res); err != nil || r.code != exitFailure || res.Files != 1 || len(res.Failed) != 1 || res.Failed[0].Path != "etc/other" {
		t.Errorf("exit code %d, %v\n%s", r.code, err, r.stdout)
	}
}

// Without root, owners and devices cannot be kept: the copy says so, of owners once, and
// continues.
func TestCpWithoutRoot(t *testing.T) {
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "setpriv")
	diskfstest.NeedTool(t, "debugfs")
	env := newFilesEnv(t)
	image, script := filepath.Join(env["HOME"], "disk.img"), filepath.Join(env["HOME"], "script")
	if err := os.WriteFile(script, []byte("cd /etc\nmknod null c 1 3\nln null zero\nsif null links_count 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	diskfstest.Run(t, "debugfs", "-w", "-f", script, image)
	mustRun(t, env, "backup", image, "--volume", "shop/db")
	program := buildVarve(t)
	diskfstest.Run(t, "chown", "-R", "65534:65534", env["HOME"])
	for _, d := range []string{env["HOME"], filepath.Dir(program)} { // another user gets there
		diskfstest.Run(t, "chmod", "a+rx", d, filepath.Dir(d))
	}
	target := filepath.Join(env["HOME"], "copy")
	cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", program, "cp", "-r", "--devices", "shop/db@latest:/etc", target)
	cmd.Env = append(os.Environ(), env.list()...)
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Count(string(out), "only root can set them") != 1 || !strings.Contains(string(out), "files=3") ||
		strings.Count(string(out), "special files need root") != 2 {
		t.Errorf("%v\n%s", err, out)
	}
	if st, err := os.Stat(target); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("the directory is %v, %v", st, err)
	}
	if b, err := os.ReadFile(filepath.Join(target, "app.conf")); err != nil || string(b) != "port=1\n" {
		t.Errorf("the copy holds %q, %v", b, err)
	}
}

// buildVarve returns the program as a file that other users can run: this test's own
// executable, which TestMain turns into the program, since linking another takes longer than
// the tests. TestMain removes it.
func buildVarve(t *testing.T) string {
	t.Helper()
	program, err := builtVarve()
	if err != nil {
		t.Fatal(err)
	}
	return program
}

var builtVarve = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "varve-build-*")
	if err != nil {
		return "", err
	}
	builtVarveDir = dir
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	executable, program := filepath.Join(dir, "varve.test"), filepath.Join(dir, "varve")
	script := "#!/bin/sh\nVARVE_TEST_AS_MAIN=1 exec " + executable + " \"$@\"\n"
	return program, errors.Join(os.WriteFile(executable, self, 0o755), os.WriteFile(program, []byte(script), 0o755))
})

// builtVarveDir is where buildVarve put the program, if it was called.
var builtVarveDir string

func needFUSE(t *testing.T) {
	t.Helper()
	diskfstest.NeedTool(t, "fusermount3")
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("needs FUSE: %v", err)
	}
	f.Close()
}

// list returns the environment as processes get it.
func (e testEnv) list() (out []string) {
	for k, v := range e {
		out = append(out, k+"="+v)
	}
	return out
}

// start runs the program with the environment of a user.
func start(t *testing.T, env testEnv, program string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env.list()...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// patience is how long a test waits for what comes by itself: a busy machine takes minutes for what otherwise takes a moment.
const patience = 10 * time.Minute

func waitUntil(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

func isEmpty(dir string) bool {
	list, err := os.ReadDir(dir)
	return err == nil && len(list) == 0
}

func TestMountCommand(t *testing.T) {
	needFUSE(t)
	env := newFilesEnv(t)
	program := buildVarve(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "shop/db/latest/files/etc/app.conf")

	// In the background: the tree is mounted when the command returns, and it says where, and
	// that a volume does not exist.
	cmd := exec.Command(program, "mount", dir, "--daemon", "--volume", "shop/db", "--volume", "shop/typo")
	cmd.Env = append(os.Environ(), env.list()...)
	// Pipes would stay open as long as the background process, which keeps its standard
	// error.
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out.Name()); err != nil || !strings.Contains(string(b), "varve umount "+dir) || !strings.Contains(string(b), "shop/typo") {
		t.Errorf("the command says %q, %v", b, err)
	}
	if b, err := os.ReadFile(conf); err != nil || string(b) != "port=1\n" {
		t.Errorf("the file holds %q, %v", b, err)
	}
	if r := runVarve(t, env, "mount", dir); r.code == exitOK || !strings.Contains(r.stderr, "varve umount") {
		t.Errorf("a second mount: exit code %d\n%s", r.code, r.stderr)
	}
	mustRun(t, env, "umount", dir)
	if r := runVarve(t, env, "umount", dir); r.code != exitUsage {
		t.Errorf("a second umount: exit code %d\n%s", r.code, r.stderr)
	}

	// In the foreground: a signal unmounts.
	cmd = start(t, env, program, "mount", dir, "--volume", "shop/db")
	waitUntil(t, "the tree appears", func() bool { return !isEmpty(dir) })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after a signal: %v", err)
	}
	if !isEmpty(dir) {
		t.Error("the tree is still there after a signal")
	}

	// Metrics count what was fetched.
	cmd = start(t, env, program, "mount", dir, "--metrics", "127.0.0.1:0", "--log-level", "info", "--log-format", "json")
	waitUntil(t, "the tree appears", func() bool { return !isEmpty(dir) })
	if _, err := os.ReadFile(conf); err != nil {
		t.Error(err)
	}
	metrics := metricsOf(t, cmd.Process.Pid)
	if n := regexp.MustCompile(`(?m)^varve_mount_fetched_bytes_total (\S+)$`).FindStringSubmatch(metrics); n == nil || n[1] == "0" {
		t.Errorf("the metrics are\n%s", metrics)
	}
	mustRun(t, env, "umount", dir)
	if err := cmd.Wait(); err != nil {
		t.Errorf("after umount: %v", err)
	}

	// A failure in the background is the command's failure.
	var exit *exec.ExitError
	if err := start(t, env, program, "mount", filepath.Join(dir, "missing"), "--daemon").Wait(); !errors.As(err, &exit) {
		t.Errorf("a mount on nothing in the background: %v", err)
	}
}

// Where FUSE cannot be used, the error says what to do, and what works without it.
func TestMountWithoutFUSE(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "unshare")
	diskfstest.NeedTool(t, "setpriv")
	env := newFilesEnv(t)
	program := buildVarve(t)
	dir := t.TempDir()
	diskfstest.Run(t, "chown", "-R", "65534:65534", env["HOME"])
	for _, d := range []string{dir, env["HOME"], filepath.Dir(program)} { // another user gets there
		diskfstest.Run(t, "chmod", "a+rx", d, filepath.Dir(d))
	}
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"no device", []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev && exec "$0" mount "$1"`, program, dir},
			[]string{"/dev/fuse does not exist", "modprobe fuse", "--device /dev/fuse", "varve ls"}},
		{"no fusermount3", []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /dev && mknod -m 666 /dev/fuse c 10 229 && mknod -m 666 /dev/null c 1 3 &&
			exec setpriv --reuid=65534 --regid=65534 --clear-groups env PATH=/nonexistent "$0" mount "$1"`, program, dir},
			[]string{"no fusermount3", "fuse3", "varve ls"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(c.args[0], c.args[1:]...)
			for k, v := range env {
				cmd.Env = append(cmd.Env, k+"="+v)
			}
			cmd.Env = append(cmd.Env, "PATH="+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			if err == nil {
				t.Errorf("it mounted: %s", out)
			}
			for _, want := range c.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("the error has no %q: %s", want, out)
				}
			}
			if !isEmpty(dir) {
				t.Error("something is mounted")
			}
		})
	}
}

// metricsOf reads the metrics of a process that chose its port.
func metricsOf(t *testing.T, pid int) string {
	t.Helper()
	mine, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	sockets := map[string]bool{}
	for _, fd := range mine {
		if to, err := os.Readlink(fd); err == nil {
			sockets[to] = true
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) { // see proc_net_tcp(5): address, state 0A for listening, inode
		f := strings.Fields(line)
		if len(f) < 10 || f[3] != "0A" || !sockets["socket:["+f[9]+"]"] {
			continue
		}
		port, err := strconv.ParseUint(f[1][strings.IndexByte(f[1], ':')+1:], 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		r, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", port))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	t.Fatal("the process listens nowhere")
	return ""
}

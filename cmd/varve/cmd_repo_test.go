package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/repository"
)

func TestRepoLifeCycle(t *testing.T) {
	env := newTestEnv(t)
	dir := filepath.Join(env["HOME"], "backups")

	if r := runVarve(t, env, "repo", "status"); r.code != exitRepository || !strings.Contains(r.stderr, "varve repo create") {
		t.Errorf("not connected: %+v", r)
	}
	noPassword := testEnv{"HOME": env["HOME"], "VARVE_CONFIG": env["VARVE_CONFIG"]}
	if r := runVarve(t, noPassword, "list"); r.code != exitRepository || !strings.Contains(r.stderr, "not connected") {
		t.Errorf("not connected, and no password: %+v", r)
	}
	mustRun(t, env, "repo", "create", "filesystem", "--path", dir, "--compression", "off", "--cluster", "prod", "--max-upload-rate", "10MiB")
	var s repository.Status
	if err := json.Unmarshal([]byte(mustRun(t, env, "repo", "status", "-o", "json").stdout), &s); err != nil {
		t.Fatal(err)
	}
	if !s.Writable || s.Compression != "off" || s.Cluster != "prod" || s.Limits.UploadBytesPerSecond != 10<<20 {
		t.Errorf("status %+v", s)
	}
	if r := runVarve(t, env, "repo", "create", "filesystem", "--path", dir); r.code != exitRefused {
		t.Errorf("created twice: %+v", r)
	}

	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil { // like a mount point
		t.Fatal(err)
	}
	if r := runVarve(t, env, "list"); r.code != exitRepository || !strings.Contains(r.stderr, "mounted") || strings.Contains(r.stderr, "create") {
		t.Errorf("the disk of the repository is not mounted: %+v", r)
	}
	if err := errors.Join(os.RemoveAll(dir), os.Rename(dir+".away", dir)); err != nil {
		t.Fatal(err)
	}

	env["VARVE_NEW_PASSWORD"] = "battery staple"
	mustRun(t, env, "repo", "change-password")
	// Again, as after an interrupt that came when the change was complete.
	if r := mustRun(t, env, "repo", "change-password"); !strings.Contains(r.stdout, "has the new password already") {
		t.Errorf("the same change again: %+v", r)
	}
	env["VARVE_NEW_PASSWORD"] = "neither"
	refused(t, env, exitRepository, "wrong password", "repo", "change-password")
	if r := runVarve(t, env, "repo", "status"); r.code != exitRepository || !strings.Contains(r.stderr, "wrong password") {
		t.Errorf("old password: %+v", r)
	}
	env["VARVE_PASSWORD"] = "battery staple"
	mustRun(t, env, "repo", "disconnect")
	if r := runVarve(t, env, "repo", "disconnect"); r.code != exitRepository {
		t.Errorf("disconnected twice: %+v", r)
	}
	if r := mustRun(t, env, "repo", "connect", "filesystem", "--path", dir, "--read-only"); !strings.Contains(r.stdout, "read-only") {
		t.Errorf("read-only connection: %+v", r)
	}
}

func TestRepoUsage(t *testing.T) {
	env := newTestEnv(t)
	for _, args := range []string{
		"repo create filesystem",
		"repo create filesystem --path %s --hash MD5",
		"repo create filesystem --path %s --retention-mode governance --retention-period 90d",
		"repo create filesystem --path %s --retention-period soon",
		"repo create filesystem --path %s --max-upload-rate fast",
		"repo create filesystem --path %s --no-cache --content-cache-size 1G",
		"repo create s3 --bucket b --secret-access-key x",
		"repo connect s3 --bucket bucket --access-key-id a",
		"repo connect sftp --host h --user u --path /p",
		"repo connect kopia-server --url http://h --user a@b",
	} {
		args = strings.ReplaceAll(args, "%s", filepath.Join(env["HOME"], "r"))
		if r := runVarve(t, env, strings.Fields(args)...); r.code != exitUsage {
			t.Errorf("varve %s: %+v", args, r)
		}
	}
	if _, err := os.Stat(filepath.Join(env["HOME"], "r", "kopia.repository.f")); !os.IsNotExist(err) {
		t.Errorf("a repository was made: %v", err)
	}
}

func TestSettingsComeFromFlagsThenEnvironmentThenFile(t *testing.T) {
	env := newTestEnv(t)
	home := env["HOME"]
	file := filepath.Join(home, "settings.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fmt.Sprintf("output: json\ncluster: from-file\nrepo:\n  compression: pgzip\nfilesystem:\n  path: %s/from-file\n", home))
	env["VARVE_FROM_FILE"] = file
	status := func(args ...string) (s repository.Status) {
		t.Helper()
		out := mustRun(t, env, append([]string{"repo", "create", "filesystem"}, args...)...).stdout
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return s
	}
	if s := status(); s.Place != "directory "+home+"/from-file" || s.Compression != "pgzip" || s.Cluster != "from-file" {
		t.Errorf("from the file: %+v", s)
	}
	env["VARVE_FILESYSTEM_PATH"] = home + "/from-env"
	env["VARVE_REPO_COMPRESSION"] = "zstd"
	if s := status(); s.Place != "directory "+home+"/from-env" || s.Compression != "zstd" {
		t.Errorf("from the environment: %+v", s)
	}
	if s := status("--path", home+"/from-flag", "--compression", "off"); s.Place != "directory "+home+"/from-flag" || s.Compression != "off" {
		t.Errorf("from flags: %+v", s)
	}
	for _, text := range []string{
		"paht: x", "filesystem:\n  paht: x", "filesistem:\n  path: x", "output: [", "- a", "filesystem:\n  path: {a: b}", "cluster:",
	} {
		write(text)
		if r := runVarve(t, env, "version"); r.code != exitUsage {
			t.Errorf("settings %q: %+v", text, r)
		}
	}
	write(`{"output": "json", "s3": {"secret-access-key": "x", "bucket": "b"}, "rclone": {"rclone-arg": ["a", "b"]}}`)
	if r := mustRun(t, env, "version"); !strings.HasPrefix(r.stdout, "{") {
		t.Errorf("JSON settings: %+v", r)
	}
}

func TestPasswordSources(t *testing.T) {
	env := newTestEnv(t)
	dir := filepath.Join(env["HOME"], "backups")
	mustRun(t, env, "repo", "create", "filesystem", "--path", dir)
	right, wrong := filepath.Join(env["HOME"], "right"), filepath.Join(env["HOME"], "wrong")
	for file, text := range map[string]string{right: "correct horse\n", wrong: "nonsense\n"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name     string
		env      testEnv
		args     []string
		code     int
		inStderr string
	}{
		{"none", nil, nil, exitRepository, "--password-file"},
		{"file", nil, []string{"--password-file", right}, 0, ""},
		{"command", nil, []string{"--password-command", "cat " + right}, 0, ""},
		{"file in the environment", testEnv{"VARVE_PASSWORD_FILE": right}, nil, 0, ""},
		{"command in the environment", testEnv{"VARVE_PASSWORD_COMMAND": "cat " + right}, nil, 0, ""},
		{"flag before environment", testEnv{"VARVE_PASSWORD": "nonsense"}, []string{"--password-file", right}, 0, ""},
		{"wrong", testEnv{"VARVE_PASSWORD": "nonsense"}, nil, exitRepository, "wrong password"},
		{"both", nil, []string{"--password-file", right, "--password-command", "cat"}, exitUsage, "both"},
		{"no such file", nil, []string{"--password-file", right + ".none"}, exitRepository, ": name a file"},
		{"empty file", nil, []string{"--password-file", os.DevNull}, exitRepository, "is empty: name a file"},
		{"empty", testEnv{"VARVE_PASSWORD": ""}, nil, exitRepository, "$VARVE_PASSWORD is empty: set it"},
		{"command fails", nil, []string{"--password-command", "exit 3"}, exitRepository, "exit status 3: run it with sh -c"},
		{"command prints nothing", nil, []string{"--password-command", "true"}, exitRepository, "printed is empty: it must print"},
		{"two lines", nil, []string{"--password-command", "echo a; echo b"}, exitRepository, "more than one line"},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := testEnv{"HOME": env["HOME"], "VARVE_CONFIG": env["VARVE_CONFIG"]}
			for k, v := range c.env {
				e[k] = v
			}
			r := runVarve(t, e, append(c.args, "repo", "status")...)
			if r.code != c.code || !strings.Contains(r.stderr, c.inStderr) {
				t.Errorf("%+v", r)
			}
			if strings.Contains(r.stderr+r.stdout, "nonsense") || strings.Contains(r.stderr+r.stdout, "correct horse") {
				t.Errorf("a password is in the output: %+v", r)
			}
		})
	}
}

// TestPasswordCommandLeavesStandardInputAlone gives a list of extents by standard
// input to a user whose password command reads all of its own.
func TestPasswordCommandLeavesStandardInputAlone(t *testing.T) {
	env, disk := newBackupEnv(t)
	in, list, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	_, err = list.WriteString(`{"base":null,"target":"s1","size":1048576}` + "\n" + `{"offset":0,"length":1048576}` + "\n" + `{"end":true,"count":1}` + "\n")
	if err := errors.Join(err, list.Close()); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	e := testEnv{"HOME": env["HOME"], "VARVE_CONFIG": env["VARVE_CONFIG"], "VARVE_PASSWORD_COMMAND": "cat >&2; echo correct horse"}
	a := newApp()
	a.stdin, a.stdout, a.stderr = in, io.Discard, &stderr
	a.lookupEnv = func(name string) (string, bool) { v, ok := e[name]; return v, ok }
	if code := a.run(t.Context(), []string{"backup", disk, "--volume", "shop/db", "--extents", "-"}); code != exitOK {
		t.Errorf("exit code %d\n%s", code, &stderr)
	}
}

func TestDurations(t *testing.T) {
	for s, want := range map[string]string{"30d": "30d", "2w": "14d", "36h": "36h0m0s", "48h": "2d"} {
		var d days
		if err := d.Set(s); err != nil || d.String() != want {
			t.Errorf("duration %q: %v, %v", s, d.String(), err)
		}
	}
	for _, s := range []string{"", "d", "-1d", "1.5d", "1y", "99999999999999w", "-1h"} {
		if d, err := parseDays(s); err == nil {
			t.Errorf("duration %q: %v", s, d)
		}
	}
}

func FuzzParseSettings(f *testing.F) {
	f.Add([]byte("a: b\nc:\n  d: [e, f]\n"))
	f.Add([]byte(`{"a": {"b": 1}}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		if s, err := parseSettings(p); err == nil && s == nil {
			t.Error("neither settings nor an error")
		}
	})
}

// TestPasswordIsTheSameWhicheverWay passes one secret, with a line end and with a byte order
// mark, in each way: all of them open what one of them created.
func TestPasswordIsTheSameWhicheverWay(t *testing.T) {
	for name, text := range map[string]string{"line end": "abc\n", "CRLF": "abc\r\n", "byte order mark": "\xef\xbb\xbfabc"} {
		t.Run(name, func(t *testing.T) {
			env := newTestEnv(t)
			file := filepath.Join(env["HOME"], "secret")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			env["VARVE_PASSWORD"] = text
			mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
			mustRun(t, env, "list")
			env["VARVE_PASSWORD"] = "abc"
			mustRun(t, env, "list")
			delete(env, "VARVE_PASSWORD")
			mustRun(t, env, "list", "--password-file", file)
			mustRun(t, env, "list", "--password-command", "cat "+file)
		})
	}
	env := newTestEnv(t)
	env["VARVE_PASSWORD"] = "two\nlines"
	r := runVarve(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	if r.code == exitOK || !strings.Contains(r.stderr, "$VARVE_PASSWORD holds more than one line") || strings.Contains(r.stderr, "two") {
		t.Errorf("a password of two lines: exit %d: %s", r.code, r.stderr)
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
	// A file is replaced only with --overwrite; without it the export is not even contacted.
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

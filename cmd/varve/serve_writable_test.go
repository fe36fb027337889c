package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

func TestServeWritableAndCommit(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	overlays := filepath.Join(env["HOME"], "overlays")
	args := []string{"--writable", "--overlay-dir", overlays, "--keep", "--overlay-limit", "128K"}
	s := startServer(t, env, args...)
	want := contents(t, disk)
	e := s.enter(t, "shop/db@latest")
	write := func(e *nbdclient.Export, off int64, text string) {
		t.Helper()
		copy(want[off:], text)
		if err := e.WriteAt(t.Context(), []byte(text), off, 0); err != nil {
			t.Fatal(err)
		}
	}
	write(e, 100_000, "written over it")
	if !bytes.Equal(s.read(t, first.Name), want) {
		t.Error("another connection does not see the write")
	}
	if err := e.WriteAt(t.Context(), make([]byte, 256<<10), 0, 0); err == nil || !strings.Contains(err.Error(), proto.ENOSPC.Error()) {
		t.Errorf("a write beyond the limit: %v", err)
	}
	commit := func(args ...string) backupResult {
		t.Helper()
		var res backupResult
		if err := json.Unmarshal([]byte(mustRun(t, env, append([]string{"commit", "-o", "json"}, args...)...).stdout), &res); err != nil {
			t.Fatal(err)
		}
		return res
	}
	running := commit(s.uri(first.Name))
	if running.Kind != "incremental" || running.Parent != first.ID || running.Stats.Changed != 64<<10 || !running.NotCrashConsistent || running.Source != "overlay" {
		t.Errorf("commit of a running overlay: %+v", running)
	}
	if r := commit(s.uri(first.Name), "--quiesced", "--volume", "test/copy"); !strings.HasPrefix(r.Name, "test/copy@") || r.Parent != first.ID || r.NotCrashConsistent {
		t.Errorf("commit to another volume: %+v", r)
	}
	// Another cluster's volume gets no point unless it is named.
	other := maps.Clone(env)
	other["VARVE_CLUSTER"] = "beta"
	if r := runVarve(t, other, "commit", s.uri(first.Name)); r.code != exitRefused || !strings.Contains(r.stderr, "--volume ") {
		t.Errorf("commit to another cluster's volume: %+v", r)
	}
	if r := runVarve(t, other, "commit", s.uri(first.Name), "--volume", "shop/db"); r.code != exitOK {
		t.Errorf("commit to a volume of this cluster: %+v", r)
	}
	if r := runVarve(t, env, "commit", filepath.Join(overlays, first.ID)); r.code == exitOK || !strings.Contains(r.stderr, "NBD URI") {
		t.Errorf("commit of an overlay in use: %+v", r)
	}
	_ = e.Close()
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}

	s = startServer(t, env, append(args, first.Name)...)
	write(s.enter(t, ""), 500_000, "and after a restart")
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	// Neither a run without --keep nor a cache of local copies deletes it.
	for _, args := range [][]string{
		{"--writable", "--overlay-dir", overlays},
		{"--hydrate", "--hydrate-dir", overlays},
		{"--writable", "--overlay-dir", overlays, "--keep", "--hydrate", "--hydrate-dir", overlays},
	} {
		args = append(args, "--listen", "unix:"+filepath.Join(t.TempDir(), "s"))
		if r := runVarve(t, env, append([]string{"serve"}, args...)...); r.code != exitRefused && r.code != exitUsage || !strings.Contains(r.stderr, overlays) {
			t.Errorf("%v: %+v", args, r)
		}
	}
	kept := commit(filepath.Join(overlays, first.ID), "--volume", "test/kept")
	if kept.NotCrashConsistent || kept.Stats.Changed != 128<<10 {
		t.Errorf("commit of a kept overlay: %+v", kept)
	}
	for _, name := range []string{kept.Name, first.Name} {
		target := filepath.Join(env["HOME"], "restored")
		mustRun(t, env, "restore", name, target)
		if got := contents(t, target); bytes.Equal(got, want) != (name == kept.Name) {
			t.Errorf("%s is not what it should be", name)
		}
		_ = os.Remove(target)
	}
}

// What was hydrated is kept, counted by the metrics, and read after a restart; copies of
// deleted points are deleted.
func TestServeHydrate(t *testing.T) {
	env, disk := newBackupEnv(t)
	first := backupJSON(t, env, disk, "--volume", "shop/db", "--block-size", "64K")
	copies := filepath.Join(env["HOME"], "copies")
	metrics := func(s *server) string {
		t.Helper()
		resp, err := http.Get(s.view.Metrics)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	args := []string{"--hydrate", "--hydrate-dir", copies, "--hydrate-limit", "64M", "--metrics", "0"}
	s := startServer(t, env, args...)
	if !bytes.Equal(s.read(t, "shop/db@latest"), contents(t, disk)) {
		t.Error("the disk differs")
	}
	waitUntil(t, "the disk is here", func() bool { return strings.Contains(metrics(s), "\nvarve_hydrate_disks_complete 1\n") })
	if text := metrics(s); !strings.Contains(text, "\nvarve_hydrate_filled_bytes_total 1.048576e+06\n") || !strings.Contains(text, "\nvarve_hydrate_limit_bytes 6.7108864e+07\n") {
		t.Errorf("metrics:\n%s", text)
	}
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	s = startServer(t, env, args...)
	if !bytes.Equal(s.read(t, "shop/db@latest"), contents(t, disk)) {
		t.Error("the disk differs after a restart")
	}
	if text := metrics(s); !strings.Contains(text, "\nvarve_hydrate_filled_bytes_total 0\n") || strings.Contains(text, "\nvarve_hydrate_read_bytes_total 0\n") {
		t.Errorf("after a restart:\n%s", text)
	}
	if r := s.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	changeByte(t, disk, 1000)
	backupJSON(t, env, disk, "--volume", "shop/db")
	mustRun(t, env, "forget", first.Name)
	startServer(t, env, args...).stop()
	if _, err := os.Stat(filepath.Join(copies, first.ID)); !os.IsNotExist(err) {
		t.Errorf("the copy of a deleted point: %v", err)
	}
}

// What a killed server left unencrypted is deleted by the next server, and what a server
// makes is deleted at its end.
func TestServeScratch(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	// A killed server neither removes its directories nor keeps their locks.
	f := serveFlags{writable: true, hydrate: true}
	killed, err := f.scratch()
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range []*overlay.Scratch{killed.overlays, killed.copies} {
		dir := filepath.Join(parent, fmt.Sprintf("kept%d", i))
		if err := errors.Join(os.Rename(s.Dir, dir), s.Close(), os.Rename(dir, s.Dir), os.Mkdir(filepath.Join(s.Dir, "id"), 0o700),
			os.WriteFile(filepath.Join(s.Dir, "id", "data"), []byte("secret"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	names := func() (dirs []string) {
		entries, err := os.ReadDir(parent)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			dirs = append(dirs, filepath.Join(parent, e.Name()))
		}
		return dirs
	}
	s := startServer(t, env, "--writable", "--hydrate")
	for _, dir := range names() {
		if dir == killed.overlays.Dir || dir == killed.copies.Dir {
			t.Errorf("%s of a killed server is there still", dir)
		}
	}
	if n := len(names()); n != 2 {
		t.Errorf("%d directories of a server: %v", n, names())
	}
	e := s.enter(t, "shop/db@latest")
	if err := e.WriteAt(t.Context(), []byte("x"), 0, 0); err != nil {
		t.Fatal(err)
	}
	_ = e.Close()
	// Anything there is deleted.
	for _, dir := range names() {
		if err := os.Mkdir(filepath.Join(dir, "half"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if r := s.stop(); r.code != exitOK || len(names()) != 0 {
		t.Errorf("exit code %d, left %v\n%s", r.code, names(), r.stderr)
	}
}

// A directory that a user named is never deleted as scratch, whatever its name: neither while
// its server runs nor afterwards.
func TestServeLeavesNamedDirectories(t *testing.T) {
	env, disk := newBackupEnv(t)
	backupJSON(t, env, disk, "--volume", "shop/db")
	parent := t.TempDir()
	t.Setenv("TMPDIR", parent)
	overlays, copies := filepath.Join(parent, "varve-overlay-mydb"), filepath.Join(parent, "varve-overlay-copies")
	args := []string{"--writable", "--keep", "--overlay-dir", overlays, "--hydrate", "--hydrate-dir", copies}
	first := startServer(t, env, args...)
	e := first.enter(t, "shop/db@latest")
	if err := e.WriteAt(t.Context(), []byte("mine"), 0, 0); err != nil {
		t.Fatal(err)
	}
	_ = e.Close()
	old := time.Now().Add(-time.Hour)
	for _, dir := range []string{overlays, copies} {
		if err := os.Chtimes(dir, old, old); err != nil {
			t.Fatal(err)
		}
	}
	other := func() {
		if r := startServer(t, env, "--writable", "--hydrate").stop(); r.code != exitOK {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
	}
	other()
	if got := first.read(t, "shop/db@latest"); string(got[:4]) != "mine" {
		t.Errorf("the running server reads %q", got[:4])
	}
	if r := first.stop(); r.code != exitOK {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	other()
	if _, err := os.Stat(copies); err != nil {
		t.Error(err)
	}
	if got := startServer(t, env, args...).read(t, "shop/db@latest"); string(got[:4]) != "mine" {
		t.Errorf("afterwards the disk reads %q", got[:4])
	}
}

package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/varve-io/varve/backup/qemu/qmp"
)

// gallows stands between a backup and the monitor, or libvirt, that it speaks with, and kills the
// backup when it has sent a number of messages. The last of them is carried out all the same: the
// backup does not hear of it.
type gallows struct {
	socket string
	read   func(*bufio.Reader) ([]byte, error)
	steps  func(message []byte) bool // whether a message counts

	open atomic.Int64 // connections

	mu      sync.Mutex
	left    int // messages until the kill; 0 for none
	polled  int // query-jobs that counted in this run
	victim  *exec.Cmd
	started chan struct{}
	killed  string // the message
}

func build(t *testing.T, target string, read func(*bufio.Reader) ([]byte, error), steps func([]byte) bool) *gallows {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "gallows-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	g := &gallows{socket: filepath.Join(dir, "s"), read: read, steps: steps}
	l, err := net.Listen("unix", g.socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); all.Wait(); _ = os.RemoveAll(dir) })
	all.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("unix", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			g.open.Add(1)
			answered := make(chan struct{})
			all.Go(func() { g.pass(client, server, answered) })
			all.Go(func() { defer close(answered); _, _ = io.Copy(client, server); _, _ = io.Copy(io.Discard, server) })
		}
	})
	return g
}

// pass hands on what a client sends.
func (g *gallows) pass(client, server net.Conn, answered <-chan struct{}) {
	defer g.open.Add(-1)
	defer func() {
		// What was asked is answered before the other side sees the end.
		_ = server.(*net.UnixConn).CloseWrite()
		<-answered
		_ = server.Close()
		_ = client.Close()
	}()
	r := bufio.NewReader(client)
	for {
		m, err := g.read(r)
		if err != nil {
			return
		}
		g.mu.Lock()
		if g.left > 0 && g.steps(m) && !g.again(m) {
			if g.left--; g.left == 0 {
				<-g.started
				_ = g.victim.Process.Kill()
				_, _ = io.Copy(io.Discard, r) // its end
				g.killed = plainStep(m)
			}
		}
		g.mu.Unlock()
		if _, err := server.Write(m); err != nil {
			return
		}
	}
}

// again reports whether a message asks once more what was asked before: how often a backup
// does depends on how busy the machine is, and the n-th step must be the same in each run.
func (g *gallows) again(m []byte) bool {
	if plainStep(m) != "query-jobs" {
		return false
	}
	g.polled++
	return g.polled > 2
}

// plainStep names a message for people.
func plainStep(m []byte) string {
	var command struct {
		Execute string `json:"execute"`
	}
	if json.Unmarshal(m, &command) == nil {
		return command.Execute
	}
	return fmt.Sprintf("procedure %d", binary.BigEndian.Uint32(m[12:]))
}

// kill runs a backup that is killed at its n-th step, and returns which that was; empty if it has
// fewer, and ended well.
func (g *gallows) kill(t *testing.T, env testEnv, n int, args ...string) string {
	t.Helper()
	started := make(chan struct{})
	g.mu.Lock()
	g.left, g.polled, g.started, g.killed = n, 0, started, ""
	g.mu.Unlock()
	cmd, _, stderr := varveProcess(t, env, args...)
	g.victim = cmd
	close(started)
	err := cmd.Wait()
	// The last message reaches the other side after the kill, which may be busy with it.
	waitUntil(t, "the connections of the backup are over", func() bool { return g.open.Load() == 0 })
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left = 0
	mustBeKilled(t, err, g.killed != "", stderr)
	return g.killed
}

func mustBeKilled(t *testing.T, err error, killed bool, stderr *bytes.Buffer) {
	t.Helper()
	var exit *exec.ExitError
	switch {
	case !killed && err != nil:
		t.Fatalf("a backup that was not killed: %v\n%s", err, stderr)
	case killed && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL):
		t.Fatalf("it was not killed: %v\n%s", err, stderr)
	}
}

// mustBackUp is the backup after one that was killed: an increment, by bitmaps, that holds the disks
// as they are.
func mustBackUp(t *testing.T, env testEnv, after string, want map[string][]byte, raw string, args ...string) {
	t.Helper()
	var res groupResult
	if err := json.Unmarshal([]byte(mustRun(t, env, append([]string{"backup", "-o", "json"}, args...)...).stdout), &res); err != nil {
		t.Fatal(err)
	}
	for _, p := range res.Points {
		name, _, _ := strings.Cut(p.Name, "@")
		if p.Content == "stream" {
			continue
		}
		if p.Kind != "incremental" || p.Source != "bitmap" && name != raw {
			t.Errorf("after %s: %s is %s by %s: %+v", after, p.Name, p.Kind, p.Source, p.Fallbacks)
		}
	}
	back := filepath.Join(t.TempDir(), "back")
	mustRun(t, env, "restore", "--group", "shop/vm@latest", back)
	for name, content := range want {
		if got, err := os.ReadFile(filepath.Join(back, "vm-"+name+".img")); err != nil || !bytes.Equal(got, content) {
			t.Errorf("after %s: %s differs from the disk, or cannot be read: %v", after, name, err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// mustHaveLeft fails if there is anything of a backup outside of the machine.
func mustHaveLeft(t *testing.T, after, key, scratch string) {
	t.Helper()
	sum := sha256.Sum256([]byte(key))
	short := hex.EncodeToString(sum[:6])
	for _, path := range []string{"/run/varve/" + short + ".lock", "/var/tmp/varve-" + short + ".nbd", "/var/tmp/varve-" + short} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("after %s: %s is left", after, path)
		}
	}
	if !isEmpty(scratch) {
		list, _ := os.ReadDir(scratch)
		t.Errorf("after %s: left in the scratch directory: %v", after, list)
	}
}

// TestKilledBackupOfQEMU kills the program at each command that it gives a running QEMU.
func TestKilledBackupOfQEMU(t *testing.T) {
	t.Parallel()
	env, _ := newBackupEnv(t)
	dir, scratch := t.TempDir(), t.TempDir()
	monitor := startMachine(t, dir)
	g := build(t, monitor, func(r *bufio.Reader) ([]byte, error) { return r.ReadBytes('\n') }, func(m []byte) bool {
		step := plainStep(m)
		return step == "query-jobs" || step != "qmp_capabilities" && !strings.HasPrefix(step, "query-")
	})
	args := []string{"qemu+qmp://" + g.socket, "--volume", "shop/vm", "--scratch", scratch}
	write := func(n int) {
		for i, name := range []string{"vda", "vdb"} {
			overwrite(t, filepath.Join(dir, name), bytes.Repeat([]byte{byte(n*2 + i)}, 3000), int64((n*37+i)%4000)<<10)
		}
	}
	write(1)
	mustRun(t, env, append([]string{"backup"}, args...)...)
	var steps []string
	for n := 1; ; n++ {
		write(n)
		step := g.kill(t, env, n, append([]string{"backup"}, args...)...)
		if step == "" {
			break
		}
		steps = append(steps, step)
		after := fmt.Sprintf("command %d (%s)", n, step)
		write(n + 100)
		want := map[string][]byte{}
		for _, name := range []string{"vda", "vdb"} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			want[name] = b
		}
		mustBackUp(t, env, after, want, "", args...)
		mustHaveLeft(t, after, g.socket, scratch)
		mustBeCleanQEMU(t, after, monitor)
	}
	all := strings.Join(steps, " ")
	for _, step := range []string{"blockdev-add", "nbd-server-start", "transaction", "block-export-add", "query-jobs", "block-export-del", "job-cancel", "blockdev-del", "nbd-server-stop", "block-dirty-bitmap-remove"} {
		if !strings.Contains(all, step) {
			t.Errorf("no backup was killed at %s; at %s", step, all)
		}
	}
}

// mustBeCleanQEMU fails if there is anything of ours in a qemu-storage-daemon but a bitmap a disk.
func mustBeCleanQEMU(t *testing.T, after, monitor string) {
	t.Helper()
	var c *qmp.Conn
	var err error
	waitUntil(t, "the monitor has left its last client", func() bool {
		c, err = qmp.Dial(t.Context(), monitor)
		return !errors.Is(err, qmp.ErrBusy)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var nodes []struct {
		Name    string            `json:"node-name"`
		Bitmaps []json.RawMessage `json:"dirty-bitmaps"`
	}
	var jobs, exports []json.RawMessage
	err = errors.Join(c.Do(t.Context(), "query-named-block-nodes", map[string]any{"flat": true}, &nodes),
		c.Do(t.Context(), "query-jobs", nil, &jobs), c.Do(t.Context(), "query-block-exports", nil, &exports))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if disk := n.Name == "vda" || n.Name == "vdb"; strings.HasPrefix(n.Name, "varve-") || disk && len(n.Bitmaps) != 1 || !disk && len(n.Bitmaps) != 0 {
			t.Errorf("after %s: node %s with the bitmaps %s", after, n.Name, n.Bitmaps)
		}
	}
	if len(jobs) > 0 || len(exports) != 2 {
		t.Errorf("after %s: jobs %s, exports %s", after, jobs, exports)
	}
	if err := c.Do(t.Context(), "nbd-server-stop", nil, nil); err == nil {
		t.Errorf("after %s: the NBD server was left running", after)
	}
}

// TestKilledBackupOfImage kills the program at each program of QEMU's that it starts, and while it
// reads.
func TestKilledBackupOfImage(t *testing.T) {
	env, _ := newBackupEnv(t)
	dir := t.TempDir()
	image, model := filepath.Join(dir, "vm.qcow2"), make([]byte, 32<<20)
	qemuTool(t, "qemu-img", "create", "-q", "-f", "qcow2", image, "32M")
	write := func(n int) {
		off := int64(n*211%500) << 16
		qemuTool(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d %d 3k", n%250+1, off), image)
		copy(model[off:], bytes.Repeat([]byte{byte(n%250 + 1)}, 3<<10))
	}
	// Programs of the same names stand before QEMU's.
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	count, at := filepath.Join(dir, "count"), filepath.Join(dir, "at")
	for _, name := range []string{"qemu-img", "qemu-nbd"} {
		real, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("#!/bin/sh\nn=$(($(cat %[1]s) + 1))\necho $n >%[1]s\n[ $n != \"$(cat %[2]s)\" ] || kill -9 $PPID\nexec %[3]s \"$@\"\n", count, at, real)
		if err := os.WriteFile(filepath.Join(bin, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	set := func(path, text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	set(count, "0")
	set(at, "none")
	args := []string{"backup", image, "--volume", "shop/vm", "--track"}
	tmp, err := os.MkdirTemp("/tmp", "killed-") // short, as a socket's path must be
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(tmp) })
	t.Setenv("TMPDIR", tmp)
	env["TMPDIR"] = tmp
	write(1)
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	mustRun(t, env, args...)
	check := func(after string) {
		t.Helper()
		set(at, "none")
		var res backupResult
		waitUntil(t, "what read for the killed backup has ended", func() bool {
			return exec.Command("qemu-img", "info", "-f", "qcow2", image).Run() == nil && exec.Command("qemu-io", "-f", "qcow2", "-c", "read 0 1", image).Run() == nil
		})
		write(len(after) + 300)
		if err := json.Unmarshal([]byte(mustRun(t, env, append([]string{args[0], "-o", "json"}, args[1:]...)...).stdout), &res); err != nil {
			t.Fatal(err)
		}
		if res.Kind != "incremental" || res.Source != "bitmap" {
			t.Errorf("after %s: %s by %s: %+v", after, res.Kind, res.Source, res.Fallbacks)
		}
		back := filepath.Join(t.TempDir(), "back.img")
		mustRun(t, env, "restore", "shop/vm@latest", back)
		if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, model) {
			t.Fatalf("after %s: the point differs from the disk, or cannot be read: %v", after, err)
		}
		if left, err := filepath.Glob(filepath.Join(tmp, "varve-*")); err != nil || len(left) > 0 {
			t.Errorf("after %s: left: %q, %v", after, left, err)
		}
		out, err := exec.Command("qemu-img", "info", "--output=json", "-f", "qcow2", image).Output()
		if n := bytes.Count(out, []byte(`"granularity"`)); err != nil || n != 1 {
			t.Errorf("after %s: %d bitmaps, %v: %s", after, n, err, out)
		}
	}
	n := 1
	for ; ; n++ {
		write(n + 1)
		set(count, "0")
		set(at, fmt.Sprint(n))
		cmd, stderr, over := varveAndAll(t, env, args...)
		err := cmd.Wait()
		over()
		ran, _ := os.ReadFile(count)
		var reached int
		if _, serr := fmt.Sscan(string(ran), &reached); serr != nil {
			t.Fatal(serr)
		}
		mustBeKilled(t, err, reached >= n, stderr)
		if reached < n {
			break
		}
		check(fmt.Sprintf("program %d", n))
	}
	if n < 5 {
		t.Errorf("only %d programs were started", n-1)
	}
	// While it reads and stores: as soon as the repository has grown.
	for i := range 3 {
		qemuTool(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d 0 32M", i+7), image)
		copy(model, bytes.Repeat([]byte{byte(i + 7)}, len(model)))
		repo := filepath.Join(env["HOME"], "repo")
		before := treeSize(repo)
		cmd, stderr, over := varveAndAll(t, env, args...)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		var err error
		for stop := false; !stop && treeSize(repo) == before; {
			select {
			case err = <-ended:
				ended <- err
				stop = true
			default:
			}
		}
		_ = cmd.Process.Kill()
		if err = <-ended; err == nil {
			t.Logf("the backup was faster than the kill:\n%s", stderr)
		}
		over()
		check(fmt.Sprintf("a kill while it stores, %d", i))
	}
}

// varveAndAll starts varve in a separate process. over waits until nothing runs any more that it started: a program
// for which a killed backup waited continues, and may begin with the image after that of the test has looked at it.
func varveAndAll(t *testing.T, env testEnv, args ...string) (cmd *exec.Cmd, stderr *bytes.Buffer, over func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	cmd, _, stderr = varveCommand(t, env, args...)
	// All inherit the pipe as file 9, which no program that varve starts gets anything else as.
	cmd.ExtraFiles = append(make([]*os.File, 6), w)
	if err := errors.Join(cmd.Start(), w.Close(), r.SetReadDeadline(time.Now().Add(patience))); err != nil {
		t.Fatal(err)
	}
	return cmd, stderr, func() {
		t.Helper()
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Fatalf("what a backup started does not end: %v", err)
		}
	}
}

// treeSize is how many bytes the files of a directory have.
func treeSize(dir string) (n int64) {
	_ = filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return nil
	})
	return n
}

package source_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/backup/source"
)

// TestQMPScratchFull fills the scratch directory: the backup ends, and the guest's writes go on.
func TestQMPScratchFull(t *testing.T) {
	t.Parallel()
	scratch := t.TempDir()
	if err := unix.Mount("none", scratch, "tmpfs", 0, "size=32m"); err != nil {
		t.Skipf("no small file system for the scratch directory: %v", err)
	}
	defer func() { _ = unix.Unmount(scratch, unix.MNT_DETACH) }()
	d := startDaemon(t, diskOf{name: "vda", format: "qcow2", size: 64 << 20})
	d.write(t, "vda", 1, 0, 64<<20)
	first := machine{}.mustBackup(t, d, nil)
	_, err := first.backup(t.Context(), d.uri(), first.options(scratch), func() {
		for off := int64(0); off < 64<<20; off += 1 << 20 {
			// Slower than the watch looks; a guest that is faster than a tenth of a second has 1 GiB.
			d.write(t, "vda", 2, off, 1<<20)
			if off >= 28<<20 {
				waitJobs(t, d)
			}
		}
	}, nil)
	if !errors.Is(err, source.ErrScratchFull) {
		t.Errorf("the scratch directory is full: %v", err)
	}
	d.mustBeClean(t, 1)
	want := d.read(t)
	first.mustBackup(t, d, nil).check(t, want, "bitmap")
}

// waitJobs waits until the daemon has no job.
func waitJobs(t *testing.T, d *daemon) {
	t.Helper()
	for end := time.Now().Add(patience); string(d.do(t, "query-jobs", nil)) != "[]"; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the job goes on")
		}
	}
}

// patience is for what a machine with other work does at last.
const patience = 5 * time.Minute

// TestQMPJobEnded has another client end our job: the export shows what is written from then on,
// and no point is made of it.
func TestQMPJobEnded(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	_, err := machine{}.backup(t.Context(), d.uri(), machine{}.options(t.TempDir()), func() {
		d.do(t, "job-cancel", map[string]any{"id": "varve-repo1234-volume12-s1"})
		for end := time.Now().Add(patience); strings.Contains(string(d.do(t, "query-jobs", nil)), "volume12-s1"); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("the job goes on")
			}
		}
	}, nil)
	if !errors.Is(err, source.ErrMoment) || !strings.Contains(err.Error(), "vdb") {
		t.Errorf("a job was cancelled: %v", err)
	}
	d.mustBeClean(t, 0)
}

// TestQMPEnded has QEMU end while a backup reads.
func TestQMPEnded(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	d.write(t, "vda", 1, 0, machineSize)
	scratch := t.TempDir()
	_, err := machine{}.backup(t.Context(), d.uri(), machine{}.options(scratch), func() { _ = d.cmd.Process.Kill() }, nil)
	if err == nil {
		t.Error("a machine that was killed was backed up")
	}
	if left, err := os.ReadDir(scratch); err != nil || len(left) != 0 {
		t.Errorf("left in the scratch directory: %v, %v", left, err)
	}
}

// TestQMPSilent has a monitor that lost the backup's connection and serves another client then: QEMU
// may run, so its NBD server's directory stays for the next backup to find.
func TestQMPSilent(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.do(t, "blockdev-add", map[string]any{"driver": "null-co", "node-name": "vda", "size": machineSize})
	d.do(t, "block-export-add", map[string]any{"type": "vhost-user-blk", "id": "guest", "node-name": "vda", "addr": map[string]any{"type": "unix", "path": filepath.Join(d.dir, "g")}})
	key := sha256.Sum256([]byte(d.monitor))
	server := filepath.Join(source.DefaultScratch, "varve-"+hex.EncodeToString(key[:6])+".nbd")
	defer os.RemoveAll(server)
	_, err := machine{}.backup(t.Context(), d.uri(), machine{}.options(t.TempDir()), func() {
		if err := os.Remove(d.monitor); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", d.monitor) // it accepts, and says nothing
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		_ = d.cmd.Process.Kill()
	}, nil)
	if !errors.Is(err, qmp.ErrBusy) {
		t.Errorf("the monitor does not answer: %v", err)
	}
	if _, err := os.Lstat(server); err != nil {
		t.Errorf("the directory of a server that may run: %v", err)
	}
}

// TestQMPRefused has machines that cannot be backed up, and the NBD server of another program.
func TestQMPRefused(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	held, err := qmp.Dial(t.Context(), d.monitor)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := source.Open(t.Context(), d.uri(), source.Options{}); !errors.Is(err, qmp.ErrBusy) {
		t.Errorf("the monitor has another client: %v", err)
	}
	_ = held.Close()
	opt := machine{}.options(t.TempDir())
	opt.Include = []string{"vdx"}
	if _, err := source.Open(t.Context(), d.uri(), opt); !errors.Is(err, source.ErrNoDisk) || !strings.Contains(err.Error(), "vda, vdb, vdc") {
		t.Errorf("a disk that is not there: %v", err)
	}
	for _, uri := range []string{"qemu+qmp://host/sock", d.uri() + "?agent=x", d.uri() + "?x=y", d.uri() + "?nbd=ftp://x", "qemu+qmp:sock"} {
		if _, err := source.Open(t.Context(), uri, source.Options{}); err == nil {
			t.Errorf("%s was opened", uri)
		}
	}
	if _, err := source.Open(t.Context(), d.uri(), source.Options{Raw: true}); !errors.Is(err, source.ErrURI) {
		t.Errorf("--raw: %v", err)
	}
	socket := filepath.Join(d.dir, "nbd")
	d.do(t, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": socket}}})
	opt.Include = []string{"vda"}
	if _, err := source.Open(t.Context(), d.uri(), opt); err == nil || !strings.Contains(err.Error(), "?nbd=") {
		t.Errorf("another NBD server: %v", err)
	}
	d.write(t, "vda", 1, 0, 1<<20)
	want := d.read(t)
	now, err := machine{}.backup(t.Context(), d.uri()+"?nbd="+"nbd%2Bunix:///%3Fsocket%3D"+socket, opt, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	now.check(t, map[string][]byte{"vda": want["vda"]}, "allocation")
	d.do(t, "nbd-server-stop", nil)

	d.do(t, "blockdev-add", map[string]any{"driver": "null-co", "node-name": "other", "size": machineSize})
	d.do(t, "blockdev-backup", map[string]any{"job-id": "others", "device": "vda", "target": "other", "sync": "none"})
	opt.Include = nil
	if _, err := source.Open(t.Context(), d.uri(), opt); !errors.Is(err, source.ErrMachineBusy) {
		t.Errorf("another tool's job has a disk: %v", err)
	}
}

// guestAgent is an agent in a guest: frozen or not.
type guestAgent struct {
	mu     sync.Mutex
	frozen bool
	froze  int
	socket string
	mute   string // a command whose answer is lost, once, with the connection
}

func startAgent(t *testing.T) *guestAgent {
	t.Helper()
	a := &guestAgent{socket: filepath.Join(t.TempDir(), "agent")}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	var clients sync.WaitGroup
	clients.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			clients.Go(func() { a.serve(conn) })
		}
	})
	t.Cleanup(func() { l.Close(); clients.Wait() })
	return a
}

func (a *guestAgent) serve(conn net.Conn) {
	defer conn.Close()
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		var m struct {
			Execute   string
			Arguments struct{ ID int64 }
			ID        int64
		}
		if json.Unmarshal(bytes.TrimLeftFunc([]byte(line), func(r rune) bool { return r != '{' }), &m) != nil {
			return
		}
		if m.Execute == "guest-sync-delimited" {
			fmt.Fprintf(conn, "\xff{\"return\": %d}\n", m.Arguments.ID)
			continue
		}
		answer := a.do(m.Execute)
		if a.isMute(m.Execute) {
			return
		}
		fmt.Fprintf(conn, "{\"return\": %s, \"id\": %d}\n", answer, m.ID)
	}
}

func (a *guestAgent) do(command string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch command {
	case "guest-fsfreeze-freeze":
		a.frozen = true
		a.froze++
		return "2"
	case "guest-fsfreeze-thaw":
		a.frozen = false
		return "2"
	}
	if a.frozen {
		return `"frozen"`
	}
	return `"thawed"`
}

func (a *guestAgent) isMute(command string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	mute := a.mute == command
	if mute {
		a.mute = ""
	}
	return mute
}

func (a *guestAgent) is() (frozen bool, froze int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.frozen, a.froze
}

func (a *guestAgent) waitThawed(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		if frozen, _ := a.is(); !frozen {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the guest is still frozen")
		}
	}
}

// TestFreeze freezes a guest for the moment of the backup; it goes on whatever is killed.
func TestFreeze(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, threeDisks()...)
	a := startAgent(t)
	uri := d.uri() + "?agent=" + a.socket
	opt := machine{}.options(t.TempDir())
	opt.Freeze, opt.Self = true, []string{os.Args[0], "guest-freeze"}
	var seen []string
	opt.Step = func(name string) {
		frozen, _ := a.is()
		seen = append(seen, fmt.Sprint(name, frozen))
	}
	if _, err := (machine{}).backup(t.Context(), uri, opt, nil, nil); err != nil {
		t.Fatal(err)
	}
	steps := strings.Join(seen, " ")
	if !strings.Contains(steps, "serverfalse frozentrue momenttrue thawedfalse") {
		t.Errorf("the guest was frozen: %s", steps)
	}

	// The process that holds the guest is killed while it is frozen.
	opt.Step = func(name string) {
		if name == "frozen" {
			killGuard(t, a.socket)
		}
	}
	if _, err := (machine{}).backup(t.Context(), uri, opt, nil, nil); err == nil {
		t.Error("the process that thaws was killed, and the moment counts as frozen")
	}
	a.waitThawed(t)
	d.mustBeClean(t, 0)

	// A guest that an earlier backup left frozen.
	a.do("guest-fsfreeze-freeze")
	opt.Step = nil
	if _, err := (machine{}).backup(t.Context(), uri, opt, nil, nil); err != nil {
		t.Error(err)
	}
	a.waitThawed(t)

	// The backup is killed while the guest is frozen.
	_, froze := a.is()
	cmd := exec.Command(os.Args[0], "killed-frozen", uri, t.TempDir())
	_ = cmd.Run()
	if _, now := a.is(); now != froze+1 {
		t.Errorf("the guest was not frozen: %d", now-froze)
	}
	a.waitThawed(t)
	if _, err := source.Forget(t.Context(), d.uri(), source.Options{}); err != nil {
		t.Error(err)
	}
	d.mustBeClean(t, 0)
}

// TestThawAfterALostAnswer loses the answer to a freeze or a thaw, with the connection: the guest is
// thawed over another one.
func TestThawAfterALostAnswer(t *testing.T) {
	t.Parallel()
	for command, want := range map[string]string{"guest-fsfreeze-freeze": "failed", "guest-fsfreeze-thaw": "frozen\nthawed\n"} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			a := startAgent(t)
			a.mute = command
			var out bytes.Buffer
			if err := source.GuardFreeze(t.Context(), "unix:"+a.socket, false, strings.NewReader(""), &out); err != nil {
				t.Fatal(err)
			}
			if frozen, froze := a.is(); frozen || froze != 1 || !strings.HasPrefix(out.String(), want) || strings.Contains(out.String(), "still be frozen") {
				t.Errorf("frozen %v after %d freezes: %s", frozen, froze, out.String())
			}
		})
	}
}

// killGuard kills the process that this one started to hold the guest of an agent: tests beside this one hold others.
func killGuard(t *testing.T, socket string) {
	t.Helper()
	children, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range children {
		b, _ := os.ReadFile(file)
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "stat"))
		fields := strings.Fields(string(stat))
		if strings.Contains(string(b), "\x00guest-freeze\x00unix:"+socket+"\x00") && len(fields) > 3 && fields[3] == fmt.Sprint(os.Getpid()) {
			var pid int
			_, _ = fmt.Sscan(filepath.Base(filepath.Dir(file)), &pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
			return
		}
	}
	t.Error("no process holds the guest")
}

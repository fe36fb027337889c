package fusefs_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/image"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
	"github.com/varve-io/varve/internal/serve"
)

// An SQLite database is read in place in the tree.
func TestSQLiteFromTheTree(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "sqlite3")
	img := diskfstest.NewImage(t, 64*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", img)
	dir, unmount := diskfstest.Mount(t, img, "")
	diskfstest.Run(t, "sqlite3", filepath.Join(dir, "shop.db"),
		"create table orders(id integer primary key, name text); with recursive n(i) as (select 1 union all select i+1 from n where i<20000) insert into orders select i, 'order '||i from n; create index byname on orders(name);")
	unmount()
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, img)
	m := mount(t, repo, fusefs.Options{})
	got := diskfstest.Run(t, "sqlite3", "-readonly", m.latest(shopDB, "files/shop.db"),
		"pragma integrity_check; select count(*), sum(id) from orders; select id from orders where name='order 777';")
	if want := "ok\n20000|200010000\n777\n"; got != want {
		t.Errorf("SQLite says %q, want %q", got, want)
	}
}

// postgres runs a program of PostgreSQL as its user.
func postgres(t testing.TB, bin string, name string, args ...string) string {
	t.Helper()
	return diskfstest.Run(t, "setpriv", append([]string{"--reuid=postgres", "--regid=postgres", "--init-groups", "--", filepath.Join(bin, name)}, args...)...)
}

// A running PostgreSQL is backed up at one moment, as an increment; the increment is mounted
// writable, and PostgreSQL starts on it with every row that it had committed.
//
// The moment is like a power failure. PostgreSQL works on a disk.img that another process
// serves, and that process is stopped (SIGSTOP): nothing is frozen, flushed or notified. Its
// overlay then holds what a disk with a volatile cache would: all that was flushed, and of
// later writes those that happened to be stored.
func TestPostgreSQLStartsOnARecoveryPoint(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "setpriv")
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(bins) == 0 {
		t.Skip("needs PostgreSQL, Debian package postgresql")
	}
	bin := filepath.Dir(bins[len(bins)-1])
	sockets, err := os.MkdirTemp("", "varve-pg-") // short: a socket's path has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	if err := os.Chmod(sockets, 0o777); err != nil {
		t.Fatal(err)
	}
	open := func(dir string) { // so that the user postgres can reach the mount
		for d := filepath.Dir(dir); d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	start := func(data string) (stop func()) {
		defer func() {
			if t.Failed() {
				b, _ := os.ReadFile(filepath.Join(sockets, "log"))
				t.Logf("PostgreSQL's log:\n%s", b)
			}
		}()
		postgres(t, bin, "pg_ctl", "-D", data, "-w", "-t", "900", "-l", filepath.Join(sockets, "log"),
			"-o", "-c listen_addresses='' -c unix_socket_directories="+sockets+" -c shared_buffers=16MB", "start")
		lock, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(lock), "\n")
		pid, err := strconv.Atoi(first)
		if err != nil {
			t.Fatal(err)
		}
		return func() {
			postgres(t, bin, "pg_ctl", "-D", data, "-w", "-t", "900", "-m", "fast", "stop")
			// pg_ctl waits until the lock file is gone. The process ends after that, and stands in the
			// data directory until then.
			wait(t, func() bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) })
		}
	}
	query := func(sql string) string {
		return postgres(t, bin, "psql", "-h", sockets, "-d", "postgres", "-qAtc", sql)
	}

	img := diskfstest.NewImage(t, 256*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", img)
	dir, unmount := diskfstest.Mount(t, img, "")
	open(dir)
	data := filepath.Join(dir, "data")
	diskfstest.Run(t, "install", "-d", "-o", "postgres", "-m", "0700", data)
	postgres(t, bin, "initdb", "-D", data, "--auth=trust", "-E", "UTF8", "--locale=C", "--wal-segsize=1")
	unmount()
	r := repotest.New(t)
	repo := r.Open(t)
	base := save(t, repo, shopDB, img)

	// The disk at work: an overlay over the full, served by another process.
	overlays, tree := t.TempDir(), t.TempDir()
	child := startChild(t, r, tree, overlayVariable+"="+overlays)
	dir, unmount = diskfstest.Mount(t, filepath.Join(tree, "shop/db/latest/disk.img"), "")
	open(dir)
	stop := start(filepath.Join(dir, "data"))
	stopped := false
	defer func() {
		if !stopped {
			stop()
		}
	}()
	query("create table orders(id serial primary key, name text)")
	const rows = 5000
	for range 5 {
		query(fmt.Sprintf("insert into orders(name) select 'order '||i from generate_series(1,%d) i", rows/5))
	}
	// PostgreSQL works until the disk stops.
	writer := exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", filepath.Join(bin, "psql"), "-h", sockets, "-d", "postgres", "-qAtc",
		"do $$ begin for i in 1..100000 loop insert into orders(name) values ('late'); commit; end loop; end $$")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, func() bool { return strings.TrimSpace(query("select count(*)>=5100 from orders")) == "t" })
	picture := filepath.Join(t.TempDir(), base.ID)
	if err := child.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	wait(t, func() bool { return halted(t, child.Process.Pid) })
	copyErr := exec.Command("cp", "-a", "--sparse=always", filepath.Join(overlays, base.ID), picture).Run()
	if err := errors.Join(copyErr, child.Process.Signal(syscall.SIGCONT)); err != nil {
		t.Fatal(err)
	}
	_ = writer.Process.Kill()
	_ = writer.Wait()
	stop()
	stopped = true
	unmount()
	if err := fusefs.Unmount(tree, false); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait()
	point := commit(t, repo, base, picture)
	if point.Kind != "incremental" {
		t.Errorf("the second point is %s", point.Kind)
	}

	m := mount(t, repo, fusefs.Options{Writable: true})
	back, unmount := diskfstest.Mount(t, m.latest(shopDB, "disk.img"), "")
	open(back)
	// On a restored disk the old process does not exist; here its PID may still be in use.
	if err := os.Remove(filepath.Join(back, "data/postmaster.pid")); err != nil {
		t.Fatal(err)
	}
	stop = start(filepath.Join(back, "data"))
	stopped = false
	log, _ := os.ReadFile(filepath.Join(sockets, "log"))
	if !strings.Contains(string(log), "automatic recovery in progress") {
		t.Error("PostgreSQL did not recover from a crash: the copy was not taken at work")
	}
	if got := strings.TrimSpace(query("select count(*) from orders where name <> 'late'")); got != fmt.Sprint(rows) {
		t.Errorf("%s rows came back, want %d", got, rows)
	}
	if got := strings.TrimSpace(query("select count(*) >= 100 from orders where name = 'late'")); got != "t" {
		t.Error("rows that were committed before the backup are missing")
	}
	query("insert into orders(name) values ('after')")
	stop()
	stopped = true
	unmount()
}

// halted reports whether all threads of a process stand still. One that a signal meets in a system call ends that
// first, and writes.
func halted(t testing.TB, pid int) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("threads of %d: %v", pid, err)
	}
	return !slices.ContainsFunc(threads, func(name string) bool {
		b, err := os.ReadFile(name) // proc_pid_stat(5): number, name in brackets, state
		if err != nil {
			return true // it has ended since
		}
		return !strings.HasPrefix(string(b[max(strings.LastIndexByte(string(b), ')'), 0):]), ") T")
	})
}

// commit makes a recovery point of a kept overlay.
func commit(t testing.TB, repo *repository.Repository, base *points.Point, dir string) *points.Point {
	t.Helper()
	cache := image.NewCache(64 << 20)
	defer cache.Close()
	written, err := serve.KeptOverlay(t.Context(), repo, cache, base, dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer written.Close()
	p, _, err := backup.Run(t.Context(), repo, backup.Options{Volume: base.Volume, Disk: written, Source: written, Parent: base.ID, Branch: true})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

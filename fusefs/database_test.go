package fusefs_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/backup/repository/repotest"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// An SQLite database is read where it lies in the tree.
func TestSQLiteFromTheTree(t *testing.T) {
	needFUSE(t)
	diskfstest.NeedRoot(t)
	diskfstest.NeedTool(t, "sqlite3")
	image := diskfstest.NewImage(t, 64*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", image)
	dir, unmount := diskfstest.Mount(t, image, "")
	diskfstest.Run(t, "sqlite3", filepath.Join(dir, "shop.db"),
		"create table orders(id integer primary key, name text); with recursive n(i) as (select 1 union all select i+1 from n where i<20000) insert into orders select i, 'order '||i from n; create index byname on orders(name);")
	unmount()
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, image)
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

// A PostgreSQL that is at work is backed up at one moment, as a full and then as an
// increment; the increment is mounted writable, and PostgreSQL starts on it with
// every row that it had promised to keep.
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
	open := func(dir string) { // so that the user postgres gets to the mount
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
		postgres(t, bin, "pg_ctl", "-D", data, "-w", "-t", "120", "-l", filepath.Join(sockets, "log"),
			"-o", "-c listen_addresses='' -c unix_socket_directories="+sockets+" -c shared_buffers=16MB", "start")
		return func() { postgres(t, bin, "pg_ctl", "-D", data, "-w", "-m", "fast", "stop") }
	}
	query := func(sql string) string {
		return postgres(t, bin, "psql", "-h", sockets, "-d", "postgres", "-qAtc", sql)
	}

	image := diskfstest.NewImage(t, 256*mib)
	diskfstest.Run(t, "mkfs.ext4", "-q", "-F", "-b", "4096", image)
	dir, _ := diskfstest.Mount(t, image, "")
	open(dir)
	data := filepath.Join(dir, "data")
	diskfstest.Run(t, "install", "-d", "-o", "postgres", "-m", "0700", data)
	postgres(t, bin, "initdb", "-D", data, "--auth=trust", "-E", "UTF8", "--locale=C", "--wal-segsize=1")
	stop := start(data)
	stopped := false
	defer func() {
		if !stopped {
			stop()
		}
	}()
	query("create table orders(id serial primary key, name text)")
	repo := repotest.New(t).Open(t)
	save(t, repo, shopDB, frozen(t, dir, image))
	const rows = 5000
	for range 5 {
		query(fmt.Sprintf("insert into orders(name) select 'order '||i from generate_series(1,%d) i", rows/5))
	}
	// Work goes on while the disk is copied at one moment.
	writer := exec.Command("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", filepath.Join(bin, "psql"), "-h", sockets, "-d", "postgres", "-qAtc",
		"do $$ begin for i in 1..100000 loop insert into orders(name) values ('late'); commit; end loop; end $$")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, func() bool { return strings.TrimSpace(query("select count(*)>=5100 from orders")) == "t" })
	point := save(t, repo, shopDB, frozen(t, dir, image))
	_ = writer.Process.Kill()
	_ = writer.Wait()
	stop()
	stopped = true
	if point.Kind != "incremental" {
		t.Errorf("the second point is %s", point.Kind)
	}

	m := mount(t, repo, fusefs.Options{Writable: true})
	back, unmount := diskfstest.Mount(t, m.latest(shopDB, "disk.img"), "")
	open(back)
	// The process of the time is not there where a disk is restored; here its number
	// may still be taken.
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

// frozen copies the image of a mounted file system at one moment, as a snapshot of
// the storage would. Programs that write are held up and are not told: what they
// have not written is not there.
func frozen(t testing.TB, dir, image string) string {
	t.Helper()
	diskfstest.Run(t, "fsfreeze", "--freeze", dir)
	defer diskfstest.Run(t, "fsfreeze", "--unfreeze", dir)
	return diskfstest.CopyImage(t, image)
}

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/varve-io/varve/fusefs/diskfs/diskfstest"
)

// dbServer is a database server started by a test as an unprivileged user.
type dbServer struct {
	t    *testing.T
	user string // the user it runs as if the test is root
	dir  string // its directory; short, since a socket's path
}

func newDBServer(t *testing.T, user string) *dbServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "varve-db-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &dbServer{t: t, user: user, dir: dir}
	if os.Geteuid() == 0 {
		diskfstest.NeedTool(t, "setpriv")
		diskfstest.Run(t, "chown", user, dir)
	}
	return s
}

// command returns the command that runs a program as the server's user.
func (s *dbServer) command(program string, args ...string) []string {
	if os.Geteuid() != 0 {
		return append([]string{program}, args...)
	}
	return append([]string{"setpriv", "--reuid=" + s.user, "--regid=" + s.user, "--init-groups", "--", program}, args...)
}

func (s *dbServer) run(program string, args ...string) string {
	s.t.Helper()
	c := s.command(program, args...)
	return diskfstest.Run(s.t, c[0], c[1:]...)
}

// file makes a file readable to the server's user.
func (s *dbServer) file(name string) string {
	s.t.Helper()
	p, err := os.ReadFile(name)
	if err != nil {
		s.t.Fatal(err)
	}
	to := filepath.Join(s.dir, filepath.Base(name))
	if err := os.WriteFile(to, p, 0o644); err != nil {
		s.t.Fatal(err)
	}
	return to
}

// checkDumps dumps a database twice, with few rows changed in between, and restores both
// points to fresh servers.
func checkDumps(t *testing.T, dump []string, change func(), rows func() string, restored func(file string) string) {
	t.Helper()
	env := newTestEnv(t)
	mustRun(t, env, "repo", "create", "filesystem", "--path", filepath.Join(env["HOME"], "repo"))
	backup := func() backupResult {
		t.Helper()
		return fromJSON[backupResult](t, mustRun(t, env, append([]string{"backup", "-o", "json", "--exec", "--volume", "shop/db-dump", "--"}, dump...)...).stdout)
	}
	before := rows()
	first := backup()
	change()
	after := rows()
	if before == after {
		t.Fatal("nothing changed")
	}
	second := backup()
	t.Logf("dumps of %d and %d bytes stored %d and %d", first.Size, second.Size, first.Stats.Uploaded, second.Stats.Uploaded)
	if second.Content != "stream" || second.Stats.Uploaded > first.Stats.Uploaded/4 {
		t.Errorf("a dump of few changed rows stored %d bytes, the first %d", second.Stats.Uploaded, first.Stats.Uploaded)
	}
	for _, p := range []struct{ id, want string }{{first.ID, before}, {second.ID, after}} {
		file := filepath.Join(env["HOME"], p.id+".sql")
		mustRun(t, env, "restore", p.id, file)
		if got := mustRun(t, env, "cat", p.id).stdout; !strings.HasSuffix(got, "\n") || got != mustRun(t, env, "restore", p.id, "-").stdout {
			t.Errorf("cat and restore give different streams")
		}
		if got := restored(file); got != p.want {
			t.Errorf("rows %q, want %q", got, p.want)
		}
	}
	// A dump that fails leaves nothing.
	bad := append([]string{"backup", "--exec", "--volume", "shop/db-dump", "--"}, dump[:len(dump)-1]...)
	refused(t, env, exitFailure, "no point was made", append(bad, "nothing")...)
	if n := countPoints(t, env); n != 2 {
		t.Errorf("%d points", n)
	}
}

// dumpRows is how many rows a dumped table has: with 32 bytes in each of four columns about 14 MB.
const dumpRows = 100_000

func TestPostgreSQLDumps(t *testing.T) {
	t.Parallel()
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(bins) == 0 {
		t.Skip("needs PostgreSQL, Debian package postgresql")
	}
	bin := filepath.Dir(bins[len(bins)-1])
	start := func() (s *dbServer, query func(string) string) {
		s = newDBServer(t, "postgres")
		data := filepath.Join(s.dir, "data")
		s.run(filepath.Join(bin, "initdb"), "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
		s.run(filepath.Join(bin, "pg_ctl"), "-D", data, "-w", "-t", "600", "-l", filepath.Join(s.dir, "log"),
			"-o", "-c listen_addresses='' -c fsync=off -c unix_socket_directories="+s.dir, "start")
		t.Cleanup(func() { s.run(filepath.Join(bin, "pg_ctl"), "-D", data, "-w", "-t", "600", "-m", "immediate", "stop") })
		return s, func(sql string) string {
			return s.run(filepath.Join(bin, "psql"), "-h", s.dir, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-qAtc", sql, "postgres")
		}
	}
	const rows = "select count(*), md5(string_agg(o::text, ',' order by id)) from orders o"
	s, query := start()
	query(fmt.Sprintf("create table orders(id int primary key, a text, b text, c text, d text); insert into orders select i, md5(i::text), md5(i::text||'b'), md5(i::text||'c'), md5(i::text||'d') from generate_series(1, %d) i", dumpRows))
	checkDumps(t, s.command(filepath.Join(bin, "pg_dump"), "-h", s.dir, "-U", "postgres", "postgres"),
		func() { query("update orders set a = 'changed' where id in (7, 50000, 99999)") },
		func() string { return query(rows) },
		func(file string) string {
			fresh, query := start()
			fresh.run(filepath.Join(bin, "psql"), "-h", fresh.dir, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-q", "-f", fresh.file(file), "postgres")
			return query(rows)
		})
}

func TestMariaDBDumps(t *testing.T) {
	t.Parallel()
	for _, program := range []string{"mariadbd", "mariadb-install-db", "mariadb-dump"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s, Debian package mariadb-server", program)
		}
	}
	start := func() (s *dbServer, query func(string) string, socket string) {
		s = newDBServer(t, "mysql")
		data, socket := filepath.Join(s.dir, "data"), filepath.Join(s.dir, "sock")
		s.run("mariadb-install-db", "--no-defaults", "--datadir="+data, "--tmpdir="+s.dir, "--auth-root-authentication-method=normal", "--skip-test-db")
		// In /tmp a server that starts removes the temporary tables of others.
		c := s.command("mariadbd", "--no-defaults", "--datadir="+data, "--tmpdir="+s.dir, "--socket="+socket, "--skip-networking", "--pid-file="+filepath.Join(s.dir, "pid"),
			"--innodb-flush-log-at-trx-commit=0")
		server := exec.CommandContext(t.Context(), c[0], c[1:]...)
		log, err := os.Create(filepath.Join(s.dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		server.Stdout, server.Stderr = log, log
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = server.Process.Kill() // if it still runs
			_ = server.Wait()
			log.Close()
		})
		waitUntil(t, "MariaDB answers", func() bool {
			return exec.CommandContext(t.Context(), "mariadb-admin", "--no-defaults", "--socket="+socket, "--user=root", "ping").Run() == nil
		})
		return s, func(sql string) string {
			return diskfstest.Run(t, "mariadb", "--no-defaults", "--socket="+socket, "--user=root", "-N", "-B", "-e", sql)
		}, socket
	}
	const rows = "select count(*), sum(crc32(concat_ws(',', id, a, b, c, d))), md5(group_concat(if(id % 1000 = 7, concat_ws(',', id, a, b, c, d), null) order by id)) from shop.orders"
	_, query, socket := start()
	query(fmt.Sprintf("create database shop; use shop; create table orders(id int primary key, a text, b text, c text, d text); insert into orders select seq, md5(seq), md5(seq+1), md5(seq+2), md5(seq+3) from seq_1_to_%d", dumpRows))
	checkDumps(t, []string{"mariadb-dump", "--no-defaults", "--socket=" + socket, "--user=root", "--single-transaction", "--skip-dump-date", "--databases", "shop"},
		func() { query("update shop.orders set a = 'changed' where id in (7, 50000, 99999)") },
		func() string { return query(rows) },
		func(file string) string {
			_, query, _ := start()
			query("source " + file)
			return query(rows)
		})
}

package hold

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// must makes the program of a recipe.
func must(t *testing.T, name string, parameters map[string]string) Program {
	t.Helper()
	p, err := Recipe(name, parameters, 10*time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// command runs a command and returns what it printed.
func command(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// server runs a server until the test ends; ready reports that it answers.
func server(t *testing.T, cmd *exec.Cmd, ready func() error) {
	t.Helper()
	if printed, is := tryServer(t, cmd, ready); !is {
		t.Fatalf("it ended: %s", printed)
	}
}

// tryServer is server for one that may end at once: then it returns false, and what that printed.
func tryServer(t *testing.T, cmd *exec.Cmd, ready func() error) (printed string, is bool) {
	t.Helper()
	log := &strings.Builder{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("%s", log)
		}
	})
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := ready()
		if err == nil {
			return "", true
		}
		select {
		case <-ended:
			return log.String(), false
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("it does not answer: %v", err)
		}
	}
}

// inDir returns a directory of the test for a server's user; root's servers run as another user.
func inDir(t *testing.T, user string) (dir string, as []string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hold-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if os.Getuid() == 0 {
		command(t, nil, "chown", user, dir)
		as = []string{"setpriv", "--reuid=" + user, "--regid=" + user, "--clear-groups"}
	}
	return dir, as
}

func TestRecipeParameters(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		recipe     string
		parameters map[string]string
		says       string
	}{
		"no recipe":    {"Oracle", nil, "there are Fsfreeze, MariaDB, MongoDB, PostgreSQL, Redis"},
		"no parameter": {PostgreSQL, map[string]string{"password": "x"}, "it has connection, method"},
		"no value":     {PostgreSQL, map[string]string{"method": "Dump"}, "not Backup or Checkpoint"},
		"none where":   {Fsfreeze, nil, "needs parameter path"},
	} {
		if _, err := Recipe(tc.recipe, tc.parameters, time.Minute); !errors.Is(err, ErrParameter) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	quoted := ` '/a '\''b'\''; reboot' `
	p := must(t, Fsfreeze, map[string]string{"path": "/a 'b'; reboot"})
	if strings.Count(p.Freeze+p.Thaw, "reboot") != 2 || !strings.Contains(p.Freeze, quoted) || !strings.Contains(p.Thaw, quoted) {
		t.Errorf("a path is not quoted: %s", p.Freeze+p.Thaw)
	}
}

func TestPostgreSQL(t *testing.T) {
	t.Parallel()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if len(found) == 0 {
		t.Skip("PostgreSQL is not installed; make setup installs it")
	}
	bin := filepath.Dir(found[len(found)-1])
	dir, as := inDir(t, "postgres")
	run := func(args ...string) *exec.Cmd {
		args = append(append([]string{}, as...), args...)
		return exec.Command(args[0], args[1:]...)
	}
	if out, err := run(bin+"/initdb", "-D", dir+"/db", "-U", "owner", "--auth=trust", "--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	env := []string{"PGHOST=" + dir, "POSTGRES_USER=owner"}
	sql := func(query string) string {
		return command(t, []string{"PGHOST=" + dir, "PGUSER=owner"}, bin+"/psql", "-d", "postgres", "-XAtc", query)
	}
	server(t, run(bin+"/postgres", "-D", dir+"/db", "-k", dir, "-c", "listen_addresses=", "-c", "fsync=off"), func() error {
		return exec.Command(bin+"/pg_isready", "-h", dir).Run()
	})
	sql("create table t(n int)")
	for name, shell := range shells(t) {
		if name == "bash" {
			continue // it takes long, and is tested separately
		}
		l := newLocal(t, shell)
		l.env = env
		m := start(t.Context(), l, Target{}, must(t, PostgreSQL, nil), calm, defaultBeat)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := sql("select count(*) from pg_stat_activity where query like '%pg_backup_start%' or state = 'idle' and application_name = 'psql'"); got == "0" {
			t.Error("no session holds the backup")
		}
		sql("insert into t values (1)") // it accepts writes throughout
		if err := errors.Join(m.prove(t.Context()), m.release(t.Context())); err != nil {
			t.Fatal(err)
		}
		label := m.notes["backup_label"]
		if !strings.Contains(label, "START WAL LOCATION: "+m.notes["start_lsn"]) || !strings.Contains(label, "LABEL: varve") || m.notes["stop_lsn"] == "" {
			t.Errorf("the notes are %q", m.notes)
		}
		l.gone()

		// Another session ends it: there is no proof.
		m = start(t.Context(), l, Target{}, must(t, PostgreSQL, nil), calm, 200*time.Millisecond)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		sql("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and application_name = 'psql'")
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), "terminat") {
			t.Errorf("with its session gone: %v", err)
		}
		_ = m.release(t.Context())
		l.gone()

		m = start(t.Context(), l, Target{}, must(t, PostgreSQL, map[string]string{"method": "Checkpoint", "connection": "dbname=postgres user=owner"}), calm, defaultBeat)
		if err := errors.Join(m.frozen(t.Context()), m.prove(t.Context()), m.release(t.Context())); err != nil {
			t.Errorf("checkpoint: %v", err)
		}

		// It is unreachable, and the error says why.
		l.env = []string{"PGHOST=/nonexistent"}
		m = start(t.Context(), l, Target{}, must(t, PostgreSQL, nil), calm, 200*time.Millisecond)
		if err := m.frozen(t.Context()); !errors.Is(err, ErrFreeze) || !strings.Contains(err.Error(), "/nonexistent") {
			t.Errorf("without a server: %v", err)
		}
		l.gone()
	}
}

func TestMariaDB(t *testing.T) {
	t.Parallel()
	daemon, err := exec.LookPath("mariadbd")
	if err != nil {
		t.Skip("MariaDB is not installed; make setup installs it")
	}
	dir, as := inDir(t, "mysql")
	args := append(append([]string{}, as...), "mariadb-install-db", "--no-defaults", "--datadir="+dir+"/db", "--tmpdir="+dir, "--auth-root-authentication-method=normal", "--skip-test-db")
	command(t, nil, args[0], args[1:]...)
	// In /tmp a server that starts removes the temporary tables of others.
	args = append(append([]string{}, as...), daemon, "--no-defaults", "--datadir="+dir+"/db", "--tmpdir="+dir, "--socket="+dir+"/socket", "--skip-networking", "--pid-file="+dir+"/pid",
		"--innodb-buffer-pool-size=16M", "--innodb-flush-log-at-trx-commit=2")
	env := []string{"MYSQL_UNIX_PORT=" + dir + "/socket"}
	server(t, exec.Command(args[0], args[1:]...), func() error {
		return exec.Command("mariadb-admin", "--no-defaults", "--socket="+dir+"/socket", "--user=root", "ping").Run()
	})
	sql := func(query string) string {
		return command(t, env, "mariadb", "--no-defaults", "--user=root", "-BNe", query)
	}
	sql("create database shop; create table shop.t(n int); set password for root@localhost = password('it''s secret')")
	env = append(env, "MYSQL_PWD=it's secret")
	all := shells(t)
	for shell, lock := range map[string]string{"dash": "ReadLock", "busybox": "BackupStage"} {
		l := newLocal(t, all[shell])
		l.env = []string{env[0], "MARIADB_ROOT_PASSWORD=it's secret"}
		p := must(t, MariaDB, map[string]string{"lock": lock})
		m := start(t.Context(), l, Target{}, p, calm, defaultBeat)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("env", env[0], env[1], "mariadb", "--no-defaults", "--user=root", "-e", "set session lock_wait_timeout=0; set session innodb_lock_wait_timeout=1; set session max_statement_time=0.2; insert into shop.t values (1)").CombinedOutput(); err == nil {
			t.Errorf("%s: it takes writes: %s", lock, out)
		}
		if err := errors.Join(m.prove(t.Context()), m.release(t.Context())); err != nil {
			t.Fatalf("%s: %v", lock, err)
		}
		sql("insert into shop.t values (2)")
		l.gone()

		// Another session ends it.
		m = start(t.Context(), l, Target{}, p, calm, 200*time.Millisecond)
		if err := m.frozen(t.Context()); err != nil {
			t.Fatal(err)
		}
		for id := range strings.FieldsSeq(sql("select id from information_schema.processlist where user = 'root' and id <> connection_id()")) {
			// The connections of clients that have ended are listed for a moment.
			out, err := exec.Command("env", env[0], env[1], "mariadb", "--no-defaults", "--user=root", "-e", "kill "+id).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "Unknown thread id") {
				t.Fatalf("%v: %s", err, out)
			}
		}
		if err := m.prove(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("%s: with its session gone: %v", lock, err)
		}
		_ = m.release(t.Context())
		l.gone()
		sql("insert into shop.t values (3)")
	}
}

func TestRedis(t *testing.T) {
	t.Parallel()
	daemon, err := exec.LookPath("redis-server")
	if err != nil {
		t.Skip("Redis is not installed; make setup installs it")
	}
	dir, as := inDir(t, "redis")
	env := []string{"REDISCLI_AUTH=secret"}
	var port string
	ask := func(args ...string) string {
		return command(t, env, "redis-cli", append([]string{"-p", port}, args...)...)
	}
	for left, is := 20, false; !is; left-- { // another process may have the port
		port = fmt.Sprint(10000 + rand.IntN(20000))
		args := append(append([]string{}, as...), daemon, "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "", "--appendonly", "yes", "--requirepass", "secret")
		cmd := exec.Command(args[0], args[1:]...)
		var printed string
		printed, is = tryServer(t, cmd, func() error {
			info := exec.Command("redis-cli", "-p", port, "info", "server")
			info.Env = append(os.Environ(), env...)
			out, err := info.CombinedOutput()
			if err == nil && !strings.Contains(string(out), fmt.Sprintf("process_id:%d\r\n", cmd.Process.Pid)) {
				err = errors.New(string(out))
			}
			return err
		})
		if !is && (left == 0 || !strings.Contains(printed, "Address already in use")) {
			t.Fatalf("it ended: %s", printed)
		}
	}
	for i, shell := range shells(t) {
		ask("set", "key", i)
		_ = os.Remove(filepath.Join(dir, "dump.rdb"))
		l := newLocal(t, shell)
		l.env = []string{"REDIS_PASSWORD=secret"}
		m := start(t.Context(), l, Target{}, must(t, Redis, map[string]string{"port": port}), calm, defaultBeat)
		if err := errors.Join(m.frozen(t.Context()), m.prove(t.Context())); err != nil {
			t.Fatal(err)
		}
		if dump, err := os.ReadFile(filepath.Join(dir, "dump.rdb")); err != nil || !strings.Contains(string(dump), i) {
			t.Errorf("the dump has %q, %v", dump, err)
		}
		if err := m.release(t.Context()); err != nil {
			t.Error(err)
		}
		l.env = []string{"REDIS_PASSWORD=wrong"}
		m = start(t.Context(), l, Target{}, must(t, Redis, map[string]string{"port": port}), calm, defaultBeat)
		if err := m.frozen(t.Context()); !errors.Is(err, ErrFreeze) {
			t.Errorf("with another password: %v", err)
		}
		l.gone()
	}
}

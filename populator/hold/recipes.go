package hold

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Recipes of applications. Passwords are taken from the environment that the pod's image defines or
// from files in the pod, never from a policy.
const (
	PostgreSQL = "PostgreSQL"
	MariaDB    = "MariaDB"
	Redis      = "Redis"
	MongoDB    = "MongoDB"
	Fsfreeze   = "Fsfreeze"
)

// ErrParameter means that a recipe has no such parameter, or rejects its value.
var ErrParameter = errors.New("invalid parameter")

// recipe makes a program from parameters, which are all known and set.
type recipe struct {
	// parameters and their defaults; those with an empty default are optional.
	parameters map[string]string
	// choices of parameters that have some.
	choices map[string][]string
	make    func(p map[string]string) Program
}

// Recipe makes the program of a recipe.
func Recipe(name string, parameters map[string]string, limit time.Duration) (Program, error) {
	r, ok := recipes[name]
	if !ok {
		return Program{}, fmt.Errorf("%w: there is no recipe %q; there are %s", ErrParameter, name, strings.Join(slices.Sorted(maps.Keys(recipes)), ", "))
	}
	all := maps.Clone(r.parameters)
	for _, k := range slices.Sorted(maps.Keys(parameters)) {
		v := parameters[k]
		if _, ok := all[k]; !ok {
			return Program{}, fmt.Errorf("%w: recipe %s has no parameter %q; it has %s", ErrParameter, name, k, strings.Join(slices.Sorted(maps.Keys(all)), ", "))
		}
		if c := r.choices[k]; c != nil && !slices.Contains(c, v) {
			return Program{}, fmt.Errorf("%w: parameter %s of recipe %s is %q, not %s", ErrParameter, k, name, v, strings.Join(c, " or "))
		}
		all[k] = v
	}
	if name == Fsfreeze && all["path"] == "" {
		return Program{}, fmt.Errorf("%w: recipe %s needs parameter path, where the volume is mounted in the container", ErrParameter, name)
	}
	p := r.make(all)
	p.Limit = limit
	return p, nil
}

// quote returns s as one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

var recipes = map[string]recipe{
	PostgreSQL: {
		parameters: map[string]string{"method": "Backup", "connection": ""},
		choices:    map[string][]string{"method": {"Backup", "Checkpoint"}},
		make:       postgreSQL,
	},
	MariaDB: {
		parameters: map[string]string{"lock": "ReadLock", "client": "", "defaultsFile": ""},
		choices:    map[string][]string{"lock": {"ReadLock", "BackupStage"}},
		make:       mariaDB,
	},
	Redis:    {parameters: map[string]string{"port": "6379"}, make: redis},
	MongoDB:  {parameters: map[string]string{"uri": "", "client": ""}, make: mongoDB},
	Fsfreeze: {parameters: map[string]string{"path": ""}, make: fsfreeze},
}

// postgreSQL: the start and the stop of a backup belong to one session ("Making a Non-Exclusive
// Low-Level Backup" in PostgreSQL's manual), and the end of the session ends the backup.
//
// A snapshot of one volume with the whole database equals the state after a crash, from which
// PostgreSQL recovers by itself; then the only gain is the checkpoint, which makes recovery short
// ("File System Level Backup"). With backup_label in it such a snapshot would not start, since it
// ends before the record of the backup's end. So the label is not written into the volume. It is
// kept with the point, for users who have an archive of the log and restore to a point in time, or
// have the database on several volumes.
func postgreSQL(p map[string]string) Program {
	// The image's variables, unless libpq's are set.
	session := `export PGUSER="${PGUSER:-${POSTGRES_USER:-postgres}}"
export PGDATABASE="${PGDATABASE:-postgres}" PGCONNECT_TIMEOUT="${PGCONNECT_TIMEOUT:-10}"
[ -n "${PGPASSWORD:-}" ] || [ -z "${POSTGRES_PASSWORD:-}" ] || export PGPASSWORD="$POSTGRES_PASSWORD"
if [ -z "${PGPASSWORD:-}" ] && [ -r "${POSTGRES_PASSWORD_FILE:-/nonexistent}" ]; then PGPASSWORD=$(cat "$POSTGRES_PASSWORD_FILE"); export PGPASSWORD; fi
exec psql -X -q -A -t -w -v ON_ERROR_STOP=1`
	if c := p["connection"]; c != "" {
		session += " -d " + quote(c)
	}
	out := Program{
		Session: session,
		Prove:   `SELECT '@nonce@ held %s';`,
	}
	if p["method"] == "Checkpoint" {
		out.Begin = `SET statement_timeout = '@limit@s';
CHECKPOINT;
SELECT '@nonce@ ready';`
		return out
	}
	// The functions had other names before version 15.
	out.Begin = `SET statement_timeout = '@limit@s';
SELECT current_setting('server_version_num')::int >= 150000 AS new \gset
\if :new
SELECT '@nonce@ note start_lsn ' || encode(convert_to(pg_backup_start('varve', true)::text, 'UTF8'), 'base64');
\else
SELECT '@nonce@ note start_lsn ' || encode(convert_to(pg_start_backup('varve', true, false)::text, 'UTF8'), 'base64');
\endif
SELECT '@nonce@ ready';`
	// The end does not wait for the archive: the label names the segments it needs.
	out.End = `\if :new
SELECT lsn::text AS lsn, labelfile, spcmapfile FROM pg_backup_stop(false) \gset varve_
\else
SELECT lsn::text AS lsn, labelfile, spcmapfile FROM pg_stop_backup(false, false) \gset varve_
\endif
SELECT '@nonce@ note ' || n || ' ' || replace(encode(convert_to(t, 'UTF8'), 'base64'), E'\n', '')
FROM (VALUES ('stop_lsn', :'varve_lsn'), ('backup_label', :'varve_labelfile'), ('tablespace_map', :'varve_spcmapfile')) AS v (n, t) WHERE t <> '';`
	return out
}

// mariaDB: the locks end with their session. ReadLock, which MySQL has too, blocks writes and
// waits for running ones; BackupStage blocks commits, and waits for less.
func mariaDB(p map[string]string) Program {
	client := `client=$(command -v mariadb || command -v mysql) || { echo 'neither mariadb nor mysql is in the container'; exit 127; }
`
	if c := p["client"]; c != "" {
		client = "client=" + quote(c) + "\n"
	}
	client += `if [ -z "${MYSQL_PWD:-}" ]; then
for f in "${MARIADB_ROOT_PASSWORD_FILE:-}" "${MYSQL_ROOT_PASSWORD_FILE:-}"; do
[ -z "$f" ] || [ ! -r "$f" ] || MYSQL_PWD=$(cat "$f")
done
MYSQL_PWD="${MYSQL_PWD:-${MARIADB_ROOT_PASSWORD:-${MYSQL_ROOT_PASSWORD:-}}}"
if [ -n "$MYSQL_PWD" ]; then export MYSQL_PWD; else unset MYSQL_PWD; fi
fi
exec "$client"`
	if f := p["defaultsFile"]; f != "" {
		client += " --defaults-file=" + quote(f)
	} else {
		client += ` --no-defaults --user="${MARIADB_ROOT_USER:-root}"`
	}
	client += " --batch --skip-column-names --unbuffered"
	lock, unlock := "FLUSH TABLES WITH READ LOCK;", "UNLOCK TABLES;"
	if p["lock"] == "BackupStage" {
		lock, unlock = "BACKUP STAGE START;\nBACKUP STAGE FLUSH;\nBACKUP STAGE BLOCK_DDL;\nBACKUP STAGE BLOCK_COMMIT;", "BACKUP STAGE END;"
	}
	return Program{
		Session: client,
		Begin:   "SET SESSION lock_wait_timeout = @limit@;\n" + lock + "\nSELECT '@nonce@ ready';",
		Prove:   "SELECT '@nonce@ held %s';",
		End:     unlock,
	}
}

// redis: it has no lock. A dump is completely written and renamed before the snapshot. Redis syncs
// an append-only file, if any, as its configuration says; each is consistent by itself at any cut.
func redis(p map[string]string) Program {
	cli := `[ -n "${REDISCLI_AUTH:-}" ] || [ -z "${REDIS_PASSWORD:-}" ] || export REDISCLI_AUTH="$REDIS_PASSWORD"
if [ -z "${REDISCLI_AUTH:-}" ] && [ -r "${REDIS_PASSWORD_FILE:-/nonexistent}" ]; then REDISCLI_AUTH=$(cat "$REDIS_PASSWORD_FILE"); export REDISCLI_AUTH; fi
ask() { redis-cli -p ` + quote(p["port"]) + ` "$@"; }
info() { ask INFO persistence | tr -d '\r' | sed -n "s/^$1://p"; }
`
	return Program{
		Freeze: cli + `while [ "$(info rdb_bgsave_in_progress)" = 1 ]; do sleep 1; done
before=$(info rdb_saves)
said=$(ask BGSAVE SCHEDULE)
case $said in *[Bb]ackground*) ;; *) echo "BGSAVE: $said"; exit 1 ;; esac
while sleep 1; do
progress=$(info rdb_bgsave_in_progress)
scheduled=$(info aof_rewrite_in_progress)
[ -n "$progress" ] || exit 1
[ "$progress$scheduled" = 00 ] || continue
[ "$(info rdb_last_bgsave_status)" = ok ] || { echo 'the dump failed'; exit 1; }
[ -n "$before" ] && [ "$(info rdb_saves)" = "$before" ] || break
done`,
		Thaw:  "true",
		Check: cli + `[ "$(info rdb_last_bgsave_status)" = ok ]`,
	}
}

// mongoDB: the lock outlives its session, so a command releases it. Locks are counted.
func mongoDB(p map[string]string) Program {
	shell := `client=$(command -v mongosh || command -v mongo) || { echo 'neither mongosh nor mongo is in the container'; exit 127; }
`
	if c := p["client"]; c != "" {
		shell = "client=" + quote(c) + "\n"
	}
	// The image's variables. The password comes through standard input, as part of the script.
	shell += `login=
if [ -n "${MONGO_INITDB_ROOT_USERNAME:-}" ]; then
login='db.getSiblingDB("admin").auth(process.env.MONGO_INITDB_ROOT_USERNAME, process.env.MONGO_INITDB_ROOT_PASSWORD);'
fi
ask() { printf '%s\n' "$login $1" | "$client" --quiet --norc ` + quote(p["uri"]) + `; }
`
	return Program{
		Freeze: shell + `said=$(ask 'const r = db.getSiblingDB("admin").runCommand({fsync: 1, lock: true}); print("varve " + (r.ok == 1 ? "locked" : tojson(r)))')
case $said in *'varve locked'*) ;; *) echo "$said"; exit 1 ;; esac`,
		Thaw: shell + `said=$(ask 'const a = db.getSiblingDB("admin"); if (a.runCommand({currentOp: 1}).fsyncLock) { a.runCommand({fsyncUnlock: 1}); } print("varve " + (a.runCommand({currentOp: 1}).fsyncLock ? "locked" : "open"))')
case $said in *'varve open'*) ;; *) echo "$said"; exit 1 ;; esac`,
		Check: shell + `said=$(ask 'print("varve " + (db.getSiblingDB("admin").runCommand({currentOp: 1}).fsyncLock ? "locked" : "open"))')
case $said in *'varve locked'*) ;; *) echo "$said"; exit 1 ;; esac`,
	}
}

// fsfreeze needs CAP_SYS_ADMIN in the container. It has no check: the only way to test whether a
// file system is frozen is to freeze it. Thawing one that is not frozen gives EINVAL, which is no
// failure. BusyBox has the long options only.
//
// The path must be a mount point: the kernel freezes the file system of any directory, which may be
// another one, even the node's. Only this file system is synced before: a global sync waits for
// every file system of the node. A freeze that failed froze nothing, and must not thaw what another
// program has frozen.
func fsfreeze(p map[string]string) Program {
	path := quote(p["path"])
	return Program{
		Freeze: "path=$(cd " + path + ` && pwd -P) || exit 1
found=
while read -r _ _ _ _ at _; do
case $at in *\\*) at=$(printf '%b' "$at") ;; esac
[ "$at" != "$path" ] || found=yes
done </proc/self/mountinfo
[ -n "$found" ] || { printf 'no file system is mounted at %s in this container\n' "$path"; exit 1; }
sync -f "$path" 2>/dev/null
exec fsfreeze --freeze "$path"`,
		Thaw: `[ "${freeze_failed:-128}" -ge 128 ] || exit 0
said=$(LC_ALL=C fsfreeze --unfreeze ` + path + ` 2>&1) || case $said in *nvalid*) ;; *) echo "$said"; exit 1 ;; esac`,
	}
}

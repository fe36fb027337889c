package kubernetes

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
)

const mariadbImage = "e2e.local/mariadb:1"

// importMariaDB makes an image of Debian's MariaDB and imports it into the cluster.
func (s *site) importMariaDB() {
	s.T.Helper()
	var programs []string
	for _, name := range []string{"mariadbd", "mariadb", "mariadb-dump", "my_print_defaults", "resolveip"} {
		path, err := exec.LookPath(name)
		if err != nil {
			s.T.Skip("Debian's MariaDB is not installed; make setup installs it")
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			s.T.Fatal(err)
		}
		programs = append(programs, path)
	}
	s.importImage(mariadbImage, "/usr/sbin:/usr/bin", programs, "/usr/bin/mariadb-install-db", "/usr/share/mysql", "/usr/lib/mysql/plugin")
}

// accounts is the manifest of a MariaDB server with a password.
const accounts = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: accounts}
spec:
  serviceName: accounts
  selector: {matchLabels: {app: accounts}}
  template:
    metadata: {labels: {app: accounts}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsUser: 999, runAsGroup: 999, fsGroup: 999, fsGroupChangePolicy: OnRootMismatch, runAsNonRoot: true}
      containers:
      - name: mariadb
        image: ` + mariadbImage + `
        imagePullPolicy: Never
        env: [{name: MARIADB_ROOT_PASSWORD, value: "it's secret"}, {name: MYSQL_UNIX_PORT, value: /tmp/mysqld.sock}]
        command: [sh, -ec]
        args:
        - |
          [ -d /data/db/mysql ] || sh /usr/bin/mariadb-install-db --no-defaults --datadir=/data/db --auth-root-authentication-method=normal --skip-test-db --force >/dev/null
          printf '%s\n' "alter user root@localhost identified by 'it''s secret';" "create database if not exists shop;" >/tmp/init.sql
          exec mariadbd --no-defaults --datadir=/data/db --skip-networking --pid-file=/tmp/pid --tmpdir=/tmp --init-file=/tmp/init.sql \
            --innodb-buffer-pool-size=32M --innodb-log-file-size=16M
        readinessProbe: {exec: {command: [sh, -c, 'MYSQL_PWD=$MARIADB_ROOT_PASSWORD mariadb --no-defaults -uroot -e "use shop"']}, periodSeconds: 1, timeoutSeconds: 20}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: e2e-wffc
      resources: {requests: {storage: 512Mi}}
      dataSourceRef: {apiGroup: varve.io, kind: RecoverySource, name: accounts}
`

const (
	mariadbClient = `MYSQL_PWD=$MARIADB_ROOT_PASSWORD mariadb --no-defaults -uroot -BN `
	makeAccounts  = `create table shop.accounts (id bigint primary key, payload char(32) not null, h char(32) not null) engine=innodb`
	// writes rows one by one, each in a separate transaction, until it is killed.
	loadAccounts = `(i=$(` + mariadbClient + `-e 'select coalesce(max(id),0) from shop.accounts'); while :; do i=$((i+1)); echo "set @p=md5(rand()); insert into shop.accounts values ($i,@p,md5(concat($i,@p)));"; usleep 5000; done | ` + mariadbClient + `) >/dev/null 2>&1 &`
	// as checkRows.
	checkAccounts = `select concat_ws('|', count(*), coalesce(max(id), 0), coalesce(sum(binary h <> binary md5(concat(id, payload))), 0)) from shop.accounts`
	accountsUpTo  = `select count(*), bit_xor(crc32(concat(id, payload, h))) from shop.accounts where id <= %d`
)

func (s *site) accounts(query string) string {
	s.T.Helper()
	return s.Exec("accounts-0", mariadbClient+`-e "`+query+`"`)
}

func (s *site) accountsMax() (id int64) {
	s.T.Helper()
	if _, err := fmt.Sscan(s.accounts("select coalesce(max(id), 0) from shop.accounts"), &id); err != nil {
		s.T.Fatal(err)
	}
	return id
}

// A MariaDB server under load is dumped by a hook, then held by a lock across the cut of its snapshot.
// Restored from the dump it has each row that was acknowledged before that; restored from the snapshot,
// exactly those that it had while it was held.
func TestHookMariaDB(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.importMariaDB()
	name := s.Namespace
	old, fresh, third := name+"-old", name+"-new", name+"-dump"
	bucket := s.bucket("maria-" + name[len(name)-6:])
	s.store(name, bucket, func(bs *v1alpha1.BackupStore) {
		bs.Spec.RestoreGrants = []v1alpha1.RestoreGrant{{From: old, To: []string{fresh, third}}}
	})
	server := func(namespace string, change func(rs *v1alpha1.RecoverySource)) *site {
		there := s.in(namespace)
		there.source("accounts", func(rs *v1alpha1.RecoverySource) {
			rs.Spec.StoreRef.Name = name
			change(rs)
		})
		there.apply(accounts)
		there.WaitReady("accounts-0")
		return there
	}
	here := server(old, func(rs *v1alpha1.RecoverySource) { rs.Spec.IfNone = v1alpha1.IfNoneEmpty })
	here.mayExec()
	here.accounts(makeAccounts)
	here.Exec("accounts-0", loadAccounts)
	here.Eventually("rows", func(context.Context) error {
		if n := here.accountsMax(); n < 200 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	before := here.accountsMax()
	undo := here.noSnapshots()
	here.startBackup("run", "data-accounts-0", func(vb *v1alpha1.VolumeBackup) {
		vb.Spec.StoreRef.Name = name
		vb.Spec.Hooks = []v1alpha1.Hook{
			{Name: "lock", Recipe: v1alpha1.HookMariaDB, TimeLimit: longHold},
			{Name: "sql", Dump: &v1alpha1.HookDump{Command: "MYSQL_PWD=$MARIADB_ROOT_PASSWORD mariadb-dump --no-defaults -uroot --single-transaction shop"}},
		}
	})
	here.waitCut("run")
	marked := here.accountsMax()
	if later := here.accountsMax(); later != marked {
		t.Errorf("it wrote rows %d to %d while it was held", marked, later)
	}
	undo()
	vb := here.waitBackup("run")
	if h := vb.Status.Hold; !strings.HasPrefix(consistent(vb), "True Held") || h == nil || len(h.Members) != 1 || !h.Members[0].Proven {
		t.Fatalf("%s, %+v", consistent(vb), h)
	}
	t.Logf("held for %d ms at row %d", vb.Status.Hold.Members[0].HeldMilliseconds, marked)
	here.Eventually("more rows", func(context.Context) error {
		if n := here.accountsMax(); n <= marked {
			return fmt.Errorf("there are %d, as while it was held", n)
		}
		return nil
	})

	there := server(fresh, func(rs *v1alpha1.RecoverySource) { rs.Spec.From.Namespace = old })
	said := there.accounts(checkAccounts)
	checkLedger(t, said, marked)
	if last := there.accountsMax(); last != marked {
		t.Errorf("the snapshot has rows up to %d; %d was the last while it was held", last, marked)
	}

	d := dumpOf(t, vb)
	text := s.readStream(bucket, old+"/data-accounts-0.sql")
	if int64(len(text)) != d.Bytes || !bytes.Contains(text, []byte("-- Dump completed")) {
		t.Errorf("the dump has %d bytes, the status says %d", len(text), d.Bytes)
	}
	dumped := server(third, func(rs *v1alpha1.RecoverySource) { rs.Spec.IfNone, rs.Spec.From.Volume = v1alpha1.IfNoneEmpty, "none" })
	dumped.mayExec()
	fed := dumped.feed("sql", v1alpha1.DumpRestoreSpec{StoreRef: v1alpha1.StoreReference{Name: name}, From: v1alpha1.RecoveryFrom{Namespace: old, Volume: "data-accounts-0.sql"},
		Into: v1alpha1.DumpRestoreInto{Command: mariadbClient + "shop", PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "accounts"}}}})
	if fed.Status.Bytes != d.Bytes {
		t.Errorf("it is %+v", fed.Status)
	}
	checkLedger(t, dumped.accounts(checkAccounts), before)
	for _, other := range []*site{there, dumped} {
		if was, is := here.accounts(fmt.Sprintf(accountsUpTo, before)), other.accounts(fmt.Sprintf(accountsUpTo, before)); was != is {
			t.Errorf("the rows up to %d were %s and are %s", before, was, is)
		}
	}
}

package kubernetes

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
)

// ledger is the manifest of a database; the restore applies it unchanged. The first time
// there is no recovery point, which its source allows.
const ledger = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: ledger}
spec:
  serviceName: ledger
  selector: {matchLabels: {app: ledger}}
  template:
    metadata: {labels: {app: ledger}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsUser: 999, runAsGroup: 999, fsGroup: 999, fsGroupChangePolicy: OnRootMismatch, runAsNonRoot: true}
      containers:
      - name: postgres
        image: ` + postgresImage + `
        imagePullPolicy: Never
        command: [sh, -ec]
        args:
        - |
          [ -s /data/db/PG_VERSION ] || initdb -D /data/db -U postgres --auth=trust -E UTF8 >/dev/null
          exec postgres -D /data/db -k /tmp -c listen_addresses= -c max_wal_size=64MB -c shared_buffers=32MB -c jit=off
        readinessProbe: {exec: {command: [psql, -h, /tmp, -U, postgres, -c, select 1]}, periodSeconds: 1, timeoutSeconds: 20}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: e2e-wffc
      resources: {requests: {storage: 512Mi}}
      dataSourceRef: {apiGroup: varve.io, kind: RecoverySource, name: ledger}
`

// rows of the ledger, each with its checksum.
const (
	makeRows = `create table ledger(id bigint primary key, payload text not null, sum text not null)`
	addRows  = `psql -q -h /tmp -U postgres -c "insert into ledger select n, p, md5(n || p) from (select n, md5(random()::text) as p from generate_series(%d, %d) n) x"`
	// writes rows one by one, each in a separate transaction, until it is killed.
	load = `(i=$(psql -h /tmp -U postgres -Atc 'select coalesce(max(id),0) from ledger'); while :; do i=$((i+1)); echo "insert into ledger select $i, p, md5($i || p) from (select md5(random()::text) as p) x;"; usleep 5000; done | psql -q -h /tmp -U postgres) >/dev/null 2>&1 &`
	// number of rows, the last one, and how many are damaged.
	checkRows = `select count(*), coalesce(max(id), 0), count(*) filter (where sum <> md5(id || payload)) from ledger`
)

func (s *site) sql(query string) string {
	s.T.Helper()
	return s.Exec("ledger-0", `psql -h /tmp -U postgres -Atc "`+query+`"`)
}

func (s *site) apply(manifest string) {
	s.T.Helper()
	if _, err := s.Cluster.Kubectl(s.T.Context(), strings.NewReader(manifest), "apply", "-n", s.Namespace, "-f", "-"); err != nil {
		s.T.Fatal(err)
	}
}

// checkLedger fails the test unless there are rows without a gap, at least as many as
// were committed before the snapshot, and each is unchanged.
func checkLedger(t *testing.T, said string, atLeast int64) {
	t.Helper()
	var count, last, wrong int64
	if _, err := fmt.Sscanf(strings.ReplaceAll(strings.TrimSpace(said), "|", " "), "%d %d %d", &count, &last, &wrong); err != nil {
		t.Fatalf("%q: %v", said, err)
	}
	if count != last || wrong != 0 || last < atLeast {
		t.Errorf("%d rows up to %d, %d of them wrong; %d were committed before the backup", count, last, wrong, atLeast)
	}
}

// A database under load is backed up three times, its namespace deleted, and restored by
// its own manifest into a new one; and the same disk is read over NBD, outside the
// cluster, from only the repository.
func TestPostgres(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.importPostgres()
	name := s.Namespace
	bucket := s.bucket("pg-" + name[len(name)-6:])
	old, fresh := name+"-old", name+"-new"
	s.store(name, bucket, func(bs *v1alpha1.BackupStore) {
		bs.Spec.RestoreGrants = []v1alpha1.RestoreGrant{{From: old, To: []string{fresh}}}
	})
	here := s.in(old)
	here.source("ledger", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.IfNone = name, v1alpha1.IfNoneEmpty
	})
	here.apply(ledger)
	here.WaitReady("ledger-0")
	here.sql(makeRows)
	here.Exec("ledger-0", fmt.Sprintf(addRows, 1, 20000))
	here.Exec("ledger-0", load)
	var committed int64
	for i, source := range []string{"csi-allocated", "csi-delta", "csi-delta"} {
		if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &committed); err != nil {
			t.Fatal(err)
		}
		here.Eventually("more rows", func(context.Context) error {
			var now int64
			if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &now); err != nil || now < committed+20 {
				return fmt.Errorf("there are %d rows, %w", now, err)
			}
			committed = now
			return nil
		})
		vb := here.backup(fmt.Sprintf("run-%d", i), "data-ledger-0", func(vb *v1alpha1.VolumeBackup) { vb.Spec.StoreRef.Name = name })
		if p := vb.Status.Point; p.Source != source {
			t.Errorf("point %d is by %s because of %v, want %s", i, p.Source, p.Fallbacks, source)
		}
	}
	// Fails the test if the namespace hangs on us.
	here.Delete(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: old}})

	there := s.in(fresh)
	there.source("ledger", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.From.Namespace = name, old
	})
	there.apply(ledger)
	there.WaitReady("ledger-0")
	checkLedger(t, there.sql(checkRows), committed)
	there.Exec("ledger-0", fmt.Sprintf(addRows, 1000000, 1000100)) // it takes more

	s.overNBD(bucket, old+"/data-ledger-0", committed)
}

// connect connects the binary of Varve's image to the repository in a bucket, on this machine, with
// a separate environment and folder.
func (s *site) connect(bucket v1alpha1.S3Storage) (varve string, env []string, dir string) {
	s.T.Helper()
	varve, err := filepath.Abs(filepath.Join("..", "..", "bin", "image", "varve"))
	if err == nil {
		_, err = os.Stat(varve)
	}
	if err != nil {
		s.T.Fatalf("the binary of the image: %v", err)
	}
	dir = s.T.TempDir()
	env = append(os.Environ(), "HOME="+dir, "VARVE_PASSWORD="+password, "AWS_ACCESS_KEY_ID="+cluster.S3AccessKey, "AWS_SECRET_ACCESS_KEY="+cluster.S3SecretKey)
	cmd := exec.Command(varve, "repo", "connect", "s3", "--bucket", bucket.Bucket, "--endpoint", bucket.Endpoint, "--region", bucket.Region, "--disable-tls", "--cluster", "e2e")
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil {
		s.T.Fatalf("connect: %v\n%s", err, out)
	}
	return varve, env, dir
}

// overNBD serves the newest point of a volume over NBD on this machine, copies the
// disk, and starts Debian's PostgreSQL on it.
func (s *site) overNBD(bucket v1alpha1.S3Storage, volume string, committed int64) {
	s.T.Helper()
	varve, env, dir := s.connect(bucket)
	run := func(argv ...string) string {
		s.T.Helper()
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		if err != nil {
			s.T.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	socket := filepath.Join(dir, "nbd.sock")
	serve := exec.Command(varve, "serve", "--listen", "unix:"+socket)
	serve.Env = env
	if err := serve.Start(); err != nil {
		s.T.Fatal(err)
	}
	defer func() {
		_ = serve.Process.Signal(os.Interrupt)
		_ = serve.Wait()
	}()
	disk := filepath.Join(dir, "disk.img")
	s.Eventually("varve serve", func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, "nbdcopy", "--", "nbd+unix:///"+volume+"@latest?socket="+socket, disk).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	mount := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mount, 0o755); err != nil {
		s.T.Fatal(err)
	}
	run("mount", "-o", "loop", disk, mount) // the journal is replayed on the copy
	defer run("umount", mount)
	bin := filepath.Join(s.postgresDir(), "bin")
	// PostgreSQL's user must reach it: not below a test's own directory.
	sockets, err := os.MkdirTemp("/tmp", "varve-pg-")
	if err != nil {
		s.T.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(sockets) }()
	data := filepath.Join(sockets, "db")
	run("cp", "-a", filepath.Join(mount, "db"), data)
	run("chown", "-R", "postgres", sockets)
	as := func(argv ...string) string {
		return run(append([]string{"setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"}, argv...)...)
	}
	// It gives up after a minute by itself: too soon for the recovery on a busy machine.
	as(filepath.Join(bin, "pg_ctl"), "start", "-w", "-t", "600", "-D", data, "-l", filepath.Join(sockets, "log"), "-o", "-k "+sockets+" -c listen_addresses= -c jit=off")
	defer as(filepath.Join(bin, "pg_ctl"), "stop", "-m", "fast", "-t", "600", "-D", data)
	checkLedger(s.T, as(filepath.Join(bin, "psql"), "-h", sockets, "-U", "postgres", "-Atc", checkRows), committed)
}

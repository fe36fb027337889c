package kubernetes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// readStream returns the newest stream of a volume, as varve restore returns it on this machine.
func (s *site) readStream(bucket v1alpha1.S3Storage, volume string) []byte {
	s.T.Helper()
	varve, env, _ := s.connect(bucket)
	cmd := exec.Command(varve, "restore", volume+"@latest", "-")
	cmd.Env = env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.T.Fatalf("restore of %s: %v\n%s", volume, err, stderr.Bytes())
	}
	return out
}

// dumpOf returns a run's status of its one dump, which must be stored.
func dumpOf(t *testing.T, vb *v1alpha1.VolumeBackup) v1alpha1.DumpStatus {
	t.Helper()
	if len(vb.Status.Dumps) != 1 {
		t.Fatalf("the run has the dumps %+v", vb.Status.Dumps)
	}
	d := vb.Status.Dumps[0]
	if d.State != v1alpha1.DumpSucceeded || d.Point == nil || d.ExitCode == nil || *d.ExitCode != 0 || d.Bytes == 0 {
		t.Fatalf("the dump is %+v", d)
	}
	return d
}

// rowsUpTo returns a checksum of the rows of the ledger up to one.
const rowsUpTo = `select count(*), md5(string_agg(id || payload || sum, ',' order by id)) from ledger where id <= %d`

// A database under load is dumped by a hook beside its snapshot, and the dump restored into a fresh
// server: all rows that were acknowledged before it began exist, and each is unchanged.
func TestDumpPostgres(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.importPostgres()
	name := s.Namespace
	bucket := s.bucket("dump-" + name[len(name)-6:])
	s.store(name, bucket, func(bs *v1alpha1.BackupStore) {
		bs.Spec.RestoreGrants = []v1alpha1.RestoreGrant{{From: name + "-old", To: []string{name + "-new"}}}
	})
	empty := func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.IfNone = name, v1alpha1.IfNoneEmpty }
	here := s.in(name + "-old")
	here.mayExec()
	here.source("ledger", empty)
	here.apply(ledger)
	here.WaitReady("ledger-0")
	here.sql(makeRows)
	here.Exec("ledger-0", fmt.Sprintf(addRows, 1, 50000))
	here.Exec("ledger-0", load)
	var marked int64
	if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &marked); err != nil {
		t.Fatal(err)
	}
	run := func(run, command string) {
		here.startBackup(run, "data-ledger-0", func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.StoreRef.Name = name
			vb.Spec.Hooks = []v1alpha1.Hook{{Name: "sql", Dump: &v1alpha1.HookDump{Command: command}}}
		})
	}
	const dump = "pg_dump -h /tmp -U postgres --no-owner postgres"
	run("run", dump)
	vb := here.waitBackup("run")
	d := dumpOf(t, vb)
	if d.Pod != "ledger-0" || d.Volume != "data-ledger-0.sql" || d.Attempts != 1 || vb.Status.Point == nil {
		t.Errorf("the dump is %+v", d)
	}
	text := s.readStream(bucket, here.Namespace+"/data-ledger-0.sql")
	if int64(len(text)) != d.Bytes {
		t.Errorf("the dump has %d bytes, the status says %d", len(text), d.Bytes)
	}

	// It is fed into a fresh server by the controller, which may read what the other namespace has dumped.
	there := s.in(name + "-new")
	there.mayExec()
	there.source("ledger", func(rs *v1alpha1.RecoverySource) {
		empty(rs)
		rs.Spec.From.Volume = "none"
	})
	there.apply(ledger)
	there.WaitReady("ledger-0")
	const psql = "psql -q -o /dev/null -v ON_ERROR_STOP=1 --single-transaction -h /tmp -U postgres"
	into := func(command string) v1alpha1.DumpRestoreSpec {
		return v1alpha1.DumpRestoreSpec{StoreRef: v1alpha1.StoreReference{Name: name}, From: v1alpha1.RecoveryFrom{Namespace: here.Namespace, Volume: "data-ledger-0.sql"},
			Into: v1alpha1.DumpRestoreInto{Command: command, PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "ledger"}}}}
	}
	// One that fails at its end leaves nothing.
	there.startFeed("fails", into(psql+" -c 'create table none ()' -f - -c 'select nothing'"))
	if said := says(there.endOfFeed("fails").Status.Conditions); !strings.Contains(said, "FeedFailed") || !strings.Contains(said, "with status") {
		t.Errorf("it says %s", said)
	}
	fed := there.feed("whole", into(psql))
	if st := fed.Status; st.Bytes != d.Bytes || st.ExitCode == nil || *st.ExitCode != 0 || st.PointID != d.Point.ID || st.Pod != "ledger-0" {
		t.Errorf("it is %+v", st)
	}
	checkLedger(t, there.sql(checkRows), marked)
	if was, is := here.sql(fmt.Sprintf(rowsUpTo, marked)), there.sql(fmt.Sprintf(rowsUpTo, marked)); was != is {
		t.Errorf("the rows up to %d were %s and are %s", marked, was, is)
	}

	// One that fails half-way is not kept, and the run makes no point; the database continues.
	run("half", dump+` && echo "out of rows" >&2 && false`)
	half := here.waitFailed("half", v1alpha1.ReasonHookFailed)
	if said := says(half.Status.Conditions); !strings.Contains(said, "status 1") || !strings.Contains(said, "out of rows") || half.Status.Point != nil {
		t.Errorf("it says %s, and made the point %+v", said, half.Status.Point)
	}
	if again := s.readStream(bucket, here.Namespace+"/data-ledger-0.sql"); !bytes.Equal(again, text) {
		t.Error("the newest dump is another one")
	}
	var before int64
	if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &before); err != nil {
		t.Fatal(err)
	}
	here.Eventually("the load's session", func(context.Context) error {
		var now int64
		if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &now); err != nil || now <= before {
			return fmt.Errorf("it writes no rows any more, %w", err)
		}
		return nil
	})
}

// Any process that forwards a dump is killed: the command is ended, no part of it is kept, and another
// attempt stores the whole.
func TestDumpFaults(t *testing.T) {
	s := newSite(t) // not in parallel: it kills the controllers and the kubelet
	s.mayExec()
	name := s.Namespace
	bucket := s.bucket("dumps-" + name[len(name)-6:])
	s.store(name, bucket, nil)
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	pod := s.RunPod(framework.Pod{Name: "app", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	// It prints half, and the rest once allowed.
	const command = `echo half; echo begun >>/tmp/begun; until [ -e /tmp/go ]; do sleep 0.1; done; echo whole`
	begun := func(n int) {
		t.Helper()
		s.Eventually(fmt.Sprintf("attempt %d of the command", n), func(context.Context) error {
			text, err := s.ReadFile(pod, "/tmp/begun")
			if err == nil && strings.Count(text, "begun") < n {
				err = errors.New("it has not begun")
			}
			return err
		})
	}
	for i, fault := range []string{"controller", "kubelet"} {
		s.Exec("app", "rm -f /tmp/go /tmp/begun")
		s.startBackup(fault, "data", func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.StoreRef.Name = name
			vb.Spec.Hooks = []v1alpha1.Hook{{Name: "out", Dump: &v1alpha1.HookDump{Command: command}}}
		})
		begun(1)
		switch fault {
		case "controller":
			s.killControllers()
		case "kubelet":
			s.KillKubelet(pod)()
		}
		begun(2)
		s.Exec("app", "touch /tmp/go")
		d := dumpOf(t, s.waitBackup(fault))
		if d.Attempts != 2 || d.Bytes != int64(len("half\nwhole\n")) {
			t.Errorf("%s: the dump is %+v", fault, d)
		}
		if got := string(s.readStream(bucket, name+"/data.out")); got != "half\nwhole\n" {
			t.Errorf("%s: the dump has %q", fault, got)
		}
		if d.Point.ID == "" || i > 0 && s.pointsOf(bucket, name+"/data.out") != 2 {
			t.Errorf("%s: there are other points", fault)
		}
	}
}

// pointsOf counts the points of a volume.
func (s *site) pointsOf(bucket v1alpha1.S3Storage, volume string) int {
	s.T.Helper()
	varve, env, _ := s.connect(bucket)
	cmd := exec.Command(varve, "list", volume, "-o", "json")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		s.T.Fatalf("list: %v", err)
	}
	return strings.Count(string(out), `"id"`)
}

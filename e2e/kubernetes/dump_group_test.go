package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// listedGroup is a group as varve list --groups shows it.
type listedGroup struct {
	ID       string
	Complete bool
	Members  []string
	Missing  []string
	Points   []struct{ ID, Volume string }
}

// listedGroup returns a group of a repository by its ID.
func (s *site) listedGroup(bucket v1alpha1.S3Storage, id string) listedGroup {
	s.T.Helper()
	varve, env, _ := s.connect(bucket)
	cmd := exec.Command(varve, "list", "--groups", "-o", "json")
	cmd.Env = env
	out, err := cmd.Output()
	if err != nil {
		s.T.Fatalf("list of groups: %v", err)
	}
	var all []listedGroup
	if err := json.Unmarshal(out, &all); err != nil {
		s.T.Fatalf("%v: %s", err, out)
	}
	i := slices.IndexFunc(all, func(g listedGroup) bool { return g.ID == id })
	if i < 0 {
		s.T.Fatalf("group %s is not in the list: %s", id, out)
	}
	return all[i]
}

// A policy with a group over two claims dumps its database once. The dump is a member of the group beside the
// claims, and a fresh database that is fed with it has the same rows. A dump that fails makes all runs of the
// group fail, or with onError: Continue makes the group incomplete.
func TestDumpOfGroup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.importPostgres()
	s.mayExec()
	name := s.Namespace
	bucket := s.bucket("dump-group-" + name[len(name)-6:])
	s.store(name, bucket, nil)
	s.source("ledger", func(rs *v1alpha1.RecoverySource) { rs.Spec.StoreRef.Name, rs.Spec.IfNone = name, v1alpha1.IfNoneEmpty })
	s.apply(ledger)
	s.WaitReady("ledger-0")
	s.sql(makeRows)
	s.Exec("ledger-0", fmt.Sprintf(addRows, 1, 2000))
	s.CreateClaim(framework.Claim{Name: "files", Mode: framework.Block, Size: "16Mi"})
	s.WaitBound("files")

	const dump = "pg_dump -h /tmp -U postgres --no-owner postgres"
	app := metav1.LabelSelector{MatchLabels: map[string]string{"app": "ledger"}}
	hook := func(command string, onError v1alpha1.HookOnError) []v1alpha1.Hook {
		return []v1alpha1.Hook{{Name: "sql", Dump: &v1alpha1.HookDump{Command: command}, PodSelector: &app, OnError: onError}}
	}
	policy := &v1alpha1.BackupPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "shop"}, Spec: v1alpha1.BackupPolicySpec{
		StoreRef: v1alpha1.StoreReference{Name: name}, Schedule: v1alpha1.Schedule{Cron: "* * * * *"}, Group: true, GroupMethod: v1alpha1.GroupHold,
		Hooks: hook(dump, v1alpha1.HookFail)}}
	s.Create(policy)
	var g *v1alpha1.RunGroup
	s.Eventually("the runs of a group", func(ctx context.Context) error {
		var list v1alpha1.VolumeBackupList
		if err := s.Client.List(ctx, &list, inNamespace(s)); err != nil {
			return err
		}
		if len(list.Items) < 2 {
			return errors.New("there are none")
		}
		g = list.Items[0].Spec.Group
		return nil
	})
	s.Delete(policy) // one group is enough; what it began continues
	if g == nil || len(g.Members) != 2 || g.Members[0].ClaimName != "data-ledger-0" || g.Members[1].ClaimName != "files" {
		t.Fatalf("the group is %+v", g)
	}
	first := s.waitBackup(g.Members[0].Run)
	d := dumpOf(t, first)
	if d.Volume != "shop.sql" || d.Pod != "ledger-0" {
		t.Errorf("the dump is %+v", d)
	}
	second := s.waitBackup(g.Members[1].Run)
	if len(second.Status.Dumps) > 0 {
		t.Errorf("the second run has dumped too: %+v", second.Status.Dumps)
	}
	listed := s.listedGroup(bucket, g.ID)
	volumes := []string{name + "/data-ledger-0", name + "/files", name + "/shop.sql"}
	if !listed.Complete || !slices.Equal(listed.Members, volumes) || len(listed.Points) != 3 {
		t.Errorf("it is listed as %+v", listed)
	}
	want := map[string]string{"data-ledger-0": first.Status.Point.ID, "files": second.Status.Point.ID, "shop.sql": d.Point.ID}
	for _, p := range listed.Points {
		if want[p.Volume] != p.ID {
			t.Errorf("the member of %s is point %s, want %s", p.Volume, p.ID, want[p.Volume])
		}
	}

	s.Exec("ledger-0", "createdb -h /tmp -U postgres fresh")
	s.feed("fresh", v1alpha1.DumpRestoreSpec{StoreRef: v1alpha1.StoreReference{Name: name},
		From: v1alpha1.RecoveryFrom{Volume: d.Volume}, At: v1alpha1.RecoveryAt{ID: d.Point.ID},
		Into: v1alpha1.DumpRestoreInto{PodSelector: app,
			Command: "psql -q -o /dev/null -v ON_ERROR_STOP=1 --single-transaction -h /tmp -U postgres fresh"}})
	rows := `psql -h /tmp -U postgres -At -c "` + fmt.Sprintf(rowsUpTo, 1<<30) + `" `
	if was, is := s.Exec("ledger-0", rows+"postgres"), s.Exec("ledger-0", rows+"fresh"); was != is || !strings.HasPrefix(was, "2000|") {
		t.Errorf("the rows were %s and are %s", was, is)
	}

	group := func(runs string, onError v1alpha1.HookOnError) []string {
		return s.backupGroup(runs, func(vb *v1alpha1.VolumeBackup) {
			vb.Spec.StoreRef.Name = name
			vb.Spec.Hooks = hook(dump+" | head -c 100; echo out of rows >&2; false", onError)
		}, "data-ledger-0", "files")
	}
	runs := group("fail", v1alpha1.HookFail)
	failed := s.waitFailed(runs[0], v1alpha1.ReasonHookFailed)
	if said := says(failed.Status.Conditions); !strings.Contains(said, "out of rows") {
		t.Errorf("it says %s", said)
	}
	other := s.waitFailed(runs[1], v1alpha1.ReasonGroupFailed)
	if failed.Status.Point != nil || other.Status.Point != nil {
		t.Errorf("there are the points %+v and %+v", failed.Status.Point, other.Status.Point)
	}

	runs = group("continue", v1alpha1.HookContinue)
	one, two := s.waitBackup(runs[0]), s.waitBackup(runs[1])
	if ds := one.Status.Dumps; len(ds) != 1 || ds[0].State != v1alpha1.DumpFailed || ds[0].Point != nil || !strings.Contains(ds[0].Message, "out of rows") {
		t.Errorf("the dump is %+v", ds)
	}
	part := s.listedGroup(bucket, one.Spec.Group.ID)
	if part.Complete || len(part.Points) != 2 || !slices.Equal(part.Missing, []string{name + "/clock.sql"}) || two.Spec.Group.ID != part.ID {
		t.Errorf("without its dump the group is listed as %+v", part)
	}
}

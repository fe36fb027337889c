package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/framework"
)

// mayExec lets the controller run hooks in the test's namespace, as docs/kubernetes.md says.
func (s *site) mayExec() {
	s.T.Helper()
	s.Create(&rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "varve-hooks"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "varve-hooks"},
		Subjects:   []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: varveNamespace, Name: controllerName}},
	})
}

// noSnapshots prevents snapshots of the test's namespace until it is undone.
func (s *site) noSnapshots() (undo func()) {
	s.T.Helper()
	const of = "count/volumesnapshots.snapshot.storage.k8s.io"
	quota := &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: "no-snapshots"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{of: resource.MustParse("0")}},
	}
	s.Create(quota)
	s.Eventually("the quota", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKeyFromObject(quota), quota); err != nil {
			return err
		}
		if _, known := quota.Status.Hard[of]; !known {
			return errors.New("it does not hold yet")
		}
		return nil
	})
	return func() { s.Delete(quota) }
}

// waitCut waits until a run holds its applications and waits for its snapshot.
func (s *site) waitCut(name string) *v1alpha1.VolumeBackup {
	s.T.Helper()
	vb := &v1alpha1.VolumeBackup{}
	s.Eventually("run "+name+" to hold", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, s.Key(name), vb); err != nil {
			return err
		}
		if vb.Status.CompletionTime != nil {
			s.T.Fatalf("it has ended: %s", says(vb.Status.Conditions))
		}
		if vb.Status.Step != "Cut" {
			return fmt.Errorf("it is at %q: %s", vb.Status.Step, says(vb.Status.Conditions))
		}
		return nil
	})
	return vb
}

// longHold is the limit of holds that last until the test has done something: on a busy machine that may take
// longer than the minute of the default.
var longHold = &metav1.Duration{Duration: 5 * time.Minute}

// stateHook freezes and thaws a file, /tmp/state.
func stateHook() v1alpha1.Hook {
	return v1alpha1.Hook{Name: "state", Command: &v1alpha1.HookCommand{
		Freeze: "echo frozen >/tmp/state", Thaw: "echo thawed >/tmp/state", Check: "grep -q frozen /tmp/state"}}
}

// waitState waits until the file of stateHook has a state, without Kubernetes.
func (s *site) waitState(pod *corev1.Pod, want string) {
	s.T.Helper()
	s.Eventually("the application to be "+want, func(context.Context) error {
		text, err := s.ReadFile(pod, "/tmp/state")
		if err == nil && strings.TrimSpace(text) != want {
			err = fmt.Errorf("it is %s", text)
		}
		return err
	})
}

// consistent returns a run's condition of its hooks.
func consistent(vb *v1alpha1.VolumeBackup) string {
	c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionConsistent)
	if c == nil {
		return "nothing"
	}
	return fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
}

// A database under load is held by one session across the cut, and the restored one has each row
// that was acknowledged while it was held.
func TestHookPostgres(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.importPostgres()
	name := s.Namespace
	old, fresh := name+"-old", name+"-new"
	s.store(name, s.bucket("hook-"+name[len(name)-6:]), func(bs *v1alpha1.BackupStore) {
		bs.Spec.RestoreGrants = []v1alpha1.RestoreGrant{{From: old, To: []string{fresh}}}
	})
	here := s.in(old)
	here.mayExec()
	here.source("ledger", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.IfNone = name, v1alpha1.IfNoneEmpty
	})
	here.apply(ledger)
	here.WaitReady("ledger-0")
	here.sql(makeRows)
	here.Exec("ledger-0", fmt.Sprintf(addRows, 1, 20000))
	here.Exec("ledger-0", load)
	undo := here.noSnapshots()
	here.startBackup("run", "data-ledger-0", func(vb *v1alpha1.VolumeBackup) {
		vb.Spec.StoreRef.Name = name
		vb.Spec.Hooks = []v1alpha1.Hook{{Name: "ledger", Recipe: v1alpha1.HookPostgreSQL, TimeLimit: longHold, Parameters: map[string]string{"connection": "host=/tmp user=postgres"}}}
	})
	here.waitCut("run")
	var marked int64
	if _, err := fmt.Sscan(here.sql("select max(id) from ledger"), &marked); err != nil {
		t.Fatal(err)
	}
	undo()
	vb := here.waitBackup("run")
	h := vb.Status.Hold
	if vb.Status.Point.Consistent == nil || !*vb.Status.Point.Consistent || !strings.HasPrefix(consistent(vb), "True Held") || h == nil || len(h.Members) != 1 {
		t.Fatalf("%s, %+v", consistent(vb), h)
	}
	m := h.Members[0]
	if m.Pod != "ledger-0" || m.FrozenAt == nil || m.HeldMilliseconds <= 0 || !m.Proven || !strings.Contains(m.Notes["backup_label"], "START WAL LOCATION") {
		t.Errorf("it held %+v", m)
	}
	t.Logf("held for %d ms, up to row %d", m.HeldMilliseconds, marked)
	var list v1alpha1.ProtectedVolumeList
	if err := here.Client.List(t.Context(), &list, inNamespace(here)); err != nil || len(list.Items) != 1 || list.Items[0].Status.LastConsistent == nil {
		t.Errorf("the ProtectedVolume says %+v, %v", list.Items, err)
	}
	here.Delete(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: old}})

	there := s.in(fresh)
	there.source("ledger", func(rs *v1alpha1.RecoverySource) {
		rs.Spec.StoreRef.Name, rs.Spec.From.Namespace = name, old
	})
	there.apply(ledger)
	there.WaitReady("ledger-0")
	checkLedger(t, there.sql(checkRows), marked)
}

// Any process that a hold depends on is killed: the application thaws, and the run makes no point.
func TestHookFaults(t *testing.T) {
	s := newSite(t) // not in parallel: it kills the controller, the API server and the kubelet
	s.mayExec()
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	pod := s.RunPod(framework.Pod{Name: "app", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	undo := s.noSnapshots()
	hook := stateHook()
	held := func(name string) {
		t.Helper()
		s.startBackup(name, "data", func(vb *v1alpha1.VolumeBackup) { vb.Spec.Hooks = []v1alpha1.Hook{hook} })
		s.waitCut(name)
		s.waitState(pod, "frozen")
	}

	held("kubelet")
	start := s.KillKubelet(pod)
	s.waitState(pod, "thawed")
	start()
	s.waitFailed("kubelet", v1alpha1.ReasonHookFailed)

	held("controller")
	s.killControllers()
	s.waitState(pod, "thawed")
	s.waitFailed("controller", v1alpha1.ReasonHoldLost)

	held("api-server")
	start = s.StopAPIServer()
	s.waitState(pod, "thawed")
	start()
	vb := s.waitEnd("api-server")
	if c := meta.FindStatusCondition(vb.Status.Conditions, v1alpha1.ConditionFailed); vb.Status.Phase != v1alpha1.BackupFailed || c == nil {
		t.Errorf("it is %s: %s", vb.Status.Phase, says(vb.Status.Conditions))
	}

	// It is proven only if the application confirms it after the cut.
	hook.Command.Check, hook.TimeLimit = "false", longHold
	held("check")
	undo()
	s.waitState(pod, "thawed")
	s.waitFailed("check", v1alpha1.ReasonHookFailed)
	hook = stateHook()
	s.startBackup("good", "data", func(vb *v1alpha1.VolumeBackup) { vb.Spec.Hooks = []v1alpha1.Hook{hook} })
	if vb := s.waitBackup("good"); !strings.HasPrefix(consistent(vb), "True") {
		t.Error(consistent(vb))
	}
	s.waitState(pod, "thawed")
}

// A user who may back up but not exec can set no hooks, not in a policy either; and the
// controller runs none if it may not exec, and says so, also of a policy.
func TestHookRights(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const tenant = "tenant"
	s.Create(&rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: tenant}, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{"varve.io"}, Resources: []string{"volumebackups", "backuppolicies"}, Verbs: []string{"get", "create", "update"}}}})
	s.Create(&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: tenant},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: tenant},
		Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: tenant}}})
	cfg := rest.CopyConfig(s.Config)
	cfg.Impersonate = rest.ImpersonationConfig{UserName: tenant}
	as, err := client.New(cfg, client.Options{Scheme: s.Client.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	policy := func(name string, hooks ...v1alpha1.Hook) *v1alpha1.BackupPolicy {
		return &v1alpha1.BackupPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}, Spec: v1alpha1.BackupPolicySpec{
			StoreRef: v1alpha1.StoreReference{Name: mainStore}, Schedule: v1alpha1.Schedule{Cron: "0 0 1 1 *"}, Hooks: hooks}}
	}
	run := func(name string, hooks ...v1alpha1.Hook) *v1alpha1.VolumeBackup {
		return &v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: name}, Spec: v1alpha1.VolumeBackupSpec{
			ClaimName: "data", StoreRef: v1alpha1.StoreReference{Name: mainStore}, Hooks: hooks}}
	}
	refusedBy := func(what string, err error) {
		t.Helper()
		if err == nil || !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "may not create pods/exec") {
			t.Errorf("%s: %v", what, err)
		}
	}
	s.Eventually("the tenant's rights", func(ctx context.Context) error { return as.Create(ctx, policy("plain")) })
	s.Eventually("the admission policy", func(ctx context.Context) error {
		if err := as.Create(ctx, policy("hooked", stateHook())); err == nil {
			return errors.Join(errors.New("it does not hold yet"), s.Client.Delete(ctx, policy("hooked")))
		}
		return nil
	})
	refusedBy("a policy", as.Create(t.Context(), policy("hooked", stateHook())))
	refusedBy("a run", as.Create(t.Context(), run("hooked", stateHook())))
	// The controller also writes to policies.
	update := func(name string, change func(bp *v1alpha1.BackupPolicy)) error {
		return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
			var bp v1alpha1.BackupPolicy
			if err := as.Get(t.Context(), s.Key(name), &bp); err != nil {
				return err
			}
			change(&bp)
			return as.Update(t.Context(), &bp)
		})
	}
	refusedBy("a change", update("plain", func(bp *v1alpha1.BackupPolicy) { bp.Spec.Hooks = []v1alpha1.Hook{stateHook()} }))
	// The tenant may relabel one that another user made, but not change it.
	s.Create(policy("others", stateHook()))
	if err := update("others", func(bp *v1alpha1.BackupPolicy) { bp.Labels = map[string]string{"a": "b"} }); err != nil {
		t.Errorf("a label: %v", err)
	}
	refusedBy("a change of another's", update("others", func(bp *v1alpha1.BackupPolicy) { bp.Spec.Hooks[0].Command.Freeze = "id" }))
	if err := as.Create(t.Context(), run("plain")); err != nil {
		t.Errorf("without hooks: %v", err)
	}

	// The administrator may; here the controller may not.
	s.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "16Mi"})
	s.RunPod(framework.Pod{Name: "app", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	s.Create(run("forbidden", stateHook()))
	vb := s.waitFailed("forbidden", v1alpha1.ReasonHookForbidden)
	if said := says(vb.Status.Conditions); !strings.Contains(said, "create rolebinding varve-hooks") {
		t.Error(said)
	}
	due := policy("due", stateHook())
	due.Spec.Schedule.Cron = "* * * * *"
	s.Create(due)
	s.Eventually("the policy to say that its runs are refused", func(ctx context.Context) error {
		if err := s.Client.Get(ctx, client.ObjectKeyFromObject(due), due); err != nil {
			return err
		}
		said := says(due.Status.Conditions)
		if !strings.Contains(said, v1alpha1.ReasonHookForbidden) || !strings.Contains(said, "create rolebinding varve-hooks") {
			return errors.New(said)
		}
		return nil
	})
}

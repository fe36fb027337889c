package policies

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/backups"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

var (
	began   = at("2026-11-21T00:30:00Z")
	mainRef = v1alpha1.StoreReference{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}
)

func created(name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(began)}
}

func newClaim(name string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: created(name), Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}}
}

func newPolicy(name, cron string) *v1alpha1.BackupPolicy {
	return &v1alpha1.BackupPolicy{ObjectMeta: created(name), Spec: v1alpha1.BackupPolicySpec{StoreRef: mainRef, Schedule: v1alpha1.Schedule{Cron: cron}}}
}

// newReconciler returns one whose time is now.
func newReconciler(t *testing.T, now *time.Time, objects ...client.Object) *Reconciler {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(s).WithStatusSubresource(&v1alpha1.BackupPolicy{}, &v1alpha1.ProtectedVolume{}, &v1alpha1.VolumeBackup{}).
		WithObjects(objects...).Build()
	return &Reconciler{
		Client: c, Live: c, Stores: &store.Stores{Client: c, Secrets: c, Namespace: "varve"},
		Events: report.NewEvents(record.NewFakeRecorder(100)), Now: func() time.Time { return *now },
	}
}

// look reconciles a policy, and returns when it is checked again and why not before.
func (p *Reconciler) look(t *testing.T, name string) (time.Duration, *metav1.Condition) {
	t.Helper()
	key := types.NamespacedName{Namespace: "shop", Name: name}
	res, err := p.Reconcile(t.Context(), reconcile.Request{NamespacedName: key})
	if err != nil {
		t.Fatal(err)
	}
	var policy v1alpha1.BackupPolicy
	if err := p.Live.Get(t.Context(), key, &policy); err != nil {
		t.Fatal(err)
	}
	return res.RequeueAfter, meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady)
}

func (p *Reconciler) runs(t *testing.T) []v1alpha1.VolumeBackup {
	t.Helper()
	var list v1alpha1.VolumeBackupList
	if err := p.Live.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func backupStore() *v1alpha1.BackupStore {
	return &v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main"}}
}

// A store that is applied after its policy is found soon.
func TestStoreThatComesLater(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	p := newReconciler(t, &now, newPolicy("hourly", "0 * * * *"), newClaim("data"))
	after, c := p.look(t, "hourly")
	if c.Reason != v1alpha1.ReasonStoreNotFound || after != retryStore {
		t.Errorf("without the store: looked at after %v, %v", after, c)
	}
	if err := p.Client.Create(t.Context(), backupStore()); err != nil {
		t.Fatal(err)
	}
	if _, c := p.look(t, "hourly"); c.Status != metav1.ConditionTrue || len(p.runs(t)) != 1 {
		t.Errorf("with it: %v, %d runs", c, len(p.runs(t)))
	}
}

// A full backup is made in time even if no full one is known.
func TestFullEvery(t *testing.T) {
	for _, tc := range []struct {
		name     string
		lastFull *metav1.Time
		now      string
		want     v1alpha1.BackupType
	}{
		{"known and young", &metav1.Time{Time: at("2026-11-22T00:00:00Z")}, "2026-11-22T12:00:00Z", v1alpha1.BackupTypeAuto},
		{"known and old", &metav1.Time{Time: at("2026-11-21T00:00:00Z")}, "2026-11-22T12:00:00Z", v1alpha1.BackupTypeFull},
		{"unknown and young", nil, "2026-11-21T12:00:00Z", v1alpha1.BackupTypeAuto},
		{"unknown and old", nil, "2026-11-22T12:00:00Z", v1alpha1.BackupTypeFull},
	} {
		now := at(tc.now)
		policy := newPolicy("hourly", "0 * * * *")
		policy.Spec.FullEvery = &metav1.Duration{Duration: 24 * time.Hour}
		pv := &v1alpha1.ProtectedVolume{ObjectMeta: created(backups.ProtectedVolumeName("data", mainRef)), Spec: v1alpha1.ProtectedVolumeSpec{ClaimName: "data", StoreRef: mainRef}}
		pv.Status.LastFull = tc.lastFull
		p := newReconciler(t, &now, policy, newClaim("data"), backupStore(), pv)
		p.look(t, "hourly")
		if runs := p.runs(t); len(runs) != 1 || runs[0].Spec.Type != tc.want {
			t.Errorf("%s: %v, want one of type %s", tc.name, runs, tc.want)
		}
	}
}

// Claims with long names that differ only at the end have separate runs.
func TestLongNames(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	long := strings.Repeat("x", 230)
	p := newReconciler(t, &now, newPolicy("hourly", "0 * * * *"), newClaim(long+"-a"), newClaim(long+"-b"), backupStore())
	p.look(t, "hourly")
	if n := len(p.runs(t)); n != 2 {
		t.Errorf("%d runs for two claims", n)
	}
	for _, r := range p.runs(t) {
		if len(r.Name) > 253 {
			t.Errorf("a name of %d bytes", len(r.Name))
		}
	}
}

// A policy that cannot run does not keep another from a claim.
func TestOverlaps(t *testing.T) {
	now := at("2026-11-21T01:05:00Z")
	for name, tc := range map[string]struct {
		spoil func(*v1alpha1.BackupPolicySpec)
		want  string
	}{
		"one that runs": {func(*v1alpha1.BackupPolicySpec) {}, v1alpha1.ReasonOverlaps},
		"schedule":      {func(s *v1alpha1.BackupPolicySpec) { s.Schedule.Cron = "nonsense" }, v1alpha1.ReasonScheduled},
		"selector": {func(s *v1alpha1.BackupPolicySpec) {
			s.Selector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Like"}}}
		}, v1alpha1.ReasonScheduled},
		"retention": {func(s *v1alpha1.BackupPolicySpec) {
			s.Retention = &v1alpha1.Retention{Within: &metav1.Duration{Duration: -time.Hour}}
		}, v1alpha1.ReasonScheduled},
	} {
		first := newPolicy("a", "0 * * * *")
		tc.spoil(&first.Spec)
		p := newReconciler(t, &now, first, newPolicy("b", "0 * * * *"), newClaim("data"), backupStore())
		if _, c := p.look(t, "b"); c.Reason != tc.want {
			t.Errorf("%s: %v, want %s", name, c, tc.want)
		}
		if _, c := p.look(t, "a"); (c.Reason == v1alpha1.ReasonInvalidSpec) != (tc.want == v1alpha1.ReasonScheduled) {
			t.Errorf("%s: the policy itself is %v", name, c)
		}
	}
}

// Few runs of a policy are kept; those made by hand are left.
func TestRunsAreThinned(t *testing.T) {
	now := at("2026-11-21T20:05:00Z")
	p := newReconciler(t, &now, newPolicy("hourly", "0 * * * *"), newClaim("data"), backupStore())
	for i := range 12 {
		vb := &v1alpha1.VolumeBackup{ObjectMeta: created(fmt.Sprint("run-", i)), Spec: v1alpha1.VolumeBackupSpec{ClaimName: "data", StoreRef: mainRef}}
		done := metav1.NewTime(began.Add(time.Duration(i) * time.Hour))
		if i%2 == 0 {
			vb.Labels = map[string]string{LabelPolicy: "hourly"}
		}
		if err := p.Client.Create(t.Context(), vb); err != nil {
			t.Fatal(err)
		}
		vb.Status.CompletionTime = &done
		if err := p.Client.Status().Update(t.Context(), vb); err != nil {
			t.Fatal(err)
		}
	}
	p.look(t, "hourly")
	left := map[string]bool{}
	for _, r := range p.runs(t) {
		left[r.Name] = true
	}
	if len(left) != 12 || left["run-0"] || !left["run-1"] || !left["run-2"] {
		t.Errorf("left are %v, want the newest five of the policy, the six by hand, and the new one", left)
	}
}

// A retained snapshot is dropped by the policies that cover its claim, no others.
func TestMaxBaseAge(t *testing.T) {
	for _, tc := range []struct {
		name     string
		selector map[string]string
		store    v1alpha1.StoreReference
		kept     bool
	}{
		{"its own", nil, mainRef, false},
		{"of other claims", map[string]string{"a": "b"}, mainRef, true},
		{"of a Repository of the same name", nil, v1alpha1.StoreReference{Kind: v1alpha1.StoreKindRepository, Name: "main"}, true},
	} {
		now := began.Add(100 * time.Hour)
		policy := newPolicy("hourly", "0 * * * *")
		policy.Spec.StoreRef, policy.Spec.MaxBaseAge = tc.store, &metav1.Duration{Duration: 10 * time.Hour}
		policy.Spec.Selector = &metav1.LabelSelector{MatchLabels: tc.selector}
		pv := &v1alpha1.ProtectedVolume{ObjectMeta: created("pv"), Spec: v1alpha1.ProtectedVolumeSpec{ClaimName: "data", StoreRef: mainRef}}
		pv.Status.Base = &v1alpha1.BaseSnapshot{Name: "snap", Time: metav1.NewTime(began)}
		p := newReconciler(t, &now, policy, newClaim("data"), pv)
		key := client.ObjectKeyFromObject(pv)
		if _, err := (&Watch{Reconciler: p}).Reconcile(t.Context(), reconcile.Request{NamespacedName: key}); err != nil {
			t.Fatal(err)
		}
		if err := p.Live.Get(t.Context(), key, pv); err != nil {
			t.Fatal(err)
		}
		if (pv.Status.Base != nil) != tc.kept {
			t.Errorf("%s: base %v", tc.name, pv.Status.Base)
		}
	}
}

// A claim that no policy covers any more has no next run, and does not hold a snapshot in
// the storage forever. One that was only backed up by hand keeps it for the next time.
func TestWithoutPolicy(t *testing.T) {
	was := metav1.NewTime(began)
	other, paused := newPolicy("hourly", "0 * * * *"), newPolicy("hourly", "0 * * * *")
	other.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}
	paused.Spec.Paused = true
	for _, tc := range []struct {
		name          string
		policy        *v1alpha1.BackupPolicy
		scheduled     *metav1.Time
		age           time.Duration
		nextRun, base bool
	}{
		{"covered", newPolicy("hourly", "0 * * * *"), &was, 1000 * time.Hour, true, true},
		{"paused", paused, &was, 1000 * time.Hour, false, true},
		{"not covered for a day", other, &was, 24 * time.Hour, false, true},
		{"not covered for long", other, &was, unscheduledBaseAge + time.Hour, false, false},
		{"never scheduled", other, nil, 1000 * time.Hour, false, true},
	} {
		now := began.Add(tc.age)
		pv := &v1alpha1.ProtectedVolume{ObjectMeta: created("pv"), Spec: v1alpha1.ProtectedVolumeSpec{ClaimName: "data", StoreRef: mainRef}}
		pv.Status.Base = &v1alpha1.BaseSnapshot{Name: "snap", Time: was}
		pv.Status.LastScheduled, pv.Status.NextRun = tc.scheduled, &was
		p := newReconciler(t, &now, tc.policy, newClaim("data"), pv)
		key := client.ObjectKeyFromObject(pv)
		res, err := (&Watch{Reconciler: p}).Reconcile(t.Context(), reconcile.Request{NamespacedName: key})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Live.Get(t.Context(), key, pv); err != nil {
			t.Fatal(err)
		}
		if (pv.Status.NextRun != nil) != tc.nextRun || (pv.Status.Base != nil) != tc.base {
			t.Errorf("%s: next run %v, base %v", tc.name, pv.Status.NextRun, pv.Status.Base)
		}
		if tc.name == "not covered for a day" && res.RequeueAfter != unscheduledBaseAge-tc.age {
			t.Errorf("%s: looked at again after %v", tc.name, res.RequeueAfter)
		}
	}
}

package storekeeper

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/metrics"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

var mainKey = store.Key{Kind: v1alpha1.StoreKindBackupStore, Name: "main"}

// newKeeper makes BackupStore main on a directory, and a tenant's Repository own in namespace shop.
func newKeeper(t *testing.T, objects ...client.Object) (client.WithWatch, *Keeper, *time.Time) {
	t.Helper()
	s := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(s), batchv1.AddToScheme(s), v1alpha1.AddToScheme(s)); err != nil {
		t.Fatal(err)
	}
	now := time.Now().Truncate(time.Second)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "nfs"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(s).WithStatusSubresource(&v1alpha1.BackupStore{}, &v1alpha1.Repository{}).WithObjects(
		&v1alpha1.BackupStore{ObjectMeta: metav1.ObjectMeta{Name: "main", UID: "main", CreationTimestamp: metav1.NewTime(now)}, Spec: v1alpha1.BackupStoreSpec{RepositorySpec: v1alpha1.RepositorySpec{
			Storage: v1alpha1.Storage{Volume: &v1alpha1.VolumeStorage{ClaimName: "nfs", Path: "repo"}}, ClusterName: "here",
			CredentialsSecretRef: corev1.LocalObjectReference{Name: "creds"}}}},
		&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "creds"}, Data: map[string][]byte{"password": []byte("secret")}},
	).WithObjects(objects...).
		WithIndex(&corev1.Event{}, "involvedObject.uid", func(o client.Object) []string { return []string{string(o.(*corev1.Event).InvolvedObject.UID)} }).
		WithIndex(&corev1.Event{}, "reason", func(o client.Object) []string { return []string{o.(*corev1.Event).Reason} }).Build()
	count, err := metrics.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return c, &Keeper{
		Client: c, Live: c, Pods: mover.Pods{Namespace: "varve", Image: "varve"}, Events: report.NewEvents(record.NewFakeRecorder(100)), Metrics: count,
		Stores:        &store.Stores{Client: c, Secrets: c, Namespace: "varve", Dir: t.TempDir(), VolumesDir: dir},
		MaintainEvery: 6 * time.Hour, Now: func() time.Time { return now },
	}, &now
}

func (k *Keeper) reconcileMain(t *testing.T) v1alpha1.RepositoryStatus {
	t.Helper()
	if _, err := k.Reconcile(t.Context(), mainKey); err != nil {
		t.Fatal(err)
	}
	var o v1alpha1.BackupStore
	if err := k.Client.Get(t.Context(), client.ObjectKey{Name: "main"}, &o); err != nil {
		t.Fatal(err)
	}
	return o.Status
}

func TestStoreIsMadeAndKept(t *testing.T) {
	_, k, _ := newKeeper(t)
	s := k.reconcileMain(t)
	if !meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionReady) || s.UniqueID == "" || s.LastContact == nil {
		t.Fatalf("status %+v", s)
	}
	// A process that finds a recent check also reports the store as reachable.
	_, again, _ := newKeeper(t)
	again.Client, again.Live = k.Client, k.Live
	registry := prometheus.NewRegistry()
	count, err := metrics.New(registry)
	if err != nil {
		t.Fatal(err)
	}
	again.Metrics = count
	again.reconcileMain(t)
	if n, err := testutil.GatherAndCount(registry, "varve_repository_reachable"); n != 1 || err != nil {
		t.Errorf("varve_repository_reachable has %d series (%v), want 1", n, err)
	}
	// A repository that was seen and is missing is not made again, which would look like
	// a store without any points.
	if err := os.RemoveAll(filepath.Join(k.Stores.VolumesDir, "nfs", "repo")); err != nil {
		t.Fatal(err)
	}
	var o v1alpha1.BackupStore
	if err := k.Client.Get(t.Context(), client.ObjectKey{Name: "main"}, &o); err != nil {
		t.Fatal(err)
	}
	o.Status.LastContact = nil
	if err := k.Client.Status().Update(t.Context(), &o); err != nil {
		t.Fatal(err)
	}
	if c := meta.FindStatusCondition(k.reconcileMain(t).Conditions, v1alpha1.ConditionReady); c.Status != metav1.ConditionFalse || c.Reason != v1alpha1.ReasonRepositoryUnreachable {
		t.Errorf("of a repository that is gone: %+v", c)
	}
}

// end ends the store's maintenance Job with a result.
func end(t *testing.T, c client.Client, key store.Key, r mover.Result) {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "pod", Labels: map[string]string{batchv1.JobNameLabel: jobName(key)}},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{
			Terminated: &corev1.ContainerStateTerminated{Message: string(r.Encode())}}}}},
	}
	if err := c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
}

func TestMaintenance(t *testing.T) {
	c, k, now := newKeeper(t)
	job := func() error {
		return c.Get(t.Context(), client.ObjectKey{Namespace: "varve", Name: jobName(mainKey)}, &batchv1.Job{})
	}
	k.reconcileMain(t)
	if err := job(); !apierrors.IsNotFound(err) {
		t.Fatalf("it is maintained before it is due: %v", err)
	}
	*now = now.Add(7 * time.Hour)
	k.reconcileMain(t)
	if err := job(); err != nil {
		t.Fatal(err)
	}
	end(t, c, mainKey, mover.Result{Reason: v1alpha1.ReasonMoverFailed, Message: "no", Again: true})
	s := k.reconcileMain(t)
	if s.LastMaintenance != nil || s.RetryMaintenance == nil || meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionMaintained) {
		t.Errorf("after one that failed: %+v", s)
	}
	if err := job(); !apierrors.IsNotFound(err) {
		t.Fatalf("the Job that failed is still there: %v", err)
	}
	if err := c.DeleteAllOf(t.Context(), &corev1.Pod{}, client.InNamespace("varve")); err != nil {
		t.Fatal(err)
	}
	*now = now.Add(retryMaintenance + time.Second)
	k.reconcileMain(t)
	end(t, c, mainKey, mover.Result{OK: true})
	s = k.reconcileMain(t)
	if s.LastMaintenance == nil || !s.LastMaintenance.Time.Equal(*now) || s.RetryMaintenance != nil || !meta.IsStatusConditionTrue(s.Conditions, v1alpha1.ConditionMaintained) {
		t.Errorf("after one that went well: %+v", s)
	}
}

// A maintenance whose pod does not start counts as failed, and is retried.
func TestMaintenanceThatDoesNotStart(t *testing.T) {
	c, k, now := newKeeper(t)
	key := client.ObjectKey{Namespace: "varve", Name: jobName(mainKey)}
	if err := c.Create(t.Context(), &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name, CreationTimestamp: metav1.NewTime(*now)}}); err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "pod", Labels: map[string]string{batchv1.JobNameLabel: key.Name}},
		Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{
			Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}}}},
	}
	if err := c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	*now = now.Add(startPatience - time.Minute)
	if s := k.reconcileMain(t); meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionMaintained) != nil {
		t.Fatalf("given up too early: %+v", s.Conditions)
	}
	*now = now.Add(2 * time.Minute)
	s := k.reconcileMain(t)
	is := meta.FindStatusCondition(s.Conditions, v1alpha1.ConditionMaintained)
	if is == nil || is.Status != metav1.ConditionFalse || !strings.Contains(is.Message, "ImagePullBackOff no such image") || s.RetryMaintenance == nil {
		t.Errorf("condition %+v, tried again at %v", is, s.RetryMaintenance)
	}
	if err := c.Get(t.Context(), key, &batchv1.Job{}); !apierrors.IsNotFound(err) {
		t.Fatalf("the Job is still there: %v", err)
	}
	*now = now.Add(retryMaintenance + time.Second)
	k.reconcileMain(t)
	if err := c.Get(t.Context(), key, &batchv1.Job{}); err != nil {
		t.Errorf("it is not tried again: %v", err)
	}
}

// An event reports a maintenance whose Job or pod the API server rejects.
func TestRefusedMaintenanceIsTold(t *testing.T) {
	pod := []client.Object{
		&batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: jobName(mainKey), UID: "job", CreationTimestamp: metav1.Now()}},
		&corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: "varve", Name: "e"}, InvolvedObject: corev1.ObjectReference{UID: "job"},
			Reason: "FailedCreate", Message: "Error creating: pods \"x\" is forbidden: exceeded quota"},
	}
	for name, tc := range map[string]struct {
		objects []client.Object
		jobs    bool // are refused
	}{"pod": {pod, false}, "job": {nil, true}} {
		c, k, now := newKeeper(t, tc.objects...)
		events := record.NewFakeRecorder(10)
		k.Events = report.NewEvents(events)
		if tc.jobs {
			*now = now.Add(7 * time.Hour) // it is due
			k.Client = interceptor.NewClient(c, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				if _, is := o.(*batchv1.Job); is {
					return apierrors.NewForbidden(batchv1.Resource("jobs"), o.GetName(), errors.New("exceeded quota"))
				}
				return c.Create(ctx, o, opts...)
			}})
		}
		if _, err := k.Reconcile(t.Context(), mainKey); (err != nil) != tc.jobs {
			t.Errorf("%s: %v", name, err)
		}
		if len(events.Events) != 1 {
			t.Fatalf("%s: %d events", name, len(events.Events))
		}
		if said := <-events.Events; !strings.HasPrefix(said, "Warning MoverWaits maintenance does not start: ") || !strings.Contains(said, "exceeded quota") {
			t.Errorf("%s: %s", name, said)
		}
	}
}

// The copy of a tenant's credentials does not outlive the tenant's Repository.
func TestDeletedRepositoryLeavesNothing(t *testing.T) {
	key := store.Key{Kind: v1alpha1.StoreKindRepository, Namespace: "shop", Name: "own"}
	here := metav1.ObjectMeta{Namespace: "varve", Name: jobName(key)}
	c, k, _ := newKeeper(t, &batchv1.Job{ObjectMeta: here}, &corev1.Secret{ObjectMeta: here})
	if _, err := k.Reconcile(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	for _, o := range []client.Object{&batchv1.Job{}, &corev1.Secret{}} {
		if err := c.Get(t.Context(), client.ObjectKey{Namespace: here.Namespace, Name: here.Name}, o); !apierrors.IsNotFound(err) {
			t.Errorf("%T is still there: %v", o, err)
		}
	}
}

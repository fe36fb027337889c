package claims

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
	"github.com/varve-io/varve/populator/store"
)

// PodMovers implements Movers with package mover.
type PodMovers struct {
	Pods   mover.Pods
	Stores *store.Stores
	Live   client.Reader
	Logs   mover.Logs
	Log    *slog.Logger // nil for nothing
}

var _ Movers = PodMovers{}

// Job implements Movers. The Secret of a tenant's Repository is copied for the run: pods
// can only mount those of their namespace.
func (m PodMovers) Job(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation, name, prime string) (*batchv1.Job, error) {
	st, err := m.Stores.Get(ctx, pop.Spec.StoreRef, pop.Spec.StoreNamespace)
	if err != nil {
		return nil, fmt.Errorf("store of %s: %w", pop.Name, err)
	}
	labels := mover.RunLabels(rolePopulate, pop.UID)
	labels[LabelPopulation] = pop.Name
	owner := map[string]string{AnnotationClaim: pop.Spec.Claim.Namespace + "/" + pop.Spec.Claim.Name, mover.AnnotationOwner: "VolumePopulation/" + pop.Namespace + "/" + pop.Name}
	secret, err := mover.EnsureSecret(ctx, c, m.Stores, st, m.Pods.Namespace, credentialsName(pop), labels, owner)
	if err != nil {
		return nil, err
	}
	return m.Pods.Build(mover.Job{
		Name: name, Labels: labels, Annotations: owner,
		Task:   mover.Task{Action: mover.ActionRestore, Store: st.Settings(), Restore: &mover.RestoreTask{PointID: pop.Spec.PointID, Delta: inPlace(pop)}},
		Secret: secret, Device: prime, StoreVolume: st.Spec.Storage.Volume,
		Proxy: st.Spec.Proxy, ServiceAccount: st.Spec.ServiceAccountName,
	})
}

const rolePopulate = "populate"

func credentialsName(pop *v1alpha1.VolumePopulation) string {
	return "store-" + string(owner(pop))
}

// Release implements Movers.
func (m PodMovers) Release(ctx context.Context, c client.Client, pop *v1alpha1.VolumePopulation) error {
	if pop.Spec.StoreRef.Kind != v1alpha1.StoreKindRepository {
		return nil
	}
	err := c.Delete(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: m.Pods.Namespace, Name: credentialsName(pop)}})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete credentials of %s: %w", pop.Name, err)
	}
	return nil
}

// Outcome implements Movers.
func (m PodMovers) Outcome(ctx context.Context, job *batchv1.Job) (Outcome, error) {
	s, err := mover.Look(ctx, m.Live, cmp.Or(m.Log, slog.New(slog.DiscardHandler)), job.Namespace, job.Name)
	if err != nil {
		return Outcome{}, err
	}
	out := Outcome{Percent: -1, Message: s.Waiting, Refused: s.Refused}
	switch s.Phase {
	case mover.Running:
		out.Percent = 0
		// The log is only for display; without it there is no percentage.
		if tail, err := m.Logs.Tail(ctx, job.Namespace, s.Pod); err == nil {
			out.Percent = percent(tail)
			p, _ := mover.LastProgress(tail)
			out.Phase, out.At = p.Phase, fmt.Sprint(p)
		}
	case mover.Ended:
		r := s.Result
		out.State, out.Reason, out.Message = Failed, r.Reason, r.Message
		if out.Reason == "" {
			out.Reason = v1alpha1.ReasonMoverFailed
		}
		if r.Restore != nil {
			out.DeviceBytes = r.Restore.DeviceBytes
		}
		if r.OK && r.Restore != nil && r.Point != nil {
			out.State, out.PointID = Succeeded, r.Point.ID
			out.VerifiedBytes, out.FileSystem = r.Restore.VerifiedBytes, r.Restore.FileSystem
		}
	}
	return out, nil
}

// percent returns the percentage of writing and reading back together.
func percent(log string) int32 {
	p, ok := mover.LastProgress(log)
	n := p.Percent()
	switch {
	case !ok || n == nil:
		return 0
	case p.Phase == mover.PhaseVerify:
		return 50 + *n/2
	case p.Phase == mover.PhaseRestore:
		return *n / 2
	}
	return 0 // nothing is written yet
}

// terminalStore marks errors about a store that no retry can fix: the claim stays pending
// and continues once the store is right again.
func terminalStore(err error) (step.Result, bool) {
	reason, _ := store.Reason(err)
	if err == nil || reason == v1alpha1.ReasonStoreNotReady {
		return step.Result{}, false
	}
	return step.Wait(reason, err.Error(), retryMissing), true
}

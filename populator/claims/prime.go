package claims

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/step"
)

// protectStep keeps the claim until what is made for it is deleted or handed over.
func (j *job) protectStep(ctx context.Context) (step.Result, error) {
	if j.pop.Spec.Restore != nil { // it has its volume, and nothing of ours to wait for
		return step.Done(), nil
	}
	old := j.claim.DeepCopy()
	if !controllerutil.AddFinalizer(j.claim, Finalizer) {
		return step.Done(), nil
	}
	if err := j.Client.Patch(ctx, j.claim, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
		return step.Result{}, fmt.Errorf("protect claim %s: %w", j.claimName(), err)
	}
	return step.Done(), nil
}

// primeStep makes our own claim and waits for its volume. With WaitForFirstConsumer the
// scheduler chooses the node, as for any claim, when a pod uses the user's claim; the
// choice is passed on.
func (j *job) primeStep(ctx context.Context) (step.Result, error) {
	if inPlace(j.pop) {
		return j.secondStep(ctx)
	}
	class, err := j.class(ctx)
	if err != nil {
		return step.Result{}, err
	}
	prime, err := j.readPrime(ctx)
	if err != nil {
		return step.Result{}, err
	}
	if prime != nil && prime.DeletionTimestamp != nil {
		return step.Wait(v1alpha1.ReasonProvisioning, "waiting for an earlier volume to be gone", look), nil
	}
	if waitsForConsumer(class) && (prime == nil || prime.Spec.VolumeName == "") {
		find := j.node
		if j.pop.Spec.Restore != nil {
			find = j.nodeLike
		}
		res, err := find(ctx, prime)
		if err != nil || !res.IsDone() {
			return res, err
		}
	}
	if prime == nil {
		prime = j.newPrime()
		if err := j.Client.Create(ctx, prime); err != nil && !apierrors.IsAlreadyExists(err) {
			if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
				message := "the volume's claim in Varve's namespace was refused: " + err.Error()
				j.warn(v1alpha1.ReasonProvisioning, message)
				return step.Wait(v1alpha1.ReasonProvisioning, message, retryMissing), nil
			}
			return step.Result{}, fmt.Errorf("create claim %s: %w", j.prime, err)
		}
	}
	if prime.Spec.VolumeName == "" || prime.Status.Phase != corev1.ClaimBound {
		return j.provisioning(ctx, prime)
	}
	pv, err := j.volume(ctx, prime.Spec.VolumeName)
	if err != nil || pv == nil {
		return step.Wait(v1alpha1.ReasonProvisioning, "waiting for volume "+prime.Spec.VolumeName, look), err
	}
	if existed(pv) {
		class, err := j.class(ctx)
		if err != nil {
			return step.Result{}, err
		}
		// A class without a provisioner has no other volumes than free ones.
		if class.Provisioner != noProvisioner {
			return step.Result{}, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf(
				"volume %s of class %s was free, and Kubernetes bound it to the claim that was to get a new one; nothing was written to it. It is retained: bind it to a claim (without its spec.claimRef it is free again), or give it another class",
				pv.Name, pv.Spec.StorageClassName))
		}
	}
	s := &j.pop.Status
	if s.PrimeVolume == pv.Name {
		return step.Done(), nil
	}
	s.PrimeVolume, s.ReclaimPolicy = pv.Name, pv.Spec.PersistentVolumeReclaimPolicy
	if pv.Spec.CSI != nil {
		s.VolumeHandle = pv.Spec.CSI.VolumeHandle
	}
	return step.Done(), j.save(ctx)
}

// noProvisioner is the provisioner of classes whose volumes are made beforehand.
const noProvisioner = "kubernetes.io/no-provisioner"

// existed reports whether a volume existed before it was bound to our claim: the binder looks for one that fits
// before a new one is made. It may hold somebody's data.
func existed(pv *corev1.PersistentVolume) bool { return pv.Annotations[annBoundByController] != "" }

// class of the claim.
func (j *job) class(ctx context.Context) (*storagev1.StorageClass, error) {
	var class storagev1.StorageClass
	name := j.pop.Spec.StorageClassName
	if err := j.Live.Get(ctx, client.ObjectKey{Name: name}, &class); err != nil {
		if apierrors.IsNotFound(err) {
			j.warn(v1alpha1.ReasonNoStorageClass, "storage class "+name+" does not exist")
		}
		return nil, fmt.Errorf("read storage class %s: %w", name, err)
	}
	return &class, nil
}

func waitsForConsumer(class *storagev1.StorageClass) bool {
	return class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
}

func waitForConsumer() step.Result {
	return step.Wait(v1alpha1.ReasonWaitingForConsumer, "waiting for a pod that uses the claim to be scheduled", 0)
}

// newPrime returns the claim whose volume is written: like the user's, but writable, as
// large as the disk, and in Block mode, so that no file system is made on it.
func (j *job) newPrime() *corev1.PersistentVolumeClaim {
	mode := corev1.PersistentVolumeBlock
	if j.pop.Spec.PointID == "" {
		mode = j.pop.Spec.VolumeMode // to stay empty: the driver makes its file system
	}
	ask := max(request(j.claim), j.pop.Spec.PointBytes, j.pop.Status.RequestBytes)
	prime := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: j.prime.Namespace, Name: j.prime.Name, Labels: j.labels(),
			Annotations: map[string]string{AnnotationClaim: j.claimName()}},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes:               writable(j.claim.Spec.AccessModes),
			StorageClassName:          &j.pop.Spec.StorageClassName,
			VolumeAttributesClassName: j.claim.Spec.VolumeAttributesClassName,
			VolumeMode:                &mode,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceStorage: *resource.NewQuantity(ask, resource.BinarySI)}},
		},
	}
	if j.pop.Status.SelectedNode != "" {
		prime.Annotations[annSelectedNode] = j.pop.Status.SelectedNode
	}
	return prime
}

// writable returns access modes that a mover can write with: the requested ones, or
// ReadWriteOnce.
func writable(modes []corev1.PersistentVolumeAccessMode) []corev1.PersistentVolumeAccessMode {
	var out []corev1.PersistentVolumeAccessMode
	for _, m := range modes {
		if m != corev1.ReadOnlyMany {
			out = append(out, m)
		}
	}
	if len(out) == 0 {
		out = []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}
	}
	return out
}

// node agrees with the scheduler on where the volume is made. It is done when the claim
// has a usable node, recorded as status.SelectedNode, and our claim is for it or does not
// exist yet.
func (j *job) node(ctx context.Context, prime *corev1.PersistentVolumeClaim) (step.Result, error) {
	chosen := j.claim.Annotations[annSelectedNode]
	if prime != nil && chosen != j.pop.Status.SelectedNode {
		return step.Result{}, errAgain // the scheduler has changed its mind
	}
	if prime != nil && prime.Annotations[annSelectedNode] == "" {
		// The provisioner found that it cannot make the volume there.
		return j.refuseNode(ctx, fmt.Sprintf("the storage cannot make the volume for node %s; the scheduler chooses again", chosen))
	}
	if chosen == "" {
		return waitForConsumer(), nil
	}
	why, err := j.unusable(ctx, chosen)
	if err != nil {
		return step.Result{}, err
	}
	if why != "" {
		return j.refuseNode(ctx, fmt.Sprintf("node %s %s; the scheduler chooses again", chosen, why))
	}
	if j.pop.Status.SelectedNode == chosen {
		return step.Done(), nil
	}
	j.pop.Status.SelectedNode = chosen
	return step.Done(), j.save(ctx)
}

// unusable says why a node cannot run a mover now; empty if it can.
func (j *job) unusable(ctx context.Context, name string) (string, error) {
	var node corev1.Node
	if err := j.Live.Get(ctx, client.ObjectKey{Name: name}, &node); err != nil {
		if apierrors.IsNotFound(err) {
			return "is gone", nil
		}
		return "", fmt.Errorf("read node %s: %w", name, err)
	}
	if node.Spec.Unschedulable {
		return "is unschedulable", nil
	}
	return "", nil
}

// refuseNode removes the scheduler's choice from the claim, so that it chooses again: an
// external populator has no roll-back otherwise.
func (j *job) refuseNode(ctx context.Context, why string) (step.Result, error) {
	j.warn(v1alpha1.ReasonStartingAgain, why)
	if _, ok := j.claim.Annotations[annSelectedNode]; ok && j.pop.Spec.Restore == nil {
		old := j.claim.DeepCopy()
		delete(j.claim.Annotations, annSelectedNode)
		if err := j.Client.Patch(ctx, j.claim, client.MergeFromWithOptions(old, client.MergeFromWithOptimisticLock{})); err != nil {
			return step.Result{}, fmt.Errorf("take the node off claim %s: %w", j.claimName(), err)
		}
	}
	return step.Result{}, errAgain
}

// provisioning waits for our claim's volume, and reports what hinders it.
func (j *job) provisioning(ctx context.Context, prime *corev1.PersistentVolumeClaim) (step.Result, error) {
	why, err := j.lastWarning(ctx, prime)
	if err != nil {
		return step.Result{}, err
	}
	if why == "" {
		return step.Wait(v1alpha1.ReasonProvisioning, "waiting for the storage to make the volume", look), nil
	}
	j.warn(v1alpha1.ReasonProvisioning, "the storage does not make the volume: "+why)
	return step.Wait(v1alpha1.ReasonProvisioning, why, retryProvisioning), nil
}

// lastWarning returns the newest warning about one of our objects; empty without any.
func (j *job) lastWarning(ctx context.Context, o client.Object) (string, error) {
	var list corev1.EventList
	if err := j.Live.List(ctx, &list, client.InNamespace(j.Namespace)); err != nil {
		return "", fmt.Errorf("list events of %s: %w", o.GetName(), err)
	}
	var last *corev1.Event
	for i := range list.Items {
		e := &list.Items[i]
		if e.InvolvedObject.Name == o.GetName() && (o.GetUID() == "" || e.InvolvedObject.UID == o.GetUID()) && e.Type == corev1.EventTypeWarning &&
			(last == nil || last.LastTimestamp.Before(&e.LastTimestamp)) {
			last = e
		}
	}
	if last == nil {
		return "", nil
	}
	return last.Message, nil
}

package claims

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// StepWritten is where a population for a VolumeRestore stays once its volume is written,
// verified and released, until it is deleted.
const StepWritten = "Written"

// handList is what follows populate for a VolumeRestore.
func handList() step.List[*job] {
	return step.List[*job]{Name: "hand", Steps: []step.Step[*job]{{Name: StepWritten, Do: wrap((*job).writtenStep)}}}
}

func (j *job) writtenStep(context.Context) (step.Result, error) {
	return step.Wait(v1alpha1.ReasonHandingOver, "the recovery point is written and verified; waiting for the VolumeRestore to take it", unboundedLook), nil
}

// Begin creates the VolumePopulation of a VolumeRestore, unless it exists.
func (d *Deps) Begin(ctx context.Context, pop *v1alpha1.VolumePopulation) error {
	pop.Namespace, pop.Name = d.Namespace, PopulationName(owner(pop))
	pop.Finalizers = []string{stateFinalizer}
	pop.Labels = map[string]string{LabelManagedBy: managedBy}
	if err := d.Client.Create(ctx, pop); err != nil {
		return fmt.Errorf("begin to write the volume of claim %s/%s: %w", pop.Spec.Claim.Namespace, pop.Spec.Claim.Name, err)
	}
	return nil
}

// Taken returns the manifest of the PersistentVolume that replaces a claim's own, with the same
// name, and the PersistentVolume and claim that hold the written volume until then.
func (d *Deps) Taken(ctx context.Context, pop *v1alpha1.VolumePopulation, claim *corev1.PersistentVolumeClaim) (manifest, source *corev1.PersistentVolume, prime *corev1.PersistentVolumeClaim, err error) {
	j := &job{Populations: &Populations{Deps: *d}, pop: pop, claim: claim, prime: client.ObjectKey{Namespace: d.Namespace, Name: PrimeName(pop)}}
	if source, err = j.volume(ctx, pop.Status.PrimeVolume); err != nil {
		return nil, nil, nil, err
	}
	if source == nil {
		return nil, nil, nil, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("volume %s is gone; Varve did not delete it", pop.Status.PrimeVolume))
	}
	if err := j.mayHandOver(ctx, source); err != nil {
		return nil, nil, nil, err
	}
	if prime, err = j.readPrime(ctx); err != nil {
		return nil, nil, nil, err
	}
	if prime == nil {
		return nil, nil, nil, step.Terminal(v1alpha1.ReasonRestoreFailed, fmt.Errorf("claim %s is gone; Varve did not delete it", j.prime))
	}
	manifest, err = j.newVolume(ctx, claim.Spec.VolumeName, source)
	return manifest, source, prime, err
}

// taken says which object has a written volume's storage: it is being given to a claim, or was.
// Then the objects made for it are not deleted.
func (j *job) taken(ctx context.Context, pv *corev1.PersistentVolume) (string, error) {
	if j.pop.Spec.Restore == nil || pv == nil {
		return "", nil
	}
	names, err := replace.Others(ctx, j.Live, pv)
	if err != nil {
		return "", err
	}
	if len(names) > 0 {
		return fmt.Sprintf("volume %s is on %s too, which is kept", pv.Name, names[0]), nil
	}
	by, err := replace.Giving(ctx, j.Live, j.Namespace, pv.Name)
	if err != nil || by == "" {
		return "", err
	}
	return fmt.Sprintf("volume %s is being given to a claim by %s", pv.Name, by), nil
}

// nodeLike chooses the node of a volume that replaces the claim's own: no scheduler does,
// since the claim is bound. The claim's volume must be usable there too; the node that the
// scheduler once chose is tried first.
func (j *job) nodeLike(ctx context.Context, prime *corev1.PersistentVolumeClaim) (step.Result, error) {
	if prime != nil && prime.Annotations[annSelectedNode] != "" {
		return step.Done(), nil
	}
	if prime != nil { // the provisioner found that it cannot make the volume there
		return step.Result{}, errAgain
	}
	old, err := j.volume(ctx, j.claim.Spec.VolumeName)
	if err != nil {
		return step.Result{}, err
	}
	var nodes corev1.NodeList
	if err := j.Live.List(ctx, &nodes); err != nil {
		return step.Result{}, fmt.Errorf("list nodes: %w", err)
	}
	var names []string
	for i := range nodes.Items {
		if n := &nodes.Items[i]; usable(n) && (old == nil || reaches(old.Spec.NodeAffinity, n)) {
			names = append(names, n.Name)
		}
	}
	slices.Sort(names)
	if len(names) == 0 {
		return step.Wait(v1alpha1.ReasonProvisioning, "waiting for a node that can use the claim's volume", retryMissing), nil
	}
	if i := slices.Index(names, j.claim.Annotations[annSelectedNode]); i > 0 {
		names[0], names[i] = names[i], names[0]
	}
	s := &j.pop.Status
	s.SelectedNode = names[int(s.Placements)%len(names)]
	s.Placements++
	return step.Done(), j.save(ctx)
}

// usable reports whether a node is ready and accepts pods.
func usable(n *corev1.Node) bool {
	return !n.Spec.Unschedulable && n.DeletionTimestamp == nil && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// reaches reports whether a node can use a volume, by the volume's affinity.
func reaches(a *corev1.VolumeNodeAffinity, n *corev1.Node) bool {
	if a == nil || a.Required == nil {
		return true
	}
	name := labels.Set{metav1.ObjectNameField: n.Name}
	return slices.ContainsFunc(a.Required.NodeSelectorTerms, func(t corev1.NodeSelectorTerm) bool {
		return len(t.MatchExpressions)+len(t.MatchFields) > 0 && matches(t.MatchExpressions, n.Labels) && matches(t.MatchFields, name)
	})
}

func matches(all []corev1.NodeSelectorRequirement, in labels.Set) bool {
	for _, r := range all {
		op, known := operators[r.Operator]
		want, err := labels.NewRequirement(r.Key, op, r.Values)
		if !known || err != nil || !want.Matches(in) {
			return false
		}
	}
	return true
}

var operators = map[corev1.NodeSelectorOperator]selection.Operator{
	corev1.NodeSelectorOpIn: selection.In, corev1.NodeSelectorOpNotIn: selection.NotIn, corev1.NodeSelectorOpExists: selection.Exists,
	corev1.NodeSelectorOpDoesNotExist: selection.DoesNotExist, corev1.NodeSelectorOpGt: selection.GreaterThan, corev1.NodeSelectorOpLt: selection.LessThan,
}

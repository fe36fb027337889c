package restores

import (
	"context"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
	"github.com/varve-io/varve/populator/step"
)

// Kinds that can be scaled.
const (
	kindDeployment  = "Deployment"
	kindStatefulSet = "StatefulSet"
	kindReplicaSet  = "ReplicaSet"
)

// refusal says why something is not scaled.
type refusal struct{ reason, message string }

func (r *refusal) Error() string { return r.message }

// scaleDownStep scales the owners of the pods that use the claim to zero, all or none. It
// records their replicas first.
func (u *run) scaleDownStep(ctx context.Context) (step.Result, error) {
	if !u.vr.Spec.ScaleDown {
		return step.Done(), nil
	}
	s := &u.vr.Status
	if len(s.Scaled) == 0 {
		u.scaling.Lock()
		res, err := u.chooseOwners(ctx)
		u.scaling.Unlock()
		if err != nil || !res.IsDone() {
			return res, err
		}
	}
	for _, o := range s.Scaled {
		changed, _, err := u.scale(ctx, o, func(now int32) int32 { return min(now, 0) })
		if res, err := u.notScaled(err); err != nil || !res.IsDone() {
			return res, err
		}
		if changed {
			u.event(false, v1alpha1.ReasonScaledDown, "%s %s is scaled from %d to 0 for VolumeRestore %s, and back when it has ended", o.Kind, o.Name, o.Replicas, u.vr.Name)
		}
	}
	return step.Done(), nil
}

// chooseOwners records what is to be scaled, once no other restore has scaled what uses the claims: that
// restore scales it back at its own end, and both would find replicas that they did not set.
func (u *run) chooseOwners(ctx context.Context) (step.Result, error) {
	if other, err := u.scaledBy(ctx); err != nil || other != "" {
		return waitForScaled(other), err
	}
	owners, err := u.owners(ctx)
	if res, err := u.notScaled(err); err != nil || !res.IsDone() || len(owners) == 0 {
		return res, err
	}
	u.vr.Status.Scaled = owners
	return step.Done(), u.save(ctx)
}

func waitForScaled(other string) step.Result {
	return step.Wait(v1alpha1.ReasonOtherRestore, "waiting for VolumeRestore "+other+", which scaled what uses the claim to 0 and scales it back when it has ended", look)
}

// notScaled turns a refusal into a wait that is reported to the user: the user can remove the
// cause, or stop the pods by hand.
func (u *run) notScaled(err error) (step.Result, error) {
	r, ok := err.(*refusal) //nolint:errorlint // made here and never wrapped
	switch {
	case err == nil:
		return step.Done(), nil
	case ok:
		u.event(true, r.reason, "%s", r.message)
		return step.Wait(r.reason, r.message, retryScale), nil
	case apierrors.IsForbidden(err):
		message := fmt.Sprintf("Varve may not scale in namespace %s; an administrator allows it with: kubectl create rolebinding varve-scale -n %s --clusterrole=varve-scale --serviceaccount=%s:varve-controller",
			u.vr.Namespace, u.vr.Namespace, u.Namespace)
		u.event(true, v1alpha1.ReasonScaleForbidden, "%s", message)
		return step.Wait(v1alpha1.ReasonScaleForbidden, message, retryScale), nil
	}
	return step.Result{}, err
}

// owners returns what to scale so that no pod uses the claim; a *refusal if one cannot be
// scaled, or would be scaled back.
func (u *run) owners(ctx context.Context) ([]v1alpha1.ScaledOwner, error) {
	var pods []corev1.Pod
	for _, m := range u.members {
		if pod := podOfClaim(m.claim); pod != "" {
			return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("claim %s belongs to pod %s and is deleted with it, so nothing is scaled: copy what is needed of it to another claim", m.name, pod)}
		}
		of, err := replace.Pods(ctx, u.Live, u.vr.Namespace, m.name)
		if err != nil {
			return nil, err
		}
		pods = append(pods, of...)
	}
	var out []v1alpha1.ScaledOwner
	for i := range pods {
		ref := metav1.GetControllerOf(&pods[i])
		if ref == nil {
			return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("pod %s uses the claim and has no owner that could be scaled; delete it", pods[i].Name)}
		}
		o, err := u.scaledOwner(ctx, "pod "+pods[i].Name, ref, maxOwners)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(out, func(x v1alpha1.ScaledOwner) bool { return x.UID == o.UID }) {
			out = append(out, *o)
		}
	}
	return out, nil
}

// podOfClaim names the pod that owns a claim, as those of generic ephemeral volumes have one; empty if
// none does.
func podOfClaim(claim *corev1.PersistentVolumeClaim) string {
	if claim != nil {
		for _, ref := range claim.OwnerReferences {
			if ref.Kind == "Pod" && ref.APIVersion == "v1" {
				return ref.Name
			}
		}
	}
	return ""
}

// deletesClaims reports whether scaling an object deletes the claims of its pods, with their data.
func deletesClaims(o client.Object) bool {
	sts, ok := o.(*appsv1.StatefulSet)
	return ok && sts.Spec.PersistentVolumeClaimRetentionPolicy != nil &&
		sts.Spec.PersistentVolumeClaimRetentionPolicy.WhenScaled == appsv1.DeletePersistentVolumeClaimRetentionPolicyType
}

// maxOwners bounds a chain of controllers, which has two of a Deployment. Whoever writes objects in the
// namespace writes their references, and can have them lead back to the object itself.
const maxOwners = 8

// scaledOwner follows a controller reference, and at most so many, to the object to scale.
func (u *run) scaledOwner(ctx context.Context, of string, ref *metav1.OwnerReference, most int) (*v1alpha1.ScaledOwner, error) {
	if most == 0 {
		return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("%s has controllers above it without end: %s %s is one; correct their ownerReferences", of, ref.Kind, ref.Name)}
	}
	o := scalable(ref.Kind)
	if o == nil || ref.APIVersion != appsv1.SchemeGroupVersion.String() {
		return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("%s belongs to %s %s (%s), which is not a Deployment, StatefulSet or ReplicaSet: stop it there, as what runs it would undo any scaling", of, ref.Kind, ref.Name, ref.APIVersion)}
	}
	if err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: ref.Name}, o); err != nil {
		return nil, err
	}
	if o.GetUID() != ref.UID {
		return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("%s belongs to a %s %s that was deleted, and another has its name now: delete what is left of the former one", of, ref.Kind, ref.Name)}
	}
	if above := metav1.GetControllerOf(o); above != nil {
		return u.scaledOwner(ctx, ref.Kind+" "+ref.Name, above, most-1)
	}
	if deletesClaims(o) {
		return nil, &refusal{v1alpha1.ReasonNotScalable, fmt.Sprintf("StatefulSet %s deletes the claims of its pods, and their data, when it is scaled to 0: set its persistentVolumeClaimRetentionPolicy.whenScaled to Retain before, or stop the pods in another way", ref.Name)}
	}
	if why := fights(o); why != "" {
		return nil, &refusal{v1alpha1.ReasonScaleFought, fmt.Sprintf("%s %s is managed by %s, which would scale it back: stop it there, or pause that and scale it to 0 by hand; the restore goes on once its pods have ended", ref.Kind, ref.Name, why)}
	}
	if hpa, err := u.autoscaler(ctx, ref.Kind, ref.Name); err != nil || hpa != "" {
		if err == nil {
			err = &refusal{v1alpha1.ReasonScaleFought, fmt.Sprintf("%s %s is scaled by HorizontalPodAutoscaler %s: delete that for the time of the restore, or stop the pods by hand", ref.Kind, ref.Name, hpa)}
		}
		return nil, err
	}
	return &v1alpha1.ScaledOwner{Kind: ref.Kind, Name: ref.Name, UID: o.GetUID(), Replicas: replicas(o)}, nil
}

func scalable(kind string) client.Object {
	switch kind {
	case kindDeployment:
		return &appsv1.Deployment{}
	case kindStatefulSet:
		return &appsv1.StatefulSet{}
	case kindReplicaSet:
		return &appsv1.ReplicaSet{}
	}
	return nil
}

func replicas(o client.Object) int32 {
	var n *int32
	switch o := o.(type) {
	case *appsv1.Deployment:
		n = o.Spec.Replicas
	case *appsv1.StatefulSet:
		n = o.Spec.Replicas
	case *appsv1.ReplicaSet:
		n = o.Spec.Replicas
	}
	if n == nil {
		return 1
	}
	return *n
}

// gitOps are labels and annotations by which tools mark objects that they sync from a Git
// repository: Argo CD (resource tracking), Flux (kustomize-controller, helm-controller).
var gitOps = map[string]string{
	"argocd.argoproj.io/tracking-id":      "Argo CD",
	"argocd.argoproj.io/instance":         "Argo CD",
	"kustomize.toolkit.fluxcd.io/name":    "Flux",
	"helm.toolkit.fluxcd.io/name":         "Flux",
	"fleet.cattle.io/bundle-id":           "Fleet",
	"config.k8s.io/owning-inventory":      "a tool that applies an inventory",
	"autoscaling.keda.sh/paused-replicas": "KEDA",
}

// managers are field managers that write replicas and would do so again. A HorizontalPodAutoscaler is not
// among them: it leaves its trace in the fields when it is deleted, and the existing ones are listed.
var managers = map[string]string{
	"argocd-controller": "Argo CD", "argocd-application-controller": "Argo CD", "kustomize-controller": "Flux", "helm-controller": "Flux",
	"fleetagent": "Fleet", "keda-operator": "KEDA", "keda": "KEDA",
}

// fights names what would scale an object back; empty if nothing is known to.
func fights(o client.Object) string {
	for _, from := range []map[string]string{o.GetAnnotations(), o.GetLabels()} {
		for k, who := range gitOps {
			if v, ok := from[k]; ok {
				return fmt.Sprintf("%s (%s: %s)", who, k, v)
			}
		}
	}
	for _, ref := range o.GetOwnerReferences() {
		if !strings.HasPrefix(ref.APIVersion, "apps/") && ref.APIVersion != "v1" {
			return fmt.Sprintf("%s %s (%s)", ref.Kind, ref.Name, ref.APIVersion)
		}
	}
	for _, f := range o.GetManagedFields() {
		if f.FieldsV1 == nil || !strings.Contains(string(f.FieldsV1.GetRawBytes()), `"f:replicas"`) {
			continue
		}
		if who, known := managers[f.Manager]; known && f.Subresource != "status" {
			return fmt.Sprintf("%s (field manager %s)", who, f.Manager)
		}
	}
	return ""
}

// autoscaler names the HorizontalPodAutoscaler of an object; empty if it has none.
func (u *run) autoscaler(ctx context.Context, kind, name string) (string, error) {
	var list autoscalingv1.HorizontalPodAutoscalerList
	if err := u.Live.List(ctx, &list, client.InNamespace(u.vr.Namespace)); err != nil {
		return "", err
	}
	for _, h := range list.Items {
		if t := h.Spec.ScaleTargetRef; t.Kind == kind && t.Name == name && strings.HasPrefix(t.APIVersion, "apps/") {
			return h.Name, nil
		}
	}
	return "", nil
}

// scale changes the replicas of an owner if it is still the same object, and reports whether it
// did and whether it is.
func (u *run) scale(ctx context.Context, o v1alpha1.ScaledOwner, want func(now int32) int32) (changed, same bool, err error) {
	obj := scalable(o.Kind)
	if obj == nil {
		return false, false, nil
	}
	err = u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: o.Name}, obj)
	if apierrors.IsNotFound(err) || err == nil && obj.GetUID() != o.UID {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	now := replicas(obj)
	n := want(now)
	if n == now {
		return false, true, nil
	}
	body := &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Namespace: u.vr.Namespace, Name: o.Name, ResourceVersion: obj.GetResourceVersion()}, Spec: autoscalingv1.ScaleSpec{Replicas: n}}
	if err := u.Client.SubResource("scale").Update(ctx, obj, client.WithSubResourceBody(body)); err != nil {
		return false, true, err
	}
	return true, true, nil
}

// fought returns a Terminal error if something has scaled an owner back.
func (u *run) fought(ctx context.Context) error {
	for _, o := range u.vr.Status.Scaled {
		obj := scalable(o.Kind)
		if obj == nil {
			continue
		}
		err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: o.Name}, obj)
		if client.IgnoreNotFound(err) != nil {
			return err
		}
		if n := replicas(obj); err == nil && obj.GetUID() == o.UID && n != 0 {
			return step.Terminal(v1alpha1.ReasonScaleFought, fmt.Errorf("%s %s was scaled to 0 and something else scaled it to %d: stop what does so, or stop the pods by hand, and create another VolumeRestore", o.Kind, o.Name, n))
		}
	}
	return nil
}

// scaleUpStep restores the replicas of each owner.
func (u *run) scaleUpStep(ctx context.Context) (step.Result, error) {
	s := &u.vr.Status
	for len(s.Scaled) > 0 {
		o := s.Scaled[0]
		changed, same, err := u.scale(ctx, o, func(now int32) int32 {
			if now != 0 { // another process did so
				return now
			}
			return o.Replicas
		})
		if res, err := u.notScaled(err); err != nil || !res.IsDone() {
			return res, err
		}
		s.Scaled = s.Scaled[1:]
		if err := u.save(ctx); err != nil {
			return step.Result{}, err
		}
		switch {
		case changed:
			u.event(false, v1alpha1.ReasonScaledUp, "%s %s is scaled back to %d", o.Kind, o.Name, o.Replicas)
		case !same && o.Replicas > 0:
			u.event(true, v1alpha1.ReasonScaledUp, "%s %s, which was scaled from %d to 0, was deleted since, and is not scaled back; if there is another of its name, check its replicas", o.Kind, o.Name, o.Replicas)
		}
	}
	return step.Done(), nil
}

package restores

import (
	"fmt"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/varve-io/varve/populator/replace"
)

// turn is one move of all others.
func (w *world) turn() {
	w.t.Helper()
	w.provisioner()
	w.binder()
	w.movers()
	w.reclaim()
	w.snapshots()
	w.deployments()
	w.check()
}

func (w *world) provisioner() {
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		if c.Spec.VolumeName != "" || c.DeletionTimestamp != nil {
			continue
		}
		w.next++
		handle := fmt.Sprintf("vol-%d", w.next)
		v := pv("pv-"+handle, handle, &c, c.Spec.Resources.Requests)
		w.must(w.c.Create(w.t.Context(), v))
		w.disks[handle] = ""
		c.Spec.VolumeName, c.Status.Phase = v.Name, corev1.ClaimBound
		w.put(&c)
	}
}

func (w *world) binder() {
	for _, c := range list(w, &corev1.PersistentVolumeClaimList{}).Items {
		v := w.volume(c.Spec.VolumeName)
		key := c.Namespace + "/" + c.Name
		switch {
		case v == nil && c.Status.Phase == corev1.ClaimBound:
			c.Status.Phase = corev1.ClaimLost
			w.lost[key] = c.Annotations[replace.AnnotationReplaced]
			w.put(&c)
		case v != nil && (c.Status.Phase == "" || c.Status.Phase == corev1.ClaimPending || c.Status.Phase == corev1.ClaimLost && c.Annotations[replace.AnnotationReplaced] != w.lost[key]):
			v.Spec.ClaimRef.UID = c.UID
			c.Status.Phase, v.Status.Phase = corev1.ClaimBound, corev1.VolumeBound
			w.put(&c)
			w.put(v)
		}
	}
	for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
		var c corev1.PersistentVolumeClaim
		ref := v.Spec.ClaimRef
		err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: ref.Namespace, Name: ref.Name}, &c)
		if err == nil && (ref.UID == "" || c.UID == ref.UID) || v.Status.Phase == corev1.VolumeReleased || ref.UID == "" {
			continue
		}
		v.Status.Phase = corev1.VolumeReleased
		w.put(&v)
	}
}

func (w *world) movers() {
	for _, j := range list(w, &batchv1.JobList{}).Items {
		var prime corev1.PersistentVolumeClaim
		if err := w.c.Get(w.t.Context(), client.ObjectKey{Namespace: varveNS, Name: j.Annotations["prime"]}, &prime); err != nil || j.DeletionTimestamp != nil {
			continue
		}
		v := w.volume(prime.Spec.VolumeName)
		if v == nil || j.Annotations["done"] != "" {
			continue
		}
		if w.hold || w.fails {
			w.disks[v.Spec.CSI.VolumeHandle] = "parts of both"

			continue
		}
		w.disks[v.Spec.CSI.VolumeHandle] = j.Annotations["point"]
		j.Annotations["done"] = "yes"
		w.must(w.c.Update(w.t.Context(), &j))
	}
}

func (w *world) reclaim() {
	for _, v := range list(w, &corev1.PersistentVolumeList{}).Items {
		switch {
		case v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimRetain && controllerutil.RemoveFinalizer(&v, "external-provisioner.volume.kubernetes.io/finalizer"):
			w.must(w.c.Update(w.t.Context(), &v))
		case v.Status.Phase == corev1.VolumeReleased && v.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete:
			delete(w.disks, v.Spec.CSI.VolumeHandle)
			v.Finalizers = nil
			w.must(w.c.Update(w.t.Context(), &v))
			w.must(w.c.Delete(w.t.Context(), &v))
		case v.DeletionTimestamp != nil && v.Status.Phase != corev1.VolumeBound && controllerutil.RemoveFinalizer(&v, "kubernetes.io/pv-protection"):
			w.must(w.c.Update(w.t.Context(), &v))
		}
	}
}

func (w *world) snapshots() {
	yes := true
	for _, s := range list(w, &snapshotv1.VolumeSnapshotList{}).Items {
		if s.Status != nil {
			continue
		}
		content := "content-" + w.disks[w.volume(w.claim().Spec.VolumeName).Spec.CSI.VolumeHandle]
		s.Status = &snapshotv1.VolumeSnapshotStatus{ReadyToUse: &yes, BoundVolumeSnapshotContentName: &content}
		w.must(w.c.Update(w.t.Context(), &s))
	}
}

// deployments makes a pod for a Deployment with replicas, and none for one without.
func (w *world) deployments() {
	for _, d := range list(w, &appsv1.DeploymentList{}).Items {
		key := client.ObjectKey{Namespace: d.Namespace, Name: d.Name + "-pod"}
		var p corev1.Pod
		err := w.c.Get(w.t.Context(), key, &p)
		switch {
		case err == nil && *d.Spec.Replicas == 0:
			w.must(w.c.Delete(w.t.Context(), &p))
		case err != nil && *d.Spec.Replicas > 0 && w.claim().Status.Phase == corev1.ClaimBound:
			w.must(w.c.Create(w.t.Context(), podOf(&d, key)))
		}
	}
}

// deployment is one that uses the claim, with its ReplicaSet.
func deployment(change func(*appsv1.Deployment)) []client.Object {
	three, yes := int32(3), true
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "app", UID: "app"}, Spec: appsv1.DeploymentSpec{Replicas: &three}}
	d.Spec.Template.Spec.Volumes = podOf(d, client.ObjectKey{}).Spec.Volumes
	if change != nil {
		change(d)
	}
	rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: userNS, Name: "app-1", UID: "app-1",
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "app", UID: "app", Controller: &yes}}}, Spec: appsv1.ReplicaSetSpec{Replicas: &three}}
	return []client.Object{d, rs, podOf(d, client.ObjectKey{Namespace: userNS, Name: "app-pod"})}
}

func podOf(_ *appsv1.Deployment, key client.ObjectKey) *corev1.Pod {
	yes := true
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name,
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "app-1", UID: "app-1", Controller: &yes}}},
		Spec: corev1.PodSpec{NodeName: "n1", Volumes: []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}}}}}
}

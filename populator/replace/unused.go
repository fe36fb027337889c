package replace

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
)

// Uses reports whether a pod's volumes, including generic ephemeral ones, name a claim.
func Uses(pod *corev1.Pod, claim string) bool {
	return slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim ||
			v.Ephemeral != nil && pod.Name+"-"+v.Name == claim
	})
}

// ended reports whether a pod has ended: the kubelet has unmounted its volumes, or a
// VolumeAttachment shows if not.
func ended(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// Pods returns the pods of a claim that have not ended. r must read past any cache.
func Pods(ctx context.Context, r client.Reader, namespace, claim string) ([]corev1.Pod, error) {
	var list corev1.PodList
	if err := r.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("list pods of claim %s/%s: %w", namespace, claim, err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return ended(&p) || !Uses(&p, claim) }), nil
}

// Attached names the node to which a PersistentVolume is, or is being, attached; empty if
// none. r must read past any cache.
func Attached(ctx context.Context, r client.Reader, volume string) (string, error) {
	var list storagev1.VolumeAttachmentList
	if err := r.List(ctx, &list); err != nil {
		return "", fmt.Errorf("list attachments: %w", err)
	}
	for _, a := range list.Items {
		if pv := a.Spec.Source.PersistentVolumeName; pv != nil && *pv == volume {
			return a.Spec.NodeName, nil
		}
	}
	return "", nil
}

// user names what uses a member's claim or its volume; empty if nothing does. A pod without
// a node does not count: it waits until the claim is bound again.
func (j *job) user(ctx context.Context, m *member) (string, error) {
	pods, err := Pods(ctx, j.Live, m.Claim.Namespace, m.Claim.Name)
	if err != nil {
		return "", err
	}
	var names []string
	for i := range pods {
		if pods[i].Spec.NodeName != "" {
			names = append(names, pods[i].Name)
		}
	}
	if len(names) > 0 {
		return fmt.Sprintf("claim %s is used by %s", m.Claim.Name, some("pod", names)), nil
	}
	node, err := Attached(ctx, j.Live, m.Volume)
	if err != nil || node != "" {
		return fmt.Sprintf("volume %s is attached to node %s", m.Volume, node), err
	}
	return "", nil
}

// held names the node whose kubelet still has a member's volume; empty if none does.
func (j *job) held(ctx context.Context, m *member) (string, error) {
	node, err := Held(ctx, j.Live, m.old)
	if err != nil || node == "" {
		return "", err
	}
	return fmt.Sprintf("volume %s is in use on node %s", m.Volume, node), nil
}

// Held names a node whose kubelet has the storage volume of a PersistentVolume in use, perhaps long
// after its attachment was deleted, as happens on a node that does not answer; empty if none has. r
// must read past any cache.
func Held(ctx context.Context, r client.Reader, pv *corev1.PersistentVolume) (string, error) {
	var nodes corev1.NodeList
	if err := r.List(ctx, &nodes); err != nil {
		return "", fmt.Errorf("list nodes: %w", err)
	}
	name := corev1.UniqueVolumeName("kubernetes.io/csi/" + handle(pv))
	for i := range nodes.Items {
		if slices.Contains(nodes.Items[i].Status.VolumesInUse, name) {
			return nodes.Items[i].Name, nil
		}
	}
	return "", nil
}

// rival names another replacement of a member's volume that goes first: one that has begun to change
// something, or an older one. Two at once would each delete what the other created.
func (j *job) rival(ctx context.Context) (string, error) {
	return find(ctx, j.Live, j.Namespace, func(o *v1alpha1.VolumeReplacement) bool {
		if o.UID == j.r.UID || !slices.ContainsFunc(o.Spec.Volumes, func(v v1alpha1.ReplacedVolume) bool {
			return slices.ContainsFunc(j.r.Spec.Volumes, func(m v1alpha1.ReplacedVolume) bool { return m.Volume == v.Volume })
		}) {
			return false
		}
		begun := o.Status.Step != "" && o.Status.Step != stepUnused
		older := o.CreationTimestamp.Before(&j.r.CreationTimestamp) || o.CreationTimestamp.Equal(&j.r.CreationTimestamp) && o.UID < j.r.UID
		return begun || older
	})
}

// Giving names the replacement that gives a PersistentVolume's storage volume to a claim; empty if
// none does. r must read past any cache.
func Giving(ctx context.Context, r client.Reader, namespace, source string) (string, error) {
	return find(ctx, r, namespace, func(o *v1alpha1.VolumeReplacement) bool {
		return slices.ContainsFunc(o.Spec.Volumes, func(v v1alpha1.ReplacedVolume) bool { return v.Source == source })
	})
}

// find names a matching replacement that has not ended.
func find(ctx context.Context, r client.Reader, namespace string, is func(*v1alpha1.VolumeReplacement) bool) (string, error) {
	var list v1alpha1.VolumeReplacementList
	if err := r.List(ctx, &list, client.InNamespace(namespace)); err != nil {
		return "", fmt.Errorf("list replacements: %w", err)
	}
	for i := range list.Items {
		if o := &list.Items[i]; !Ended(o) && is(o) {
			return o.Name, nil
		}
	}
	return "", nil
}

// some names at most three of many.
func some(kind string, names []string) string {
	const most = 3
	slices.Sort(names)
	if len(names) == 1 {
		return kind + " " + names[0]
	}
	if len(names) > most {
		return fmt.Sprintf("%ss %s and %d more", kind, strings.Join(names[:most], ", "), len(names)-most)
	}
	return kind + "s " + strings.Join(names, ", ")
}

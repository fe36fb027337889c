package restores

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/replace"
)

// scaledBy names another restore at work that has scaled to 0 an owner of pods with one of the claims,
// and will scale it back; empty if none has. Its own claims may be others.
func (u *run) scaledBy(ctx context.Context) (string, error) {
	var list v1alpha1.VolumeRestoreList
	if err := u.Live.List(ctx, &list, client.InNamespace(u.vr.Namespace)); err != nil {
		return "", fmt.Errorf("list restores: %w", err)
	}
	for i := range list.Items {
		o := &list.Items[i]
		if o.UID == u.vr.UID || o.Status.Step == "" {
			continue
		}
		for _, s := range o.Status.Scaled {
			if uses, err := u.startsPods(ctx, s); err != nil || uses {
				return o.Name, err
			}
		}
	}
	return "", nil
}

// startsPods reports whether the pods of a scaled owner use one of the claims. One that may not be read
// counts as if they did.
func (u *run) startsPods(ctx context.Context, s v1alpha1.ScaledOwner) (bool, error) {
	obj := scalable(s.Kind)
	if obj == nil {
		return false, nil
	}
	err := u.Live.Get(ctx, client.ObjectKey{Namespace: u.vr.Namespace, Name: s.Name}, obj)
	switch {
	case apierrors.IsNotFound(err), err == nil && obj.GetUID() != s.UID:
		return false, nil
	case apierrors.IsForbidden(err):
		return true, nil
	case err != nil:
		return false, fmt.Errorf("read %s %s: %w", s.Kind, s.Name, err)
	}
	return slices.ContainsFunc(u.members, func(m *member) bool { return podsUse(obj, m.name) }), nil
}

// podsUse reports whether the pods that an object makes use a claim.
func podsUse(o client.Object, claim string) bool {
	pod := &corev1.Pod{}
	switch o := o.(type) {
	case *appsv1.Deployment:
		pod.Spec = o.Spec.Template.Spec
	case *appsv1.ReplicaSet:
		pod.Spec = o.Spec.Template.Spec
	case *appsv1.StatefulSet:
		pod.Spec = o.Spec.Template.Spec
		for i := range o.Spec.VolumeClaimTemplates {
			ordinal, is := strings.CutPrefix(claim, o.Spec.VolumeClaimTemplates[i].Name+"-"+o.Name+"-")
			if _, err := strconv.ParseUint(ordinal, 10, 31); is && err == nil {
				return true
			}
		}
	}
	return replace.Uses(pod, claim)
}

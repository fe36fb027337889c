package policies

import (
	"fmt"
	"reflect"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/varve-io/varve/api/v1alpha1"
)

// A policy whose store excludes its namespace is checked as soon as that may have changed.
func TestStoreThatAllowsIsSeen(t *testing.T) {
	policy := func(namespace, name string, ref v1alpha1.StoreReference) *v1alpha1.BackupPolicy {
		p := newPolicy(name, "@daily")
		p.Namespace, p.Spec.StoreRef = namespace, ref
		return p
	}
	now := began
	p := newReconciler(t, &now, policy("shop", "main", mainRef), policy("other", "main", v1alpha1.StoreReference{Name: "main"}),
		policy("shop", "second", v1alpha1.StoreReference{Name: "second"}), policy("shop", "own", v1alpha1.StoreReference{Kind: v1alpha1.StoreKindRepository, Name: "main"}))
	meta := func(namespace, name string, generation int64, label string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: namespace, Name: name, Generation: generation, Labels: map[string]string{"team": label}}
	}
	for name, tc := range map[string]struct {
		old, now client.Object
		want     []string
	}{
		"a store":          {&v1alpha1.BackupStore{ObjectMeta: meta("", "main", 1, "")}, &v1alpha1.BackupStore{ObjectMeta: meta("", "main", 2, "")}, []string{"other/main", "shop/main"}},
		"a store's status": {&v1alpha1.BackupStore{ObjectMeta: meta("", "main", 1, "")}, &v1alpha1.BackupStore{ObjectMeta: meta("", "main", 1, "")}, nil},
		"a Repository":     {&v1alpha1.Repository{ObjectMeta: meta("shop", "main", 1, "")}, &v1alpha1.Repository{ObjectMeta: meta("shop", "main", 2, "")}, []string{"shop/own"}},
		"a label":          {&corev1.Namespace{ObjectMeta: meta("", "other", 1, "a")}, &corev1.Namespace{ObjectMeta: meta("", "other", 1, "b")}, []string{"other/main"}},
		"no label":         {&corev1.Namespace{ObjectMeta: meta("", "other", 1, "a")}, &corev1.Namespace{ObjectMeta: meta("", "other", 2, "a")}, nil},
		"a claim": {&corev1.PersistentVolumeClaim{ObjectMeta: meta("shop", "data", 1, "a")}, &corev1.PersistentVolumeClaim{ObjectMeta: meta("shop", "data", 1, "b")},
			[]string{"shop/main", "shop/own", "shop/second"}},
	} {
		var got []string
		for _, w := range watches(p.Client) {
			if reflect.TypeOf(w.Object) == reflect.TypeOf(tc.now) && w.When.Update(event.UpdateEvent{ObjectOld: tc.old, ObjectNew: tc.now}) {
				for _, r := range w.Find(t.Context(), tc.now) {
					got = append(got, fmt.Sprint(r.NamespacedName))
				}
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q is looked at, want %q", name, got, tc.want)
		}
	}
}

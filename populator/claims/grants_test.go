package claims

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

// A claim that waits for a grant is checked as soon as its store or its namespace may give it.
func TestNewGrantIsSeen(t *testing.T) {
	stored := func(namespace, name, kind, store string) client.Object {
		return &v1alpha1.RecoverySource{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
			Spec: v1alpha1.RecoverySourceSpec{StoreRef: v1alpha1.StoreReference{Kind: v1alpha1.StoreKind(kind), Name: store}}}
	}
	claim := func(namespace, kind, source string) *corev1.PersistentVolumeClaim {
		c := newClaim(corev1.PersistentVolumeBlock, "fast")
		c.Namespace, c.Name, c.Spec.DataSourceRef.Kind, c.Spec.DataSourceRef.Name = namespace, "of-"+source, kind, source
		return c
	}
	bound, bare := claim("a", kindRecoverySource, "main"), claim("a", kindRecoverySource, "main")
	bound.Name, bound.Spec.VolumeName = "bound", "theirs"
	bare.Name, bare.Spec.DataSourceRef = "bare", nil
	w := newWorld(t,
		stored("a", "main", "", "main"), stored("b", "main", "BackupStore", "main"), stored("b", "other", "BackupStore", "other"), stored("b", "own", "Repository", "main"),
		&v1alpha1.VolumeBackup{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "run"}, Spec: v1alpha1.VolumeBackupSpec{StoreRef: v1alpha1.StoreReference{Name: "main"}}},
		claim("a", kindRecoverySource, "main"), claim("b", kindRecoverySource, "main"), claim("b", kindRecoverySource, "other"), claim("b", kindRecoverySource, "own"),
		claim("a", kindVolumeBackup, "run"), claim("b", kindVolumeBackup, "gone"), bound, bare,
	)
	object := func(o client.Object, namespace, name string, generation int64, label string) client.Object {
		o = o.DeepCopyObject().(client.Object)
		o.SetNamespace(namespace)
		o.SetName(name)
		o.SetGeneration(generation)
		o.SetLabels(map[string]string{"team": label})
		return o
	}
	for name, tc := range map[string]struct {
		of              client.Object
		namespace, name string
		generation      int64
		label           string
		want            []string
	}{
		"a grant":               {&v1alpha1.BackupStore{}, "", "main", 2, "x", []string{"a/of-main", "a/of-run", "b/of-main"}},
		"another store's":       {&v1alpha1.BackupStore{}, "", "other", 2, "x", []string{"b/of-other"}},
		"a Repository's":        {&v1alpha1.Repository{}, "b", "main", 2, "x", []string{"b/of-own"}},
		"of another namespace":  {&v1alpha1.Repository{}, "a", "main", 2, "x", nil},
		"a store's status":      {&v1alpha1.BackupStore{}, "", "main", 1, "x", nil},
		"a namespace's label":   {&corev1.Namespace{}, "", "b", 1, "y", []string{"b/of-gone", "b/of-main", "b/of-other", "b/of-own"}},
		"a namespace's status":  {&corev1.Namespace{}, "", "b", 1, "x", nil},
		"a source":              {&v1alpha1.RecoverySource{}, "b", "main", 2, "x", []string{"b/of-main"}},
		"a source's conditions": {&v1alpha1.RecoverySource{}, "b", "main", 1, "x", nil},
	} {
		old, now := object(tc.of, tc.namespace, tc.name, 1, "x"), object(tc.of, tc.namespace, tc.name, tc.generation, tc.label)
		var got []string
		for _, watched := range claimWatches(w.c) {
			if reflect.TypeOf(watched.Object) == reflect.TypeOf(now) && watched.When.Update(event.UpdateEvent{ObjectOld: old, ObjectNew: now}) {
				for _, r := range watched.Find(t.Context(), now) {
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

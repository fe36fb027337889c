package backups

import (
	"context"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/populator/mover"
	"github.com/varve-io/varve/populator/step"
)

const testUID = types.UID("0b0c1b73-c27f-3d54-6502-b79bd5b4ddb4")

// snapshotPair is a VolumeSnapshot and its content.
func snapshotPair(namespace, name, handle string, policy snapshotv1.DeletionPolicy, labels map[string]string) []client.Object {
	uid := types.UID(namespace + "/" + name)
	return []client.Object{
		&snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: uid, Labels: labels}},
		&snapshotv1.VolumeSnapshotContent{
			ObjectMeta: metav1.ObjectMeta{Name: name, UID: "content-" + uid, Labels: labels},
			Spec: snapshotv1.VolumeSnapshotContentSpec{
				DeletionPolicy: policy, Source: snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
				VolumeSnapshotRef: corev1.ObjectReference{Namespace: namespace, Name: name, UID: uid},
			},
		},
	}
}

// storage imitates the snapshot sidecars: the content of a deleted snapshot with policy
// Delete is deleted, and so is the storage's snapshot.
type storage struct {
	t       *testing.T
	c       client.WithWatch
	deleted map[string]int
}

func (s *storage) settle(ctx context.Context) {
	var contents snapshotv1.VolumeSnapshotContentList
	if err := s.c.List(ctx, &contents); err != nil {
		s.t.Fatal(err)
	}
	deleting := map[string]int{}
	for i := range contents.Items {
		c := &contents.Items[i]
		if c.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentDelete {
			continue
		}
		if deleting[handleOf(c)]++; deleting[handleOf(c)] > 1 {
			s.t.Errorf("two contents of %s would delete it", handleOf(c))
		}
		ref := c.Spec.VolumeSnapshotRef
		err := s.c.Get(ctx, types.NamespacedName{Namespace: ref.Namespace, Name: ref.Name}, &snapshotv1.VolumeSnapshot{})
		if client.IgnoreNotFound(err) == nil && err != nil {
			s.deleted[handleOf(c)]++
			if err := s.c.Delete(ctx, c); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

func TestDropContents(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := snapshotv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	mine := map[string]string{mover.LabelRun: string(testUID), LabelVolume: "v"}
	origin := map[string]string{mover.LabelRun: string(testUID), LabelVolume: "v", LabelOrigin: "true"}
	base := map[string]string{mover.LabelRun: "earlier", LabelVolume: "v"}
	other := map[string]string{mover.LabelRun: "another", LabelVolume: "w"}
	const retain, remove = snapshotv1.VolumeSnapshotContentRetain, snapshotv1.VolumeSnapshotContentDelete
	originName, twinName := originName(testUID), twinName(testUID)
	for _, tc := range []struct {
		name    string
		objects []client.Object
		keep    string
		gone    []string // handles that must be deleted, once each
	}{
		{"twin only", snapshotPair("varve", twinName, "snap-2", retain, mine), "", []string{"snap-2"}},
		{"origin only", snapshotPair("shop", originName, "snap-2", retain, origin), "", []string{"snap-2"}},
		{"origin and twin", append(snapshotPair("shop", originName, "snap-2", retain, origin), snapshotPair("varve", twinName, "snap-2", retain, mine)...), "", []string{"snap-2"}},
		{"kept as the base", append(snapshotPair("varve", twinName, "snap-2", retain, mine), snapshotPair("varve", "old-base", "snap-1", retain, base)...), twinName, []string{"snap-1"}},
		{"failed, base stays", append(snapshotPair("varve", twinName, "snap-2", retain, mine), snapshotPair("varve", "old-base", "snap-1", retain, base)...), "old-base", []string{"snap-2"}},
		{"another volume's", append(snapshotPair("varve", twinName, "snap-2", remove, mine), snapshotPair("varve", "theirs", "snap-9", retain, other)...), "", []string{"snap-2"}},
		{"content without its snapshot", snapshotPair("varve", twinName, "snap-2", retain, mine)[1:], "", []string{"snap-2"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &storage{t: t, deleted: map[string]int{}}
			s.c = fake.NewClientBuilder().WithScheme(scheme).WithObjects(tc.objects...).Build()
			b := &Reconciler{Live: s.c, Pods: mover.Pods{Namespace: "varve"}}
			b.Client = step.Observe(s.c, func(ctx context.Context, w step.Write) error {
				if !w.After && w.Kind == "VolumeSnapshotContent" && w.Verb == "delete" {
					var c snapshotv1.VolumeSnapshotContent
					if err := s.c.Get(ctx, types.NamespacedName{Name: w.Name[1:]}, &c); err == nil && c.Spec.DeletionPolicy == remove {
						s.deleted[handleOf(&c)]++ // what the sidecar would do
					}
				}
				if w.After {
					s.settle(ctx)
				}
				return nil
			})
			for round := 0; ; round++ {
				left, err := b.dropContents(t.Context(), client.MatchingLabels{LabelVolume: "v"}, tc.keep)
				if err != nil {
					t.Fatal(err)
				}
				if left == 0 {
					break
				}
				if round > 20 {
					t.Fatalf("%d are left for ever", left)
				}
			}
			if len(s.deleted) != len(tc.gone) {
				t.Errorf("deleted %v, want %v", s.deleted, tc.gone)
			}
			for _, h := range tc.gone {
				if s.deleted[h] != 1 {
					t.Errorf("%s was deleted %d times", h, s.deleted[h])
				}
			}
			if tc.keep != "" {
				if err := s.c.Get(t.Context(), types.NamespacedName{Name: tc.keep}, &snapshotv1.VolumeSnapshotContent{}); err != nil {
					t.Errorf("the base is gone: %v", err)
				}
			}
		})
	}
}

func TestSteps(t *testing.T) {
	if !Abandon.has(Abandon.Steps[0].Name) || Abandon.has(Backup.Steps[0].Name) {
		t.Error("steps of the two lists cannot be told apart")
	}
	for _, l := range []list{Backup, Abandon} {
		for _, name := range l.Names() {
			if phases[name] == "" {
				t.Errorf("step %s has no phase", name)
			}
		}
	}
}

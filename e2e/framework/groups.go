package framework

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	groupsnapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/cluster"
)

// GroupSnapshot takes a snapshot of all claims with the labels, at one moment, and waits
// until it is usable.
func (f *F) GroupSnapshot(name, class string, labels map[string]string) {
	f.T.Helper()
	g := &groupsnapshotv1.VolumeGroupSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: name},
		Spec: groupsnapshotv1.VolumeGroupSnapshotSpec{VolumeGroupSnapshotClassName: &class,
			Source: groupsnapshotv1.VolumeGroupSnapshotSource{Selector: &metav1.LabelSelector{MatchLabels: labels}}},
	}
	f.Create(g)
	f.Eventually("group snapshot "+name, func(ctx context.Context) error {
		if err := f.Client.Get(ctx, f.Key(name), g); err != nil {
			return err
		}
		if s := g.Status; s == nil || s.ReadyToUse == nil || !*s.ReadyToUse {
			return f.NotYet(name, "it is not ready")
		}
		return nil
	})
}

// GroupMember is the name of the ready snapshot of a claim in a group snapshot.
func (f *F) GroupMember(group, claim string) string {
	f.T.Helper()
	var pvc corev1.PersistentVolumeClaim
	if err := f.Client.Get(f.T.Context(), f.Key(claim), &pvc); err != nil {
		f.T.Fatal(err)
	}
	found := ""
	f.Eventually("the member for claim "+claim, func(ctx context.Context) error {
		var list snapshotv1.VolumeSnapshotList
		if err := f.Client.List(ctx, &list, client.InNamespace(f.Namespace)); err != nil {
			return err
		}
		for _, s := range list.Items {
			of := s.Spec.Source.PersistentVolumeClaimName
			for _, o := range s.OwnerReferences {
				if o.Kind == "VolumeGroupSnapshot" && o.Name == group && of != nil && *of == claim {
					found = s.Name
					return nil
				}
			}
		}
		return errors.New("there is none")
	})
	f.WaitSnapshot(found)
	return found
}

// SnapshotDropped reports whether a driver has deleted a snapshot, by its API: a driver
// that keeps the data for later deltas has still dropped it.
func (f *F) SnapshotDropped(d *cluster.Driver, handle string) func(context.Context) error {
	return func(ctx context.Context) error {
		var list snapshotv1.VolumeSnapshotContentList
		if err := f.Client.List(ctx, &list); err != nil {
			return err
		}
		for _, c := range list.Items {
			if c.Spec.Driver == d.Name && c.Status != nil && c.Status.SnapshotHandle != nil && *c.Status.SnapshotHandle == handle {
				return fmt.Errorf("content %s is still there", c.Name)
			}
		}
		return nil
	}
}

// Images returns how many image files a driver has: volumes and snapshots that were not
// deleted.
func (f *F) Images(d *cluster.Driver) int {
	f.T.Helper()
	files, err := filepath.Glob(filepath.Join(f.Cluster.DriverState(d), "*.img"))
	if err != nil {
		f.T.Fatal(err)
	}
	return len(files)
}

// ImageSize is the real size of a volume's device, in bytes.
func (f *F) ImageSize(d *cluster.Driver, handle string) int64 {
	f.T.Helper()
	st, err := os.Stat(filepath.Join(f.Cluster.DriverState(d), handle+".img"))
	if err != nil {
		f.T.Fatal(err)
	}
	return st.Size()
}

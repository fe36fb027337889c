package framework

import (
	"context"
	"fmt"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
)

// Volume modes, as variables for pointers.
const (
	Block      = corev1.PersistentVolumeBlock
	Filesystem = corev1.PersistentVolumeFilesystem
)

// Claim describes a PersistentVolumeClaim.
type Claim struct {
	Name  string
	Class string // empty: the default class
	Mode  corev1.PersistentVolumeMode
	Size  string // such as 64Mi
	// Snapshot or Volume in the same namespace to start from; empty: none.
	Snapshot, Volume string
}

// CreateClaim creates a claim and does not wait for it.
func (f *F) CreateClaim(c Claim) *corev1.PersistentVolumeClaim {
	f.T.Helper()
	pvc := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: c.Name},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			VolumeMode:  &c.Mode,
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{
				corev1.ResourceStorage: resource.MustParse(c.Size)}},
		}}
	if c.Class != "" {
		pvc.Spec.StorageClassName = &c.Class
	}
	if c.Snapshot != "" {
		group := snapshotv1.GroupName
		pvc.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: c.Snapshot}
	}
	if c.Volume != "" {
		pvc.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: c.Volume}
	}
	f.Create(pvc)
	return pvc
}

// WaitBound waits until a claim has its volume.
func (f *F) WaitBound(name string) *corev1.PersistentVolume {
	f.T.Helper()
	pv := &corev1.PersistentVolume{}
	f.Eventually("claim "+name, func(ctx context.Context) error {
		var pvc corev1.PersistentVolumeClaim
		if err := f.Client.Get(ctx, f.Key(name), &pvc); err != nil {
			return err
		}
		if pvc.Status.Phase != corev1.ClaimBound {
			return f.NotYet(name, "it is %s", pvc.Status.Phase)
		}
		return f.Client.Get(ctx, client.ObjectKey{Name: pvc.Spec.VolumeName}, pv)
	})
	return pv
}

// LastEvent returns the newest event about a named object, for error messages and for
// tests that await one.
func (f *F) LastEvent(ctx context.Context, name string) string {
	var list corev1.EventList
	if err := f.Client.List(ctx, &list, client.InNamespace(f.Namespace)); err != nil {
		return err.Error()
	}
	var last *corev1.Event
	for i := range list.Items {
		e := &list.Items[i]
		if e.InvolvedObject.Name == name && (last == nil || !e.LastTimestamp.Before(&last.LastTimestamp)) {
			last = e
		}
	}
	if last == nil {
		return "no event"
	}
	return last.Reason + ": " + last.Message
}

// Snapshot takes a snapshot of a claim and waits until it is usable.
func (f *F) Snapshot(name, claim, class string) *snapshotv1.VolumeSnapshot {
	f.T.Helper()
	f.CreateSnapshot(name, claim, class)
	return f.WaitSnapshot(name)
}

// CreateSnapshot creates a snapshot of a claim and does not wait for it. An empty class
// is the driver's default one.
func (f *F) CreateSnapshot(name, claim, class string) *snapshotv1.VolumeSnapshot {
	f.T.Helper()
	s := &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, Name: name},
		Spec:       snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim}},
	}
	if class != "" {
		s.Spec.VolumeSnapshotClassName = &class
	}
	f.Create(s)
	return s
}

// WaitSnapshot waits until a snapshot is bound and ready.
func (f *F) WaitSnapshot(name string) *snapshotv1.VolumeSnapshot {
	f.T.Helper()
	s := &snapshotv1.VolumeSnapshot{}
	f.Eventually("snapshot "+name, func(ctx context.Context) error {
		if err := f.Client.Get(ctx, f.Key(name), s); err != nil {
			return err
		}
		st := s.Status
		if st == nil || st.BoundVolumeSnapshotContentName == nil || st.ReadyToUse == nil || !*st.ReadyToUse {
			if st != nil && st.Error != nil && st.Error.Message != nil {
				return fmt.Errorf("it is not ready: %s", *st.Error.Message)
			}
			return f.NotYet(name, "it is not ready")
		}
		return nil
	})
	return s
}

// Content is the VolumeSnapshotContent of a ready snapshot.
func (f *F) Content(s *snapshotv1.VolumeSnapshot) *snapshotv1.VolumeSnapshotContent {
	f.T.Helper()
	c := &snapshotv1.VolumeSnapshotContent{}
	if err := f.Client.Get(f.T.Context(), client.ObjectKey{Name: *s.Status.BoundVolumeSnapshotContentName}, c); err != nil {
		f.T.Fatal(err)
	}
	return c
}

// Handle is the storage's name of a ready snapshot.
func (f *F) Handle(s *snapshotv1.VolumeSnapshot) string {
	f.T.Helper()
	c := f.Content(s)
	if c.Status == nil || c.Status.SnapshotHandle == nil {
		f.T.Fatalf("content %s has no handle", c.Name)
	}
	return *c.Status.SnapshotHandle
}

// AllowModeChange lets claims of another volume mode be made from a snapshot.
func (f *F) AllowModeChange(s *snapshotv1.VolumeSnapshot) {
	f.T.Helper()
	c := f.Content(s)
	old := c.DeepCopy()
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, "snapshot.storage.kubernetes.io/allow-volume-mode-change", "true")
	if err := f.Client.Patch(f.T.Context(), c, client.MergeFrom(old)); err != nil {
		f.T.Fatal(err)
	}
}

// Driver starts a CSI driver for the test, with its sidecars. It ends with the test,
// after the test's volumes; the test fails if the driver still holds any, or a snapshot.
func (f *F) Driver(o csidriver.Options) *cluster.Driver {
	f.T.Helper()
	d, err := f.Cluster.AddDriver(f.T.Context(), "d"+random()+".csi.varve.io", o)
	if err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() {
		if f.T.Failed() {
			f.collect()
		}
		f.clear()
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		if err := f.Await(ctx, "driver "+d.Name+" to hold nothing", func(context.Context) error {
			volumes, snapshots, err := csidriver.Held(f.Cluster.DriverState(d))
			if err == nil && len(volumes)+len(snapshots) > 0 {
				err = fmt.Errorf("it has volumes %v and snapshots %v", volumes, snapshots)
			}
			return err
		}); err != nil {
			f.T.Error(err)
		}
		if err := f.Cluster.RemoveDriver(ctx, d); err != nil {
			f.T.Errorf("remove driver %s: %v", d.Name, err)
		}
	})
	return d
}

// SetDriver changes a driver's options while it runs, for the rest of the test. Those
// that are read only once (see package csidriver) need a separate driver.
func (f *F) SetDriver(d *cluster.Driver, o csidriver.Options) {
	f.T.Helper()
	dir := f.Cluster.DriverState(d)
	before, err := csidriver.ReadOptions(dir)
	if err == nil {
		err = csidriver.WriteOptions(dir, o)
	}
	if err != nil {
		f.T.Fatal(err)
	}
	f.T.Cleanup(func() {
		if _, still := f.Cluster.Drivers[d.Name]; !still {
			return
		}
		if err := csidriver.WriteOptions(dir, before); err != nil {
			f.T.Error(err)
		}
	})
}

package framework_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/e2e/csidriver"
	"github.com/varve-io/varve/e2e/framework"
)

// refused waits until an event about an object says why it is refused.
func refused(f *framework.F, name, why string) {
	f.T.Helper()
	f.Eventually(name+" to be refused", func(ctx context.Context) error {
		if got := f.LastEvent(ctx, name); !strings.Contains(got, why) {
			return fmt.Errorf("the last event is %q, want %q in it", got, why)
		}
		return nil
	})
}

// One driver that rounds sizes, requires a secret, does not list snapshots and has no
// Block volumes: these do not need a driver each.
func TestDriverSizesSecretsAndLists(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	const gib, short = int64(1 << 30), int64(16 << 20)
	o := csidriver.Options{RoundTo: gib, ShortBy: short, RequiredSecret: "open-sesame", NoListSnapshots: true}
	d := f.Driver(o)
	f.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Block, Size: "64Mi"})
	f.RunPod(framework.Pod{Name: "p", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	pv := f.WaitBound("data")
	if got := pv.Spec.Capacity[corev1.ResourceStorage]; got.Cmp(*resource.NewQuantity(gib, resource.BinarySI)) != 0 {
		t.Errorf("the volume has %s, want 1Gi", got.String())
	}
	if got := f.Exec("p", "blockdev --getsize64 /dev/data"); got != fmt.Sprint(gib-short) {
		t.Errorf("the device has %s bytes, want %d", got, gib-short)
	}
	if got := f.ImageSize(d, pv.Spec.CSI.VolumeHandle); got != gib-short {
		t.Errorf("the image has %d bytes, want %d", got, gib-short)
	}
	// Without LIST_SNAPSHOTS the snapshotter relies on the driver's answer at creation.
	snap := f.Snapshot("s", "data", d.Class())
	if _, err := f.BlockService(d).Allocated(t.Context(), snap, 0); err != nil {
		t.Errorf("snapshot metadata, with the class's secret: %v", err)
	}

	wrong := o
	wrong.RequiredSecret = "another"
	f.SetDriver(d, wrong)
	f.CreateClaim(framework.Claim{Name: "denied", Class: d.Class(), Mode: framework.Block, Size: "64Mi"})
	refused(f, "denied", `the secret "token" is missing or wrong`)
	f.SetDriver(d, o)
	f.WaitBound("denied")

	noBlock := o
	noBlock.NoBlock = true
	f.SetDriver(d, noBlock)
	f.CreateClaim(framework.Claim{Name: "raw", Class: d.Class(), Mode: framework.Block, Size: "64Mi"})
	refused(f, "raw", "has no Block volumes")
	f.CreateClaim(framework.Claim{Name: "files", Class: d.Class(), Mode: framework.Filesystem, Size: "64Mi"})
	f.WaitBound("files")
}

// A volume with snapshots stays until they are deleted.
func TestDriverKeepsSourceOfSnapshots(t *testing.T) {
	f := framework.New(t)
	d := defaultDriver(f)
	f.SetDriver(d, csidriver.Options{KeepSourceOfSnapshots: true})
	f.CreateClaim(framework.Claim{Name: "data", Mode: framework.Block, Size: "8Mi"})
	pv := f.WaitBound("data")
	snap := f.Snapshot("s", "data", "")
	f.Delete(&corev1.PersistentVolumeClaim{ObjectMeta: meta(f, "data")})
	f.Eventually("the driver to refuse", func(ctx context.Context) error {
		if err := f.Client.Get(ctx, client.ObjectKey{Name: pv.Name}, pv); err != nil {
			t.Fatalf("the volume is gone: %v", err)
		}
		var events corev1.EventList
		if err := f.Client.List(ctx, &events, client.InNamespace("default")); err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.InvolvedObject.Name == pv.Name && strings.Contains(e.Message, "has snapshots") {
				return nil
			}
		}
		return errors.New("no event says so")
	})
	f.Delete(snap)
	f.Eventually("the volume to go after its snapshot", func(ctx context.Context) error {
		err := f.Client.Get(ctx, client.ObjectKey{Name: pv.Name}, pv)
		if err == nil {
			return fmt.Errorf("it is %s", pv.Status.Phase)
		}
		return client.IgnoreNotFound(err)
	})
}

// With a driver that attaches, a VolumeAttachment precedes the pod and outlives it for as
// long as the driver needs.
func TestDriverAttaches(t *testing.T) {
	t.Parallel()
	f := framework.New(t)
	d := f.Driver(csidriver.Options{AttachRequired: true, DetachDelay: csidriver.Duration(2e9)})
	f.CreateClaim(framework.Claim{Name: "data", Class: d.Class(), Mode: framework.Block, Size: "8Mi"})
	f.RunPod(framework.Pod{Name: "p", Claims: map[string]corev1.PersistentVolumeMode{"data": framework.Block}})
	pv := f.WaitBound("data")
	attachments := func(ctx context.Context) (n int) {
		var list storagev1.VolumeAttachmentList
		if err := f.Client.List(ctx, &list); err != nil {
			t.Fatal(err)
		}
		for _, a := range list.Items {
			if v := a.Spec.Source.PersistentVolumeName; v != nil && *v == pv.Name {
				n++
			}
		}
		return n
	}
	if attachments(t.Context()) != 1 {
		t.Fatal("the pod runs without a VolumeAttachment")
	}
	f.Delete(&corev1.Pod{ObjectMeta: meta(f, "p")})
	if attachments(t.Context()) != 1 {
		t.Error("the VolumeAttachment went with the pod; it should take the driver two seconds more")
	}
	f.Eventually("the volume to be detached", func(ctx context.Context) error {
		if attachments(ctx) != 0 {
			return errors.New("it is attached")
		}
		return nil
	})
}

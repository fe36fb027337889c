package kubernetes

import (
	"context"
	"fmt"
	"slices"
	"strings"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	batchv1 "k8s.io/api/batch/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/e2e/cluster"
	"github.com/varve-io/varve/e2e/csidriver"
)

func quantity(s string) resource.Quantity { return resource.MustParse(s) }

// inventory is the content of a cluster and a driver: kind to names, sorted.
type inventory map[string][]string

// names lists the objects of a list that match, in all namespaces, as kind
// namespace/name.
func (s *site) names(ctx context.Context, list client.ObjectList, match func(client.Object) bool) ([]string, error) {
	if err := s.Client.List(ctx, list); err != nil {
		return nil, err
	}
	kind := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%T", list), "*"), "List")
	kind = kind[strings.LastIndexByte(kind, '.')+1:]
	var names []string
	err := meta.EachListItem(list, func(o runtime.Object) error {
		if c, ok := o.(client.Object); ok && match(c) {
			names = append(names, kind+" "+c.GetNamespace()+"/"+c.GetName())
		}
		return nil
	})
	slices.Sort(names)
	return names, err
}

// take lists all that Varve may leave, and what the driver itself keeps.
func (s *site) take(ctx context.Context, d *cluster.Driver) (inventory, error) {
	inv := inventory{}
	for _, list := range []client.ObjectList{
		&corev1.PersistentVolumeList{}, &corev1.PersistentVolumeClaimList{}, &snapshotv1.VolumeSnapshotList{}, &snapshotv1.VolumeSnapshotContentList{},
		&storagev1.VolumeAttachmentList{}, &corev1.PodList{}, &batchv1.JobList{}, &corev1.SecretList{}, &coordinationv1.LeaseList{}, &v1alpha1.VolumePopulationList{}, &v1alpha1.VolumeReplacementList{},
	} {
		names, err := s.names(ctx, list, func(o client.Object) bool {
			// Controllers come and go with the test.
			return o.GetLabels()["app.kubernetes.io/component"] != "controller" && o.GetName() != controllerName
		})
		if err != nil {
			return nil, err
		}
		inv[fmt.Sprintf("%T", list)] = names
	}
	volumes, snapshots, err := csidriver.Held(s.Cluster.DriverState(d))
	inv["volumes of the driver"], inv["snapshots of the driver"] = volumes, snapshots
	return inv, err
}

// differs returns what is in one inventory and not in the other.
func (inv inventory) differs(after inventory) error {
	var wrong []string
	for kind, names := range after {
		for _, n := range names {
			if !slices.Contains(inv[kind], n) {
				wrong = append(wrong, "left over: "+n)
			}
		}
	}
	for kind, names := range inv {
		for _, n := range names {
			if !slices.Contains(after[kind], n) {
				wrong = append(wrong, "lost: "+n)
			}
		}
	}
	if len(wrong) == 0 {
		return nil
	}
	slices.Sort(wrong)
	return fmt.Errorf("%s", strings.Join(wrong, "; "))
}

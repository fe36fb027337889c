package store

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
)

// Points of namespace shop: one from before UIDs were recorded, two of an earlier namespace
// of that name, one of the present one.
var shopPoints = []*points.Point{{ID: "before"}, {ID: "old-1", NamespaceUID: "old"}, {ID: "old-2", NamespaceUID: "old"}, {ID: "new", NamespaceUID: "new"}}

func TestCheckRestore(t *testing.T) {
	all := []string{"before", "old-1", "old-2", "new"}
	for _, tc := range []struct {
		name     string
		identity v1alpha1.NamespaceIdentity
		grants   []v1alpha1.RestoreGrant
		from     string
		want     []string // IDs; none is ErrNotGranted
	}{
		{"by name", "", nil, "", all},
		{"by name, said so", v1alpha1.NamespaceIdentityName, nil, "shop", all},
		{"by UID", v1alpha1.NamespaceIdentityUID, nil, "", []string{"new"}},
		{"by UID with a grant of one", v1alpha1.NamespaceIdentityUID, []v1alpha1.RestoreGrant{{From: "shop", FromUID: "old", To: []string{"shop"}}}, "", []string{"old-1", "old-2", "new"}},
		{"by UID with a grant of all", v1alpha1.NamespaceIdentityUID, []v1alpha1.RestoreGrant{{From: "shop", To: []string{"shop"}}}, "", all},
		{"by UID with a grant to another", v1alpha1.NamespaceIdentityUID, []v1alpha1.RestoreGrant{{From: "shop", To: []string{"other"}}}, "", []string{"new"}},
		{"by UID with a grant of before to this one", v1alpha1.NamespaceIdentityUID, []v1alpha1.RestoreGrant{{From: "shop", To: []string{"shop"}, ToUIDs: []string{"new"}}}, "", all},
		{"by UID with a grant of before to an earlier one", v1alpha1.NamespaceIdentityUID, []v1alpha1.RestoreGrant{{From: "shop", To: []string{"shop"}, ToUIDs: []string{"old"}}}, "", []string{"new"}},
		{"another namespace", "", nil, "else", nil},
		{"another namespace, granted", "", []v1alpha1.RestoreGrant{{From: "*", To: []string{"shop"}}}, "else", all},
		{"another namespace, one of its UIDs granted", "", []v1alpha1.RestoreGrant{{From: "else", FromUID: "old", To: []string{"*"}}}, "else", []string{"old-1", "old-2"}},
		{"another namespace, granted to an earlier one", "", []v1alpha1.RestoreGrant{{From: "else", To: []string{"shop"}, ToUIDs: []string{"old"}}}, "else", nil},
		{"another namespace, none of its points granted", "", []v1alpha1.RestoreGrant{{From: "else", FromUID: "no", To: []string{"shop"}}}, "else", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			scheme := runtime.NewScheme()
			if err := corev1.AddToScheme(scheme); err != nil {
				t.Fatal(err)
			}
			// The cache still has the earlier namespace.
			s := &Stores{
				Secrets: fake.NewClientBuilder().WithScheme(scheme).WithObjects(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "new"}}).Build(),
				Client:  fake.NewClientBuilder().WithScheme(scheme).WithObjects(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", UID: "old"}}).Build(),
			}
			st := s.FromBackupStore(&v1alpha1.BackupStore{Spec: v1alpha1.BackupStoreSpec{NamespaceIdentity: tc.identity, RestoreGrants: tc.grants, RepositorySpec: v1alpha1.RepositorySpec{ClusterName: "here"}}})
			may, err := s.CheckRestore(t.Context(), st, "shop", "", tc.from)
			var got []string
			if err == nil {
				v := points.Volume{Cluster: "here", Namespace: "shop", Name: "data"}
				for _, p := range shopPoints { // each requested by its ID
					if _, perr := pickAllowed(st, "shop", v, shopPoints, may, v1alpha1.RecoveryAt{ID: p.ID}); perr == nil {
						got = append(got, p.ID)
					} else if err = perr; !errors.Is(err, ErrNotGranted) {
						t.Errorf("%s: %v", p.ID, err)
					}
				}
				latest, lerr := pickAllowed(st, "shop", v, shopPoints, may, v1alpha1.RecoveryAt{})
				if len(got) > 0 {
					if err = nil; lerr != nil || latest.ID != got[len(got)-1] {
						t.Errorf("the latest is %v, %v", latest, lerr)
					}
				}
			}
			switch {
			case tc.want == nil && (!errors.Is(err, ErrNotGranted) || !strings.Contains(err.Error(), "restoreGrants")):
				t.Errorf("got %v, %v; want an error that says which grant is missing", got, err)
			case tc.want != nil && (err != nil || !slices.Equal(got, tc.want)):
				t.Errorf("got %v, %v; want %v", got, err, tc.want)
			}
		})
	}
}

package store

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/points"
)

// anyNamespace stands for all namespaces in a grant.
const anyNamespace = "*"

// CheckUse checks whether objects of a namespace may use a store: a Repository is for its
// own namespace, a BackupStore selects by labels. The error wraps ErrNotAllowed.
func (s *Stores) CheckUse(ctx context.Context, st *Store, namespace string) error {
	if st.Tenancy == nil {
		if st.Key.Namespace != namespace {
			return fmt.Errorf("%w: %s belongs to namespace %s", ErrNotAllowed, st.Key, st.Key.Namespace)
		}
		return nil
	}
	sel := st.Tenancy.AllowedNamespaces
	if sel == nil {
		return nil
	}
	want, err := metav1.LabelSelectorAsSelector(sel)
	if err != nil {
		return fmt.Errorf("%w: %s: allowedNamespaces: %w", ErrSpec, st.Key, err)
	}
	ns, err := s.namespaceOf(ctx, namespace)
	if err != nil {
		return err
	}
	if !want.Matches(labels.Set(ns.Labels)) {
		return fmt.Errorf("%w: %s takes namespaces with labels %s; an administrator can label namespace %s so",
			ErrNotAllowed, st.Key, want, namespace)
	}
	return nil
}

// MayRestore reports whether a namespace may restore a point.
type MayRestore func(*points.Point) bool

// CheckRestore returns which of the points that fromNamespace of fromCluster made (empty: its
// own, of the store's cluster) a namespace may restore. A namespace may always restore its
// own points of this cluster, and all points in its own Repository; others need a grant of
// the BackupStore. The error wraps ErrNotAllowed, or ErrNotGranted if it may restore none of
// them.
func (s *Stores) CheckRestore(ctx context.Context, st *Store, namespace, fromCluster, fromNamespace string) (MayRestore, error) {
	if err := s.CheckUse(ctx, st, namespace); err != nil {
		return nil, err
	}
	if st.Tenancy == nil {
		return func(*points.Point) bool { return true }, nil
	}
	fromCluster, fromNamespace = cmp.Or(fromCluster, st.Spec.ClusterName), cmp.Or(fromNamespace, namespace)
	own := fromCluster == st.Spec.ClusterName && fromNamespace == namespace
	if own && !st.ByUID() {
		return func(*points.Point) bool { return true }, nil
	}
	var grants []v1alpha1.RestoreGrant
	needUID := own
	for _, g := range st.Tenancy.RestoreGrants {
		if cmp.Or(g.FromCluster, st.Spec.ClusterName) == fromCluster && (g.From == anyNamespace || g.From == fromNamespace) &&
			(slices.Contains(g.To, anyNamespace) || slices.Contains(g.To, namespace)) {
			grants = append(grants, g)
			needUID = needUID || len(g.ToUIDs) > 0
		}
	}
	var uid string
	if needUID {
		u, err := s.NamespaceUID(ctx, namespace)
		if err != nil {
			return nil, err
		}
		uid = string(u)
		grants = slices.DeleteFunc(grants, func(g v1alpha1.RestoreGrant) bool { return len(g.ToUIDs) > 0 && !slices.Contains(g.ToUIDs, uid) })
	}
	if !own && len(grants) == 0 {
		return nil, notGranted(st, v1alpha1.RestoreGrant{FromCluster: fromCluster, From: fromNamespace, To: []string{namespace}})
	}
	return func(p *points.Point) bool {
		return own && p.NamespaceUID == uid || slices.ContainsFunc(grants, func(g v1alpha1.RestoreGrant) bool {
			return g.FromUID == "" || g.FromUID == p.NamespaceUID
		})
	}, nil
}

// notGranted names the missing grant.
func notGranted(st *Store, g v1alpha1.RestoreGrant) error {
	uid := ""
	if g.FromUID != "" {
		uid = ", fromUID: " + g.FromUID
	}
	return fmt.Errorf("%w: %s has no restoreGrants entry {fromCluster: %s, from: %s%s, to: [%s]}; an administrator can add it",
		ErrNotGranted, st.Key, g.FromCluster, g.From, uid, g.To[0])
}

// pickAllowed is Pick among those of a volume's points that a namespace may restore. The error
// wraps ErrNotGranted if there are points but none of these, or if the point requested by its
// ID is not one of them.
func pickAllowed(st *Store, namespace string, v points.Volume, pts []*points.Point, may MayRestore, at v1alpha1.RecoveryAt) (*points.Point, error) {
	mine := slices.DeleteFunc(slices.Clone(pts), func(p *points.Point) bool { return !may(p) })
	p, err := Pick(mine, at)
	if err == nil || len(mine) > 0 && at.ID == "" {
		return p, err
	}
	other, oerr := Pick(pts, at)
	if oerr != nil {
		return nil, err // of those it may see
	}
	return nil, fmt.Errorf("recovery point %s is of an earlier namespace %s: %w", other.ShortID(), v.Namespace,
		notGranted(st, v1alpha1.RestoreGrant{FromCluster: v.Cluster, From: v.Namespace, FromUID: other.NamespaceUID, To: []string{namespace}}))
}

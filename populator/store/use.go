package store

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"slices"
)

// anyNamespace stands for all namespaces in a grant.
const anyNamespace = "*"

// CheckUse says whether objects of a namespace may use a store. A Repository is its own
// namespace's; a BackupStore says by labels. The error wraps ErrNotAllowed.
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

// CheckRestore says whether a namespace may restore the points that fromNamespace of
// fromCluster made (empty: its own, of the store's cluster). A namespace may always
// restore its own points of this cluster, in a Repository of its own all there are; else
// it takes a grant of the BackupStore. The error wraps ErrNotAllowed or ErrNotGranted.
func (s *Stores) CheckRestore(ctx context.Context, st *Store, namespace, fromCluster, fromNamespace string) error {
	if err := s.CheckUse(ctx, st, namespace); err != nil {
		return err
	}
	if fromCluster == "" {
		fromCluster = st.Spec.ClusterName
	}
	if fromNamespace == "" {
		fromNamespace = namespace
	}
	if st.Tenancy == nil || fromCluster == st.Spec.ClusterName && fromNamespace == namespace {
		return nil
	}
	for _, g := range st.Tenancy.RestoreGrants {
		cluster := g.FromCluster
		if cluster == "" {
			cluster = st.Spec.ClusterName
		}
		if cluster == fromCluster && (g.From == anyNamespace || g.From == fromNamespace) &&
			(slices.Contains(g.To, anyNamespace) || slices.Contains(g.To, namespace)) {
			return nil
		}
	}

	return fmt.Errorf("%w: %s has no restoreGrants entry {fromCluster: %s, from: %s, to: [%s]}; an administrator can add it",
		ErrNotGranted, st.Key, fromCluster, fromNamespace, namespace)
}

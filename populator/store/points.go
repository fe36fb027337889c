package store

import (
	"context"
	"fmt"
	"strings"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup/blocktree"
	"github.com/varve-io/varve/backup/points"
)

// Found is a recovery point and its record.
type Found struct {
	Point *points.Point
	// Record is nil for a point that another program wrote.
	Record *blocktree.Record
}

// From names a volume in a store; empty parts are the claim's own.
type From struct {
	Cluster, Namespace, Volume string
}

// Resolve finds the recovery point that fills a claim in namespace, and reads its record.
// claim is the claim's name, for parts that from leaves empty.
//
// The error wraps ErrNone only if the repository was read and holds none of the volume: an
// unreachable repository is repository.ErrUnreachable, and for a volume without a point
// that matches at the error is ErrNoMatch. Resolve also calls CheckRestore.
func (s *Stores) Resolve(ctx context.Context, st *Store, namespace, claim string, from From, at v1alpha1.RecoveryAt) (*Found, error) {
	may, err := s.CheckRestore(ctx, st, namespace, from.Cluster, from.Namespace)
	if err != nil {
		return nil, err
	}
	v := points.Volume{Cluster: from.Cluster, Namespace: from.Namespace, Name: from.Volume}
	if v.Cluster == "" {
		v.Cluster = st.Spec.ClusterName
	}
	if v.Namespace == "" {
		v.Namespace = namespace
	}
	if v.Name == "" {
		v.Name = claim
	}
	var found *Found
	err = s.With(ctx, st, func(ctx context.Context, repo *Open) error {
		cat, err := points.List(ctx, repo.Repository, points.ListOptions{Volume: &v})
		if err != nil {
			return err
		}
		p, err := pickAllowed(st, namespace, v, cat.Of(v), may, at)
		if err != nil {
			return fmt.Errorf("%s:%s in %s: %w", v.Cluster, v, st.Key, err)
		}
		found = &Found{Point: p}
		if p.Foreign == "" {
			found.Record, err = points.LoadRecord(ctx, repo.Repository, p)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// Group finds the points that were made together with one; nil if it has no group or was deleted.
func (s *Stores) Group(ctx context.Context, st *Store, point string) (*points.Group, error) {
	var g *points.Group
	err := s.With(ctx, st, func(ctx context.Context, repo *Open) error {
		cat, err := points.List(ctx, repo.Repository, points.ListOptions{})
		if err != nil {
			return err
		}
		if p := cat.ByID(point); p != nil {
			g = cat.Groups().Of(p)
		}
		return nil
	})
	return g, err
}

// With opens a store, calls do with it and closes it. A storage that is silent for too long is
// repository.ErrUnreachable; then, and when ctx ends, do may still run when With returns. The
// error of do does not contain the credentials.
func (s *Stores) With(ctx context.Context, st *Store, do func(context.Context, *Open) error) error {
	repo, err := s.Open(ctx, st)
	if err != nil {
		return err
	}
	return repo.with(ctx, do)
}

// WithEnsured is With after Ensure.
func (s *Stores) WithEnsured(ctx context.Context, st *Store, do func(context.Context, *Open) error) error {
	repo, err := s.Ensure(ctx, st)
	if err != nil {
		return err
	}
	return repo.with(ctx, do)
}

func (o *Open) with(ctx context.Context, do func(context.Context, *Open) error) error {
	return o.Redact(o.Answering(ctx, func(ctx context.Context) error { return do(ctx, o) }, func() {
		if err := o.Close(context.WithoutCancel(ctx)); err != nil {
			o.warn(err)
		}
	}))
}

// Pick chooses among the points of one volume, oldest first. The error wraps ErrNone if
// there are none at all, else ErrNoMatch.
func Pick(pts []*points.Point, at v1alpha1.RecoveryAt) (*points.Point, error) {
	if len(pts) == 0 {
		return nil, ErrNone
	}
	switch {
	case at.ID != "":
		var found *points.Point
		for _, p := range pts {
			if strings.HasPrefix(p.ID, at.ID) {
				if found != nil {
					return nil, fmt.Errorf("%w: the ID %s begins those of %s and %s; give more of it", ErrNoMatch, at.ID, found.ID, p.ID)
				}
				found = p
			}
		}
		if found == nil {
			return nil, fmt.Errorf("%w: none of its %d has an ID that begins with %s", ErrNoMatch, len(pts), at.ID)
		}
		return found, nil
	case at.Time != nil:
		var found *points.Point
		for _, p := range pts {
			if !p.Time.After(at.Time.Time) && (found == nil || p.Time.After(found.Time)) {
				found = p
			}
		}
		if found == nil {
			return nil, fmt.Errorf("%w: the oldest of its %d is of %s", ErrNoMatch, len(pts), pts[0].Time.UTC().Format("2006-01-02T15:04:05Z"))
		}
		return found, nil
	}
	return pts[len(pts)-1], nil
}

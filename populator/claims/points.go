package claims

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/populator/store"
)

// StorePoints finds recovery points in stores.
type StorePoints struct{ Stores *store.Stores }

var _ Points = StorePoints{}

// Find implements Points.
func (p StorePoints) Find(ctx context.Context, q Query) (Found, error) {
	st, err := p.Stores.Get(ctx, q.Store, q.Namespace)
	if err != nil {
		return Found{}, refusal(err)
	}
	from := store.From{Cluster: q.From.Cluster, Namespace: q.From.Namespace, Volume: q.From.Volume}
	found, err := p.Stores.Resolve(ctx, st, q.Namespace, q.From.Volume, from, q.At)
	if err != nil {
		return Found{}, refusal(err)
	}
	out := Found{ID: found.Point.ID, Time: found.Point.Time, Bytes: found.Point.Size, Stream: found.Point.Stream}
	// The owner of a Repository controls the mode in its records: there it allows nothing
	// that the mode of the claim does not.
	if st.Tenancy != nil {
		out.AllowModeChange = st.Tenancy.AllowVolumeModeChange
	}
	if found.Record != nil && found.Record.Claim != nil {
		out.VolumeMode = corev1.PersistentVolumeMode(found.Record.Claim.VolumeMode)
		out.RequestBytes = found.Record.Claim.RequestBytes
	}
	if out.Bytes <= 0 {
		return Found{}, &RefusedError{Reason: v1alpha1.ReasonNoRecoveryPoint, Message: fmt.Sprintf("recovery point %s is of an empty disk", short(out.ID))}
	}
	return out, nil
}

// Group implements Points.
func (p StorePoints) Group(ctx context.Context, q Query, found Found) ([]Query, error) {
	st, err := p.Stores.Get(ctx, q.Store, q.Namespace)
	if err != nil {
		return nil, refusal(err)
	}
	g, err := p.Stores.Group(ctx, st, found.ID)
	if err != nil {
		return nil, refusal(err)
	}
	none := func(format string, args ...any) error {
		return &RefusedError{Reason: v1alpha1.ReasonNoGroup, Message: fmt.Sprintf("recovery point %s ", short(found.ID)) + fmt.Sprintf(format, args...)}
	}
	if g == nil {
		return nil, none("was not made together with others")
	}
	if !g.Complete() {
		return nil, none("is of group %s, in which %s has none", g, g.Missing[0])
	}
	var out []Query
	for _, m := range g.Members() {
		if m.ID == found.ID {
			continue
		}
		out = append(out, Query{Store: q.Store, Namespace: q.Namespace, At: v1alpha1.RecoveryAt{ID: m.ID},
			From: v1alpha1.RecoveryFrom{Cluster: m.Volume.Cluster, Namespace: m.Volume.Namespace, Volume: m.Volume.Name}})
	}
	if len(out) != len(g.Wanted)-1 {
		return nil, none("is not the newest of its volume in group %s", g)
	}
	return out, nil
}

// Restores implements Points.
func (p StorePoints) Restores(ctx context.Context, ref v1alpha1.StoreReference, namespace string) (int, error) {
	st, err := p.Stores.Get(ctx, ref, namespace)
	if err != nil {
		if errors.Is(err, store.ErrNotFound) {
			return defaultRestoresPerStore, nil // the mover's Job will report it
		}
		return 0, err
	}
	_, restores := st.Limits()
	return restores, nil
}

// refusal distinguishes errors that a user must fix from those that may pass.
func refusal(err error) error {
	if reason, again := store.Reason(err); !again {
		return &RefusedError{Reason: reason, Message: err.Error(), NoneAtAll: errors.Is(err, store.ErrNone)}
	}
	return err
}

package storekeeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/varve-io/varve/api/v1alpha1"
	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/populator/report"
	"github.com/varve-io/varve/populator/store"
)

// pin adds the pins of a BackupStore's spec to the repository's points, removes those that
// left the spec, and records both. A pin that cannot be added gives a condition and an
// event, but the store still counts as reachable.
func (k *Keeper) pin(ctx context.Context, st *store.Store, repo *store.Open, status *v1alpha1.RepositoryStatus) {
	if st.Tenancy == nil || len(st.Tenancy.Pins) == 0 && len(status.Pinned) == 0 {
		return
	}
	want := map[string]string{}
	for _, p := range st.Tenancy.Pins {
		want[p.ID] = p.Reason
	}
	err := fmt.Errorf("%w: no pin can be changed; \"varve pin\" does it where the repository is writable", store.ErrReadOnly)
	var missing map[string]error
	if repo.Writable() {
		var held []string
		pins := backup.OwnedPins{Owner: st.Spec.ClusterName + "/" + st.Key.String(), Want: want, Held: status.Pinned}
		if held, missing, err = pins.Apply(ctx, repo.Repository); err == nil {
			status.Pinned = held
		}
	}
	for _, id := range slices.Sorted(maps.Keys(missing)) {
		err = errors.Join(err, fmt.Errorf("%s: %w", id, missing[id]))
	}
	if err == nil {
		report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionPinned, metav1.ConditionTrue, v1alpha1.ReasonPinned,
			fmt.Sprintf("%d recovery points are pinned", len(status.Pinned)))
		return
	}
	message := strings.ReplaceAll(repo.Redact(err).Error(), "\n", "; ")
	report.Condition(&status.Conditions, st.Object, v1alpha1.ConditionPinned, metav1.ConditionFalse, v1alpha1.ReasonPinFailed, message)
	k.Events.Warning(st.Object, v1alpha1.ReasonPinFailed, "pins: %s", message)
}

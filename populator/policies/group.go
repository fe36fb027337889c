package policies

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/varve-io/varve/api/v1alpha1"
)

// maxGroup bounds the claims of a group.
const maxGroup = 32

// tooMany reports whether a group that selects claims, except those that policies before it cover, would have too
// many: it starts no runs.
func tooMany(selector labels.Selector, claims []corev1.PersistentVolumeClaim, taken func(*corev1.PersistentVolumeClaim) bool) bool {
	n := 0
	for i := range claims {
		if pvc := &claims[i]; Covers(selector, pvc) && !taken(pvc) {
			n++
		}
	}
	return n > maxGroup
}

// group handles all claims of a policy with a group: their runs are due at one time. It returns
// when the next are, and whether it started them.
func (p *Reconciler) group(ctx context.Context, policy *v1alpha1.BackupPolicy, c cron.Schedule, claims []corev1.PersistentVolumeClaim) (next time.Time, started bool, err error) {
	spread := time.Duration(0)
	if policy.Spec.Schedule.Spread != nil {
		spread = policy.Spec.Schedule.Spread.Duration
	}
	s, now := of(c, spread, policy.UID), p.now()
	next = s.next(now)
	var volumes []*v1alpha1.ProtectedVolume
	for i := range claims {
		pv, err := p.protectedVolume(ctx, policy, &claims[i])
		if err != nil {
			return now, false, err
		}
		volumes = append(volumes, pv)
	}
	from := policy.CreationTimestamp.Time
	if at := policy.Status.LastScheduled; at != nil && at.After(from) {
		from = at.Time
	}
	due := s.last(from, now)
	if !due.IsZero() {
		if started, err = p.startGroup(ctx, policy, claims, volumes, due); err != nil {
			return now, started, err
		}
		at := metav1.NewTime(due)
		policy.Status.LastScheduled = &at
	}
	for _, pv := range volumes {
		if pv.Status.NextRun != nil && pv.Status.NextRun.Time.Equal(next) {
			continue
		}
		at := metav1.NewTime(next)
		pv.Status.NextRun = &at
		if !due.IsZero() {
			last := metav1.NewTime(due)
			pv.Status.LastScheduled = &last
		}
		if err := p.Client.Status().Update(ctx, pv); err != nil {
			return now, started, fmt.Errorf("status of ProtectedVolume %s: %w", pv.Name, err)
		}
	}
	return next, started, nil
}

// startGroup creates the runs that were due at a time, unless it is too late for them or one of
// an earlier time is still running, and reports whether it did. Their names and their group derive from that time, so
// creating them is idempotent.
func (p *Reconciler) startGroup(ctx context.Context, policy *v1alpha1.BackupPolicy, claims []corev1.PersistentVolumeClaim, volumes []*v1alpha1.ProtectedVolume, due time.Time) (started bool, err error) {
	var runs []*v1alpha1.VolumeBackup
	for i := range claims {
		vb, err := p.due(ctx, policy, &claims[i], volumes[i], due)
		if err != nil || vb == nil {
			return false, err
		}
		runs = append(runs, vb)
	}
	slices.SortFunc(runs, func(a, b *v1alpha1.VolumeBackup) int { return strings.Compare(a.Spec.ClaimName, b.Spec.ClaimName) })
	if len(runs) > 1 {
		sum := sha256.Sum256([]byte(string(policy.UID) + "\n" + due.UTC().Format(time.RFC3339)))
		g := &v1alpha1.RunGroup{Name: policy.Name, ID: hex.EncodeToString(sum[:16]), Time: metav1.NewTime(due), Method: policy.Spec.GroupMethod}
		for _, vb := range runs {
			g.Members = append(g.Members, v1alpha1.GroupMember{ClaimName: vb.Spec.ClaimName, Run: vb.Name})
		}
		for _, vb := range runs {
			vb.Spec.Group = g
		}
	}
	for _, vb := range runs {
		if err := p.create(ctx, vb); err != nil {
			return false, err
		}
	}
	return true, nil
}

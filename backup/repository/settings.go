package repository

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/maintenance"
	"github.com/kopia/kopia/snapshot/policy"
)

// writeSettings writes the missing ones of what makes a repository Varve's: the owner of
// maintenance, a policy and Varve's record, which readers look for last. It returns what
// was written.
func (r *Repository) writeSettings(ctx context.Context, w repo.RepositoryWriter, compressor string) (written []string, err error) {
	has, err := maintenance.HasParams(ctx, w)
	if err != nil {
		return nil, fmt.Errorf("read maintenance parameters: %w", err)
	}
	if !has {
		if err := r.writeMaintenanceParams(ctx, w); err != nil {
			return nil, err
		}
		written = append(written, "owner of maintenance")
	}
	_, err = policy.GetDefinedPolicy(ctx, w, policy.GlobalPolicySourceInfo)
	switch {
	case errors.Is(err, policy.ErrPolicyNotFound):
		if err := policy.SetPolicy(ctx, w, policy.GlobalPolicySourceInfo, keepAll()); err != nil {
			return nil, fmt.Errorf("write policy: %w", err)
		}
		written = append(written, "policy that keeps all snapshots")
	case err != nil:
		return nil, fmt.Errorf("read policy: %w", err)
	}
	labels := map[string]string{"type": recordType, "varve": configKind}
	found, err := w.FindManifests(ctx, labels)
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	if len(found) == 0 {
		if _, err := w.PutManifest(ctx, labels, Config{Format: configFormat, Compression: compressor, PacksSince: r.Now().UTC()}); err != nil {
			return nil, fmt.Errorf("write settings: %w", err)
		}
		written = append(written, "settings of the repository")
	}
	return written, nil
}

func (r *Repository) writeMaintenanceParams(ctx context.Context, w repo.RepositoryWriter) error {
	blobcfg, err := r.direct.FormatManager().BlobCfgBlob(ctx)
	if err != nil {
		return fmt.Errorf("read repository parameters: %w", err)
	}
	params := maintenance.DefaultParams()
	params.Owner = r.rep.ClientOptions().UsernameAtHost()
	params.FullCycle.Interval = fullMaintenanceInterval
	params.ExtendObjectLocks = blobcfg.IsRetentionEnabled()
	if err := maintenance.CheckExtendRetention(ctx, blobcfg, &params); err != nil {
		return fmt.Errorf("object lock: %w", err)
	}
	if err := maintenance.SetParams(ctx, w, &params); err != nil {
		return fmt.Errorf("write maintenance parameters: %w", err)
	}
	return nil
}

// keepAll is a policy under which stock Kopia expires nothing: without one, `kopia
// snapshot expire --all` would delete by Kopia's defaults. No other rule keeps a
// snapshot, so that this one is easy to see (kopia snapshot/policy/retention_policy.go).
func keepAll() *policy.Policy {
	n := func(v int) *policy.OptionalInt { o := policy.OptionalInt(v); return &o }
	no := policy.OptionalBool(false)
	return &policy.Policy{
		RetentionPolicy: policy.RetentionPolicy{
			KeepLatest:               n(math.MaxInt32),
			KeepHourly:               n(0),
			KeepDaily:                n(0),
			KeepWeekly:               n(0),
			KeepMonthly:              n(0),
			KeepAnnual:               n(0),
			IgnoreIdenticalSnapshots: &no,
		},
		SchedulingPolicy: policy.SchedulingPolicy{Manual: true}, // kopia's server takes no snapshots of its own here
	}
}

package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/maintenance"
)

// Status describes a repository and this machine's connection to it.
type Status struct {
	Place        string `json:"place"`   // where it is, for people
	Storage      string `json:"storage"` // Kopia's name of the kind
	UniqueID     string `json:"uniqueID,omitempty"`
	Owned        bool   `json:"createdByVarve"`
	Writable     bool   `json:"writable"`
	ReadOnly     string `json:"readOnlyReason,omitempty"`
	Cluster      string `json:"cluster"`
	Client       string `json:"client"` // user@host towards Kopia
	Format       int    `json:"formatVersion,omitempty"`
	Hash         string `json:"hash,omitempty"`
	Encryption   string `json:"encryption,omitempty"`
	Compression  string `json:"compression,omitempty"` // of blocks; "off" for none
	ECCPercent   int    `json:"eccOverheadPercent"`
	PackBytes    int    `json:"packBytes,omitempty"`
	Splitter     string `json:"splitter,omitempty"` // of stock Kopia's files
	PasswordMove bool   `json:"passwordChangeable"`

	Retention   RetentionStatus `json:"objectLock"`
	Epoch       EpochStatus     `json:"epoch"`
	IndexBlobs  int             `json:"indexBlobs"`
	Capacity    *CapacityStatus `json:"capacity,omitempty"` // if the storage reports it
	Cache       CacheStatus     `json:"cache"`
	Limits      Limits          `json:"limits"`
	Maintenance OwnerStatus     `json:"maintenance"`

	// Unreadable are the unreadable parts of the list of recovery points.
	Unreadable []UnreadableManifests `json:"unreadableManifests,omitempty"`
	// Unknown are packs that no index knows.
	Unknown []UnknownPack `json:"unknownPacks,omitempty"`
}

// RetentionStatus says how blobs are locked.
type RetentionStatus struct {
	Mode          string `json:"mode,omitempty"`
	PeriodSeconds int64  `json:"periodSeconds,omitempty"`
	Extended      bool   `json:"extendedByMaintenance"`
}

// EpochStatus says how often indexes are merged.
type EpochStatus struct {
	MinSeconds     int64 `json:"minSeconds,omitempty"`
	RefreshSeconds int64 `json:"refreshSeconds,omitempty"`
}

// CapacityStatus describes the volume that holds the repository, in bytes.
type CapacityStatus struct {
	Size int64 `json:"sizeBytes"`
	Free int64 `json:"freeBytes"`
}

// CacheStatus describes the cache on this machine, in bytes.
type CacheStatus struct {
	Directory     string `json:"directory,omitempty"`
	ContentLimit  int64  `json:"contentLimitBytes"`
	MetadataLimit int64  `json:"metadataLimitBytes"`
	Used          int64  `json:"usedBytes"`
}

// OwnerStatus says who maintains the repository and when next. The times are zero before
// the first run.
type OwnerStatus struct {
	Owner     string    `json:"owner"`
	Here      bool      `json:"ownedByThisClient"`
	NextQuick time.Time `json:"nextQuick,omitzero"`
	NextFull  time.Time `json:"nextFull,omitzero"`
}

// Status gathers the status.
func (r *Repository) Status(ctx context.Context) (*Status, error) {
	s := &Status{
		Place:    r.place,
		Storage:  "kopia-server",
		Owned:    !r.foreign && r.direct != nil,
		Writable: r.Writable(),
		Cluster:  r.cluster,
		Client:   r.rep.ClientOptions().UsernameAtHost(),
		Limits:   limitsOf(r.rep.ClientOptions().Throttling),
	}
	if !s.Writable {
		s.ReadOnly = r.readOnlyReason()
	}
	params, err := maintenance.GetParams(ctx, r.rep)
	if err != nil {
		return nil, fmt.Errorf("read maintenance parameters: %w", err)
	}
	s.Maintenance.Owner = params.Owner
	s.Maintenance.Here = params.Owner == s.Client
	if r.direct == nil {
		return s, nil
	}
	if err := r.directStatus(ctx, s, params); err != nil {
		return nil, err
	}
	return s, nil
}

func (r *Repository) directStatus(ctx context.Context, s *Status, params *maintenance.Params) error {
	fm := r.direct.FormatManager()
	s.Storage = unguarded(r.direct.BlobReader().ConnectionInfo()).Type
	s.UniqueID = hexID(r.direct.UniqueID())
	cf := fm.ScrubbedContentFormat()
	s.Format = int(cf.Version)
	s.Hash, s.Encryption, s.ECCPercent = cf.Hash, cf.Encryption, cf.ECCOverheadPercent
	s.PackBytes = cf.MaxPackSize
	s.Splitter = fm.ObjectFormat().Splitter
	s.PasswordMove = fm.SupportsPasswordChange()
	s.Epoch.MinSeconds = int64(cf.EpochParameters.MinEpochDuration / time.Second)
	s.Epoch.RefreshSeconds = int64(cf.EpochParameters.EpochRefreshFrequency / time.Second)
	if s.Owned {
		s.Compression = r.config.Compression
		if s.Compression == "" {
			s.Compression = CompressionOff
		}
	}
	ret, err := r.retention(ctx)
	if err != nil {
		return err
	}
	s.Retention = RetentionStatus{Mode: ret.Mode, PeriodSeconds: int64(ret.Period / time.Second), Extended: params.ExtendObjectLocks}

	index, err := r.direct.IndexBlobs(ctx, false)
	if err != nil {
		return fmt.Errorf("list index blobs: %w", err)
	}
	s.IndexBlobs = len(index)

	schedule, err := maintenance.GetSchedule(ctx, r.direct)
	if err != nil {
		return fmt.Errorf("read maintenance schedule: %w", err)
	}
	s.Maintenance.NextQuick, s.Maintenance.NextFull = schedule.NextQuickMaintenanceTime, schedule.NextFullMaintenanceTime

	if s.Unreadable, err = r.UnreadableManifests(ctx); err != nil {
		return err
	}
	if s.Unknown, err = r.UnknownPacks(ctx); err != nil {
		return err
	}

	capacity, err := r.direct.BlobVolume().GetCapacity(ctx)
	switch {
	case err == nil:
		s.Capacity = &CapacityStatus{Size: int64(capacity.SizeB), Free: int64(capacity.FreeB)}
	case !errors.Is(err, blob.ErrNotAVolume):
		return fmt.Errorf("read storage capacity: %w", err)
	}

	lc, err := readConnection(r.direct.ConfigFilename())
	if err != nil {
		return err
	}
	if lc.Caching != nil && lc.Caching.CacheDirectory != "" {
		s.Cache = CacheStatus{
			Directory:     lc.Caching.CacheDirectory,
			ContentLimit:  lc.Caching.ContentCacheSizeLimitBytes,
			MetadataLimit: lc.Caching.MetadataCacheSizeLimitBytes,
			Used:          diskUse(lc.Caching.CacheDirectory),
		}
	}
	return nil
}

// retention reads how blobs are locked.
func (r *Repository) retention(ctx context.Context) (Retention, error) {
	cfg, err := r.direct.FormatManager().BlobCfgBlob(ctx)
	if err != nil {
		return Retention{}, fmt.Errorf("read retention: %w", err)
	}
	return Retention{Mode: string(cfg.RetentionMode), Period: cfg.RetentionPeriod}, nil
}

// diskUse adds up the sizes of the files below dir; files that vanish during the walk do not count.
func diskUse(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // vanished
		}
		if info, err := d.Info(); err == nil {
			n += info.Size()
		}
		return nil
	})
	return n
}

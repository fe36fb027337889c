package repository

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/compression"
	"github.com/kopia/kopia/repo/ecc"
	"github.com/kopia/kopia/repo/encryption"
	"github.com/kopia/kopia/repo/format"
	"github.com/kopia/kopia/repo/hashing"
)

// Format describes a new repository. Empty fields take the default.
type Format struct {
	Hash        string // of contents, one of Hashes
	Encryption  string // one of Encryptions
	Compression string // of blocks, one of Compressions, or "off"
	// ECCOverheadPercent is how much is added to each blob so that flipped bits can be
	// corrected; 0 for none.
	ECCOverheadPercent int
}

// Defaults of Format. Hash and compression are not Kopia's own: docs/repository.md has
// the measurement.
const (
	DefaultHash        = "BLAKE3-256-128"
	DefaultEncryption  = encryption.DefaultAlgorithm
	DefaultCompression = "s2-default"
	CompressionOff     = "off"
)

// Retention locks new blobs against deletion and change, where the storage can (S3,
// Google and Azure buckets made for it). The zero value means no lock.
type Retention struct {
	Mode   string        // "governance", "compliance", or "locked" (Azure)
	Period time.Duration // from the last write or extension
}

// MinRetention is the shortest Retention.Period: full maintenance, which extends the
// locks, runs every 24 hours, and Kopia requires another 24 in between (kopia
// repo/maintenance/blob_retain.go, CheckExtendRetention).
const MinRetention = 48 * time.Hour

const fullMaintenanceInterval = 24 * time.Hour

// CreateOptions say how to create a repository and how to connect to it.
type CreateOptions struct {
	ConnectOptions
	Format    Format
	Retention Retention
}

// Hashes lists the hash algorithms.
func Hashes() []string { return hashing.SupportedAlgorithms() }

// Encryptions lists the encryption algorithms.
func Encryptions() []string { return encryption.SupportedAlgorithms(false) }

// Compressions lists the compressors of blocks, without "off".
func Compressions() []string {
	var names []string
	for name := range compression.ByName {
		if !compression.IsDeprecated[name] {
			names = append(names, string(name))
		}
	}
	slices.Sort(names)
	return names
}

func oneOf(what, name string, known []string) error {
	if name == "" || slices.Contains(known, name) {
		return nil
	}
	return invalid("unknown %s %q: choose one of %s", what, name, strings.Join(known, ", "))
}

func (f Format) validate() error {
	if f.ECCOverheadPercent < 0 || f.ECCOverheadPercent > 100 {
		return invalid("an error correction overhead of %d %% is not between 0 and 100", f.ECCOverheadPercent)
	}
	if f.Compression == CompressionOff {
		f.Compression = ""
	}
	return errors.Join(
		oneOf("hash algorithm", f.Hash, Hashes()),
		oneOf("encryption algorithm", f.Encryption, Encryptions()),
		oneOf("compression", f.Compression, Compressions()),
	)
}

// compressor is the one in the repository's record: Kopia's name, empty for none.
func (f Format) compressor() string {
	switch f.Compression {
	case "":
		return DefaultCompression
	case CompressionOff:
		return ""
	default:
		return f.Compression
	}
}

func (ret Retention) enabled() bool { return ret != Retention{} }

func (ret Retention) mode() blob.RetentionMode {
	if strings.EqualFold(ret.Mode, string(blob.Locked)) {
		return blob.Locked
	}
	return blob.RetentionMode(strings.ToUpper(ret.Mode))
}

func (ret Retention) validate() error {
	switch {
	case !ret.enabled():
		return nil
	case ret.Mode == "" || ret.Period == 0:
		return invalid("object lock needs both a retention mode and a retention period")
	case !ret.mode().IsValid() && ret.mode() != blob.Locked:
		return invalid("unknown retention mode %q: choose governance (users with the bypass permission can delete), compliance (no user can) or, on Azure, locked", ret.Mode)
	case ret.Period < MinRetention:
		return invalid("a retention period of %s is too short: at least %s, because maintenance extends the locks once a day", ret.Period, MinRetention)
	}
	return nil
}

// Create makes a repository and connects to it. The next Create with the same password
// finishes one that was interrupted. If a repository exists, the error is
// ErrAlreadyExists and nothing is changed.
func Create(ctx context.Context, opt CreateOptions) error {
	if err := errors.Join(opt.validate(), opt.Format.validate(), opt.Retention.validate()); err != nil {
		return err
	}
	if opt.ReadOnly {
		return invalid("a repository cannot be created read-only: create it, then connect to it with --read-only elsewhere")
	}
	if s, ok := opt.Storage.(*S3); ok && !s.PointInTime.IsZero() {
		return invalid("a repository cannot be created at a point in time")
	}
	st, release, err := openStorage(ctx, opt.Storage, true)
	if err != nil {
		return err
	}
	defer release()
	defer st.Close(context.WithoutCancel(ctx))
	if opt.Retention.enabled() && !canLock(st) {
		return invalid("%s cannot lock objects: object lock works on S3, Google Cloud Storage and Azure only", place(st.ConnectionInfo()))
	}

	f, err := readFormatBlob(ctx, st)
	exists := err == nil
	if !exists {
		if err := initialize(ctx, st, opt, err); err != nil {
			return err
		}
		if f, err = readFormatBlob(ctx, st); err != nil {
			return err
		}
	}
	c, err := newConnection(st, f, opt.ConnectOptions)
	if err != nil {
		return err
	}
	if exists {
		if err := c.refuseFinished(ctx, opt.ConnectOptions); err != nil {
			return err
		}
	}
	r, err := c.tryUnfinished(ctx, opt.ConnectOptions)
	if err != nil {
		return err
	}
	if err := errors.Join(r.finishCreate(ctx, opt, exists), r.Close(context.WithoutCancel(ctx))); err != nil {
		return err
	}
	return c.install(opt.ConfigFile)
}

// refuseFinished returns nil for a repository whose creation was interrupted.
func (c *connection) refuseFinished(ctx context.Context, opt ConnectOptions) error {
	where := placeOf(c.lc)
	r, err := c.try(ctx, opt)
	switch {
	case errors.Is(err, ErrIncompleteRepository):
		return nil
	case errors.Is(err, ErrWrongPassword):
		return existsError(where, "it has another password; connect to it with 'varve repo connect', or choose another place")
	case err != nil:
		return existsError(where, err.Error())
	}
	text := "connect to it with 'varve repo connect', or choose another place"
	if r.foreign {
		text = "it was made by Kopia or Velero; connect to it with 'varve repo connect' to read it, or choose another place"
	}
	return errors.Join(existsError(where, text), r.Close(context.WithoutCancel(ctx)))
}

func existsError(where, text string) error {
	return &stateError{kind: ErrAlreadyExists, text: fmt.Sprintf("a repository already exists in %s: %s", where, text)}
}

// initialize writes the blobs that describe a repository. why is readFormatBlob's error.
func initialize(ctx context.Context, st blob.Storage, opt CreateOptions, why error) error {
	octx, settled, release := boundSilence(ctx, OpenTimeout)
	defer release()
	defer settled()
	octx, over := withTurn(octx, opt.Turn)
	defer over()
	where := place(st.ConnectionInfo())
	switch {
	case errors.Is(why, ErrNotInitialized):
	case errors.Is(why, ErrIncompleteRepository):
		// Only the result of the first of the two writes may be there.
		found, err := inspect(octx, st)
		if err != nil {
			return explain(octx, where, err)
		}
		if found.packs || !found.blobConfig {
			return why
		}
		if err := st.DeleteBlob(octx, format.KopiaBlobCfgBlobID); err != nil {
			return explain(octx, where, err)
		}
	default:
		return why
	}
	kopia := &repo.NewRepositoryOptions{
		BlockFormat: format.ContentFormat{
			Hash:               cmp.Or(opt.Format.Hash, DefaultHash),
			Encryption:         opt.Format.Encryption,
			ECCOverheadPercent: opt.Format.ECCOverheadPercent,
		},
		RetentionPeriod: opt.Retention.Period,
	}
	if opt.Format.ECCOverheadPercent > 0 {
		kopia.BlockFormat.ECC = ecc.DefaultAlgorithm
	}
	if opt.Retention.enabled() {
		kopia.RetentionMode = opt.Retention.mode()
	}
	err := mayChange(octx, st)
	if err == nil {
		err = repo.Initialize(octx, st, kopia, opt.Password)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, repo.ErrAlreadyInitialized): // somebody was faster
		return existsError(where, "it was created a moment ago; connect to it with 'varve repo connect'")
	case opt.Retention.enabled() && mentionsLock(err):
		return &stateError{kind: ErrInvalidOptions, cause: err, text: fmt.Sprintf(
			"%s does not accept object locks (%s): make the bucket with object lock (on Azure and Google: versioning and retention) enabled", where, brief(err))}
	default:
		return explain(octx, where, err)
	}
}

func mentionsLock(err error) bool {
	text := strings.ToLower(err.Error())
	return errors.Is(err, blob.ErrUnsupportedPutBlobOption) ||
		strings.Contains(text, "objectlock") || strings.Contains(text, "object lock") ||
		strings.Contains(text, "retention") || strings.Contains(text, "immutab")
}

// finishCreate writes what makes a repository Varve's: parameters, then in one
// session maintenance owner, policy and, last to be looked for, the record.
func (r *Repository) finishCreate(ctx context.Context, opt CreateOptions, resumed bool) error {
	fm := r.direct.FormatManager()
	if resumed {
		if err := r.sameFormat(ctx, opt); err != nil {
			return err
		}
	}
	mp, err := fm.GetMutableParameters(ctx)
	if err != nil {
		return fmt.Errorf("read repository parameters: %w", err)
	}
	blobcfg, err := fm.BlobCfgBlob(ctx)
	if err != nil {
		return fmt.Errorf("read repository parameters: %w", err)
	}
	features, err := fm.RequiredFeatures(ctx)
	if err != nil {
		return fmt.Errorf("read repository parameters: %w", err)
	}
	// Each flush of a backup adds an index blob, and within an epoch none are merged:
	// with 3,600 of them a cold open takes 2 s.
	mp.EpochParameters.MinEpochDuration = 6 * time.Hour
	mp.EpochParameters.EpochRefreshFrequency = 2 * time.Hour // at most a third of an epoch
	mp.EpochParameters.CleanupSafetyMargin = 6 * time.Hour   // at least three refreshes
	if err := fm.SetParameters(ctx, mp, blobcfg, features); err != nil {
		return fmt.Errorf("set repository parameters: %w", err)
	}

	err = repo.WriteSession(ctx, r.rep, repo.WriteSessionOptions{Purpose: "varve repo create"}, func(ctx context.Context, w repo.RepositoryWriter) error {
		_, err := r.writeSettings(ctx, w, opt.Format.compressor())
		return err
	})
	if err != nil {
		return fmt.Errorf("finish the repository: %w", err)
	}
	return nil
}

// sameFormat refuses to finish a repository that was begun with other options.
func (r *Repository) sameFormat(ctx context.Context, opt CreateOptions) error {
	f := r.direct.FormatManager().ScrubbedContentFormat()
	differ := func(what, begun, asked string) error {
		return invalid("the unfinished repository was begun with %s %s, not %s: create it with the same options, or delete it first", what, begun, asked)
	}
	if h := opt.Format.Hash; h != "" && h != f.Hash {
		return differ("hash", f.Hash, h)
	}
	if e := opt.Format.Encryption; e != "" && e != f.Encryption {
		return differ("encryption", f.Encryption, e)
	}
	if e := opt.Format.ECCOverheadPercent; e != f.ECCOverheadPercent {
		return differ("an error correction overhead of", fmt.Sprint(f.ECCOverheadPercent), fmt.Sprint(e))
	}
	ret, err := r.retention(ctx)
	if err != nil {
		return err
	}
	asked := Retention{}
	if opt.Retention.enabled() {
		asked = Retention{Mode: string(opt.Retention.mode()), Period: opt.Retention.Period}
	}
	if ret != asked {
		return differ("a retention of", fmt.Sprint(ret), fmt.Sprint(asked))
	}
	return nil
}

// CreateFilesystem makes a repository with all defaults in a directory and
// connects to it, with its cache beside the configuration file.
func CreateFilesystem(ctx context.Context, dir, configFile, password string) error {
	return Create(ctx, CreateOptions{ConnectOptions: ConnectOptions{
		ConfigFile: configFile,
		Storage:    &Filesystem{Path: dir},
		Password:   password,
		Cache:      Cache{Directory: configFile + ".cache"},
	}})
}

package repository

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"
)

// diagnose finds out more about an attempt that failed because kopia.repository or
// kopia.blobcfg does not decrypt: the password may be wrong, or the blob damaged. If no
// more can be found out it returns err, which says both.
func diagnose(ctx context.Context, lc *repo.LocalConfig, side sideFile, place string, err error) error {
	wrong, half := errors.Is(err, ErrWrongPassword), errors.Is(err, ErrPasswordChangeInterrupted)
	if lc.Storage == nil || !wrong && !half {
		return err
	}
	ctx = context.WithValue(ctx, turnKey{}, (*turn)(nil)) // no key is derived here
	st, serr := blob.NewStorage(ctx, *lc.Storage, false)
	if serr != nil {
		return err
	}
	defer st.Close(context.WithoutCancel(ctx))
	if half {
		return diagnoseBlobConfig(ctx, st, place, err)
	}
	p, serr := getBlob(ctx, st, format.KopiaRepositoryBlobID)
	if serr != nil || side.UniqueID == "" {
		return err
	}
	var f format.KopiaRepositoryJSON
	if json.Unmarshal(p, &f) != nil || hex.EncodeToString(f.UniqueID) == side.UniqueID {
		return err
	}
	return &stateError{kind: ErrReplaced, cause: err, text: fmt.Sprintf(
		"the blob kopia.repository in %s is not the one of the repository connected: if another repository is there now, run 'varve repo connect' again; "+
			"if the blob is damaged, put back a copy of it", place)}
}

// diagnoseBlobConfig relies on this: every writer of kopia.blobcfg writes
// kopia.repository next (kopia repo/format, ChangePassword, SetParameters and
// Initialize). The error also wraps ErrPasswordChangeInterrupted: kopia.repository may
// have been restored.
func diagnoseBlobConfig(ctx context.Context, st blob.Storage, place string, err error) error {
	cfg, err1 := st.GetMetadata(ctx, format.KopiaBlobCfgBlobID)
	main, err2 := st.GetMetadata(ctx, format.KopiaRepositoryBlobID)
	if err1 != nil || err2 != nil || cfg.Timestamp.After(main.Timestamp) {
		return err
	}
	return &stateError{kind: ErrIncompleteRepository, cause: err, text: fmt.Sprintf(
		"the blob kopia.blobcfg in %s is damaged: put back a copy of it; it holds only the settings of object lock, "+
			"so without a copy, and if the storage locks no objects, delete it", place)}
}

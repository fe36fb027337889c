package repository

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/format"
)

// ChangePassword changes the password of the connected repository. Other clients need the
// new one from their next open on. To finish a change that was interrupted between its
// two writes, call it again with the same two passwords.
func ChangePassword(ctx context.Context, opt OpenOptions, newPassword string) error {
	if newPassword == "" {
		return invalid("the new repository password is empty")
	}
	r, err := Open(ctx, opt)
	if errors.Is(err, ErrPasswordChangeInterrupted) {
		return finishPasswordChange(ctx, opt, newPassword)
	}
	if err != nil {
		return err
	}
	return errors.Join(r.changePassword(ctx, newPassword), r.Close(context.WithoutCancel(ctx)))
}

func (r *Repository) changePassword(ctx context.Context, newPassword string) error {
	if !r.Writable() {
		return fmt.Errorf("%w: %s", ErrReadOnly, r.readOnlyReason())
	}
	fm := r.direct.FormatManager()
	if !fm.SupportsPasswordChange() {
		return invalid("the repository in %s has format version 1, whose password cannot change: upgrade it with 'kopia repository upgrade' first", r.place)
	}
	if err := fm.ChangePassword(ctx, newPassword); err != nil {
		return fmt.Errorf("change password: %w", err)
	}
	return nil
}

// finishPasswordChange writes the second of the two blobs of a password change
// (kopia repo/format/format_change_password.go): kopia.blobcfg is under the
// new password already, kopia.repository still under the old one.
func finishPasswordChange(ctx context.Context, opt OpenOptions, newPassword string) error {
	lc, err := readConnection(opt.ConfigFile)
	if err != nil {
		return err
	}
	if lc.Storage == nil || lc.ReadOnly {
		return fmt.Errorf("%w: finish the password change where it was begun", ErrReadOnly)
	}
	octx, settled, release := boundSilence(ctx, OpenTimeout)
	defer release()
	defer settled()
	where := place(*lc.Storage)
	st, err := blob.NewStorage(octx, *lc.Storage, false)
	if err != nil {
		return explain(octx, where, err)
	}
	defer st.Close(context.WithoutCancel(ctx))

	half := &halfChanged{Storage: st}
	fm, err := openFormat(octx, half, opt.Password)
	if err != nil {
		return explain(octx, where, err)
	}
	if err := fm.ChangePassword(octx, newPassword); err != nil {
		return explain(octx, where, err)
	}
	// Both blobs match only with the password that the change began with.
	if _, err := openFormat(octx, &halfChanged{Storage: st, repository: half.repository, whole: true}, newPassword); err != nil {
		return &stateError{kind: ErrPasswordChangeInterrupted, cause: err, text: fmt.Sprintf(
			"the blob kopia.blobcfg in %s does not fit the new password either: give the one that the interrupted password change set, or, if the blob is damaged, put back a copy of it", where)}
	}
	if err := half.commit(octx); err != nil {
		return explain(octx, where, err)
	}
	return nil
}

func openFormat(ctx context.Context, st blob.Storage, password string) (*format.Manager, error) {
	return format.NewManager(ctx, st, "", 0, password, time.Now)
}

// halfChanged is a storage that holds back the new kopia.repository until commit and
// hides kopia.blobcfg, unless whole.
type halfChanged struct {
	blob.Storage
	repository blob.Bytes
	options    blob.PutOptions
	whole      bool
}

func (s *halfChanged) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	switch {
	case id == format.KopiaBlobCfgBlobID && !s.whole:
		return blob.ErrBlobNotFound
	case id == format.KopiaRepositoryBlobID && s.repository != nil:
		out.Reset()
		_, err := s.repository.WriteTo(out)
		return err
	}
	return s.Storage.GetBlob(ctx, id, offset, length, out)
}

func (s *halfChanged) PutBlob(_ context.Context, id blob.ID, data blob.Bytes, opts blob.PutOptions) error {
	if id == format.KopiaRepositoryBlobID {
		s.repository, s.options = data, opts
	}
	return nil
}

func (s *halfChanged) commit(ctx context.Context) error {
	return s.Storage.PutBlob(ctx, format.KopiaRepositoryBlobID, s.repository, s.options)
}

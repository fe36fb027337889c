package repository

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"reflect"
	"strings"
	"syscall"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/blob/retrying"
	"github.com/minio/minio-go/v7"
	"golang.org/x/sys/unix"
)

// explainDenials makes a storage name the missing right when it denies something, and
// makes Kopia try such a write or deletion once. Kopia's storages come wrapped in retries
// (kopia repo/blob/retrying), which treat only a few of Kopia's own errors as final, so
// this wrapper goes inside the retries.
func explainDenials(st blob.Storage) blob.Storage {
	if inner, ok := withoutRetries(st); ok {
		return retrying.NewWrapper(&denials{inner})
	}
	return &denials{st}
}

// withoutRetries returns the storage inside Kopia's retry wrapper. The wrapper's type is
// not exported, but its only field is.
func withoutRetries(st blob.Storage) (blob.Storage, bool) {
	v := reflect.ValueOf(st)
	wrapper := reflect.TypeOf(retrying.NewWrapper(st))
	if v.Type() != wrapper {
		return nil, false
	}
	inner, ok := v.Elem().FieldByName("Storage").Interface().(blob.Storage)
	return inner, ok
}

// denials is a storage whose denials are deniedErrors.
type denials struct{ blob.Storage }

func (s *denials) GetBlob(ctx context.Context, id blob.ID, offset, length int64, out blob.OutputBuffer) error {
	return s.explain(rightRead, s.Storage.GetBlob(ctx, id, offset, length, out))
}

func (s *denials) GetMetadata(ctx context.Context, id blob.ID) (blob.Metadata, error) {
	m, err := s.Storage.GetMetadata(ctx, id)
	return m, s.explain(rightRead, err)
}

func (s *denials) ListBlobs(ctx context.Context, prefix blob.ID, each func(blob.Metadata) error) error {
	return s.explain(rightList, s.Storage.ListBlobs(ctx, prefix, each))
}

// PutBlob asks for the time of a blob once it is written. Kopia's S3 storage does so even
// if the write failed, and reports that the blob is missing instead of the cause (kopia
// repo/blob/s3/s3_storage.go, PutBlob): the cause was lost, and the write was not
// retried.
func (s *denials) PutBlob(ctx context.Context, id blob.ID, data blob.Bytes, opt blob.PutOptions) error {
	if err := s.writable(); err != nil {
		return s.explain(rightWrite, err)
	}
	written := opt.GetModTime
	asked := unguarded(s.ConnectionInfo()).Type == "s3" && written != nil
	if asked {
		opt.GetModTime = nil
	}
	if err := s.Storage.PutBlob(ctx, id, data, opt); err != nil || !asked {
		return s.explain(rightWrite, err)
	}
	m, err := s.GetMetadata(ctx, id)
	if err == nil {
		*written = m.Timestamp
	}
	return err
}

func (s *denials) DeleteBlob(ctx context.Context, id blob.ID) error {
	if err := s.writable(); err != nil {
		return s.explain(rightWrite, err)
	}
	return s.explain(rightDelete, s.Storage.DeleteBlob(ctx, id))
}

// writable checks the file system before Kopia does, which would try ten times to delete
// from a directory that is mounted read-only.
func (s *denials) writable() error {
	o, ok := s.ConnectionInfo().Config.(*filesystem.Options)
	if !ok {
		return nil
	}
	err := unix.Access(o.Path, unix.W_OK|unix.X_OK)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
		return err //nolint:wrapcheck // explained by the callers
	}
	return nil // the operation itself explains other errors better
}

func (s *denials) explain(r right, err error) error {
	var known *deniedError
	if err == nil || errors.As(err, &known) || !isDenied(err) {
		return err
	}
	return &deniedError{rights: []right{r}, place: s.ConnectionInfo(), cause: err}
}

// isDenied recognises a storage's denial of a right. It is false for keys that are
// unknown, wrong or expired: those do not concern rights.
func isDenied(err error) bool {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) { // file systems and SFTP
		return true
	}
	var s3 minio.ErrorResponse
	if errors.As(err, &s3) {
		return s3.StatusCode == http.StatusForbidden && (s3.Code == "AccessDenied" || s3.Code == "AllAccessDisabled")
	}
	text := err.Error()
	for _, denied := range []string{
		"googleapi: Error 403",            // Google
		"AuthorizationPermissionMismatch", // Azure
		"AuthorizationFailure",            // Azure, by the firewall
		"insufficient_permissions",        // B2
	} {
		if strings.Contains(text, denied) {
			return true
		}
	}
	var dav *fs.PathError // WebDAV: the status code instead of a system error
	return errors.As(err, &dav) && strings.HasPrefix(dav.Err.Error(), "403")
}

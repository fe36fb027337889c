package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/retrying"
	"github.com/kopia/kopia/repo/blob/s3"
	"github.com/minio/minio-go/v7"
)

// busyS3 fails its first writes, and requests a blob's time as Kopia's S3 storage does.
type busyS3 struct {
	blob.Storage
	fail, puts int
	there      bool
}

var errBusy = errors.New("503 Slow Down")

func (s *busyS3) ConnectionInfo() blob.ConnectionInfo {
	return blob.ConnectionInfo{Type: "s3", Config: &s3.Options{}}
}

func (s *busyS3) GetMetadata(context.Context, blob.ID) (blob.Metadata, error) {
	if !s.there {
		return blob.Metadata{}, blob.ErrBlobNotFound
	}
	return blob.Metadata{Timestamp: time.Unix(7, 0)}, nil
}

func (s *busyS3) PutBlob(ctx context.Context, id blob.ID, _ blob.Bytes, opt blob.PutOptions) error {
	var err error
	if s.puts++; s.puts <= s.fail {
		err = errBusy
	} else {
		s.there = true
	}
	if opt.GetModTime != nil {
		m, err := s.GetMetadata(ctx, id)
		if err != nil {
			return err
		}
		*opt.GetModTime = m.Timestamp
	}
	return err
}

// TestPutIsTriedAgain: a write that requests its time and fails for a moment is retried.
func TestPutIsTriedAgain(t *testing.T) {
	t.Parallel() // it waits for the retry
	for _, fail := range []int{0, 1} {
		s := &busyS3{fail: fail}
		var written time.Time
		err := explainDenials(retrying.NewWrapper(s)).PutBlob(t.Context(), "p1", text("x"), blob.PutOptions{GetModTime: &written})
		if err != nil || s.puts != fail+1 || !written.Equal(time.Unix(7, 0)) {
			t.Errorf("%d failures: %v after %d writes, at %v", fail, err, s.puts, written)
		}
	}
}

func TestIsDenied(t *testing.T) {
	for _, row := range []struct {
		err  error
		want bool
	}{
		{minio.ErrorResponse{StatusCode: http.StatusForbidden, Code: "AccessDenied"}, true},
		{fmt.Errorf("StatObject: %w", minio.ErrorResponse{StatusCode: http.StatusForbidden, Code: "AccessDenied"}), true},
		{minio.ErrorResponse{StatusCode: http.StatusForbidden, Code: "SignatureDoesNotMatch"}, false},
		{minio.ErrorResponse{StatusCode: http.StatusForbidden, Code: "RequestTimeTooSkewed"}, false},
		{minio.ErrorResponse{StatusCode: http.StatusServiceUnavailable, Code: "SlowDown"}, false},
		{&fs.PathError{Op: "open", Path: "/r/p", Err: syscall.EACCES}, true},
		{&fs.PathError{Op: "open", Path: "/r/p", Err: syscall.EROFS}, true},
		{&fs.PathError{Op: "open", Path: "/r/p", Err: syscall.ENOSPC}, false},
		{&fs.PathError{Op: "Write", Path: "/dav/p", Err: errors.New("403")}, true},
		{&fs.PathError{Op: "Write", Path: "/dav/403", Err: errors.New("507")}, false},
		{errors.New("googleapi: Error 403: varve@x does not have storage.objects.create access"), true},
		{errors.New("googleapi: Error 404: not there"), false},
		{blob.ErrBlobNotFound, false},
	} {
		if got := isDenied(row.err); got != row.want {
			t.Errorf("%v: denied is %v", row.err, got)
		}
	}
}

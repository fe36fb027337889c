package repository

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/azure"
	"github.com/kopia/kopia/repo/blob/b2"
	"github.com/kopia/kopia/repo/blob/filesystem"
	"github.com/kopia/kopia/repo/blob/gcs"
	"github.com/kopia/kopia/repo/blob/rclone"
	"github.com/kopia/kopia/repo/blob/s3"
	"github.com/kopia/kopia/repo/blob/sftp"
	"github.com/kopia/kopia/repo/blob/sharded"
	"github.com/kopia/kopia/repo/blob/throttling"
	"github.com/kopia/kopia/repo/blob/webdav"
)

// Storage says where a repository's blobs are kept: one of *Filesystem, *S3,
// *GCS, *Azure, *B2, *SFTP, *WebDAV and *Rclone, or *Guarded around one.
type Storage interface {
	// validate reports options that are missing or contradict each other, in words for
	// the user, before anything is changed.
	validate() error
	// open connects. With create set, it makes the place if the storage can (a directory,
	// never a bucket).
	open(ctx context.Context, create bool) (blob.Storage, error)
}

var (
	_ Storage = (*Filesystem)(nil)
	_ Storage = (*S3)(nil)
	_ Storage = (*GCS)(nil)
	_ Storage = (*Azure)(nil)
	_ Storage = (*B2)(nil)
	_ Storage = (*SFTP)(nil)
	_ Storage = (*WebDAV)(nil)
	_ Storage = (*Rclone)(nil)
	_ Storage = (*Guarded)(nil)
)

// place names a storage for people: kind and address, no secrets.
func place(ci blob.ConnectionInfo) string {
	bucket := func(name, prefix string) string { return strings.TrimSuffix(name+"/"+prefix, "/") }
	switch o := ci.Config.(type) {
	case *filesystem.Options:
		return "directory " + o.Path
	case *s3.Options:
		return fmt.Sprintf("S3 bucket %s at %s", bucket(o.BucketName, o.Prefix), o.Endpoint)
	case *gcs.Options:
		return "Google Cloud Storage bucket " + bucket(o.BucketName, o.Prefix)
	case *azure.Options:
		return fmt.Sprintf("Azure container %s of account %s", bucket(o.Container, o.Prefix), o.StorageAccount)
	case *b2.Options:
		return "B2 bucket " + bucket(o.BucketName, o.Prefix)
	case *sftp.Options:
		return fmt.Sprintf("SFTP %s@%s:%d:%s", o.Username, o.Host, o.Port, o.Path)
	case *webdav.Options:
		return "WebDAV " + o.URL
	case *rclone.Options:
		return "rclone remote " + o.RemotePath
	case *guardedOptions:
		return place(o.Storage)
	default:
		return "storage of type " + ci.Type
	}
}

// isLocal reports whether a storage needs no cache of contents.
func isLocal(ci blob.ConnectionInfo) bool { return ci.Type == "filesystem" }

// openStorage validates and opens a storage that answers within OpenTimeout. The error says
// what to do. release frees the storage's resources once it is closed.
func openStorage(ctx context.Context, s Storage, create bool) (st blob.Storage, release func(), err error) {
	if s == nil {
		return nil, nil, invalid("no storage given")
	}
	if err := s.validate(); err != nil {
		return nil, nil, err
	}
	octx, settled, release := boundSilence(ctx, OpenTimeout)
	st, err = answered(octx, func() (blob.Storage, error) {
		return watch(octx, func() (blob.Storage, error) { return s.open(octx, create) })
	},
		func(st blob.Storage) { _ = st.Close(context.WithoutCancel(ctx)) })
	settled()
	if err != nil {
		err = explain(octx, describe(s), err)
		release()
		return nil, nil, err
	}
	return st, release, nil
}

// describe is place for a storage that is not open yet.
func describe(s Storage) string {
	switch o := s.(type) {
	case *Filesystem:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *S3:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *GCS:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *Azure:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *B2:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *SFTP:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *WebDAV:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *Rclone:
		return place(blob.ConnectionInfo{Config: o.options()})
	case *Guarded:
		return describe(o.Storage)
	default:
		return fmt.Sprintf("%T", s)
	}
}

// retentionKinds are the storages whose blobs Kopia can lock.
var retentionKinds = []string{"s3", "gcs", "azureBlob"}

func canLock(st blob.Storage) bool {
	return slices.Contains(retentionKinds, unguarded(st.ConnectionInfo()).Type)
}

// Limits bound the use of a storage by one client; 0 is unlimited.
type Limits struct {
	UploadBytesPerSecond   float64 `json:"uploadBytesPerSecond,omitempty"`
	DownloadBytesPerSecond float64 `json:"downloadBytesPerSecond,omitempty"`
	ReadsPerSecond         float64 `json:"readsPerSecond,omitempty"`
	WritesPerSecond        float64 `json:"writesPerSecond,omitempty"`
	ListsPerSecond         float64 `json:"listsPerSecond,omitempty"`
	ConcurrentReads        int     `json:"concurrentReads,omitempty"`
	ConcurrentWrites       int     `json:"concurrentWrites,omitempty"`
}

func (l Limits) validate() error {
	for _, v := range []float64{l.UploadBytesPerSecond, l.DownloadBytesPerSecond, l.ReadsPerSecond, l.WritesPerSecond, l.ListsPerSecond, float64(l.ConcurrentReads), float64(l.ConcurrentWrites)} {
		if v < 0 || v != v {
			return invalid("a limit on the use of the storage cannot be negative; 0 means no limit")
		}
	}
	return nil
}

// kopia returns nil for no limits at all.
func (l Limits) kopia() *throttling.Limits {
	if l == (Limits{}) {
		return nil
	}
	return &throttling.Limits{
		UploadBytesPerSecond:   l.UploadBytesPerSecond,
		DownloadBytesPerSecond: l.DownloadBytesPerSecond,
		ReadsPerSecond:         l.ReadsPerSecond,
		WritesPerSecond:        l.WritesPerSecond,
		ListsPerSecond:         l.ListsPerSecond,
		ConcurrentReads:        l.ConcurrentReads,
		ConcurrentWrites:       l.ConcurrentWrites,
	}
}

func limitsOf(l *throttling.Limits) Limits {
	if l == nil {
		return Limits{}
	}
	return Limits{
		UploadBytesPerSecond:   l.UploadBytesPerSecond,
		DownloadBytesPerSecond: l.DownloadBytesPerSecond,
		ReadsPerSecond:         l.ReadsPerSecond,
		WritesPerSecond:        l.WritesPerSecond,
		ListsPerSecond:         l.ListsPerSecond,
		ConcurrentReads:        l.ConcurrentReads,
		ConcurrentWrites:       l.ConcurrentWrites,
	}
}

// shardsOf spreads the blobs of a new repository over 256 directories of a kind, where Kopia
// makes 4096: a list reads each of them, with a request of its own on a server, and they
// stay when they are empty. The repository keeps what it was created with.
func shardsOf(create bool) sharded.Options {
	if !create {
		return sharded.Options{}
	}
	return sharded.Options{DirectoryShards: []int{1, 2}}
}

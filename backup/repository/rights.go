package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
	"github.com/kopia/kopia/repo/blob/filesystem"
)

// ErrDenied means that this client lacks a right in the storage, for example to write or
// to delete objects.
var ErrDenied = errors.New("the storage denies access")

// right is a right in a storage, as a word for the user.
type right string

const (
	rightRead   right = "read"
	rightList   right = "list"
	rightWrite  right = "write"
	rightDelete right = "delete"
)

// deniedError names the right that is missing.
type deniedError struct {
	rights []right
	place  blob.ConnectionInfo
	cause  error
}

func (e *deniedError) Error() string {
	words := make([]string, len(e.rights))
	for i, r := range e.rights {
		words[i] = string(r)
	}
	what := strings.Join(words, " and ")
	if _, local := unguarded(e.place).Config.(*filesystem.Options); local {
		advice := "run this as a user who may"
		if e.has(rightWrite) {
			advice += ", or mount it for writing"
		}
		return fmt.Sprintf("this user may not %s in %s (%s): %s", what, place(e.place), brief(e.cause), advice)
	}
	return fmt.Sprintf("this client may not %s objects in %s (%s): grant its key the right to %s, or use another key; docs/repository.md lists the rights that each command needs",
		what, place(e.place), brief(e.cause), what)
}

func (e *deniedError) Unwrap() []error { return []error{ErrDenied, e.cause} }

// Is makes Kopia not retry a denial (kopia repo/blob/retrying, isRetriable): ten attempts
// would take 12 seconds.
func (e *deniedError) Is(target error) bool {
	return target == blob.ErrInvalidCredentials && (e.has(rightWrite) || e.has(rightDelete))
}

func (e *deniedError) has(r right) bool { return slices.Contains(e.rights, r) }

// rightsBlob is written and deleted to find out whether this client may do so. Kopia
// ignores blobs of such a name. All clients use the same name, so that at most one blob
// is left by clients that may write but not delete.
const (
	rightsBlob blob.ID = "varve.rights"
	rightsText text    = "varve finds out with this object whether it may write here; it may be deleted\n"
)

// text is blob.Bytes.
type text string

func (t text) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, string(t))
	return int64(n), err //nolint:wrapcheck // the writer's own
}

func (t text) Length() int { return len(t) }

func (t text) Reader() io.ReadSeekCloser {
	return struct {
		io.ReadSeeker
		io.Closer
	}{strings.NewReader(string(t)), io.NopCloser(nil)}
}

// mayDelete fails with ErrDenied if this client may not delete. Deleting a missing blob
// changes nothing.
func mayDelete(ctx context.Context, st blob.Storage) error {
	if err := st.DeleteBlob(ctx, rightsBlob); err != nil && !errors.Is(err, blob.ErrBlobNotFound) {
		return err //nolint:wrapcheck // names the right, the place and the blob's operation
	}
	return nil
}

// mayChange fails with ErrDenied if this client may not write or delete; the error names
// all missing rights.
func mayChange(ctx context.Context, st blob.Storage) error {
	cannotWrite := st.PutBlob(ctx, rightsBlob, rightsText, blob.PutOptions{})
	if cannotWrite != nil && !errors.Is(cannotWrite, ErrDenied) {
		return cannotWrite //nolint:wrapcheck // names the right, the place and the blob's operation
	}
	cannotDelete := mayDelete(ctx, st)
	var w, d *deniedError
	if errors.As(cannotWrite, &w) && errors.As(cannotDelete, &d) && !d.has(rightWrite) {
		return &deniedError{rights: []right{rightWrite, rightDelete}, place: d.place, cause: w.cause}
	}
	if cannotDelete != nil {
		return cannotDelete
	}
	return cannotWrite //nolint:wrapcheck // as above
}

// rights caches what is known about a connection's rights. A denial is checked again,
// because rights can be granted later.
type rights struct{ delete, change atomic.Bool }

// CheckRights fails with ErrDenied if this client may not write or delete objects in the
// storage; the error names the missing rights. Call it before work that would be lost
// without them.
func (r *Repository) CheckRights(ctx context.Context) error {
	if !r.Writable() {
		return fmt.Errorf("%w: %s", ErrReadOnly, r.readOnlyReason())
	}
	if r.rights.change.Load() {
		return nil
	}
	wctx, w, err := r.direct.NewDirectWriter(ctx, repo.WriteSessionOptions{Purpose: "varve rights"})
	if err != nil {
		return fmt.Errorf("open write session: %w", err)
	}
	err = mayChange(wctx, w.BlobStorage())
	err = errors.Join(err, w.Close(context.WithoutCancel(wctx)))
	if err == nil {
		r.rights.change.Store(true)
		r.rights.delete.Store(true)
	}
	return err
}

// checkDelete fails with ErrDenied if this client may not delete. A session ends by
// deleting its marker: without that right it would fail, and leave a marker, a pack and
// an index. A missing right to write shows in a session's first write, which leaves
// nothing.
func (r *Repository) checkDelete(ctx context.Context, st blob.Storage) error {
	if r.rights.delete.Load() {
		return nil
	}
	if err := mayDelete(ctx, st); err != nil {
		return err
	}
	r.rights.delete.Store(true)
	return nil
}

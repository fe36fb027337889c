package fusefs

import (
	"context"
	"errors"
	"io/fs"
	"syscall"

	"github.com/varve-io/varve/fusefs/diskfs"
)

// errno returns the errno of an error, and logs what an errno cannot say.
func (p *point) errno(ctx context.Context, op string, err error) syscall.Errno {
	var no syscall.Errno
	switch {
	case err == nil:
		return 0
	case ctx.Err() != nil, errors.Is(err, context.Canceled):
		return syscall.EINTR
	case errors.Is(err, fs.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, diskfs.ErrCorrupt):
		no = syscall.EUCLEAN
	case errors.Is(err, diskfs.ErrUnsupported):
		no = syscall.EOPNOTSUPP
	case errors.As(err, &no):
		return no
	default:
		no = syscall.EIO
	}
	p.fs.log.Error("cannot read from a recovery point", "point", p.info.Name(), "operation", op, "error", err)
	return no
}

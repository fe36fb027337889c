package main

import (
	"context"
	"errors"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/imageio"
	"github.com/varve-io/varve/backup/libvirt"
	"github.com/varve-io/varve/backup/nbddisk"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/qemu"
	"github.com/varve-io/varve/backup/qemu/qmp"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/backup/target"
	"github.com/varve-io/varve/blockdev/nbdattach"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/internal/plain"
	"github.com/varve-io/varve/internal/serve"
	"github.com/varve-io/varve/nbdserver"
)

// Exit codes, as documented in docs/exit-codes.md. Scripts depend on them: a code never
// changes its meaning.
const (
	exitOK          = 0
	exitFailure     = 1   // anything without a code of its own
	exitUsage       = 2   // wrong command, flag, argument or settings file
	exitRepository  = 3   // the repository cannot be opened
	exitDamaged     = 4   // verify, or a read, found data missing or corrupt
	exitNotFound    = 5   // a name matches no recovery point or volume, or several
	exitRefused     = 6   // a safety check said no and nothing was changed
	exitInterrupted = 130 // by a signal
)

var errInterrupted = errors.New("interrupted")

// usageError is an error in how varve was called.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// exitCodes is the table from errors to exit codes. The first row that matches by errors.Is
// decides; errors of a type are matched in exitCode.
var exitCodes = []struct {
	is   error
	code int
}{
	{errInterrupted, exitInterrupted},
	{context.Canceled, exitInterrupted},
	{repository.ErrInvalidOptions, exitUsage},
	{errNoPassword, exitRepository},
	{repository.ErrNotConnected, exitRepository},
	{repository.ErrWrongPassword, exitRepository},
	{repository.ErrUnreachable, exitRepository},
	{repository.ErrNotInitialized, exitRepository},
	{repository.ErrIncompleteRepository, exitRepository},
	{repository.ErrNewerFormat, exitRepository},
	{repository.ErrUpgradeInProgress, exitRepository},
	{repository.ErrReplaced, exitRepository},
	{repository.ErrPasswordChangeInterrupted, exitRepository},
	{repository.ErrAlreadyExists, exitRefused},
	{points.ErrNoSuchPoint, exitNotFound},
	{points.ErrAmbiguous, exitNotFound},
	{points.ErrLeased, exitRefused},
	{backup.ErrPinned, exitRefused},
	{backup.ErrPartOfGroup, exitRefused},
	{backup.ErrIncompleteGroup, exitDamaged},
	{errDeclined, exitRefused},
	{backup.ErrEmptyPolicy, exitUsage},
	{repository.ErrNotOwner, exitRefused},
	{points.ErrDamaged, exitDamaged},
	{repository.ErrContentMissing, exitDamaged},
	{repository.ErrContentCorrupt, exitDamaged},
	{repository.ErrReadOnly, exitRefused},
	{repository.ErrDenied, exitRefused},
	{backup.ErrVerify, exitDamaged},
	{backup.ErrWrongParent, exitRefused},
	{backup.ErrOtherDisk, exitRefused},
	{backup.ErrShrunk, exitRefused},
	{backup.ErrStreamLength, exitRefused},
	{backup.ErrEmptyStream, exitRefused},
	{points.ErrStream, exitUsage},
	{backup.ErrTooLarge, exitRefused},
	{backup.ErrSourceLied, exitRefused},
	{cbt.ErrBaseMismatch, exitRefused},
	{cbt.ErrVolumeMismatch, exitRefused},
	{cbt.ErrSizeMismatch, exitRefused},
	{cbt.ErrNoBase, exitRefused},
	{cbt.ErrOutOfRange, exitRefused},
	{cbt.ErrOverlap, exitRefused},
	{cbt.ErrTruncated, exitRefused},
	{cbt.ErrFormat, exitRefused},
	{cbt.ErrTooScattered, exitRefused},
	{backup.ErrNotBase, exitRefused},
	{backup.ErrOtherRestore, exitRefused},
	{backup.ErrTargetTooSmall, exitRefused},
	{errTargetExists, exitRefused},
	{target.ErrExists, exitRefused},
	{target.ErrFormat, exitUsage},
	{nbddisk.ErrReadOnly, exitRefused},
	{nbddisk.ErrTooSmall, exitRefused},
	{nbddisk.ErrNoBitmap, exitNotFound},
	{nbddisk.ErrOtherDisk, exitRefused},
	{imageio.ErrSize, exitRefused},
	{imageio.ErrHidden, exitRefused},
	{imageio.ErrReadOnly, exitRefused},
	{imageio.ErrTooSmall, exitRefused},
	{qemu.ErrLocked, exitRefused},
	{qemu.ErrLeadsOut, exitRefused},
	{qemu.ErrImage, exitRefused},
	{source.ErrFormat, exitUsage},
	{source.ErrNoTracking, exitUsage},
	{source.ErrMachineBusy, exitRefused},
	{source.ErrNoDisk, exitNotFound},
	{qmp.ErrBusy, exitRefused},
	{libvirt.ErrNoDomain, exitNotFound},
	{errDomainExists, exitRefused},
	{errNoDefinition, exitUsage},
	{errOtherCluster, exitRefused},
	{errNotPrivate, exitRefused},
	{disk.ErrMounted, exitRefused},
	{disk.ErrTooSmall, exitRefused},
	{disk.ErrReadOnly, exitRefused},
	{disk.ErrNotADisk, exitUsage},
	{overlay.ErrInUse, exitRefused},
	{overlay.ErrOtherBase, exitRefused},
	{hydrate.ErrInUse, exitRefused},
	{hydrate.ErrNotACache, exitRefused},
	{overlay.ErrKept, exitRefused},
	{disks.ErrPadded, exitRefused},
	{disks.ErrNotPadded, exitRefused},
	{serve.ErrNotWritable, exitUsage},
	{nbdserver.ErrUnknownExport, exitNotFound},
	{nbdattach.ErrWritable, exitUsage},
	{nbdattach.ErrOtherDisk, exitRefused},
	{errOtherVolume, exitUsage},
	{fusefs.ErrNotMounted, exitUsage},
	{fusefs.ErrBusy, exitRefused},
}

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	var usage *usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	var child *childError
	if errors.As(err, &child) {
		return child.code
	}
	for _, row := range exitCodes {
		if errors.Is(err, row.is) {
			return row.code
		}
	}
	return exitFailure
}

// message returns the text of an error for the user: one line, or one per point that a name
// may mean, safe for a terminal, since it may contain names of files from an untrusted disk.
func message(err error) string {
	lines := strings.Split(strings.TrimSpace(withoutRepeats(brief(err))), "\n")
	for i, line := range lines {
		lines[i] = plain.Text(line)
	}
	if errors.Is(err, points.ErrAmbiguous) {
		return strings.Join(lines, "\n")
	}
	return strings.Join(lines, "; ")
}

package main

import (
	"context"
	"errors"
	"strings"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/cbt"
	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/backup/hydrate"
	"github.com/varve-io/varve/backup/overlay"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs"
	"github.com/varve-io/varve/internal/serve"
	"github.com/varve-io/varve/nbdserver"
	"github.com/varve-io/varve/nbdserver/nbdattach"
)

// Exit codes. docs/exit-codes.md tells users what they mean; scripts depend on
// them, so a code never changes its meaning.
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

// exitCodes is the one table from errors to exit codes. The first row that
// matches by errors.Is decides; errors of a type are matched in exitCode.
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
	{backup.ErrNoSuchPoint, exitNotFound},
	{backup.ErrAmbiguous, exitNotFound},
	{backup.ErrLeased, exitRefused},
	{backup.ErrPinned, exitRefused},
	{errDeclined, exitRefused},
	{backup.ErrEmptyPolicy, exitUsage},
	{repository.ErrNotOwner, exitRefused},
	{backup.ErrDamaged, exitDamaged},
	{repository.ErrContentMissing, exitDamaged},
	{repository.ErrContentCorrupt, exitDamaged},
	{repository.ErrReadOnly, exitRefused},
	{backup.ErrVerify, exitDamaged},
	{backup.ErrWrongParent, exitRefused},
	{backup.ErrOtherDisk, exitRefused},
	{backup.ErrShrunk, exitRefused},
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
	{serve.ErrPadded, exitRefused},
	{serve.ErrNotPadded, exitRefused},
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

// message is what a user reads of an error: one line, or one for each point that a name
// may mean, and nothing that would do harm to a terminal, since names of files in it can
// be a stranger's.
func message(err error) string {
	lines := strings.Split(strings.TrimSpace(withoutRepeats(brief(err))), "\n")
	for i, line := range lines {
		lines[i] = printable(line)
	}
	if errors.Is(err, backup.ErrAmbiguous) {
		return strings.Join(lines, "\n")
	}
	return strings.Join(lines, "; ")
}

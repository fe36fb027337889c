package repository

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"

	"github.com/kopia/kopia/repo"
	"github.com/kopia/kopia/repo/blob"
)

// Sentinel errors of Create, Connect, Open and ChangePassword. Each returned error wraps
// one of these. It is one sentence for the user that ends in what to do next; errors.Is
// and errors.As still find the cause.
var (
	// ErrNotConnected means that there is no configuration file.
	ErrNotConnected = errors.New("not connected to a repository")
	// ErrWrongPassword means that the password does not open the repository.
	ErrWrongPassword = errors.New("wrong repository password")
	// ErrUnreachable means that the storage does not answer, or refuses access.
	ErrUnreachable = errors.New("repository storage unreachable")
	// ErrNotInitialized means that the storage holds no repository.
	ErrNotInitialized = errors.New("no repository there")
	// ErrIncompleteRepository means that a create was interrupted, or that the
	// blob which describes the repository is lost or damaged.
	ErrIncompleteRepository = errors.New("incomplete repository")
	// ErrNewerFormat means that newer software made the repository.
	ErrNewerFormat = errors.New("newer repository format")
	// ErrAlreadyExists means that Create found a finished repository.
	ErrAlreadyExists = errors.New("repository already exists")
	// ErrUpgradeInProgress means that a Kopia client has locked the repository
	// to upgrade its format.
	ErrUpgradeInProgress = errors.New("repository upgrade in progress")
	// ErrReplaced means that another repository is in the place of the connected one.
	ErrReplaced = errors.New("repository was replaced")
	// ErrPasswordChangeInterrupted means that a password change ended between
	// its two writes.
	ErrPasswordChangeInterrupted = errors.New("password change was interrupted")
	// ErrInvalidOptions means that options are wrong or contradict each other; nothing
	// was changed.
	ErrInvalidOptions = errors.New("invalid repository options")
)

// stateError is an error in words for the user.
type stateError struct {
	kind  error  // one of the sentinels
	text  string // the sentence
	cause error  // may be nil
}

func (e *stateError) Error() string { return e.text }

func (e *stateError) Unwrap() []error {
	if e.cause == nil {
		return []error{e.kind}
	}
	return []error{e.kind, e.cause}
}

func invalid(format string, args ...any) error {
	return &stateError{kind: ErrInvalidOptions, text: fmt.Sprintf(format, args...)}
}

// damagedIndex matches Kopia's error about an index blob that does not decode; in the
// storage's own failures another text follows the name (kopia
// repo/content/committed_content_index.go).
var damagedIndex = regexp.MustCompile(`error loading index blob (\S+): .*(?:decrypt|invalid|malformed|checksum)`)

// explain turns Kopia's error from an attempt to open the repository into one of the
// sentinels. Kopia has few distinct errors, so the fixed parts of its messages are
// matched (kopia repo/open.go, repo/format).
func explain(ctx context.Context, place string, err error) error {
	if err == nil {
		return nil
	}
	var known *stateError
	if errors.As(err, &known) {
		return err
	}
	cause := context.Cause(ctx)
	if cause != nil && !errors.Is(cause, errNoAnswer) {
		return cause
	}
	say := func(kind error, format string, args ...any) error {
		return &stateError{kind: kind, text: fmt.Sprintf(format, args...), cause: err}
	}
	text := err.Error()
	var denied *deniedError
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(text, p) {
				return true
			}
		}
		return false
	}
	switch {
	case errors.Is(err, repo.ErrInvalidPassword):
		return say(ErrWrongPassword, "wrong password for the repository in %s: give the one it was created with, or that was set last by 'varve repo change-password'; "+
			"if it is right, the blob kopia.repository is damaged: put back a copy of it", place)
	case has("code = PermissionDenied", "code = Unauthenticated"): // of a Kopia server
		return say(ErrWrongPassword, "%s refuses user or password: give the password of that user on the server, and check that the user exists there", place)
	case errors.Is(err, repo.ErrRepositoryUnavailableDueToUpgradeInProgress):
		return say(ErrUpgradeInProgress, "the repository in %s is locked by a Kopia client that upgrades its format: wait until it has ended, or, if it was abandoned, run 'kopia repository upgrade rollback'", place)
	case has("can't handle repositories created using version", "does not support feature", "index version"):
		return say(ErrNewerFormat, "the repository in %s was made by a newer version of Kopia (%s): use a newer varve", place, brief(err))
	case has("unsupported key derivation algorithm", "unknown encryption algorithm"):
		return say(ErrNewerFormat, "the repository in %s was made by a newer version of Kopia, or its blob kopia.repository is damaged (%s): use a newer varve, or put back a copy of the blob", place, brief(err))
	case errors.Is(err, repo.ErrRepositoryNotInitialized), has("unable to read format blob") && errors.Is(err, blob.ErrBlobNotFound):
		return say(ErrNotInitialized, "there is no repository in %s: check the place, or make one with 'varve repo create'", place)
	case has("deserialize blob config"):
		return say(ErrPasswordChangeInterrupted, "the password opens kopia.repository in %s but not kopia.blobcfg, which is newer: a password change was interrupted, or the blob is damaged: "+
			"run 'varve repo change-password' again with the same old and new password to finish the change; if there was none, put back a copy of kopia.blobcfg", place)
	case has("can't parse format blob", "invalid format blob", "invalid repository blobcfg blob"):
		return say(ErrIncompleteRepository, "the blob kopia.repository in %s is damaged: put back a copy of it, without it nothing in the repository can be read", place)
	case damagedIndex.MatchString(text):
		return say(ErrContentCorrupt, "the index of the repository in %s is damaged: blob %s cannot be read: put back a copy of it; "+
			"without one run 'varve repo repair', which finds in the packs what it listed", place, damagedIndex.FindStringSubmatch(text)[1])
	case errors.As(err, &denied):
		return say(ErrUnreachable, "%s", denied.Error())
	case errors.Is(err, blob.ErrInvalidCredentials):
		return say(ErrUnreachable, "%s refuses the credentials: check the storage's keys and their permissions", place)
	case has("bucket does not exist", "NoSuchBucket", "bucket not found", "container does not exist", "ContainerNotFound", "bucket doesn't exist"):
		return say(ErrUnreachable, "%s does not exist: make it first with your storage's own tools, or check the name", place)
	case errors.Is(cause, errNoAnswer):
		return say(ErrUnreachable, "%s does not answer: check the address, the network and whether the storage is up (%s)", place, brief(err))
	case errors.Is(err, fs.ErrNotExist):
		return say(ErrUnreachable, "%s does not exist: check the path and whether the disk it is on is mounted", place)
	default:
		return say(ErrUnreachable, "cannot reach %s: %s; check the place, the network and the credentials", place, brief(err))
	}
}

// brief shortens Kopia's nested errors to their last parts.
func brief(err error) string {
	parts := strings.Split(strings.Join(strings.Fields(err.Error()), " "), ": ")
	if len(parts) > 3 {
		parts = parts[len(parts)-3:]
	}
	s := strings.Join(parts, ": ")
	if r := []rune(s); len(r) > 300 {
		s = string(r[:300]) + "…"
	}
	return s
}

package diskfs

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
)

// ErrLost means that bytes of the image are gone, and others can still be read. The ReaderAt
// below reports it, as a [*LostError], where it can make the difference: after it
// a directory is read on, after any other error of the ReaderAt it is not.
var ErrLost = errors.New("data lost")

// LostError marks an error of the ReaderAt that concerns only the bytes that were asked
// for. It matches ErrLost.
type LostError struct{ Err error }

func (e *LostError) Error() string { return e.Err.Error() }
func (e *LostError) Unwrap() error { return e.Err }

// Is makes errors.Is(err, ErrLost) true.
func (e *LostError) Is(target error) bool { return target == ErrLost }

// Local reports whether an error concerns one place of an image: what lies elsewhere
// can be read all the same.
func Local(err error) bool {
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrLost) || errors.Is(err, fs.ErrNotExist)
}

// Dangling is the error of Inode for a number that an entry of directory dir has. An inode
// that is not in use is then damage of the directory: the name exists.
func Dangling(in Inodes, dir, ino uint64, err error) error {
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &CorruptError{Type: in.Info().Type, Where: fmt.Sprintf("directory %d", dir), What: fmt.Sprintf("an entry names inode %d, which is not in use", ino)}
}

// MapError says that a range of a file's content cannot be found, since the block that
// maps it is damaged. Content from byte End on may still be read.
type MapError struct {
	End int64
	Err error
}

func (e *MapError) Error() string { return e.Err.Error() }
func (e *MapError) Unwrap() error { return e.Err }

// maxFaults bounds the errors that Faults keeps.
const maxFaults = 8

// Faults collects what cannot be read in several places of one file or directory. The
// zero value is ready to use.
type Faults struct {
	errs []error
	more int
}

// Add takes an error in, unless it is nil. It reports whether reading on makes sense.
func (f *Faults) Add(err error) (goOn bool) {
	switch {
	case err == nil:
		return true
	case len(f.errs) == maxFaults:
		f.more++
	default:
		f.errs = append(f.errs, err)
	}
	return Local(err)
}

// Err gives all errors as one, nil if there is none. errors.Is and As see each.
func (f *Faults) Err() error {
	switch {
	case len(f.errs) == 0:
		return nil
	case len(f.errs) == 1 && f.more == 0:
		return f.errs[0]
	}
	return &faultsError{f.errs, f.more}
}

// faultsError is several errors in one line.
type faultsError struct {
	errs []error
	more int
}

func (e *faultsError) Error() string {
	texts := make([]string, len(e.errs))
	for i, err := range e.errs {
		texts[i] = err.Error()
	}
	if e.more > 0 {
		texts = append(texts, fmt.Sprintf("and %d more errors", e.more))
	}
	return strings.Join(texts, "; ")
}

func (e *faultsError) Unwrap() []error { return e.errs }

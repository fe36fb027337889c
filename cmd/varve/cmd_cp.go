package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disks"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/fusefs/browse"
	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/fusefs/files"
	"github.com/varve-io/varve/internal/progress"
)

type cpFlags struct {
	recursive, force, stale, tar, sparse, devices, setID bool
	workers                                              int
}

func newCpCommand(a *app) *cobra.Command {
	var f cpFlags
	cmd := &cobra.Command{
		Use:     "cp POINT:/PATH... TARGET",
		GroupID: groupRead,
		Short:   "Copy files out of a recovery point",
		Long: `Copy files and directories out of a recovery point, without a mount and without
root. Modes, owners, times, extended attributes, hard links, special files and
holes are kept as far as the user may set them; files are copied in parallel.
Device nodes are skipped unless --devices is given, and programs lose their
set-user-ID and set-group-ID bits and capabilities unless --setid is given: an
untrusted disk must not grant rights on this machine.

What cannot be read (damage, encryption) is skipped: lost content of a file becomes
a hole. Everything else is copied, then each damaged file is named and the exit
code is 1, or 4 if the repository lost data.

A TARGET that is a directory gets the files in it, else it is the copy's name.
Paths may have the wildcards *, ? and [] (quote them for the shell).

--tar writes a tar archive to standard output instead; there is no TARGET then.
Content that cannot be read is zeroes in it. Holes become zeroes, unless --sparse
keeps them in a format that GNU tar and bsdtar can read, and busybox cannot.`,
		Example: `  varve cp -r shop/db@latest:/var/lib/app ./app
  varve cp 'shop/db@latest:/etc/*.conf' /tmp/
  varve cp --tar shop/db@latest:/home | ssh host tar -x`,
		Args: func(cmd *cobra.Command, args []string) error {
			if f.tar {
				return cobra.MinimumNArgs(1)(cmd, args)
			}
			return cobra.MinimumNArgs(2)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if f.tar && (f.devices || f.setID) {
				return usagef("--devices and --setid are for copies: an archive has everything, and what unpacks it decides")
			}
			if f.tar {
				return a.cpTar(cmd.Context(), args, f)
			}
			if f.sparse {
				return usagef("--sparse is for --tar: a copy keeps holes anyway")
			}
			return a.cp(cmd.Context(), args[:len(args)-1], args[len(args)-1], f)
		},
	}
	fl := cmd.Flags()
	fl.BoolVarP(&f.recursive, "recursive", "r", false, "copy directories with all that is below")
	fl.BoolVarP(&f.force, "force", "f", false, "replace files that are there already")
	fl.BoolVar(&f.tar, "tar", false, "write a tar archive to standard output")
	fl.BoolVar(&f.sparse, "sparse", false, "with --tar: keep holes, as GNU tar and bsdtar can read them")
	fl.BoolVar(&f.devices, "devices", false, "make device nodes (needs root)")
	fl.BoolVar(&f.setID, "setid", false, "keep set-user-ID and set-group-ID bits and capabilities of files")
	fl.IntVar(&f.workers, "workers", 0, "files copied at once (default two for each CPU)")
	addStaleFlag(cmd, &f.stale)
	return cmd
}

// cpResult is what "varve cp -o json" prints.
type cpResult struct {
	Target string `json:"target"`
	browse.CopyResult
	Failed []cpFailure `json:"failed,omitempty"` // what could not be read
}

// cpFailure is a file that was not copied, or only in part.
type cpFailure struct {
	Path    string `json:"path"`              // within its file system
	Partial bool   `json:"partial,omitempty"` // the copy lacks a part of it
	Error   string `json:"error"`
	err     error
}

// cpFailures collects what could not be read. If the storage does not answer, its method
// returns the error, since every other file would fail as well.
type cpFailures []cpFailure

func (l *cpFailures) add(name string, err error) error {
	if errors.Is(err, repository.ErrUnreachable) {
		return fmt.Errorf("copy %s: %w", name, err)
	}
	var partial *browse.PartialError
	*l = append(*l, cpFailure{name, errors.As(err, &partial), message(err), err})
	return nil
}

// report names each failure; the error is nil if there is none.
func (l cpFailures) report(a *app, target string) error {
	if len(l) == 0 {
		return nil
	}
	slices.SortStableFunc(l, func(a, b cpFailure) int { return strings.Compare(a.Path, b.Path) })
	for _, f := range l {
		what := "not copied"
		if f.Partial {
			what = "copied without a part"
		}
		a.log.Error(what, "file", files.Rooted(f.Path), "error", f.Error)
	}
	return &incompleteError{l, target}
}

// incompleteError means that a copy lacks files, or parts of files, each of which was named.
type incompleteError struct {
	failed cpFailures
	target string
}

func (e *incompleteError) Error() string {
	without, partly := 0, map[string]bool{}
	for _, f := range e.failed {
		if f.Partial {
			partly[f.Path] = true
		} else {
			without++
		}
	}
	var parts []string
	switch {
	case without == 1 && len(partly) == 0:
		parts = append(parts, e.failed[0].Path+" could not be read and is not in "+e.target)
	case without == 1:
		parts = append(parts, "1 file or directory could not be read and is not in "+e.target)
	case without > 1:
		parts = append(parts, fmt.Sprintf("%d files or directories could not be read and are not in %s", without, e.target))
	}
	switch {
	case len(partly) == 1 && without == 0:
		parts = append(parts, fmt.Sprintf("%s is in %s, but a part of it could not be read", e.failed[0].Path, e.target))
	case len(partly) > 0:
		parts = append(parts, fmt.Sprintf("%d are in %s, but a part of each could not be read", len(partly), e.target))
	}
	end := "all else is"
	if len(e.failed) > 1 {
		end += ": they are named above"
	}
	return strings.Join(append(parts, end), "; ")
}

// Unwrap returns all causes, for the exit code.
func (e *incompleteError) Unwrap() []error {
	var errs []error
	for _, f := range e.failed {
		errs = append(errs, f.err)
	}
	return errs
}

// inTheWayError means that a file would be replaced; nothing was copied.
type inTheWayError struct{ err error }

func (e *inTheWayError) Error() string        { return e.err.Error() }
func (e *inTheWayError) Unwrap() error        { return e.err }
func (e *inTheWayError) Is(target error) bool { return target == errTargetExists }

func (a *app) cp(ctx context.Context, sources []string, target string, f cpFlags) error {
	into := false
	if st, err := os.Stat(target); err == nil && st.IsDir() {
		into = true
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("target: %w", err)
	}
	task := a.progress.Start("copy", 0, progress.Bytes)
	defer task.Done()
	var sum browse.CopyResult
	var failed cpFailures
	err := a.withFiles(ctx, "cp", disks.AtOnce, func(open opener, _ *damageReport) error {
		copies, openErr := copiesOf(ctx, open, sources, f.stale)
		if err := placeCopies(copies, target, into, len(sources) > 1); err != nil {
			return err
		}
		for _, c := range copies {
			res, err := browse.Copy(ctx, c.fsys, c.name, c.to, browse.CopyOptions{
				Recursive: f.recursive, Force: f.force, Workers: f.workers, Copied: task.Add, Devices: f.devices, SetID: f.setID,
				Warn:   func(name string, err error) { a.log.Warn("not kept", "file", name, "error", err) },
				Failed: failed.add,
			})
			sum.Add(res)
			if err != nil {
				return err
			}
		}
		return openErr
	})
	task.Done()
	if errors.Is(err, fs.ErrExist) && sum.Files+sum.Dirs == 0 {
		return &inTheWayError{err}
	}
	damaged := (*unreadableError)(nil) // directories in which a pattern could not be matched
	if err != nil && !errors.As(err, &damaged) {
		return err
	}
	if sum.OwnersLost > 0 {
		a.log.Warn("owners are not kept, since only root can set them: all belongs to you", "files", sum.OwnersLost)
	}
	if sum.DevicesLeft > 0 {
		a.log.Warn("device nodes were left out: with --devices they are made", "files", sum.DevicesLeft)
	}
	if sum.SetIDLost > 0 {
		a.log.Warn("set-ID bits and capabilities of programs were not kept: with --setid they are", "files", sum.SetIDLost)
	}
	incomplete := failed.report(a, target)
	return errors.Join(a.print(cpResult{target, sum, failed}, func(t *table) {
		t.line("copied %s and %s, %s of data, to %s", counted(sum.Files, "file", "files"), counted(sum.Dirs, "directory", "directories"), t.bytes(sum.Bytes), target)
	}), err, incomplete)
}

// fileCopy is a file to copy, and where to.
type fileCopy struct {
	from *files.Point
	fsys diskfs.FileSystem
	name string
	to   string
}

// copiesOf finds the files that the arguments name, up to the first argument that has an error.
func copiesOf(ctx context.Context, open opener, args []string, stale bool) (copies []fileCopy, err error) {
	for _, arg := range args {
		from, fsys, names, err := open(ctx, arg, stale)
		if err != nil {
			return copies, err
		}
		if fsys == nil {
			return copies, listOfVolumes(arg, from)
		}
		for _, name := range names {
			copies = append(copies, fileCopy{from: from, fsys: fsys, name: name})
		}
	}
	return copies, nil
}

// placeCopies chooses the target of each copy; it refuses two with the same one before anything
// is copied.
func placeCopies(copies []fileCopy, target string, into, several bool) error {
	if (several || len(copies) > 1) && !into {
		return usagef("several files need a directory as target, and %s is none", target)
	}
	taken := map[string]bool{}
	for i := range copies {
		c := &copies[i]
		c.to = target
		if into {
			base := path.Base(c.name)
			if c.name == "." {
				base = c.from.Point().Volume.Name
			}
			c.to = filepath.Join(target, base)
		}
		if taken[c.to] {
			return usagef("two of the files would both become %s; nothing was copied", c.to)
		}
		taken[c.to] = true
	}
	return nil
}

func counted(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (a *app) cpTar(ctx context.Context, sources []string, f cpFlags) error {
	const incomplete = "the archive is incomplete: discard it"
	a.left = incomplete
	task := a.progress.Start("archive", 0, progress.Bytes)
	defer task.Done()
	out := bufio.NewWriterSize(a.stdout, 1<<20)
	if len(sources) > 1 {
		return usagef("--tar takes one POINT:/PATH, which may have wildcards")
	}
	return a.withFiles(ctx, "cp", disks.AtOnce, func(open opener, _ *damageReport) error {
		from, fsys, names, err := open(ctx, sources[0], f.stale)
		if err != nil {
			return err
		}
		if fsys == nil {
			return listOfVolumes(sources[0], from)
		}
		var failed cpFailures
		a.begin(incomplete)
		err = browse.Tar(ctx, fsys, out, names, browse.TarOptions{Sparse: f.sparse, Copied: task.Add, Failed: failed.add, Skipped: func(name string) {
			a.log.Warn("a socket cannot be archived, it is left out", "file", name)
		}})
		task.Done()
		if err = errors.Join(err, out.Flush()); err == nil {
			a.notBegun() // it is complete, but for what the report names
		}
		return errors.Join(err, failed.report(a, "the archive"))
	})
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/varve-io/varve/backup"
	"github.com/varve-io/varve/backup/points"
	"github.com/varve-io/varve/backup/repository"
	"github.com/varve-io/varve/backup/source"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/internal/readfull"
	"github.com/varve-io/varve/internal/zero"
)

// diskOnly are the flags of a backup that do not apply to a stream.
var diskOnly = []string{
	"full", "parent", "block-size", "live", "on-read-error", "on-mismatch", "verify-unchanged", "spot-check-limit", "spot-check-time",
	"new-disk", "allow-shrink", "volume-handle",
}

// sourceOnly are the flags that need a source that can be opened, and not even apply to a
// disk read from a stream.
var sourceOnly = []string{
	"extents", "extents-format", "extents-base", "extents-target", "format", "raw", "follow-chain", "bitmap", "base-change-id", "change-id", "track",
}

// checkStream rejects flags and arguments that do not apply to a stream, or only to one.
func (f *backupFlags) checkStream(cmd *cobra.Command, args []string) error {
	dash, fl := cmd.ArgsLenAtDash(), cmd.Flags()
	switch {
	case f.exec && (dash != 0 || len(args) == 0):
		return usagef("--exec takes a command after '--': varve backup --exec --volume shop/db-dump -- pg_dump shop")
	case !f.exec && len(args) > 1 && slices.Contains(args, "-"):
		return usagef("standard input is no part of a group: back it up by itself")
	case !f.exec && !slices.Contains(args, "-"):
		for _, name := range []string{"size", "expect-bytes"} {
			if fl.Changed(name) {
				return usagef("--%s is for standard input ('-') and --exec: a disk has its own size", name)
			}
		}
		return nil
	}
	f.stream = true
	for _, name := range sourceOnly {
		if fl.Changed(name) {
			return usagef("--%s is about a device or an image file, not about a stream", name)
		}
	}
	for _, name := range []string{"size", "expect-bytes"} {
		if v := fl.Lookup(name); v.Changed && v.Value.String() == "0" {
			return usagef("--%s is above 0", name)
		}
	}
	if fl.Changed("size") {
		if fl.Changed("expect-bytes") {
			return usagef("--size says how many bytes there are: no --expect-bytes")
		}
		return nil // a disk
	}
	for _, name := range diskOnly {
		if fl.Changed(name) {
			return usagef("--%s is about a disk: give --size as well if the bytes are one", name)
		}
	}
	return nil
}

// openStream starts the source of the bytes. end stops it, whether or not all was read.
func (a *app) openStream(ctx context.Context, args []string, f backupFlags) (r io.Reader, end func(), err error) {
	if f.exec {
		return a.startCommand(ctx, args)
	}
	if in, ok := a.stdin.(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		return nil, nil, usagef("standard input is a terminal: pipe the stream into varve, or let it run the command: --exec")
	}
	pr, pw := io.Pipe()
	go func() { // ends with standard input or, since nothing can interrupt that, with the process
		_, err := io.CopyBuffer(onlyWriter{pw}, a.stdin, make([]byte, 1<<20))
		pw.CloseWithError(err)
	}()
	stop := context.AfterFunc(ctx, func() { pr.CloseWithError(context.Cause(ctx)) })
	return pr, func() {
		stop()
		pr.Close()
	}, nil
}

// onlyWriter hides the other methods of a writer, so that a copy uses its own buffer.
type onlyWriter struct{ io.Writer }

// errCommand means that the command of --exec failed.
var errCommand = errors.New("the command failed")

// commandOutput is the output of a command. It ends with io.EOF only if the command
// succeeded.
type commandOutput struct {
	cmd  *exec.Cmd
	out  io.Reader
	over bool
}

// startCommand runs a command without a shell. Its standard error is varve's.
func (a *app) startCommand(ctx context.Context, args []string) (io.Reader, func(), error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stderr = a.stderr
	// In a process group of its own, so that what it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, nil, fmt.Errorf("%w: %w", errCommand, err)
	}
	c := &commandOutput{cmd: cmd, out: out}
	return c, func() {
		cancel()
		if !c.over {
			_ = cmd.Wait() // the command was stopped
		}
	}, nil
}

func (c *commandOutput) Read(p []byte) (int, error) {
	n, err := c.out.Read(p)
	if !errors.Is(err, io.EOF) || c.over {
		return n, err
	}
	c.over = true
	if werr := c.cmd.Wait(); werr != nil {
		return n, fmt.Errorf("%w: %s: %w; what it printed is not kept", errCommand, c.cmd.Path, werr)
	}
	return n, io.EOF
}

// backupStream backs up standard input, or the output of a command.
func (a *app) backupStream(ctx context.Context, args []string, f backupFlags) (err error) {
	opt, err := a.backupOptions(f)
	if err != nil {
		return err
	}
	if _, err := points.ParseVolume(f.volume, "any"); err != nil {
		return &usageError{err}
	}
	repo, err := a.openRepository(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, repo.Close(context.WithoutCancel(ctx))) }()
	if opt.Volume, err = points.ParseVolume(f.volume, a.clusterOf(repo)); err != nil {
		return err
	}
	in, stop, err := a.openStream(ctx, args, f)
	if err != nil {
		return err
	}
	defer stop()
	if f.size > 0 {
		return a.backupSpooled(ctx, repo, in, int64(f.size), opt)
	}
	end := a.backupProgress(&opt)
	a.begin("")
	p, rec, err := backup.RunStream(ctx, repo, backup.StreamOptions{
		Volume: opt.Volume, Reader: in, Expect: int64(f.expect), ToolVersion: opt.ToolVersion,
		CheckpointEvery: opt.CheckpointEvery, Progress: opt.Progress,
	})
	end()
	if err != nil {
		return err
	}
	a.made(p)
	if err := a.print(backupResultOf(p, rec, "stream"), func(t *table) { writeBackup(t, p, rec, "stream") }); err != nil {
		return err
	}
	backup.MaybeMaintain(ctx, repo)
	return nil
}

// backupSpooled backs up a stream that is a disk of this size. A backup reads a disk in
// several places at once, and its ends first, so the stream is written to a file before.
func (a *app) backupSpooled(ctx context.Context, repo *repository.Repository, in io.Reader, size int64, opt backup.Options) (err error) {
	file, err := spool(in, size)
	if err != nil {
		return fmt.Errorf("%s: %w; no point was made", opt.Volume, err)
	}
	open, err := a.openSources(ctx, []string{file}, func(string) source.Options { return source.Options{Raw: true} }, nil)
	err = errors.Join(err, os.Remove(file))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, open.close()) }()
	open.disks[0].set(&opt)
	end := a.backupProgress(&opt)
	a.begin("")
	p, rec, err := backup.Run(ctx, repo, opt)
	end()
	if err != nil {
		return err
	}
	a.made(p)
	if err := a.print(backupResultOf(p, rec, "disk from a stream"), func(t *table) { writeBackup(t, p, rec, "disk from a stream") }); err != nil {
		return err
	}
	backup.MaybeMaintain(ctx, repo)
	return nil
}

// spoolPart is the unit that is written, or left as a hole, in bytes.
const spoolPart = 64 << 10

// spool writes a stream of exactly this size to a file in the directory for temporary files.
// Zeroes become holes.
func spool(in io.Reader, size int64) (path string, err error) {
	f, err := os.CreateTemp("", "varve-stream-*")
	if err != nil {
		return "", fmt.Errorf("a file for the stream: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	n, buf := int64(0), make([]byte, spoolPart)
	for {
		k, rerr := readfull.Read(in, buf)
		if n+int64(k) > size {
			return "", fmt.Errorf("%w: more than the %s of --size", backup.ErrStreamLength, bytesize.Exact(size))
		}
		if !zero.Only(buf[:k]) {
			if _, err := f.WriteAt(buf[:k], n); err != nil {
				return "", fmt.Errorf("write the stream to %s: %w; TMPDIR names a directory with more room", f.Name(), err)
			}
		}
		n += int64(k)
		switch {
		case rerr == io.EOF: //nolint:errorlint // one that wraps it is a failure
			if n != size {
				return "", fmt.Errorf("%w: %s of the %s of --size came", backup.ErrStreamLength, bytesize.Exact(n), bytesize.Exact(size))
			}
			if err := f.Truncate(size); err != nil {
				return "", fmt.Errorf("a file for the stream: %w", err)
			}
			return f.Name(), nil
		case rerr != nil:
			return "", fmt.Errorf("read the stream at %d: %w", n, rerr)
		}
	}
}

// catStreams writes the streams that the arguments name to standard output. If an argument
// names something else it does nothing, and done is false.
func (a *app) catStreams(ctx context.Context, args []string) (done bool, err error) {
	for _, arg := range args {
		if strings.Contains(arg, ":/") {
			return false, nil
		}
	}
	err = a.withRepository(ctx, func(repo *repository.Repository) error {
		cat, err := points.List(ctx, repo, points.ListOptions{})
		if err != nil {
			return err
		}
		var pts []*points.Point
		for _, arg := range args {
			p, err := a.names(repo, cat).Read(strings.TrimSuffix(arg, ":"))
			if err != nil || !p.Stream {
				return nil //nolint:nilerr // reported again as a path of files
			}
			pts = append(pts, p)
		}
		done = true
		for _, p := range pts {
			if _, err := backup.RestoreTo(ctx, repo, p, a.stdout, backup.RestoreOptions{}); err != nil {
				return err
			}
		}
		return nil
	})
	return done, err
}

package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/varve-io/varve/backup/disk"
	"github.com/varve-io/varve/internal/bytesize"
	"github.com/varve-io/varve/nbdserver/nbdclient"
	"github.com/varve-io/varve/nbdserver/proto"
)

func newNBDCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "nbd",
		GroupID: groupRead,
		Short:   "Debug any NBD server: list, describe, map and read its exports",
		Long: `A debugging client for any NBD server. An export is named by an NBD
URI: nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, and nbds: for TLS
with ?tls-certificates=DIRECTORY (ca-cert.pem, client-cert.pem, client-key.pem).`,
	}
	cmd.AddCommand(newNBDListCommand(a), newNBDInfoCommand(a), newNBDMapCommand(a), newNBDReadCommand(a))
	return cmd
}

// dialNBD connects to the server of a URI and negotiates the newest headers.
func dialNBD(ctx context.Context, text string) (*nbdclient.URI, *nbdclient.Client, nbdclient.Headers, error) {
	u, err := nbdclient.ParseURI(text)
	if err != nil {
		return nil, nil, 0, &usageError{err}
	}
	c, err := nbdclient.Dial(ctx, u, nil)
	if err != nil {
		return nil, nil, 0, err
	}
	h, err := c.Negotiate(nbdclient.Extended)
	if err != nil {
		return nil, nil, 0, errors.Join(err, c.Close())
	}
	return u, c, h, nil
}

func newNBDListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "list URI", Short: "List the exports of a server", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, c, _, err := dialNBD(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			list := []nbdclient.Listed{}
			if err := c.List(func(l nbdclient.Listed) bool { list = append(list, l); return true }); err != nil {
				return errors.Join(err, c.Close())
			}
			if err := c.Abort(); err != nil {
				return err
			}
			return a.print(list, func(t *table) {
				t.row("EXPORT", "DESCRIPTION")
				for _, l := range list {
					t.row(l.Name, l.Description)
				}
			})
		},
	}
}

// nbdInfo is what "varve nbd info -o json" prints.
type nbdInfo struct {
	nbdclient.Info
	Can      []string `json:"can"`
	Headers  string   `json:"headers"`
	TLS      bool     `json:"tls"`
	Contexts []string `json:"contexts"`
}

// abilities are a server's transmission flags, in words.
var abilities = []struct {
	flag proto.TransmissionFlags
	word string
}{
	{proto.FlagReadOnly, "read-only"},
	{proto.FlagCanMultiConn, "multi-conn"},
	{proto.FlagSendCache, "cache"},
	{proto.FlagSendDF, "df"},
	{proto.FlagSendFlush, "flush"},
	{proto.FlagSendFUA, "fua"},
	{proto.FlagSendTrim, "trim"},
	{proto.FlagSendWriteZeroes, "write-zeroes"},
	{proto.FlagSendFastZero, "fast-zero"},
}

func newNBDInfoCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "info URI", Short: "Describe an export", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, c, h, err := dialNBD(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			info, err := describeExport(c, u.Export, h)
			if err != nil {
				return errors.Join(err, c.Close())
			}
			if err := c.Abort(); err != nil {
				return err
			}
			return a.print(info, func(t *table) { writeNBDInfo(t, info) })
		},
	}
}

func describeExport(c *nbdclient.Client, export string, h nbdclient.Headers) (*nbdInfo, error) {
	in, err := c.Info(export)
	if err != nil {
		return nil, err
	}
	out := &nbdInfo{Info: in, Headers: h.String(), TLS: c.TLS(), Can: []string{}, Contexts: []string{}}
	for _, can := range abilities {
		if in.Flags&can.flag != 0 {
			out.Can = append(out.Can, can.word)
		}
	}
	if h == nbdclient.Simple {
		return out, nil
	}
	names, err := c.ListContexts(export)
	refused := (*nbdclient.RefusedError)(nil)
	if err != nil && !errors.As(err, &refused) {
		return nil, err
	}
	out.Contexts = append(out.Contexts, names...)
	return out, nil
}

func writeNBDInfo(t *table, in *nbdInfo) {
	t.row("Export:", in.Name)
	if in.Description != "" {
		t.row("Description:", in.Description)
	}
	t.row("Size:", bytesize.Exact(int64(in.Size)))
	t.row("Headers:", in.Headers)
	t.row("TLS:", in.TLS)
	t.row("Block sizes:", fmt.Sprintf("%s minimum, %s preferred, %s maximum", t.bytes(int64(in.MinimumBlock)), t.bytes(int64(in.PreferredBlock)), t.bytes(int64(in.MaximumPayload))))
	for i, word := range in.Can {
		head := ""
		if i == 0 {
			head = "Flags:"
		}
		t.row(head, word)
	}
	for i, name := range in.Contexts {
		head := ""
		if i == 0 {
			head = "Contexts:"
		}
		t.row(head, name)
	}
}

// nbdRange is the part of an export that a command processes.
type nbdRange struct{ offset, length bytesize.Value }

func (r *nbdRange) flags(cmd *cobra.Command) {
	cmd.Flags().Var(&r.offset, "offset", "where to begin")
	cmd.Flags().Var(&r.length, "length", "how much (default to the end)")
}

// within returns the range in an export of a size.
func (r *nbdRange) within(size uint64) (off, length int64, err error) {
	off, length = int64(r.offset), int64(r.length)
	if uint64(off) > size || uint64(length) > size-uint64(off) {
		return 0, 0, usagef("--offset %d with --length %d is beyond the end of the export, which has %s", off, length, bytesize.Exact(int64(size)))
	}
	if length == 0 {
		length = int64(size) - off
	}
	return off, length, nil
}

// nbdExtent is a run that "varve nbd map -o json" prints.
type nbdExtent struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Flags  uint64 `json:"flags"`
	Means  string `json:"means,omitempty"`
}

func newNBDMapCommand(a *app) *cobra.Command {
	name := "base:allocation"
	var r nbdRange
	cmd := &cobra.Command{
		Use: "map URI", Short: "Show which parts of an export hold data, or changed", Args: cobra.ExactArgs(1),
		Long: `Show the runs of an export in a metadata context: base:allocation for data and
holes; on a Varve server also qemu:allocation-depth (how many recovery points
back the data was written) and qemu:dirty-bitmap:POINT (changed since POINT).`,
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := enterExport(cmd.Context(), args[0], name)
			if err != nil {
				return err
			}
			runs, err := mapExport(cmd.Context(), e, name, &r)
			if err = errors.Join(err, e.Close()); err != nil {
				return err
			}
			return a.print(runs, func(t *table) {
				t.row("OFFSET", "LENGTH", "FLAGS", "MEANS")
				for _, x := range runs {
					t.row(x.Offset, x.Length, x.Flags, x.Means)
				}
			})
		},
	}
	cmd.Flags().StringVar(&name, "context", name, "metadata context to show")
	r.flags(cmd)
	return cmd
}

// enterExport connects and enters transmission, with metadata contexts.
func enterExport(ctx context.Context, uri string, contexts ...string) (*nbdclient.Export, error) {
	u, c, h, err := dialNBD(ctx, uri)
	if err != nil {
		return nil, err
	}
	if len(contexts) > 0 {
		if h == nbdclient.Simple {
			return nil, errors.Join(errors.New("the server knows no metadata contexts"), c.Close())
		}
		got, err := c.SetContexts(u.Export, contexts...)
		if err == nil && len(got) != len(contexts) {
			err = fmt.Errorf("the server does not know metadata context %q of this export", contexts[0])
		}
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	e, err := c.Go(u.Export)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return e, nil
}

func mapExport(ctx context.Context, e *nbdclient.Export, name string, r *nbdRange) ([]nbdExtent, error) {
	off, length, err := r.within(e.Size)
	if err != nil {
		return nil, err
	}
	runs := []nbdExtent{}
	err = e.Map(ctx, name, off, length, func(at int64, x nbdclient.Extent) bool {
		runs = append(runs, nbdExtent{at, x.Length, x.Flags, flagsMean(name, x.Flags)})
		return true
	})
	return runs, err
}

// flagsMean describes a context's flags in words.
func flagsMean(context string, flags uint64) string {
	pick := func(words ...string) string { return words[min(flags, uint64(len(words)-1))] }
	switch {
	case context == "base:allocation":
		return pick("data", "hole", "zero", "hole,zero")
	case context == "qemu:allocation-depth":
		if flags == 0 {
			return "unallocated"
		}
		return ""
	default:
		return pick("clean", "dirty")
	}
}

func newNBDReadCommand(a *app) *cobra.Command {
	var r nbdRange
	var dump, overwrite bool
	cmd := &cobra.Command{
		Use: "read URI [FILE]", Short: "Read bytes of an export to a file or standard output", Args: cobra.RangeArgs(1, 2),
		Long: `Read bytes of an export to a file, a device that is not in use, or standard output
('-', and without FILE). Zeroes become holes in a file.`,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			toFile := len(args) == 2 && args[1] != "-"
			if !toFile {
				a.left = "what was read is incomplete: discard it"
			} else if err := mayReplace(args[1], overwrite); err != nil {
				return err
			}
			e, err := enterExport(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, e.Close()) }()
			off, length, err := r.within(e.Size)
			if err != nil {
				return err
			}
			if !toFile {
				return copyExport(cmd.Context(), a.stdout, e, off, length, dump)
			}
			f, err := createOutput(args[1])
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, f.Close()) }()
			if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
				return errors.Join(err, copyExport(cmd.Context(), f, e, off, length, dump))
			}
			sparse := &sparseWriter{file: f}
			return errors.Join(copyExport(cmd.Context(), sparse, e, off, length, dump), sparse.Finish())
		},
	}
	r.flags(cmd)
	cmd.Flags().BoolVar(&dump, "hex", false, "show a hex dump, numbered from the beginning of the range")
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "overwrite a file that exists, or what a device holds")
	return cmd
}

// mayReplace refuses to overwrite a file, or what a device holds, unless overwrite is set,
// and anything in use.
func mayReplace(path string, overwrite bool) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil //nolint:nilerr // it does not exist, or creating it reports the error
	case info.Mode().IsRegular() && info.Size() > 0 && !overwrite:
		return fmt.Errorf("%w: %s: replace it with --overwrite, or choose another name", errTargetExists, path)
	case !info.Mode().IsRegular() && !isBlockDevice(info):
		return nil
	}
	uses, err := disk.Uses(path)
	switch {
	case err != nil:
		return err
	case len(uses) > 0:
		return &disk.InUseError{Path: path, Uses: uses, Advice: "release it (umount, swapoff, losetup -d, ...) or choose another target"}
	case isBlockDevice(info) && !overwrite:
		return mayOverwriteDevice(path)
	}
	return nil
}

// createOutput opens the output. A device is claimed, so that no other process mounts it
// during the copy.
func createOutput(path string) (*os.File, error) {
	if info, err := os.Stat(path); err == nil && isBlockDevice(info) {
		return os.OpenFile(path, os.O_WRONLY|os.O_EXCL, 0)
	}
	return os.Create(path)
}

func isBlockDevice(info fs.FileInfo) bool {
	return info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
}

func copyExport(ctx context.Context, out io.Writer, e *nbdclient.Export, off, length int64, dump bool) error {
	bw := bufio.NewWriter(out)
	var w io.Writer = bw
	if dump {
		d := hex.Dumper(bw)
		w = d
	}
	unit := min(int64(e.MaximumPayload), 1<<20)
	if unit <= 0 {
		return errors.New("the server takes no requests: its maximum block size is 0")
	}
	buf := make([]byte, min(unit, length))
	for length > 0 {
		p := buf[:min(int64(len(buf)), length)]
		if _, err := e.ReadAt(ctx, p, off); err != nil {
			return errors.Join(err, bw.Flush())
		}
		if _, err := w.Write(p); err != nil {
			return fmt.Errorf("write what was read: %w", err)
		}
		off, length = off+int64(len(p)), length-int64(len(p))
	}
	if d, ok := w.(io.WriteCloser); ok {
		if err := d.Close(); err != nil { // writes the last line
			return err
		}
	}
	return bw.Flush()
}

func isReadOnly(in nbdclient.Info) bool { return in.Flags&proto.FlagReadOnly != 0 }

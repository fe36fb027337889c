package cbt

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/varve-io/varve/internal/bytesize"
)

// ExtentsFormat is the value of the header's "format".
const ExtentsFormat = "varve-extents/1"

// maxLine bounds one line of a list, in bytes. An extent takes under 80; a header may
// carry long change IDs.
const maxLine = 64 << 10

// cancelEvery is how many lines are read between two checks of the context.
const cancelEvery = 4096

// Extents reads a list of changed or allocated extents from a stream of JSON lines,
// as docs/cbt-extents.md describes:
//
//	{"format":"varve-extents/1","base":"snap-41","target":"snap-42","size":1073741824}
//	{"offset":0,"length":65536}
//	{"offset":1048576,"length":4096,"zero":true}
//	{"end":true,"count":2}
//
// Memory is bounded by the Checker's bounds and one line. A blocked read is not
// interrupted by the context, which is checked between lines: close the stream for
// that.
type Extents struct {
	r        *bufio.Reader
	consumed bool
}

var _ Source = (*Extents)(nil)

// NewExtents reads the list from r (a file, standard input), once and to its end. It
// does not close r.
func NewExtents(r io.Reader) *Extents {
	return &Extents{r: bufio.NewReaderSize(r, maxLine)}
}

const extentsName = "extents"

// Changes reads the list. It refuses it with an *Error if its base, volume or size
// are not the request's, if an extent is out of range or overlaps another, if it ends
// without its trailer, and if a line cannot be understood. Report.Allocated is set for
// a list without a base.
func (x *Extents) Changes(ctx context.Context, req Request, emit func(Extent) error) (Report, error) {
	if x.consumed {
		return Report{}, &Error{Source: extentsName, Kind: ErrConsumed, Detail: "give the list anew"}
	}

	x.consumed = true
	lines := lineReader{r: x.r}

	line, err := lines.next()
	if errors.Is(err, io.EOF) {
		return Report{}, &Error{Source: extentsName, Kind: ErrTruncated, Detail: "it is empty, not even a header"}
	}

	if err != nil {
		return Report{}, err
	}

	head, err := parseHeader(line)
	if err != nil {
		return Report{}, lines.malformed(err)
	}

	if err := head.check(req, lines.number); err != nil {
		return Report{}, err
	}

	checker := NewChecker(extentsName, req.Size)
	if err := x.list(ctx, &lines, head, checker, emit); err != nil {
		return Report{}, err
	}

	if err := checker.Close(); err != nil {
		return Report{}, err
	}

	report := Report{
		Source:         extentsName,
		TargetChangeID: head.Target,
		VolumeHandle:   head.Volume,
		Size:           req.Size,
		Exact:          true,
		Reported:       checker.Reported(),
		Allocated:      req.Base == nil,
	}
	if req.Base != nil {
		report.BaseChangeID = req.Base.ChangeID
		if report.VolumeHandle == "" {
			report.VolumeHandle = req.Base.VolumeHandle
		}
	}
	return report, nil
}

// list reads the lines after the header, up to the end of the stream.
func (x *Extents) list(ctx context.Context, lines *lineReader, head header, checker *Checker, emit func(Extent) error) error {
	ended := false

	for n := 0; ; n++ {
		if n%cancelEvery == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
		}

		line, err := lines.next()
		if errors.Is(err, io.EOF) {
			if !ended && head.trailer() {
				return &Error{
					Source: extentsName, Line: lines.number, Kind: ErrTruncated,
					Detail: fmt.Sprintf(`it ends after %d extents without its last line {"end":true,"count":%d}; `+
						`make the list again, or say "trailer":false in its header if its writer never ends lists with one`,
						checker.Count(), checker.Count()),
				}
			}
			return nil
		}

		if err != nil {
			return err
		}

		if ended {
			return lines.malformed(errors.New(`something follows the last line {"end":true,...}; give one list at a time`))
		}

		entry, err := parseLine(line)
		if err != nil {
			return lines.malformed(err)
		}

		if entry.end {
			if entry.count != checker.Count() {
				return &Error{
					Source: extentsName, Line: lines.number, Kind: ErrTruncated,
					Detail: fmt.Sprintf("its last line counts %d extents, but it has %d; make the list again", entry.count, checker.Count()),
				}
			}

			ended = true

			continue
		}

		if err := checker.Add(entry.extent, lines.number); err != nil {
			return err
		}

		if err := emit(entry.extent); err != nil {
			return err
		}
	}
}

// check rejects a list that does not answer the request.
func (h header) check(req Request, line int64) error {
	refuse := func(kind error, format string, args ...any) error {
		return &Error{Source: extentsName, Line: line, Kind: kind, Detail: fmt.Sprintf(format, args...)}
	}

	switch {
	case h.Size != req.Size:
		return refuse(ErrSizeMismatch, "the list is of a disk of %s, and this disk has %s; make a list of the disk that is being backed up",
			bytesize.Exact(h.Size), bytesize.Exact(req.Size))
	case req.Base == nil && h.Base != "":
		return refuse(ErrBaseMismatch, `the list is relative to %s, but a full backup is being made; `+
			`give a list with "base":null that names all allocated ranges, or none`, quote(h.Base))
	case req.Base == nil:
		return nil
	case req.Base.ChangeID == "":
		return refuse(ErrBaseMismatch, "recovery point %s was recorded without a change ID, so no list can be relative to it; "+
			"make this backup without a list or a full one with a list", quote(req.Base.PointID))
	case h.Base == "":
		return refuse(ErrBaseMismatch, "the list names all allocated ranges, but an increment on %s (point %s) is being made; "+
			"give a list relative to it, or make a full backup", quote(req.Base.ChangeID), quote(req.Base.PointID))
	case h.Base != req.Base.ChangeID:
		return refuse(ErrBaseMismatch, "the list is relative to %s, but the parent point %s is %s; "+
			"give a list relative to that, or make a full backup", quote(h.Base), quote(req.Base.PointID), quote(req.Base.ChangeID))
	case h.Volume != "" && req.Base.VolumeHandle != "" && h.Volume != req.Base.VolumeHandle:
		return refuse(ErrVolumeMismatch, "the list is of volume %s, but the parent point %s is of %s",
			quote(h.Volume), quote(req.Base.PointID), quote(req.Base.VolumeHandle))
	}
	return nil
}

// quote makes an untrusted name printable and not too long.
func quote(s string) string {
	const most = 128
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}

// lineReader returns the non-blank lines of a stream, each bounded by maxLine.
type lineReader struct {
	r      *bufio.Reader
	number int64 // of the line last returned, from 1
	cut    bool  // the line last returned had no newline
}

// next returns the next line that is not blank, without surrounding space. It is valid until
// the next call. At the end the error is io.EOF.
func (l *lineReader) next() ([]byte, error) {
	for {
		line, err := l.r.ReadSlice('\n')
		if len(line) > 0 {
			l.number++
		}

		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			l.cut = true
		case errors.Is(err, bufio.ErrBufferFull):
			return nil, &Error{Source: extentsName, Line: l.number, Kind: ErrFormat, Detail: fmt.Sprintf("the line is longer than %d bytes", maxLine)}
		default:
			return nil, &Error{Source: extentsName, Line: l.number, Kind: ErrTruncated, Detail: "reading the list", Cause: err}
		}

		if line = bytes.TrimSpace(line); len(line) > 0 {
			return line, nil
		}

		if l.cut {
			return nil, io.EOF
		}
	}
}

// malformed returns the error for the line last returned. If that ends with the stream
// instead of a newline it was probably cut off.
func (l *lineReader) malformed(cause error) error {
	if l.cut {
		return &Error{Source: extentsName, Line: l.number, Kind: ErrTruncated, Detail: "it ends within a line", Cause: cause}
	}
	return &Error{Source: extentsName, Line: l.number, Kind: ErrFormat, Cause: cause}
}

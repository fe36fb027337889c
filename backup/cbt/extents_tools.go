package cbt

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/varve-io/varve/internal/bytesize"
)

// ExtentsTool is a program whose own JSON output is accepted as a list of extents.
type ExtentsTool string

// The tools whose output is accepted.
const (
	// RBDDiff is "rbd diff --format json": [{"offset":0,"length":4096,"exists":"true"}].
	RBDDiff ExtentsTool = "rbd"
	// NBDInfo is "nbdinfo --map=CONTEXT --json", of a dirty bitmap or of base:allocation:
	// [{"offset":0,"length":4096,"type":1,"description":"dirty"}].
	NBDInfo ExtentsTool = "nbdinfo"
	// QEMUImg is "qemu-img map --output=json": [{"start":0,"length":4096,"zero":false,"data":true}].
	QEMUImg ExtentsTool = "qemu-img"
)

// ToolExtents reads the output of a tool: one JSON array, whose closing bracket proves it
// complete. Such a list names no states, so the caller does. Memory is bounded by the
// Checker's bounds and one element.
type ToolExtents struct {
	// Tool wrote the list.
	Tool ExtentsTool
	// Base is the change ID that the list is relative to, empty for a list of allocated
	// ranges. Target is the change ID of the listed state.
	Base, Target string
	// List is read once, to its end.
	List io.Reader

	consumed bool
}

var _ Source = (*ToolExtents)(nil)

// DetectExtents reads the beginning of a list, and returns the tool that wrote it, or "" for
// a list in Varve's own form (or in none), and a reader of the whole list.
func DetectExtents(list io.Reader) (ExtentsTool, io.Reader) {
	r := bufio.NewReaderSize(list, maxLine)
	head, _ := r.Peek(4 << 10) // short at the end of the list

	if head = bytes.TrimLeft(head, " \t\r\n"); len(head) == 0 || head[0] != '[' {
		return "", r
	}

	first, _, _ := bytes.Cut(head, []byte("}"))
	switch {
	case bytes.Contains(first, []byte(`"exists"`)):
		return RBDDiff, r
	case bytes.Contains(first, []byte(`"description"`)):
		return NBDInfo, r
	case bytes.Contains(first, []byte(`"start"`)):
		return QEMUImg, r
	}
	return RBDDiff, r // the only tool that lists changes, so an empty list means no changes
}

// toolElement has the fields of all tools.
type toolElement struct {
	Offset      *int64 `json:"offset"`
	Start       *int64 `json:"start"`
	Length      *int64 `json:"length"`
	Exists      any    `json:"exists"` // "true" or "false", as text in all versions seen
	Type        *int64 `json:"type"`
	Description string `json:"description"`
	Zero        *bool  `json:"zero"`
	Data        *bool  `json:"data"`
	Present     *bool  `json:"present"`
}

// Changes reads the list. It rejects, with an *Error, a list that does not answer the
// request, is cut off, or is not of the tool.
func (x *ToolExtents) Changes(ctx context.Context, req Request, emit func(Extent) error) (Report, error) {
	refuse := func(kind error, format string, args ...any) (Report, error) {
		return Report{}, &Error{Source: extentsName, Kind: kind, Detail: fmt.Sprintf(format, args...)}
	}

	if x.consumed {
		return refuse(ErrConsumed, "give the list anew")
	}

	x.consumed = true

	switch {
	case x.Target == "":
		return refuse(ErrFormat, "the output of %s does not say which state it lists; name it", x.Tool)
	case x.Base == x.Target:
		return refuse(ErrFormat, "base and target are the same, %s: a change ID names one state of the volume", quote(x.Base))
	}

	head := header{Base: x.Base, Target: x.Target, Size: req.Size}
	if err := head.check(req, 0); err != nil {
		return Report{}, err
	}

	checker := NewChecker(extentsName, req.Size)

	end, err := x.list(ctx, checker, emit)
	if err != nil {
		return Report{}, err
	}

	// These list the whole disk, so the end of the list is the size of the disk.
	if x.Tool != RBDDiff && end != req.Size {
		return refuse(ErrSizeMismatch, "the list ends at %s, and this disk has %s; make a list of the disk that is being backed up", bytesize.Exact(end), bytesize.Exact(req.Size))
	}

	if err := checker.Close(); err != nil {
		return Report{}, err
	}

	report := Report{
		Source: extentsName, TargetChangeID: x.Target, Size: req.Size, Exact: true,
		Reported: checker.Reported(), Allocated: req.Base == nil,
	}
	if req.Base != nil {
		report.BaseChangeID, report.VolumeHandle = req.Base.ChangeID, req.Base.VolumeHandle
	}
	return report, nil
}

// list reads the array and returns where its last element ends.
func (x *ToolExtents) list(ctx context.Context, checker *Checker, emit func(Extent) error) (int64, error) {
	// An element has under 300 bytes; one that never ends must not be kept whole.
	dec := json.NewDecoder(&elementLimit{r: x.List})

	broken := func(err error) error {
		kind := ErrFormat
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			kind, err = ErrTruncated, errors.New("it ends before the closing bracket; make the list again")
		}
		return &Error{Source: extentsName, Kind: kind, Detail: fmt.Sprintf("output of %s, element %d", x.Tool, checker.Count()+1), Cause: err}
	}

	if start, err := dec.Token(); err != nil {
		return 0, broken(err)
	} else if start != json.Delim('[') {
		return 0, broken(errors.New("it is not a JSON array"))
	}

	end := int64(0)

	for n := 0; dec.More(); n++ {
		if n%cancelEvery == 0 {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
		}

		var e toolElement
		if err := dec.Decode(&e); err != nil {
			return 0, broken(err)
		}

		extent, report, err := x.extent(e)
		if err != nil {
			return 0, broken(err)
		}

		if extent.Offset < 0 || extent.Length < 0 || x.Tool != RBDDiff && extent.Offset != end {
			return 0, broken(fmt.Errorf("range %v does not follow the one before", extent))
		}

		end = extent.Offset + extent.Length
		if !report {
			continue
		}

		if err := checker.Add(extent, int64(n)+1); err != nil {
			return 0, err
		}

		if err := emit(extent); err != nil {
			return 0, err
		}
	}

	if _, err := dec.Token(); err != nil {
		return 0, broken(err)
	}

	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return 0, broken(errors.New("something follows the list; give one list at a time"))
	}
	return end, nil
}

// extent returns the range of an element, and whether it changed (or, without a base, is
// allocated).
func (x *ToolExtents) extent(e toolElement) (extent Extent, report bool, err error) {
	offset := e.Offset
	if x.Tool == QEMUImg {
		offset = e.Start // its "offset" is one in the file
	}

	if offset == nil || e.Length == nil {
		return extent, false, errors.New("it has no offset or length")
	}

	extent = Extent{Offset: *offset, Length: *e.Length}

	switch x.Tool {
	case RBDDiff:
		switch e.Exists {
		case "true", true:
		case "false", false:
			extent.Zero = true
		default:
			return extent, false, errors.New(`it lacks "exists"; use "rbd diff --format json"`)
		}
		return extent, true, nil
	case NBDInfo:
		return x.nbdExtent(extent, e)
	case QEMUImg:
		if x.Base != "" {
			return extent, false, errors.New("qemu-img map lists what is allocated, not what changed; leave the base out and make a full backup")
		}

		if e.Zero == nil || e.Data == nil {
			return extent, false, errors.New(`it lacks "zero" or "data"; use "qemu-img map --output=json"`)
		}

		extent.Zero = *e.Zero
		return extent, true, nil
	}
	return extent, false, fmt.Errorf("%q is no tool whose output is accepted", x.Tool)
}

// nbdExtent reads the flags of a metadata context: of a dirty bitmap bit 0 is "dirty", of
// base:allocation bit 0 is "hole" and bit 1 "zero" (NBD protocol, metadata contexts).
// nbdinfo names them in the description.
func (x *ToolExtents) nbdExtent(extent Extent, e toolElement) (Extent, bool, error) {
	if e.Type == nil {
		return extent, false, errors.New(`it lacks "type"; use "nbdinfo --map=CONTEXT --json"`)
	}

	bitmap := e.Description == "dirty" || e.Description == "clean"
	allocation := e.Description == "data" || strings.Contains(e.Description, "hole") || strings.Contains(e.Description, "zero")

	switch {
	case bitmap && x.Base == "":
		return extent, false, errors.New("a dirty bitmap lists what changed since a base, which has to be named")
	case bitmap:
		return extent, *e.Type&1 != 0, nil
	case allocation && x.Base != "":
		return extent, false, errors.New("base:allocation lists what is allocated, not what changed; leave the base out and make a full backup")
	case allocation:
		extent.Zero = *e.Type&2 != 0
		return extent, true, nil
	}
	return extent, false, fmt.Errorf("the context of %s is neither a dirty bitmap nor base:allocation", quote(e.Description))
}

// elementLimit ends a list that continues for maxLine bytes without the end of an element.
type elementLimit struct {
	r       io.Reader
	without int
}

func (l *elementLimit) Read(p []byte) (int, error) {
	n, err := l.r.Read(p[:min(len(p), 4<<10)])
	if i := bytes.LastIndexByte(p[:n], '}'); i >= 0 {
		l.without = n - i
	} else if l.without += n; l.without > maxLine {
		return 0, fmt.Errorf("an element is longer than %d bytes", maxLine)
	}
	return n, err
}

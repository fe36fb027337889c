package cbt

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// ThinDelta reads what thin_delta printed (thin-provisioning-tools): the blocks by which two
// snapshots of LVM's thin pools differ, as XML with or without --verbose, the end of which says
// that it is complete. It names the states by numbers of the pool only, so the caller does. The
// size of a block is in it, in sectors of 512 bytes (thin_delta(8)).
type ThinDelta struct {
	// Base is the change ID of the state on the left (--snap1), Target that of the state on
	// the right (--snap2), which is the one that is backed up.
	Base, Target string
	// List is read once, to its end.
	List io.Reader

	consumed bool
}

var _ Source = (*ThinDelta)(nil)

// thinSector is the unit of data_block_size, in bytes.
const thinSector = 512

// Changes reads the list. What is mapped on one side only, or differs, is listed to be read: what
// the right does not map is zeroes, or bytes of an external origin. The error is an *Error.
func (x *ThinDelta) Changes(ctx context.Context, req Request, emit func(Extent) error) (Report, error) {
	refuse := func(kind error, format string, args ...any) (Report, error) {
		return Report{}, &Error{Source: extentsName, Kind: kind, Detail: fmt.Sprintf(format, args...)}
	}

	if x.consumed {
		return refuse(ErrConsumed, "give the list anew")
	}

	x.consumed = true

	switch {
	case x.Target == "" || x.Base == "":
		return refuse(ErrFormat, "the output of thin_delta does not say which states it compares; name both")
	case x.Base == x.Target:
		return refuse(ErrFormat, "base and target are the same, %s: a change ID names one state of the volume", quote(x.Base))
	}

	head := header{Base: x.Base, Target: x.Target, Size: req.Size}
	if err := head.check(req, 0); err != nil {
		return Report{}, err
	}

	list := thinList{ctx: ctx, size: req.Size, checker: NewChecker(extentsName, req.Size), emit: emit}
	if err := list.read(x.List); err != nil {
		return Report{}, err
	}

	if err := list.checker.Close(); err != nil {
		return Report{}, err
	}

	return Report{
		Source: extentsName, BaseChangeID: x.Base, TargetChangeID: x.Target, VolumeHandle: req.Base.VolumeHandle,
		Size: req.Size, Exact: true, Reported: list.checker.Reported(),
	}, nil
}

// thinList is a list that is being read.
type thinList struct {
	ctx     context.Context
	size    int64 // of the disk
	checker *Checker
	emit    func(Extent) error

	block  int64  // bytes
	kind   string // of the ranges that come, with --verbose
	inDiff bool
	done   bool // </diff> was seen
}

func (l *thinList) read(r io.Reader) error {
	dec := xml.NewDecoder(&thinLimit{r: r})

	for n := int64(0); ; n++ {
		if n%cancelEvery == 0 {
			if err := l.ctx.Err(); err != nil {
				return err
			}
		}

		token, err := dec.Token()

		var syntax *xml.SyntaxError

		switch {
		case errors.Is(err, io.EOF) && l.done:
			return nil
		case errors.Is(err, io.EOF), errors.As(err, &syntax) && syntax.Msg == "unexpected EOF":
			return l.broken(ErrTruncated, n, errors.New("it ends before </superblock>; make the list again"))
		case err != nil:
			return l.broken(ErrFormat, n, err)
		}

		switch token := token.(type) {
		case xml.StartElement:
			if err := l.start(token, n); err != nil {
				return err
			}
		case xml.EndElement:
			if token.Name.Local == "diff" {
				l.done = true
			}
		}
	}
}

func (l *thinList) broken(kind error, n int64, err error) error {
	return &Error{Source: extentsName, Kind: kind, Detail: fmt.Sprintf("output of thin_delta, after %d extents", l.checker.Count()), Cause: err}
}

func (l *thinList) start(e xml.StartElement, n int64) error {
	switch name := e.Name.Local; name {
	case "superblock":
		sectors, err := thinNumber(e, "data_block_size")
		// A pool's blocks have 64 KiB to 1 GiB (lvmthin(7)).
		if err != nil || sectors == 0 || sectors > 1<<21 || l.block != 0 {
			return l.broken(ErrFormat, n, errors.New("it names no size of a block, or several"))
		}

		l.block = sectors * thinSector
		return nil
	case "diff":
		if l.block == 0 || l.inDiff {
			return l.broken(ErrFormat, n, errors.New("it is not one difference of a pool"))
		}

		l.inDiff = true
		return nil
	case "same", "different", "left_only", "right_only":
		l.kind = name
		if len(e.Attr) == 0 {
			return nil // ranges follow
		}
		return l.extent(e, n)
	case "range":
		return l.extent(e, n)
	default:
		return l.broken(ErrFormat, n, fmt.Errorf("element %s is not known", quote(name)))
	}
}

func (l *thinList) extent(e xml.StartElement, n int64) error {
	begin, err := thinNumber(e, "begin")
	length, lengthErr := thinNumber(e, "length")

	switch {
	case err != nil || lengthErr != nil || !l.inDiff || l.done || l.kind == "":
		return l.broken(ErrFormat, n, fmt.Errorf("a range lacks its beginning or length, or is in the wrong place"))
	case begin > 1<<53/l.block || length > 1<<53/l.block:
		return &Error{Source: extentsName, Kind: ErrOutOfRange, Detail: fmt.Sprintf("range of %d blocks at %d", length, begin)}
	case l.kind == "same":
		return nil
	}

	x := Extent{Offset: begin * l.block, Length: length * l.block}
	switch unmapped := l.kind == "left_only"; {
	case unmapped && x.Offset >= l.size:
		return nil // the disk was larger
	case x.Offset < l.size && x.End() > l.size && (unmapped || x.End()-l.size < l.block):
		x.Length = l.size - x.Offset // the disk ends within a block
	}

	if err := l.checker.Add(x, 0); err != nil {
		return err
	}
	return l.emit(x)
}

// thinNumber is an attribute that counts blocks or sectors.
func thinNumber(e xml.StartElement, name string) (int64, error) {
	for _, a := range e.Attr {
		if a.Name.Local == name {
			n, err := strconv.ParseUint(a.Value, 10, 62)
			return int64(n), err
		}
	}
	return 0, fmt.Errorf("no %s", name)
}

// thinLimit ends a list that continues for maxLine bytes without the end of an element.
type thinLimit struct {
	r       io.Reader
	without int
}

func (l *thinLimit) Read(p []byte) (int, error) {
	n, err := l.r.Read(p[:min(len(p), 4<<10)])
	l.without += n

	for i := n - 1; i >= 0; i-- {
		if p[i] == '>' {
			l.without = n - i
			break
		}
	}

	if l.without > maxLine {
		return 0, fmt.Errorf("an element is longer than %d bytes", maxLine)
	}
	return n, err
}

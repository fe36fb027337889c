package cbt

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// ExtentsHeader describes a list; see docs/cbt-extents.md.
type ExtentsHeader struct {
	// Base is the change ID that the list is relative to; empty for a list of all
	// allocated ranges. Target is the change ID of the listed state, required.
	Base, Target string
	// Size of the target in bytes.
	Size int64
	// Volume is the storage's name of the volume; may be empty.
	Volume string
}

// ExtentsWriter writes a list that Extents reads. Not for concurrent use.
type ExtentsWriter struct {
	w     *bufio.Writer
	line  []byte
	count int64
	ended bool
}

// NewExtentsWriter writes the header.
func NewExtentsWriter(w io.Writer, h ExtentsHeader) (*ExtentsWriter, error) {
	if h.Target == "" || h.Size < 0 {
		return nil, fmt.Errorf("write extents: a list needs the target's change ID and a size, got %q and %d", h.Target, h.Size)
	}

	fields := struct {
		Format string  `json:"format"`
		Base   *string `json:"base"`
		Target string  `json:"target"`
		Size   int64   `json:"size"`
		Volume string  `json:"volume,omitempty"`
	}{Format: ExtentsFormat, Target: h.Target, Size: h.Size, Volume: h.Volume}
	if h.Base != "" {
		fields.Base = &h.Base
	}

	line, err := json.Marshal(fields)
	if err != nil {
		return nil, fmt.Errorf("write extents: header: %w", err)
	}

	x := &ExtentsWriter{w: bufio.NewWriter(w)}
	if err := x.writeLine(line); err != nil {
		return nil, err
	}
	return x, nil
}

// Add writes one extent. It is not checked against the others.
func (x *ExtentsWriter) Add(e Extent) error {
	line := append(x.line[:0], `{"offset":`...)
	line = strconv.AppendInt(line, e.Offset, 10)
	line = append(line, `,"length":`...)
	line = strconv.AppendInt(line, e.Length, 10)

	if e.Zero {
		line = append(line, `,"zero":true`...)
	}

	x.line = append(line, '}')
	x.count++
	return x.writeLine(x.line)
}

// Close writes the last line, which proves the list complete. Without it, readers
// refuse the list.
func (x *ExtentsWriter) Close() error {
	if x.ended {
		return errors.New("write extents: closed already")
	}

	x.ended = true

	if err := x.writeLine(fmt.Appendf(nil, `{"end":true,"count":%d}`, x.count)); err != nil {
		return err
	}

	if err := x.w.Flush(); err != nil {
		return fmt.Errorf("write extents: %w", err)
	}
	return nil
}

func (x *ExtentsWriter) writeLine(line []byte) error {
	if _, err := x.w.Write(line); err != nil {
		return fmt.Errorf("write extents: %w", err)
	}

	if err := x.w.WriteByte('\n'); err != nil {
		return fmt.Errorf("write extents: %w", err)
	}
	return nil
}

package hold

import (
	"bytes"
	"io"
)

// lines splits a stream into lines. A line longer than maxLine is truncated.
type lines struct {
	take func(line []byte)
	part []byte
}

// NewLines returns a writer that calls take with each line written, without its end. A line of more
// than 16 KiB is truncated; take must not retain its argument.
func NewLines(take func(line []byte)) io.Writer { return &lines{take: take} }

func (l *lines) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		i := bytes.IndexByte(p, '\n')
		piece := p
		if i >= 0 {
			piece = p[:i]
		}
		l.part = append(l.part, piece[:min(len(piece), maxLine-len(l.part))]...)
		if i < 0 {
			break
		}
		l.take(bytes.TrimSuffix(l.part, []byte("\r")))
		l.part = l.part[:0]
		p = p[i+1:]
	}
	return n, nil
}

package readfull

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

type idle struct{}

func (idle) Read([]byte) (int, error) { return 0, nil }

func TestRead(t *testing.T) {
	wrapped := fmt.Errorf("the connection: %w", io.EOF)
	for name, tc := range map[string]struct {
		r    io.Reader
		n    int
		want error
	}{
		"full":          {strings.NewReader("12345"), 4, nil},
		"just full":     {iotest.DataErrReader(strings.NewReader("1234")), 4, nil},
		"in pieces":     {iotest.OneByteReader(strings.NewReader("12345")), 4, nil},
		"short":         {strings.NewReader("123"), 3, io.EOF},
		"short at once": {iotest.DataErrReader(strings.NewReader("123")), 3, io.EOF},
		"nothing":       {strings.NewReader(""), 0, io.EOF},
		"cut off":       {io.MultiReader(strings.NewReader("123"), iotest.ErrReader(io.ErrUnexpectedEOF)), 3, io.ErrUnexpectedEOF},
		"wrapped":       {io.MultiReader(strings.NewReader("123"), iotest.ErrReader(wrapped)), 3, wrapped},
		"idle":          {idle{}, 0, io.ErrNoProgress},
	} {
		p := make([]byte, 4)
		n, err := Read(tc.r, p)
		if n != tc.n || err != tc.want || !bytes.HasPrefix([]byte("12345"), p[:n]) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
}

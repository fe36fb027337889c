// Package readfull reads a stream in pieces, and knows its proper end from a broken one.
package readfull

import "io"

// Read reads until p is full. Its error is io.EOF, with what came before, only if r itself
// ended with io.EOF: a stream that is cut off reports io.ErrUnexpectedEOF, which io.ReadFull
// would return for a proper end too, or an error that wraps io.EOF.
func Read(r io.Reader, p []byte) (n int, err error) {
	for idle := 0; n < len(p) && err == nil; {
		var k int
		if k, err = r.Read(p[n:]); k > 0 {
			n, idle = n+k, 0
		} else if idle++; err == nil && idle > maxIdle {
			err = io.ErrNoProgress
		}
	}
	if n == len(p) && err == io.EOF {
		return n, nil // the next call says so
	}
	return n, err
}

// maxIdle is how often a reader may give nothing and no error, as in package bufio.
const maxIdle = 100

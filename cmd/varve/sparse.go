package main

import (
	"os"

	"github.com/varve-io/varve/internal/zero"
)

// sparseUnit is the unit of holes in bytes: file systems allocate no smaller blocks by
// default.
const sparseUnit = 4096

// sparseWriter writes a new file from its beginning and leaves holes for zeroes. Finish sets
// the file's size. It is not for files with data.
type sparseWriter struct {
	file *os.File
	off  int64
}

// Write appends p to what was written before.
func (w *sparseWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		end := n
		for end < len(p) && !w.isHole(p, end) {
			end = w.next(p, end)
		}
		if end > n {
			m, err := w.file.WriteAt(p[n:end], w.off+int64(n))
			if n += m; err != nil {
				w.off += int64(n)
				return n, err
			}
		}
		for n < len(p) && w.isHole(p, n) {
			n = w.next(p, n)
		}
	}
	w.off += int64(n)
	return n, nil
}

// next returns the end, in p, of the unit that p[i] lies in.
func (w *sparseWriter) next(p []byte, i int) int {
	return min(i+sparseUnit-int((w.off+int64(i))%sparseUnit), len(p))
}

func (w *sparseWriter) isHole(p []byte, i int) bool {
	return zero.Only(p[i:w.next(p, i)])
}

// Finish extends the file over a hole at its end.
func (w *sparseWriter) Finish() error { return w.file.Truncate(w.off) }

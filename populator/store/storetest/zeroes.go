package storetest

// Zeroes is a disk of zeroes, of so many bytes.
type Zeroes int64

// ReadAt implements io.ReaderAt.
func (Zeroes) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

// Size implements backup.Disk.
func (d Zeroes) Size() int64 { return int64(d) }

// CheckSize implements backup.Disk.
func (Zeroes) CheckSize() error { return nil }

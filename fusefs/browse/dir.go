package browse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path"
	"time"

	"github.com/varve-io/varve/fusefs/diskfs"
	"github.com/varve-io/varve/internal/extsort"
)

// sortBytes bounds the memory for sorting one directory, in bytes; more goes to a file. Some
// 50,000 entries fit.
const sortBytes = 8 << 20

// Dir is a directory, sorted by name. It takes bounded memory for any number of entries.
type Dir struct {
	e      *Entry
	sorted *extsort.Sorter // name, NUL, inode -> metadata, or nothing where it cannot be read
	damage error
	count  int
}

// Child is an entry of a directory, or the error of one whose metadata cannot be read.
type Child struct {
	*Entry        // nil if Err is set
	Path   string // set in any case
	Err    error
}

// Name returns the entry's name.
func (c Child) Name() string { return path.Base(c.Path) }

// ReadDir reads a directory. Names are sorted twice: by inode to read the metadata in disk
// order, then by name. An error is one of the context or of the place for temporary files;
// what cannot be read of the directory is its Damage. Close releases its resources.
func ReadDir(ctx context.Context, e *Entry) (d *Dir, err error) {
	d = &Dir{e: e, sorted: extsort.New(sortBytes)}
	byInode := extsort.New(sortBytes)
	defer func() {
		err = errors.Join(err, byInode.Close())
		if err != nil {
			err = errors.Join(err, d.Close())
			d = nil
		}
	}()
	if err := d.names(ctx, byInode); err != nil {
		return d, err
	}
	var key, value []byte
	for r, err := range byInode.Sorted() {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return d, fmt.Errorf("list /%s: %w", e.Path, err)
		}
		key = append(append(append(key[:0], r.Value...), 0), r.Key...)
		value = value[:0]
		// A failed one is read again later, for its error.
		node, err := e.in.Inode(binary.BigEndian.Uint64(r.Key))
		if err == nil {
			value = appendStat(value, node.Stat())
		} else if !diskfs.Local(err) { // every other would fail, too
			d.damage = errors.Join(d.damage, e.err("readdir", err))
			return d, nil
		}
		if err := d.sorted.Add(key, value); err != nil {
			return d, fmt.Errorf("list /%s: %w", e.Path, err)
		}
		d.count++
	}
	return d, nil
}

// names reads the names of the directory.
func (d *Dir) names(ctx context.Context, byInode *extsort.Sorter) error {
	node, err := d.e.Node()
	if err != nil {
		d.damage = err
		return nil
	}
	var faults diskfs.Faults
	for ent, err := range node.Entries() {
		if err != nil {
			if !faults.Add(err) {
				break
			}
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := byInode.Add(binary.BigEndian.AppendUint64(nil, ent.Ino), []byte(ent.Name)); err != nil {
			return fmt.Errorf("list /%s: %w", d.e.Path, err)
		}
	}
	d.damage = d.e.err("readdir", faults.Err())
	return nil
}

// KeepDirectories drops all other entries, and names that are there twice.
func (d *Dir) KeepDirectories() error {
	dirs := extsort.New(sortBytes)
	d.count = 0
	var last lastName
	for r, err := range d.sorted.Sorted() {
		if err == nil {
			if last.again(r.Key) {
				continue
			}
			if st, ok := parseStat(r.Value); !ok || !st.FileMode().IsDir() {
				continue
			}
			d.count++
			err = dirs.Add(r.Key, r.Value)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("list /%s: %w", d.e.Path, err), dirs.Close())
		}
	}
	old := d.sorted
	d.sorted = dirs
	return old.Close()
}

// Damage returns what cannot be read of the directory; nil if it is intact.
func (d *Dir) Damage() error { return d.damage }

// Len returns the number of readable entries.
func (d *Dir) Len() int { return d.count }

// Close releases the directory's resources.
func (d *Dir) Close() error { return d.sorted.Close() }

// All returns the entries by name; it may be called repeatedly. An error is one of the
// temporary file, and ends it.
//
// A name that is there more than once is damage: only the first is returned, and a copy of
// the others would meet what was made of it.
func (d *Dir) All() iter.Seq2[Child, error] {
	return func(yield func(Child, error) bool) {
		var last lastName
		for r, err := range d.sorted.Sorted() {
			if err != nil {
				yield(Child{}, fmt.Errorf("list /%s: %w", d.e.Path, err))
				return
			}
			name, ino := string(r.Key[:len(r.Key)-9]), binary.BigEndian.Uint64(r.Key[len(r.Key)-8:])
			c := Child{Path: Join(d.e.Path, name)}
			if last.again(r.Key) {
				c.Err = &fs.PathError{Op: "lstat", Path: c.Path, Err: d.e.twice(name)}
				if !yield(c, nil) {
					return
				}
				continue
			}
			st, ok := parseStat(r.Value)
			if !ok {
				node, err := d.e.in.Inode(ino)
				if err == nil {
					st = node.Stat()
				}
				if err != nil {
					c.Err = &fs.PathError{Op: "lstat", Path: c.Path, Err: diskfs.Dangling(d.e.in, d.e.Stat.Ino, ino, err)}
				}
			}
			if c.Err == nil {
				c.Entry = &Entry{Path: c.Path, Info: st.FileInfo(name), Stat: st, in: d.e.in}
			}
			if !yield(c, nil) {
				return
			}
		}
	}
}

// lastName is the name of the record before, in an order by names.
type lastName struct {
	name []byte
	set  bool
}

// again reports whether a record has the name of the one before.
func (l *lastName) again(key []byte) bool {
	name := key[:len(key)-9]
	same := l.set && bytes.Equal(name, l.name)
	l.name, l.set = append(l.name[:0], name...), true
	return same
}

// twice is the damage of a directory that has a name more than once.
func (e *Entry) twice(name string) error {
	return &diskfs.CorruptError{
		Type: e.in.Info().Type, Where: fmt.Sprintf("directory %d", e.Stat.Ino), What: fmt.Sprintf("the name %q is there more than once", name),
	}
}

var le = binary.LittleEndian

// appendStat encodes metadata in a fixed form.
func appendStat(b []byte, st *diskfs.Stat) []byte {
	b = le.AppendUint64(b, st.Ino)
	for _, v := range []uint32{st.Mode, st.Nlink, st.UID, st.GID, st.Major, st.Minor, uint32(st.BlockSize), st.Generation, st.Flags} {
		b = le.AppendUint32(b, v)
	}
	for _, v := range []int64{st.Size, st.Blocks} {
		b = le.AppendUint64(b, uint64(v))
	}
	for _, t := range []time.Time{st.Atime, st.Mtime, st.Ctime, st.Btime} {
		b = le.AppendUint64(b, uint64(t.Unix()))
		b = le.AppendUint32(b, uint32(t.Nanosecond()))
	}
	return b
}

// parseStat decodes what appendStat wrote; false if b is empty.
func parseStat(b []byte) (*diskfs.Stat, bool) {
	if len(b) == 0 {
		return nil, false
	}
	u32 := func() uint32 {
		v := le.Uint32(b)
		b = b[4:]
		return v
	}
	u64 := func() uint64 {
		v := le.Uint64(b)
		b = b[8:]
		return v
	}
	st := &diskfs.Stat{Ino: u64()}
	st.Mode, st.Nlink, st.UID, st.GID, st.Major, st.Minor = u32(), u32(), u32(), u32(), u32(), u32()
	st.BlockSize, st.Generation, st.Flags = int32(u32()), u32(), u32()
	st.Size, st.Blocks = int64(u64()), int64(u64())
	for _, t := range []*time.Time{&st.Atime, &st.Mtime, &st.Ctime, &st.Btime} {
		sec := int64(u64())
		if *t = time.Unix(sec, int64(u32())).UTC(); sec == zeroTime {
			*t = time.Time{}
		}
	}
	return st, true
}

// zeroTime are the seconds of the time that is not known.
var zeroTime = time.Time{}.Unix()

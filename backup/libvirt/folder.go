package libvirt

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/digitalocean/go-libvirt"
)

// folderPrefix begins the names of the storage pools that are made for a Folder.
const folderPrefix = "varve-folder-"

// Folder is a directory of libvirt's machine as its storage driver shows it, for connections without a shell there. It
// is a storage pool: the one that libvirt has of the directory, or a transient one, which Close removes. It is not
// safe for concurrent use.
type Folder struct {
	c    *Conn
	path string
	pool libvirt.StoragePool
	ours bool
}

// OpenFolder finds or makes the pool of a directory.
func (c *Conn) OpenFolder(path string) (*Folder, error) {
	f := &Folder{c: c, path: filepath.Clean(path)}
	return f, f.open()
}

func (f *Folder) open() error {
	pool, err := call(f.c, "StoragePoolLookupByTargetPath", func(l *libvirt.Libvirt) (libvirt.StoragePool, error) {
		return l.StoragePoolLookupByTargetPath(f.path)
	})
	if Is(err, libvirt.ErrNoStoragePool) {
		var text bytes.Buffer
		var id [8]byte
		_, _ = rand.Read(id[:]) // never fails
		fmt.Fprintf(&text, "<pool type='dir'><name>%s%s</name><target><path>", folderPrefix, hex.EncodeToString(id[:]))
		if err := xml.EscapeText(&text, []byte(f.path)); err != nil {
			return err
		}
		text.WriteString("</path></target></pool>")
		pool, err = call(f.c, "StoragePoolCreateXML", func(l *libvirt.Libvirt) (libvirt.StoragePool, error) {
			return l.StoragePoolCreateXML(text.String(), 0)
		})
	}
	f.pool, f.ours = pool, strings.HasPrefix(pool.Name, folderPrefix) // perhaps of a process that was killed
	return err
}

// shared runs do, and once more with another pool if that was removed: another process may have made it, and removes it
// at its end.
func (f *Folder) shared(do func() error) error {
	err := do()
	if Is(err, libvirt.ErrNoStoragePool) || Is(err, libvirt.ErrOperationInvalid) {
		if f.open() == nil {
			err = do()
		}
	}
	return err
}

// refresh has libvirt look into the directory again.
func (f *Folder) refresh() error {
	return run(f.c, "StoragePoolRefresh", func(l *libvirt.Libvirt) error { return l.StoragePoolRefresh(f.pool, 0) })
}

// Free is the room in the directory, in bytes.
func (f *Folder) Free() (free int64, err error) {
	err = f.shared(func() error {
		if err := f.refresh(); err != nil {
			return err
		}
		n, err := call(f.c, "StoragePoolGetInfo", func(l *libvirt.Libvirt) (uint64, error) {
			_, _, _, n, err := l.StoragePoolGetInfo(f.pool)
			return n, err
		})
		free = int64(min(n, 1<<62))
		return err
	})
	return free, err
}

// ReadFile reads a file of the directory, of at most so many bytes.
func (f *Folder) ReadFile(name string, most int64) (content []byte, err error) {
	err = f.shared(func() error {
		content, err = f.readFile(name, most)
		return err
	})
	return content, err
}

func (f *Folder) readFile(name string, most int64) ([]byte, error) {
	lookup := func() (libvirt.StorageVol, error) {
		return call(f.c, "StorageVolLookupByName", func(l *libvirt.Libvirt) (libvirt.StorageVol, error) {
			return l.StorageVolLookupByName(f.pool, name)
		})
	}
	file, err := lookup()
	if Is(err, libvirt.ErrNoStorageVol) { // made after libvirt had looked
		if err := f.refresh(); err != nil {
			return nil, err
		}
		file, err = lookup()
	}
	if err != nil {
		return nil, err
	}
	type info struct {
		kind int8
		size uint64
	}
	of, err := call(f.c, "StorageVolGetInfoFlags", func(l *libvirt.Libvirt) (i info, err error) {
		i.kind, _, i.size, err = l.StorageVolGetInfoFlags(file, uint32(libvirt.StorageVolGetPhysical))
		return i, err
	})
	switch {
	case err != nil:
		return nil, err
	case libvirt.StorageVolType(of.kind) != libvirt.StorageVolFile:
		return nil, fmt.Errorf("%s is not a regular file", filepath.Join(f.path, name))
	case of.size > uint64(most):
		return nil, fmt.Errorf("%s is larger than %d bytes", filepath.Join(f.path, name), most)
	}
	// The client blocks all its calls for ever if a writer fails, so this one takes all that comes.
	w := &download{most: most}
	if _, err := callBeating(f.c, "StorageVolDownload", f.c.timeout, func(l *libvirt.Libvirt, beat func()) (struct{}, error) {
		w.beat = beat
		return struct{}{}, l.StorageVolDownload(file, w, 0, 0, 0)
	}); err != nil {
		return nil, err
	}
	if w.came != int64(of.size) {
		return nil, fmt.Errorf("%s: %d of %d bytes came", filepath.Join(f.path, name), w.came, of.size)
	}
	return w.content, nil
}

// download keeps the first bytes that are written to it.
type download struct {
	content    []byte
	came, most int64
	beat       func()
}

func (d *download) Write(p []byte) (int, error) {
	d.beat()
	d.came += int64(len(p))
	d.content = append(d.content, p[:min(int64(len(p)), d.most-int64(len(d.content)))]...)
	return len(p), nil
}

// Close removes the pool, if it was made for a Folder.
func (f *Folder) Close() error {
	if !f.ours {
		return nil
	}
	err := run(f.c, "StoragePoolDestroy", func(l *libvirt.Libvirt) error { return l.StoragePoolDestroy(f.pool) })
	if Is(err, libvirt.ErrNoStoragePool) { // removed by another process that shared it
		return nil
	}
	return err
}

// ForgetFolders removes the pools that killed processes left, and returns their names.
func (c *Conn) ForgetFolders() (names []string, err error) {
	pools, err := call(c, "ConnectListAllStoragePools", func(l *libvirt.Libvirt) ([]libvirt.StoragePool, error) {
		all, _, err := l.ConnectListAllStoragePools(1, 0)
		return all, err
	})
	errs := []error{err}
	for _, p := range pools {
		if !strings.HasPrefix(p.Name, folderPrefix) {
			continue
		}
		if err := (&Folder{c: c, pool: p, ours: true}).Close(); err != nil {
			errs = append(errs, fmt.Errorf("storage pool %s: %w", p.Name, err))
			continue
		}
		names = append(names, p.Name)
	}
	return names, errors.Join(errs...)
}

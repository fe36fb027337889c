package files

import (
	"io/fs"
	"time"

	"github.com/varve-io/varve/fusefs/browse"
)

// Info is what lists show of a file.
type Info struct {
	Name    string    `json:"name"`
	Path    string    `json:"path,omitempty"` // within its volume
	Mode    string    `json:"mode"`
	Links   uint64    `json:"links"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Target  string    `json:"target,omitempty"` // of a symbolic link
	Error   string    `json:"error,omitempty"`  // why it cannot be read; with mode "??????????" nothing else is known
}

// Describe returns what lists show of a file. If the target of a link cannot be read, it
// returns the rest with the error.
func Describe(e *browse.Entry) (Info, error) {
	f := Info{
		Name: e.Info.Name(), Mode: ModeString(e.Stat.Mode), Links: uint64(e.Stat.Nlink), UID: e.Stat.UID, GID: e.Stat.GID,
		Size: e.Stat.Size, ModTime: e.Stat.Mtime.UTC(),
	}
	var err error
	if e.Info.Mode()&fs.ModeSymlink != 0 {
		f.Target, err = e.ReadLink()
	}
	return f, err
}

// ModeString formats st_mode as ls(1) does.
func ModeString(mode uint32) string {
	b := []byte{TypeLetter(mode)}
	if b[0] == 'f' {
		b[0] = '-'
	}
	for i, c := range "rwxrwxrwx" {
		if mode&(0o400>>i) == 0 {
			c = '-'
		}
		b = append(b, byte(c)) //nolint:gosec // an ASCII letter
	}
	for _, s := range []struct {
		bit    uint32
		at     int
		letter byte
	}{{0o4000, 3, 's'}, {0o2000, 6, 's'}, {0o1000, 9, 't'}} {
		if mode&s.bit == 0 {
			continue
		}
		if b[s.at] == '-' {
			s.letter -= 'a' - 'A' // not executable
		}
		b[s.at] = s.letter
	}
	return string(b)
}

// Rooted returns a path as users write it, with a leading slash.
func Rooted(name string) string {
	if name == "." {
		return "/"
	}
	return "/" + name
}

// WithoutPath returns an error without the path before it.
func WithoutPath(err error) error {
	if path, ok := err.(*fs.PathError); ok { //nolint:errorlint // one within another error is part of its text
		return path.Err
	}
	return err
}

// TypeLetter returns find(1)'s letter for the type bits of st_mode.
func TypeLetter(mode uint32) byte {
	const letters = "?pc?d?b?f?l?s???" // by the four type bits
	return letters[mode>>12&15]
}

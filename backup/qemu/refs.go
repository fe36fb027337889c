package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// ErrLeadsOut means that an image names a file that it must not lead to.
var ErrLeadsOut = errors.New("the image leads to another file")

// maxChain bounds the files beneath an image.
const maxChain = 256

// CheckReferences follows what the image file at path, of that format, is made of: its
// backing chain, data files and extents. Unless follow is set, each must be a file of the
// folder of the one that names it, and of a format that is named: json:{...}, protocols and
// other folders are ErrLeadsOut. A raw image leads nowhere.
func CheckReferences(path, format string, follow bool) error {
	for range maxChain {
		if format == Raw {
			return nil
		}
		h, err := readHeadOf(path)
		if err != nil {
			return err
		}
		if h.Format != format {
			return fmt.Errorf("%s: %w: it is %s, not %s", path, ErrImage, h.Format, format)
		}
		if follow {
			return nil // its user answers for the whole chain
		}
		for _, name := range h.Others {
			part, err := resolve(path, name)
			if err == nil && format == VMDK {
				err = checkExtent(path, part)
			}
			if err != nil {
				return err
			}
		}
		if h.Backing == "" {
			return nil
		}
		next, err := resolve(path, h.Backing)
		switch {
		case err != nil:
			return err
		case h.BackingFormat == "":
			return fmt.Errorf("%s: %w: it does not name the format of its backing file %s, which QEMU would guess; "+
				"set it with 'qemu-img rebase -u -F FORMAT -b %s %s', or pass --follow-chain if the whole chain is known to be safe",
				path, ErrLeadsOut, h.Backing, h.Backing, path)
		}
		path, format = next, h.BackingFormat
	}
	return fmt.Errorf("%s: %w: more than %d files lie beneath each other", path, ErrImage, maxChain)
}

// checkExtent refuses an extent of a vmdk that names further files, which QEMU would open.
func checkExtent(image, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 512)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: read %s: %w", image, path, err)
	}
	if !bytes.HasPrefix(head[:n], []byte("KDMV")) {
		return nil // a flat one, of which nothing is understood
	}
	h, err := readVMDK(f, head[:n])
	if err == nil && len(h.Others) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %w: its extent %s names other files; if this is known to be right, pass --follow-chain", image, ErrLeadsOut, path)
}

func readHeadOf(path string) (*Head, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	h, err := ReadHead(f, info.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return h, nil
}

// resolve gives the path of a file that an image names, if it is one of the image's folder.
// A symbolic link leads wherever its maker wanted, so it is refused too.
func resolve(image, name string) (string, error) {
	out := func(why string) error {
		return fmt.Errorf("%s: %w: %q %s; if this is known to be right, pass --follow-chain", image, ErrLeadsOut, name, why)
	}
	dir, base := filepath.Split(name)
	switch {
	case name == "" || base == "" || strings.ContainsRune(name, 0):
		return "", out("is no file name")
	case strings.Contains(name, ":"): // json:{...}, nbd://..., fat:rw:...
		return "", out("is not a plain file")
	case dir != "" && dir != "./":
		return "", out("is in another folder")
	}
	path := filepath.Join(filepath.Dir(image), base)
	info, err := os.Lstat(path)
	if err != nil {
		return "", fmt.Errorf("%s: a file that it is made of: %w", image, err)
	}
	if !info.Mode().IsRegular() {
		return "", out("is not a regular file")
	}
	return path, nil
}
